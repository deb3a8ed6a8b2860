"""Faults planted into the CPU provider, each a thing that kernels get wrong: the check of its operation must see it.

That is what shows that the checks of test_kernels.py can fail.
"""

import inspect
from dataclasses import replace

import pytest
import torch

from vllm_dsa import cache
from vllm_dsa.kernels import Rope, cpu, reference
from vllm_dsa.testing import compare
from vllm_dsa.testing.cases import BY_NAME, with_dtype
from vllm_dsa.testing.check import CHECKS, replaced

pytestmark = pytest.mark.usefixtures("one_thread")


def changed(function, **changes):
    """A provider's function with some arguments changed first: name=f(value, all arguments by name)."""
    signature = inspect.signature(function)

    def faulty(*args):
        given = signature.bind(*args).arguments
        return function(**given | {name: change(given[name], given) for name, change in changes.items()})

    return replaced(cpu, **{function.__name__: faulty})


def of_rows(function, **changes):
    """A provider's function with fields of its Rows changed: name=f(value, rows)."""
    return changed(
        function,
        rows=lambda rows, _: replace(rows, **{k: change(getattr(rows, k), rows) for k, change in changes.items()}),
    )


def compact(pages, _):
    """Pages read as if nothing lay between them."""
    strides = torch.empty(pages.shape, device="meta").stride()
    return pages.as_strided(pages.shape, strides)


def patched(name, fault):
    """The provider with one of its module's own functions replaced."""

    def plant(monkeypatch):
        monkeypatch.setattr(cpu, name, fault(getattr(cpu, name)))
        return cpu

    return plant


def without_relu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "relu_", lambda self: self)
    return replaced(cpu, scores=None)


def after_select(change):
    """select, then a change of what it selected."""

    def select(codes, weights, index_cache, rows, out):
        cpu.select(codes, weights, index_cache, rows, out)
        out.copy_(change(out, rows))

    return replaced(cpu, select=select)


def after_attend(out_change=lambda out: out, lse_change=lambda lse: lse):
    def attend(query, latent_cache, rows, selected, scale, out):
        lse = cpu.attend(query, latent_cache, rows, selected, scale, out)
        out.copy_(out_change(out))
        return lse_change(lse)

    return replaced(cpu, attend=attend)


def rope(**changes):
    return lambda function: changed(function, rope=lambda rope, _: Rope(**vars(rope) | changes))


def norms(**change):
    (name, value), *_ = change.items()
    return changed(cpu.write_keys, norms=lambda norms, _: replace(norms, **{name: value(getattr(norms, name))}))


