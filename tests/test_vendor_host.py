"""What the vendor provider does around FlashMLA, DeepGEMM and FlashAttention, on a CPU: which rows, keys, pages and
bounds each gets, and where the results go. The libraries, and this package's Triton kernels, are stood in for in torch.
"""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_dsa import cache, compat
from vllm_dsa.kernels import reference, triton_attend, triton_select, vendor
from vllm_dsa.metadata import Rows, dense_parts, without
from vllm_dsa.testing import compare
from vllm_dsa.testing.cases import V32, Case
from vllm_dsa.testing.check import check_attend, check_select, written

GARBAGE = 1e9  # where the libraries leave what they find
UP_PROJECTED = 2.0**-6  # of the largest value: keys, values and results are rounded to bfloat16
TOP_K = 64
STEPS = {  # (context, new tokens) of each request, and the most rows of one that decodes
    "decodes": (((300, 1), (40, 1), (63, 1), (64, 1)), 1),
    "drafts": (((300, 2), (40, 2), (63, 2)), 2),
    "prefills": (((0, 90), (130, 60), (10, 5), (400, 1)), 0),
    "mixed": (((300, 1), (40, 1), (0, 70), (250, 20), (60, 16)), 1),
    "a draft and a prefill": (((300, 2), (250, 20)), 2),  # as many rows that decode as requests
    "drafts of other lengths": (((300, 1), (200, 3), (250, 20), (70, 9)), 3),
    "long": (((500, 460),), 0),
    "many decodes": (((70, 1),) * 40, 1),
}
CACHES = ((cache.FP8_DS_MLA, 656), ("auto", 576))


