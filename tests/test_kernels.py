"""Every operation of the CPU provider against reference.py, over all cases, and what both must do by contract."""

from dataclasses import replace

import pytest
import torch

from vllm_dsa import cache
from vllm_dsa.kernels import cpu, reference
from vllm_dsa.testing import compare
from vllm_dsa.testing.cases import BY_NAME, CASES, Case, build, with_dtype
from vllm_dsa.testing.check import CHECKS, written

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = [with_dtype(case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)]
BOTH = pytest.mark.parametrize("kernels", [cpu, reference], ids=["cpu", "reference"])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
@pytest.mark.parametrize("op", CHECKS)
def test_op_agrees_with_the_reference(op, case):
    CHECKS[op](cpu, case)


def step(case: Case, kernels=cpu):
    """(inputs, selected, out, lse) of one provider's select and attend."""
    inputs, codes, weights = written(case)
    selected = torch.empty(case.tokens, case.top_k, dtype=torch.int32)
    kernels.select(codes, weights, inputs.index_cache, inputs.rows, selected)
    out = torch.empty(case.tokens, case.heads, case.rank, dtype=case.dtype)
    lse = kernels.attend(inputs.query, inputs.latent_cache, inputs.rows, selected, inputs.scale, out)
    return inputs, selected, out, lse


@BOTH
@pytest.mark.parametrize("latent_kind", ["auto", cache.FP8_DS_MLA])
def test_top_k_of_the_length_or_more_is_dense_attention(kernels, latent_kind):
    case = Case("dense", ((0, 60), (33, 31)), rank=512, rope_dim=64, top_k=64, latent_kind=latent_kind)
    inputs, selected, out, lse = step(case, kernels)
    block_size = case.block_size
    for row, length in enumerate(inputs.rows.lengths.tolist()):
        assert selected[row].tolist() == [*range(length), *[-1] * (64 - length)]
        table = inputs.rows.block_table[inputs.rows.requests[row]].tolist()
        stored = torch.stack([inputs.latent_cache[table[s // block_size], s % block_size] for s in range(length)])
        latents = (cache.unpack_latent(stored) if latent_kind == cache.FP8_DS_MLA else stored).double()
        logits = inputs.query[row].double() @ latents.T * inputs.scale
        compare.assert_close("attention", out[row], logits.softmax(-1) @ latents[:, : case.rank], 1e-6)
        compare.assert_close("log-sum-exp", lse[row], logits.logsumexp(-1), 1e-6)


@BOTH
def test_equal_scores_go_to_the_smaller_position(kernels):
    inputs, selected, _, _ = step(BY_NAME["ties all"], kernels)
    first = torch.arange(16, dtype=torch.int32)
    assert (selected == first).all()
    # With five kinds of key, every kind but the worst that is taken is taken whole, and that one from its start.
    _, selected, _, _ = step(BY_NAME["ties few"], kernels)
    inputs, codes, weights = written(BY_NAME["ties few"])
    scores = reference.scores(codes, weights, inputs.index_cache, inputs.rows, 0)
    worst = scores[selected[0].long()].min()
    same = torch.nonzero(scores == worst).squeeze(1)
    taken = selected[0][torch.isin(selected[0], same)]
    assert len(taken) < len(same)
    assert taken.tolist() == same[: len(taken)].tolist()


def test_minus_zero_ties_with_zero():
    scores = torch.tensor([[-0.0, 0.0, -1.0, 1.0, -0.0, 0.0, float("nan")]])
    ranks = cpu._rank(scores, 10, torch.tensor([16]))  # the NaN is past the row's length
    assert ranks.argsort(descending=True).tolist() == [[3, 0, 1, 4, 5, 2, 6]]


def test_rank_orders_as_the_scores_do():
    scores = torch.cat([torch.randn(2000) * 10.0 ** torch.randint(-40, 38, (2000,)), torch.tensor([3e38, -3e38, 0.0])])
    ranks = cpu._rank(scores.unsqueeze(0), 0, torch.tensor([len(scores)]))[0]
    assert torch.equal(ranks.argsort(descending=True), scores.sort(descending=True, stable=True).indices)
    assert len(ranks.unique()) == len(ranks)


@BOTH
def test_rows_without_keys_select_nothing_and_give_zero(kernels):
    case = BY_NAME["mixed"]
    _, selected, out, lse = step(case, kernels)
    last = slice(-case.padding_rows, None)
    assert (selected[last] == -1).all()
    assert (out[last] == 0).all()
    assert (lse[last] == float("-inf")).all()


def test_attend_reads_no_row_that_is_not_selected():
    case = BY_NAME["mixed"]
    inputs, selected, out, lse = step(case)
    keep = torch.zeros(inputs.latent_cache.shape[:2], dtype=torch.bool)
    for row in range(case.tokens):
        positions = selected[row][selected[row] >= 0].long()
        pages = inputs.rows.block_table[inputs.rows.requests[row].long(), positions // case.block_size].long()
        keep[pages, positions % case.block_size] = True
    assert not keep.all()
    inputs.latent_cache[~keep] = float("nan")
    again = torch.empty_like(out)
    lse_again = cpu.attend(inputs.query, inputs.latent_cache, inputs.rows, selected, inputs.scale, again)
    compare.assert_same_bits("attention", again, out)
    compare.assert_same_bits("log-sum-exp", lse_again, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_takes_strided_inputs_and_leaves_them_alone(dtype):
    case = with_dtype(BY_NAME["mixed"], dtype)
    plain, strided = build(case), build(case)
    names = ("latent", "rope_key", "index_key", "rope_query", "index_query", "head_weights")
    for name in names:
        value = getattr(strided, name)
        setattr(strided, name, torch.cat([value, value], dim=-1)[..., : value.shape[-1]])
    results = [(cpu.write_keys(*x.keys()), cpu.write_queries(*x.queries())) for x in (plain, strided)]
    compare.assert_same_bits("latent cache", strided.latent_cache, plain.latent_cache)
    compare.assert_same_bits("index cache", strided.index_cache, plain.index_cache)
    compare.assert_same_bits("query", strided.query, plain.query)
    for got, want in zip(results[1][1], results[0][1], strict=True):
        compare.assert_same_bits("index query", got, want)
    untouched = build(case)
    for name in names:
        compare.assert_same_bits(name, getattr(plain, name), getattr(untouched, name))


@BOTH
def test_a_layer_without_indexer_writes_latents_only(kernels):
    case = BY_NAME["chunk"]
    inputs, want = build(case), build(case)
    reference.write_keys(*want.keys())
    norms = replace(inputs.norms, index_weight=None, index_bias=None)
    keys = (inputs.latent, inputs.rope_key, None, norms, inputs.rope, inputs.positions, inputs.slots)
    kernels.write_keys(*keys, inputs.latent_cache, None)
    compare.assert_close("latents", inputs.latent_cache, want.latent_cache, compare.TOLERANCE[case.dtype])
    assert kernels.write_queries(inputs.rope_query, None, None, inputs.rope, inputs.positions, inputs.query) is None


def test_decode_is_exact_for_every_code():
    codes = torch.arange(256, dtype=torch.uint8)
    want = codes.view(cache.E4M3).float()
    finite = ~want.isnan()
    assert torch.equal(cpu._decode(codes).float()[finite] * 256, want[finite])
    assert cpu._decode(codes).isfinite().all()