def last_page_only_whole(lengths, rows):
    return torch.where(lengths > rows.block_size, lengths // rows.block_size * rows.block_size, lengths)


def ties_to_larger(codes, weights, index_cache, rows, out):
    out.fill_(-1)
    for row, length in enumerate(rows.lengths.tolist()):
        scores = cpu.scores(codes, weights, index_cache, rows, row)
        chosen = length - 1 - reference.top_k(scores.flip(0), out.shape[1])
        out[row, : len(chosen)] = chosen.sort().values


# operation, fault -> (case, what makes the faulty provider)
FAULTS = {
    ("write", "slot off by one"): ("chunk", lambda _: changed(cpu.write_keys, slots=lambda slots, _: slots + 1)),
    ("write", "two slots swapped"): (
        "chunk",
        lambda _: changed(cpu.write_keys, slots=lambda s, _: s[[1, 0, *range(2, len(s))]]),
    ),
    ("write", "negative slots written"): (
        "mixed",
        lambda _: changed(cpu.write_keys, slots=lambda slots, _: slots.abs()),
    ),
    ("write", "a token left out"): ("chunk", lambda _: changed(cpu.write_keys, slots=lambda s, _: s.clone().fill_(-1))),
    ("write", "latent cache's page stride ignored"): ("chunk", lambda _: changed(cpu.write_keys, latent_cache=compact)),
    ("write", "index cache's page stride ignored"): ("chunk", lambda _: changed(cpu.write_keys, index_cache=compact)),
    ("write", "latent norm's weight dropped"): ("chunk", lambda _: norms(latent_weight=torch.ones_like)),
    ("write", "index norm's bias dropped"): ("chunk", lambda _: norms(index_bias=torch.zeros_like)),
    ("write", "index norm's weight dropped"): ("chunk", lambda _: norms(index_weight=torch.ones_like)),
    ("write", "eps of the wrong norm"): ("chunk", lambda _: norms(index_eps=lambda eps: 1e-2)),
    ("write", "positions off by one"): ("chunk", lambda _: changed(cpu.write_keys, positions=lambda p, _: p - 1)),
    ("write", "index keys' RoPE layout swapped"): ("chunk", lambda _: rope(index_interleaved=True)(cpu.write_keys)),
    ("write", "index queries' RoPE layout swapped"): (
        "chunk",
        lambda _: rope(index_interleaved=True)(cpu.write_queries),
    ),
    ("write", "interleaved index RoPE ignored"): (
        "interleaved",
        lambda _: rope(index_interleaved=False)(cpu.write_keys),
    ),
    ("write", "MLA's RoPE not interleaved"): (
        "chunk",
        patched("_turn", lambda turn: lambda x, cos_sin, interleaved: turn(x, cos_sin, False)),
    ),
    ("write", "queries not turned"): ("chunk", lambda _: changed(cpu.write_queries, positions=lambda p, _: p * 0)),
    ("write", "head weights not scaled"): (
        "chunk",
        lambda _: changed(cpu.write_queries, head_weights=lambda w, given: w * given["index_query"].shape[1] ** 0.5),
    ),
    ("write", "fp8 latents in one scale group"): (
        "fp8",
        lambda _: changed(cpu.write_keys, latent=lambda latent, _: latent.roll(cache.LATENT_GROUP, 1)),
    ),
    ("select", "relu dropped"): ("decode", without_relu),
    ("select", "own token forgotten"): (
        "decode",
        lambda _: of_rows(cpu.select, lengths=lambda n, _: (n - 1).clamp(min=0)),
    ),
    ("select", "one key too many"): ("chunk", lambda _: of_rows(cpu.select, lengths=lambda n, _: n + 1)),
    ("select", "last page's part forgotten"): ("decode", lambda _: of_rows(cpu.select, lengths=last_page_only_whole)),
    ("select", "every row sees the last row's keys"): (
        "chunk",
        lambda _: of_rows(cpu.select, lengths=lambda n, rows: torch.full_like(n, rows.ends[0])),
    ),
    ("select", "logical pages taken for physical ones"): (
        "decode",
        lambda _: of_rows(cpu.select, block_table=lambda t, _: torch.arange(t.shape[1]).int().expand_as(t)),
    ),
    ("select", "every request reads the first one's pages"): (
        "decode",
        lambda _: of_rows(cpu.select, block_table=lambda t, rows: t[rows.ends.index(max(rows.ends))].expand_as(t)),
    ),
    ("select", "page stride ignored"): ("decode", lambda _: changed(cpu.select, index_cache=compact)),
    ("select", "keys not scaled"): (
        "decode",
        patched("_index_keys", lambda load: lambda *args: (load(*args)[0], torch.ones_like(load(*args)[1]))),
    ),
    ("select", "head weights without their sign"): (
        "decode",
        lambda _: changed(cpu.select, weights=lambda w, _: w.abs()),
    ),
    ("select", "head weights of another row"): (
        "prefill",
        lambda _: changed(cpu.select, weights=lambda w, _: w.roll(1, 0)),
    ),
    ("select", "ties to the larger position"): ("ties all", lambda _: replaced(cpu, select=ties_to_larger)),
    ("select", "sliding window"): (
        "prefill",
        lambda _: after_select(
            lambda out, rows: torch.where(
                out < 0, out, (rows.lengths.unsqueeze(1) - 16).clamp(min=0) + torch.arange(16)
            )
        ),
    ),
    ("select", "best first"): ("prefill", lambda _: after_select(lambda out, _: out.flip(1))),
    ("select", "one position twice"): ("decode", lambda _: after_select(lambda out, _: out[:, [0, 0, *range(2, 16)]])),
    ("select", "padded with 0"): ("at top_k", lambda _: after_select(lambda out, _: out.clamp(min=0))),
    ("select", "slots in place of positions"): ("decode", lambda _: after_select(lambda out, _: out + 16)),
    ("attend", "padding attended to"): (
        "at top_k",
        lambda _: changed(cpu.attend, selected=lambda s, _: s.clamp(min=0)),
    ),
    ("attend", "first selected row left out"): (
        "decode",
        lambda _: changed(cpu.attend, selected=lambda s, _: torch.cat([s[:, 1:], torch.full_like(s[:, :1], -1)], 1)),
    ),
    ("attend", "logical pages taken for physical ones"): (
        "decode",
        lambda _: of_rows(cpu.attend, block_table=lambda t, _: torch.arange(t.shape[1]).int().expand_as(t)),
    ),
    ("attend", "page stride ignored"): ("decode", lambda _: changed(cpu.attend, latent_cache=compact)),
    ("attend", "not scaled"): ("decode", lambda _: changed(cpu.attend, scale=lambda scale, _: 1.0)),
    ("attend", "rotated key left out"): (
        "decode",
        lambda _: changed(cpu.attend, query=lambda q, given: q * (torch.arange(q.shape[2]) < given["out"].shape[2])),
    ),
    ("attend", "fp8 scales of the first group for all"): (
        "fp8",
        lambda _: changed(cpu.attend, latent_cache=lambda c, _: with_first_scale(c)),
    ),
    ("attend", "log-sum-exp in base 2"): ("decode", lambda _: after_attend(lse_change=lambda lse: lse / 0.6931472)),
    ("attend", "log-sum-exp 0 for rows without keys"): (
        "mixed",
        lambda _: after_attend(lse_change=lambda lse: lse.nan_to_num(neginf=0.0)),
    ),
    ("attend", "rows without keys unwritten"): (
        "mixed",
        lambda _: after_attend(lambda out: out.masked_fill((out == 0).all(-1, keepdim=True), float("nan"))),
    ),
    ("attend", "one head of all"): ("decode", lambda _: after_attend(lambda out: out[:, :1].expand_as(out).clone())),
}


def with_first_scale(pages):
    copy = pages.clone()
    copy[..., 512:528] = pages[..., 512:516].repeat(1, 1, 4)
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "fault"), FAULTS)
def test_a_planted_fault_is_seen(op, fault, dtype, monkeypatch):
    name, plant = FAULTS[op, fault]
    with pytest.raises(compare.Mismatch):
        CHECKS[op](plant(monkeypatch), with_dtype(BY_NAME[name], dtype))


@pytest.mark.parametrize("op", CHECKS)
@pytest.mark.parametrize("name", sorted({name for name, _ in FAULTS.values()}))
def test_without_a_fault_nothing_is_seen(op, name):
    CHECKS[op](replaced(cpu), BY_NAME[name])
