"""Rows that see at most index_topk keys, attended to densely; VLLM_DSA_DENSE=1, which does so with all rows; and the
warm-up that compiles kernels before requests."""

from dataclasses import replace

import pytest
import torch
from engine import engine
from oracle import Oracle
from test_metadata import int32
from tiny_checkpoint import write_random
from torch.nn.functional import scaled_dot_product_attention

from vllm_dsa import attention
from vllm_dsa.backend import kernel_request
from vllm_dsa.kernels import dispatch
from vllm_dsa.metadata import Rows, between, build_rows, dense_parts, without

TOP_K = 32
SIZES = dict(num_hidden_layers=2, num_attention_heads=2, index_n_heads=8, index_topk=TOP_K)
PROMPTS = [torch.randint(8, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (20, 40, 150)]


def rows_of(starts: list[int], ends: list[int], decodes: int = 0) -> Rows:
    table = torch.arange(60, dtype=torch.int32).reshape(len(ends), -1)
    rows = build_rows(int32(*starts), int32(*ends), table, 16, starts[-1])
    return replace(rows, decodes=decodes)


@pytest.mark.parametrize(
    ("starts", "ends", "decodes", "parts"),
    [
        ([0, 40], [40], 0, [(0, slice(0, 32))]),  # a prompt that passes top_k
        ([0, 20], [20], 0, [(0, slice(0, 20))]),  # one that does not
        ([0, 20], [40], 0, [(0, slice(0, 12))]),  # its second chunk
        ([0, 20], [80], 0, []),  # past top_k altogether
        ([0, 7], [7], 0, []),  # too few rows to be worth it
        ([0, 1, 2, 42], [9, 50, 40], 2, [(2, slice(2, 34))]),  # decodes are left alone
        ([0, 10, 50], [10, 40], 0, [(0, slice(0, 10)), (1, slice(10, 42))]),
    ],
)
def test_dense_parts(starts, ends, decodes, parts):
    rows = rows_of(starts, ends, decodes)
    found = dense_parts(rows, TOP_K, 8)
    assert list(found) == parts
    seen = [row for part in between([part for _, part in found], starts[-1]) for row in range(starts[-1])[part]]
    dense = [row for _, part in found for row in range(starts[-1])[part]]
    assert sorted(seen + dense) == list(range(starts[-1]))
    assert all(rows.lengths[row] <= TOP_K for row in dense)
    lengths = without(rows, found).lengths
    assert (lengths[dense] == 0).all() and torch.equal(lengths[seen], rows.lengths[seen])


def attend_dense(query, latent_cache, rows, request, w_uk, w_uv, scale, out):
    """The contract in plain torch."""
    count = len(query)
    length = rows.ends[request] - (rows.starts[request + 1] - rows.starts[request]) + count
    blocks = rows.block_table[request, : -(-length // rows.block_size)].long()
    latents = latent_cache[blocks].flatten(0, 1)[:length].float()
    rank = w_uk.shape[2]
    key = torch.einsum("lr,nor->nlo", latents[:, :rank], w_uk)
    key = torch.cat([key, latents[:, rank:].expand(len(key), -1, -1)], dim=-1)
    value = torch.einsum("lr,nro->nlo", latents[:, :rank], w_uv)
    seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
    attended = scaled_dot_product_attention(query.transpose(0, 1), key, value, attn_mask=seen, scale=scale)
    out.copy_(attended.transpose(0, 1))


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    path = tmp_path_factory.mktemp("random")
    write_random(path, **SIZES)
    with engine(path, enable_prefix_caching=False) as running:
        yield running


def logprobs(running) -> torch.Tensor:
    return torch.cat(running.prompt_logprobs(PROMPTS))


def with_dense(running, monkeypatch, function) -> torch.Tensor:
    for layer in running.layers:
        monkeypatch.setattr(layer, "kernels", replace(layer.kernels, attend_dense=function, dense_rows=4))
    return logprobs(running)


def test_dense_rows_equal_sparse_rows(running, monkeypatch):
    calls = []

    def counted(query, *args):
        calls.append(len(query))
        attend_dense(query, *args)

    sparse = logprobs(running)
    dense = with_dense(running, monkeypatch, counted)
    assert calls and max(calls) == TOP_K
    assert (dense - sparse).abs().max() < 1e-4


@pytest.mark.parametrize("fault", ["rotation", "causal"])
def test_a_dense_fault_is_seen(running, monkeypatch, fault):
    def faulty(query, latent_cache, rows, request, w_uk, w_uv, scale, out):
        if fault == "rotation":
            query = query.clone()
            query[..., w_uk.shape[1] :] = query[..., w_uk.shape[1] :].flip(0)
        attend_dense(query, latent_cache, rows, request, w_uk, w_uv, scale, out)
        if fault == "causal":
            out[0] = out[-1]

    assert (with_dense(running, monkeypatch, faulty) - logprobs_without(running, monkeypatch)).abs().max() > 1e-2


def logprobs_without(running, monkeypatch) -> torch.Tensor:
    monkeypatch.undo()
    return logprobs(running)


def test_the_dense_mode_equals_a_selection_of_everything(running, monkeypatch, tmp_path):
    """And neither reads nor writes the index-key caches."""
    write_random(tmp_path, **SIZES | dict(index_topk=4096))
    oracle = Oracle(tmp_path)
    want = torch.cat([oracle.prompt_logprobs(prompt) for prompt in PROMPTS])
    assert (logprobs(running) - want).abs().max() > 1e-2
    monkeypatch.setenv("VLLM_DSA_DENSE", "1")
    for layer in running.layers:
        monkeypatch.setattr(layer, "kernels", dispatch.choose(kernel_request(layer.vllm_config, layer.config)))
        layer.indexer.cache.kv_cache.fill_(0xFF)
    assert (logprobs(running) - want).abs().max() < 1e-4
    assert all((layer.indexer.cache.kv_cache == 0xFF).all() for layer in running.layers)


def test_warm_up_runs_every_kernel_and_changes_nothing(running, monkeypatch):
    before = logprobs(running)
    layer, called = running.layers[0], set()

    def recorded(name):
        function = getattr(layer.kernels, name)

        def call(*args):
            called.add(name)
            return function(*args)

        return call

    names = ("write_keys", "write_queries", "select", "attend")
    monkeypatch.setattr(layer, "kernels", replace(layer.kernels, **{name: recorded(name) for name in names}))
    monkeypatch.setattr(attention, "WARM_ROWS", 16)
    bound, config, tokens = layer.kv_cache, layer.config, 24
    layer.warm_up(
        torch.arange(tokens),
        torch.randn(tokens, config.kv_lora_rank),
        torch.randn(tokens, config.qk_rope_head_dim),
        torch.randn(tokens, config.index_head_dim),
        torch.randn(tokens, layer.heads, config.qk_head_dim),
        torch.randn(tokens, config.index_n_heads, config.index_head_dim),
        torch.randn(tokens, config.index_n_heads),
        torch.empty(tokens, layer.heads, config.v_head_dim),
    )
    assert called == set(names) and layer.warm
    assert layer.kv_cache is bound
    monkeypatch.undo()
    assert torch.equal(logprobs(running), before)
