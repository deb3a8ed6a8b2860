"""The vendor provider on Hopper: DeepGEMM scores, FlashMLA attends. Contracts: ``vllm_dsa.kernels``.

select  decodes: DeepGEMM's paged kernel, one row at a time of each request, straight from the pages
        prefills: keys of a few requests gathered into one buffer, DeepGEMM's contiguous kernel, rows in tiles
        both: scores within VLLM_DSA_SCORE_BUDGET_MB, then this package's exact top-k
attend  few heads: the Triton provider's kernels, which are faster there (benchmarks/portable.py --vendor)
        fp8_ds_mla decodes: FlashMLA's decode kernel, straight from the pages, heads padded to 64 or 128
        fp8_ds_mla prefills: latents of a few requests widened to bfloat16 in a workspace, FlashMLA's prefill kernel
        bfloat16 cache: from the pages themselves, decodes by FlashAttention, prefills by the prefill kernel
        rows that see at most index_topk keys: keys and values up-projected, FlashAttention

What all layers of a step share (schedules, row bounds, expanded block tables) is made once: ``Rows.once``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_dsa import cache, envs
from vllm_dsa.kernels import triton_attend
from vllm_dsa.kernels.triton_select import PLACES_BYTES, top_k_rows
from vllm_dsa.metadata import Rows, one_row_each, prefill_parts, score_tiles, to_device

GATHER_ROWS = 1 << 18  # keys or latents gathered at a time: 34 MB of keys, 302 MB of latents
DECODE_HEADS = (64, 128)  # of its decode kernel
# Up to so many heads Triton's kernels are the faster ones: in prefills and all over bfloat16 caches; in decodes over
# fp8_ds_mla, from so many rows on. Measured: H200, 2026-11-22.
TRITON_HEADS, TRITON_DECODE_HEADS, TRITON_DECODE_ROWS = 32, 16, 32
DENSE_ROWS = 256  # below, up-projecting the keys costs more than attending to all heads' values in the latents


@dataclass(frozen=True)
class Gathered:
    """Prefill requests whose keys are gathered together, as the kernels want them."""

    requests: slice
    rows: slice
    starts: torch.Tensor  # [requests + 1] int32: first gathered key of each request, then the total
    row_starts: torch.Tensor  # [rows] int32: first gathered key of the row's request
    keys: int
    tiles: list[tuple[slice, int]]  # of score_tiles


def library_refusals() -> list[str]:
    """Why FlashMLA or DeepGEMM cannot be called here; empty if both can. Of sizes, see ``limits``."""
    from vllm_dsa.compat import vendor_refusals

    return vendor_refusals()


def query_heads(request: Any) -> int:
    """Heads to allocate a query buffer with, so that no kernel here has to pad it."""
    if request.latent_kind != cache.FP8_DS_MLA:
        return request.num_heads
    return next(n for n in DECODE_HEADS if n >= request.num_heads)


def select(
    codes: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    rows: Rows,
    out: torch.Tensor,
    scored: Callable[[], None] | None = None,
) -> None:
    """Top-k positions of every row."""
    if rows.decodes:
        _select_decodes(codes[: rows.decodes], weights[: rows.decodes], index_cache, rows, out[: rows.decodes], scored)
    elif scored:
        scored()
    for part in _gathered(rows, out.shape[1]):
        _select_part(codes[part.rows], weights[part.rows], index_cache, rows, part, out[part.rows])
    if (padding := _padding(rows)).start < padding.stop:
        out[padding] = -1


def _select_decodes(
    codes: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    rows: Rows,
    out: torch.Tensor,
    scored: Callable[[], None] | None,
) -> None:
    from vllm_dsa.compat import paged_mqa_logits, paged_mqa_schedule

    width = rows.block_table.shape[1] * rows.block_size
    tile = max(1, (envs.VLLM_DSA_SCORE_BUDGET_MB << 20) // (width * 4))
    pages = index_cache.view(len(index_cache), rows.block_size, 1, -1)
    table = _decode_table(rows)
    for first in range(0, len(codes), tile):
        mine = slice(first, first + tile)
        lengths = rows.lengths[: rows.decodes][mine]
        ends = lengths.unsqueeze(1)
        schedule = rows.once(("schedule", first), partial(paged_mqa_schedule, ends, rows.block_size))
        logits = paged_mqa_logits(codes[mine].unsqueeze(1), pages, weights[mine], ends, table[mine], schedule, width)
        if scored and not first:
            scored()
        top_k_rows(logits, lengths, out[mine])


def _decode_table(rows: Rows) -> torch.Tensor:
    """Block table [decodes, blocks] of the decode rows, one line a row."""
    table = rows.block_table[: rows.decodes]
    if len(table) == rows.decodes and one_row_each(rows.starts, min(rows.decodes, rows.starts[-1])):
        return table
    return rows.once("table", lambda: rows.block_table[rows.requests[: rows.decodes].long()])


def _gathered(rows: Rows, top_k: int) -> list[Gathered]:
    """The step's prefills in parts of at most GATHER_ROWS keys (a longer request alone)."""

    def make() -> list[Gathered]:
        found, most = [], (envs.VLLM_DSA_SCORE_BUDGET_MB << 20) // 4
        for part in prefill_parts(rows, GATHER_ROWS):
            first, mine = part.requests.start, slice(part.rows.start, rows.starts[part.requests.stop])
            if mine.start < mine.stop:  # not only padding
                starts = to_device(part.bounds, torch.int32, rows.lengths.device)
                row_starts = starts[(rows.requests[mine] - first).long()]
                tiles = score_tiles(rows, part.requests, top_k, most, DENSE_ROWS)
                found.append(Gathered(part.requests, mine, starts, row_starts, part.bounds[-1], tiles))
        return found

    return rows.once(("gathered", top_k), make)