def scores(codes: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[keys] of codes [H, D]."""
    return (weights.unsqueeze(-1) * (codes.float() @ keys.float().T).relu()).sum(0) * scales


def attention(query: torch.Tensor, latents: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [N, 512] and log-sum-exp [N] of query [N, 576] over latents [k, 576]."""
    logits = scale * (query.float() @ latents.float().T)
    return logits.softmax(-1) @ latents[:, :512].float(), logits.logsumexp(-1)


def paged_mqa_logits(codes, pages, weights, lengths, table, schedule, width):
    assert schedule == lengths.tolist()
    found = torch.full((len(codes), width), GARBAGE)
    for row, (length,) in enumerate(lengths.tolist()):
        keys, scales = cache.load_index_keys(pages.flatten(1), table[row, : -(-length // 64)], 128)
        found[row, :length] = scores(codes[row, 0], weights[row], keys, scales)[:length]
    return found


def mqa_logits(codes, keys, scales, weights, starts, ends, longest):
    assert longest % 4 == 0 and int((ends - starts).max()) <= longest
    found = torch.full((len(codes), longest), GARBAGE)
    for row, (first, last) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        found[row, : last - first] = scores(codes[row], weights[row], keys[first:last], scales[first:last])
    return found


def gather_index_keys(pages, keys, scales, table, starts):
    assert len(starts) == len(table) + 1 and int(starts[-1]) == len(keys)
    for request, (first, last) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
        found, of_each = cache.load_index_keys(pages.flatten(1), table[request, : -(-(last - first) // 64)], 128)
        keys[first:last], scales[first:last, 0] = found[: last - first].to(keys.dtype), of_each[: last - first]


def gather_latents(pages, latents, table, starts, requests):
    assert len(starts) == len(table) == requests
    bounds = [*starts.tolist(), len(latents)]
    for request, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        positions = torch.arange(last - first)
        slots = table[request, positions // 64].long() * 64 + positions % 64
        latents[first:last] = cache.load_latent(pages, slots).to(latents.dtype)


def top_k_rows(scored: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor) -> None:
    out.fill_(-1)
    for row, length in enumerate(lengths.tolist()):
        count = min(length, out.shape[1])
        whole = torch.arange(count, dtype=torch.int32)
        out[row, :count] = whole if length <= out.shape[1] else reference.top_k(scored[row, :length], count)


def flash_mla_decode(query, pages, slots, scale, schedule, out):
    rows, _, heads, _ = query.shape
    assert heads in vendor.DECODE_HEADS and slots.shape[:2] == (rows, 1)
    values = torch.zeros(rows, 1, heads, 512, dtype=query.dtype) if out is None else out
    lse = torch.full((rows, heads, 1), GARBAGE)
    for row in range(rows):
        chosen = slots[row, 0][slots[row, 0] >= 0].long()
        values[row, 0], lse[row, :, 0] = attention(query[row, 0], cache.load_latent(pages.squeeze(2), chosen), scale)
    return values, lse


def flash_mla_prefill(query, latents, at, scale, valid, out):
    lse = torch.full(query.shape[:2], GARBAGE)
    for row, count in enumerate(valid.tolist()):
        chosen = at[row, 0, :count]
        assert (chosen >= 0).all() and (at[row, 0, count:] == -1).all()
        out[row], lse[row] = attention(query[row], latents[chosen.long(), 0], scale)
    return lse


def flash_attention_gathered(query, latents, at, valid, starts, scale, out):
    assert starts.tolist() == list(range(len(query) + 1))
    lse = torch.full(query.shape[:2], GARBAGE)
    for row, count in enumerate(valid.tolist()):
        assert (at[row, :count] >= 0).all()
        out[row], lse[row] = attention(query[row], latents[at[row, :count].long()], scale)
    return lse


def flash_attention(query, keys, values, query_starts, key_starts, scale, out):
    assert (query_starts.tolist(), key_starts.tolist()) == ([0, len(query)], [0, len(keys)])
    logits = scale * torch.einsum("mhd,nhd->hmn", query.float(), keys.float())
    seen = torch.arange(len(keys)) <= torch.arange(len(query)).unsqueeze(1) + len(keys) - len(query)
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    out.copy_(torch.einsum("hmn,nhv->mhv", weights, values.float()))


def to_slots(selected: torch.Tensor, rows: Rows, mine: slice, page_rows: int) -> torch.Tensor:
    chosen, requests = selected[mine].long(), rows.requests[mine].long()
    pages = rows.block_table[requests].gather(1, chosen.clamp(min=0) // rows.block_size)
    return torch.where(chosen >= 0, pages * page_rows + chosen % rows.block_size, -1).int()


class Shift:
    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(chosen, starts, at, *_, **__):
            at.copy_(torch.where(chosen >= 0, chosen + starts.unsqueeze(1), -1))

        return run


def of_some(whole: bool) -> Any:
    """triton_attend's functions, of the step's decodes or of all others."""

    def attend(query, latent_cache, rows, selected, scale, out, lse):
        mine = slice(0, rows.decodes) if whole else slice(rows.decodes, len(out))
        some = replace(rows, requests=rows.requests[mine], lengths=rows.lengths[mine])
        own = query[mine, : out.shape[1]]
        lse[mine] = reference.attend(own, latent_cache, some, selected[mine], scale, out[mine])

    return attend


@pytest.fixture
def stood_in(monkeypatch, one_thread) -> Any:
    """The vendor's module, small parts and tiles, and libraries in torch."""
    for function in (paged_mqa_logits, mqa_logits, gather_index_keys, gather_latents, flash_mla_decode):
        monkeypatch.setitem(vars(compat), function.__name__, function)
    for function in (flash_mla_prefill, flash_attention, flash_attention_gathered):
        monkeypatch.setitem(vars(compat), function.__name__, function)
    monkeypatch.setitem(vars(compat), "paged_mqa_schedule", lambda lengths, block_size: lengths.tolist())
    monkeypatch.setitem(vars(compat), "flash_mla_schedule", object)
    for name, value in {"top_k_rows": top_k_rows, "to_slots": to_slots, "_shift": Shift()}.items():
        monkeypatch.setattr(vendor, name, value)
    monkeypatch.setattr(vendor, "GATHER_ROWS", 200)
    monkeypatch.setattr(vendor, "DENSE_ROWS", 16)
    monkeypatch.setattr(triton_attend, "attend_decodes", of_some(True))
    monkeypatch.setattr(triton_attend, "attend_prefills", of_some(False))
    monkeypatch.setenv("VLLM_DSA_SCORE_BUDGET_MB", "1")
    return vendor


def case_of(step: str, heads: int = 64, kind: str = cache.FP8_DS_MLA, padding: int = 656) -> Case:
    requests, _ = STEPS[step]
    sizes = dict(requests=requests, heads=heads, latent_kind=kind, page_padding=padding)
    sizes |= dict(top_k=TOP_K, index_heads=4, dtype=torch.bfloat16, decode_rows=STEPS[step][1])
    return replace(V32, name=f"{step} {kind}", **sizes)


def random_step(seed: int) -> Case:
    """Decodes, drafts and chunks of prompts, often as many rows that decode as requests, and maybe padding."""
    generator = random.Random(seed)
    drafted = generator.randrange(1, 5)

    def some(count: int, new: int) -> list[tuple[int, int]]:
        return [(generator.choice((0, 5, TOP_K - 2, 150, 300)), generator.randint(1, new)) for _ in range(count)]

    decoding = some(generator.randrange(4), drafted)
    rows = sum(new for _, new in decoding)
    requests = decoding + some(generator.choice((0, 1, 3, rows - len(decoding))), 90)
    sizes: dict[str, Any] = dict(decode_rows=drafted, padding_rows=generator.choice((0, 0, 3)))
    heads, kind = generator.choice((16, 64)), generator.choice((cache.FP8_DS_MLA, "auto"))
    sizes |= dict(heads=heads, latent_kind=kind, page_padding=656 if kind == cache.FP8_DS_MLA else 576)
    sizes |= dict(requests=tuple(requests), top_k=TOP_K, index_heads=4, dtype=torch.bfloat16)
    return replace(V32, name=f"step {seed}", **sizes)


@pytest.mark.parametrize("seed", range(30))
def test_random_steps(seed, stood_in):
    case = random_step(seed)
    check_select(stood_in, case)
    check_attend(stood_in, case, tolerance=compare.TOLERANCE)


@pytest.mark.parametrize("step", STEPS)
def test_select(step, stood_in):
    check_select(stood_in, case_of(step))


@pytest.mark.parametrize("step", ["decodes", "drafts", "mixed", "prefills"])
def test_what_may_run_beside_top_k(step, stood_in, monkeypatch):
    """scored() is called once, by this provider and by Triton's: behind decodes' scores, before any top-k."""
    launched: list[str] = []

    def logged(module: Any, name: str) -> None:
        function = vars(module)[name]
        monkeypatch.setitem(vars(module), name, lambda *args: launched.append(name) or function(*args))

    inputs, codes, weights = written(case_of(step))
    selected = torch.empty(len(codes), TOP_K, dtype=torch.int32)
    logged(compat, "paged_mqa_logits")
    logged(vendor, "top_k_rows")
    vendor.select(codes, weights, inputs.index_cache, inputs.rows, selected, lambda: launched.append("scored"))
    scores = ["paged_mqa_logits"] if inputs.rows.decodes else []
    assert launched[: len(scores) + 2] == [*scores, "scored", "top_k_rows"] and launched.count("scored") == 1

    launched.clear()
    monkeypatch.setattr(triton_select, "_score", lambda *_: None)
    monkeypatch.setattr(triton_select, "top_k_rows", lambda *_: None)
    logged(triton_select, "_score")
    logged(triton_select, "top_k_rows")
    triton_select.select(codes, weights, inputs.index_cache, inputs.rows, selected, lambda: launched.append("scored"))
    assert launched == ["_score", "scored", "top_k_rows"]


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("kind, padding", CACHES, ids=lambda value: str(value))
@pytest.mark.parametrize("step", [step for step in STEPS if step != "long"])
def test_attend(step, kind, padding, heads, stood_in):
    """16 heads are padded for FlashMLA's decode kernel, and 64 are not."""
    check_attend(stood_in, case_of(step, heads, kind, padding), tolerance=compare.TOLERANCE)


@pytest.mark.parametrize("kind, padding", CACHES, ids=lambda value: str(value))
def test_dense_rows(kind, padding, stood_in):
    """Rows that see at most index_topk keys, with keys and values up-projected; the others see nothing of them."""
    case = case_of("mixed", 4, kind, padding)
    inputs, *_ = written(case)
    generator = torch.Generator().manual_seed(0)
    w_uk, w_uv = (torch.randn(4, *shape, generator=generator).bfloat16() / 16 for shape in ((128, 512), (512, 128)))
    parts = dense_parts(inputs.rows, TOP_K, 16)
    assert [(request, part.stop - part.start) for request, part in parts] == [(2, TOP_K)]
    left = without(inputs.rows, parts).lengths
    for request, part in parts:
        query = torch.randn(part.stop - part.start, 4, 192, generator=generator).bfloat16()
        out = torch.empty(len(query), 4, 128, dtype=torch.bfloat16)
        stood_in.attend_dense(query, inputs.latent_cache, inputs.rows, request, w_uk, w_uv, inputs.scale, out)
        everything = torch.arange(TOP_K, dtype=torch.int32).expand(len(query), -1)
        lengths = inputs.rows.lengths[part].unsqueeze(1)
        seen = torch.where(everything < lengths, everything, -1)
        absorbed = torch.einsum("mhd,hdr->mhr", query[..., :128].float(), w_uk.float())
        whole = torch.cat([absorbed, query[..., 128:].float()], -1)
        values = torch.empty(len(query), 4, 512)
        rows = replace(inputs.rows, requests=inputs.rows.requests[part], lengths=inputs.rows.lengths[part])
        reference.attend(whole, inputs.latent_cache, rows, seen, inputs.scale, values)
        want = torch.einsum("mhr,hrv->mhv", values, w_uv.float())
        compare.assert_close("dense attention", out.float(), want, UP_PROJECTED)
        assert not left[part].any()
    assert int((left > 0).sum()) == case.tokens - TOP_K