def _padding(rows: Rows) -> slice:
    """Rows behind the prefills that are of no request; those that pad decodes are decodes."""
    return slice(max(rows.starts[-1], rows.decodes), len(rows.lengths))


def _select_part(
    codes: torch.Tensor, weights: torch.Tensor, index_cache: torch.Tensor, rows: Rows, part: Gathered, out: torch.Tensor
) -> None:
    from vllm_dsa.compat import gather_index_keys, mqa_logits

    dim = codes.shape[-1]
    keys = torch.empty(part.keys, dim, dtype=cache.E4M3, device=codes.device)
    scales = torch.empty(part.keys, 1, dtype=torch.float32, device=codes.device)
    pages = index_cache.view(len(index_cache), rows.block_size, -1)
    gather_index_keys(pages, keys, scales, rows.block_table[part.requests], part.starts)
    lengths = rows.lengths[part.rows]
    for tile, longest in part.tiles:
        starts, mine = part.row_starts[tile], lengths[tile]
        if longest <= out.shape[1]:
            top_k_rows(scales.new_empty(1, 4), mine, out[tile])  # no score is looked at
            continue
        width = -(-longest // 64) * 64  # whole 16 bytes: top-k's wide loads
        logits = mqa_logits(codes[tile], keys, scales.squeeze(1), weights[tile], starts, starts + mine, width)
        top_k_rows(logits, mine, out[tile])


def attend(
    query: torch.Tensor, latent_cache: torch.Tensor, rows: Rows, selected: torch.Tensor, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """Softmax attention of every row over its selected latent rows; returns the log-sum-exp."""
    tokens, heads = out.shape[:2]
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=query.device)
    step = (query, latent_cache, rows, selected, scale, out, lse)
    if latent_cache.dtype == torch.uint8:
        through_triton = heads <= TRITON_DECODE_HEADS and rows.decodes >= TRITON_DECODE_ROWS
    else:
        through_triton = heads <= TRITON_HEADS
    if through_triton:
        triton_attend.attend_decodes(*step)
    elif rows.decodes:
        sums = _attend_decodes(*step[:-1])
        if rows.decodes == tokens:
            return sums
        lse[: rows.decodes] = sums
    if heads <= TRITON_HEADS:
        triton_attend.attend_prefills(*step)
    elif rows.decodes < tokens:
        _attend_prefills(*step)
    if (padding := _padding(rows)).start < padding.stop:
        out[padding], lse[padding] = 0, float("-inf")
    return lse


def _attend_decodes(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    from vllm_dsa.compat import flash_attention_gathered, flash_mla_decode, flash_mla_schedule

    mine, heads = slice(0, rows.decodes), out.shape[1]
    if latent_cache.dtype != torch.uint8:
        latents, page_rows = _flat_rows(latent_cache)
        at, valid = to_slots(selected, rows, mine, page_rows), _valid(rows, mine, selected.shape[1])
        count = rows.decodes + 1
        starts = rows.once("starts", lambda: torch.arange(count, dtype=torch.int32, device=query.device))
        return flash_attention_gathered(query[mine, :heads], latents, at, valid, starts, scale, out[mine])
    padded = query[mine] if query.shape[1] in DECODE_HEADS else _padded(query[mine])
    schedule = rows.once("flash_mla", flash_mla_schedule)
    slots = to_slots(selected, rows, mine, rows.block_size)
    direct = out[mine].unsqueeze(1) if heads == padded.shape[1] else None
    values, sums = flash_mla_decode(
        padded.unsqueeze(1), latent_cache.unsqueeze(2), slots.unsqueeze(1), scale, schedule, direct
    )
    if direct is None:
        out[mine].copy_(values[:, 0, :heads])
    return sums[:, :heads, 0]


def _padded(query: torch.Tensor) -> torch.Tensor:
    tokens, heads, width = query.shape
    padded = query.new_zeros(tokens, next(n for n in DECODE_HEADS if n >= heads), width)
    padded[:, :heads] = query
    return padded


def _attend_prefills(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    from vllm_dsa.compat import gather_latents

    if latent_cache.dtype != torch.uint8:
        mine, (latents, page_rows) = slice(rows.decodes, len(out)), _flat_rows(latent_cache)
        at = to_slots(selected, rows, mine, page_rows)
        lse[mine] = _attend_rows(query, latents, rows, mine, at, scale, out)
        return
    for part in _gathered(rows, selected.shape[1]):
        latents = torch.empty(part.keys, 576, dtype=torch.bfloat16, device=query.device)
        requests = part.requests.stop - part.requests.start
        gather_latents(latent_cache, latents, rows.block_table[part.requests], part.starts[:requests], requests)
        chosen = selected[part.rows]
        at = torch.empty_like(chosen)
        _shift[(len(chosen),)](chosen, part.row_starts, at, chosen.shape[1], chosen.stride(0), BLOCK=1024)
        lse[part.rows] = _attend_rows(query, latents, rows, part.rows, at, scale, out)


def _attend_rows(
    query: torch.Tensor,
    latents: torch.Tensor,
    rows: Rows,
    mine: slice,
    at: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Rows ``mine`` over the rows ``at`` of latents [n, 576]; the log-sum-exp of these rows."""
    from vllm_dsa.compat import flash_mla_prefill

    query, valid = query[mine, : out.shape[1]], _valid(rows, mine, at.shape[1])
    return flash_mla_prefill(query, latents.unsqueeze(1), at.unsqueeze(1), scale, valid, out[mine])


def _valid(rows: Rows, mine: slice, top_k: int) -> torch.Tensor:
    """How many keys each of rows ``mine`` selects."""
    name = ("valid", mine.start, mine.stop, id(rows.lengths), top_k)  # ``without`` has other lengths
    return rows.once(name, lambda: rows.lengths[mine].clamp(max=top_k))


def attend_dense(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    request: int,
    w_uk: torch.Tensor,
    w_uv: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Softmax attention of the first rows of a request over all keys they see, by FlashAttention."""
    from vllm_dsa.compat import flash_attention, gather_latents

    count, heads, width = query.shape
    rank, nope = w_uk.shape[2], w_uk.shape[1]
    length = rows.ends[request] - (rows.starts[request + 1] - rows.starts[request]) + count
    table = rows.block_table[request : request + 1]
    if latent_cache.dtype == torch.uint8:
        latents = torch.empty(length, 576, dtype=torch.bfloat16, device=query.device)
        zero = rows.once("zero", lambda: torch.zeros(1, dtype=torch.int32, device=query.device))
        gather_latents(latent_cache, latents, table, zero, 1)
    else:
        pages = table[0, : -(-length // rows.block_size)].long()
        latents = latent_cache[pages].flatten(0, 1)[:length]
    shared = latents[:, :rank].expand(heads, -1, -1)
    keys = torch.empty(length, heads, width, dtype=query.dtype, device=query.device)
    torch.bmm(shared, w_uk.transpose(1, 2), out=keys[..., :nope].transpose(0, 1))
    keys[..., nope:] = latents[:, None, rank:]
    values = torch.empty(length, heads, out.shape[2], dtype=query.dtype, device=query.device)
    torch.bmm(shared, w_uv, out=values.transpose(0, 1))
    bounds = (rows.once(("bounds", n), partial(to_device, (0, n), torch.int32, query.device)) for n in (count, length))
    flash_attention(query, keys, values, *bounds, scale, out)


def workspace(request: Any, tokens: int) -> int:
    """Bytes that select, attend or attend_dense may take for so many rows; they do not overlap in time."""
    selecting = GATHER_ROWS * (request.index_dim + 4) + (envs.VLLM_DSA_SCORE_BUDGET_MB << 20) + PLACES_BYTES
    attending = tokens * request.top_k * 4
    if request.latent_kind == cache.FP8_DS_MLA:
        attending += GATHER_ROWS * 576 * 2
    dense = request.top_k * (576 + request.num_heads * 2 * 192) * 2
    return max(selecting, attending, dense, triton_attend.workspace(request, tokens))


def _flat_rows(latent_cache: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The pages [pages, block, 576] as rows [n, 576], and how many rows one page is apart from the next."""
    pages, block_size, width = latent_cache.shape
    stride = latent_cache.stride(0)
    if stride % width or latent_cache.stride(1) != width:
        raise RuntimeError(f"latent pages {latent_cache.stride()} apart are not whole rows of {width} apart.")
    count = (pages - 1) * (stride // width) + block_size
    return latent_cache.as_strided((count, width), (width, 1)), stride // width


def to_slots(selected: torch.Tensor, rows: Rows, mine: slice, page_rows: int) -> torch.Tensor:
    """Positions [T, K] selected by rows ``mine`` as rows of the flat cache, pages ``page_rows`` apart; -1 stays."""
    chosen, table = selected[mine], rows.block_table
    count, top_k = chosen.shape
    slots = torch.empty(count, top_k, dtype=torch.int32, device=selected.device)
    block = 512
    _slots[(count, triton.cdiv(top_k, block))](
        chosen,
        rows.requests[mine],
        table,
        slots,
        top_k,
        chosen.stride(0),
        table.stride(0),
        rows.block_size,
        page_rows,
        BLOCK=block,
    )
    return slots


@triton.jit(do_not_specialize_on_alignment=["requests"])
def _slots(selected, requests, table, slots, k, stride, table_stride, block_size, page_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    line = table + tl.load(requests + row).to(tl.int64) * table_stride
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(selected + row * stride + column, mask=column < k, other=-1)
    page = tl.load(line + position // block_size, mask=position >= 0, other=0)
    slot = tl.where(position >= 0, page * page_rows + position % block_size, -1)
    tl.store(slots + row * k + column, slot, mask=column < k)


@triton.jit
def _shift(selected, starts, at, k, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + row)
    for first in range(0, k, BLOCK):
        column = first + tl.arange(0, BLOCK)
        position = tl.load(selected + row * stride + column, mask=column < k, other=-1)
        tl.store(at + row * k + column, tl.where(position >= 0, position + start, -1), mask=column < k)
