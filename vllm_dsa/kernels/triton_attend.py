"""attend on GPUs: gather the selected latent rows and attend to them. Contracts: ``vllm_dsa.kernels``.

prefills  the latents of a few requests are first written one behind the other in the model's dtype, once for all heads
          and rows; then one program a row and block of heads attends to all its keys
decodes   straight from the pages; a row's keys are cut into ``splits`` parts, a number that depends on the layer's
          shape alone; a second kernel merges these in order

So the bits of a row depend on what it holds and on which of both it is, never on its company.

Decodes over an fp8_ds_mla cache multiply in float16, which holds a code times its power-of-two scale exactly; queries
are first multiplied by a power of two, head by head, so that they fit. Other scales are rounded to 11 bits, or, in
prefills, the products to the model's dtype. Over other caches all is in their own dtype. Accumulation is float32.
Parts, divided by their sums of weights, are kept in float16 until they are merged (in float32 for float32 models).
"""

import math
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_dsa import cache, envs
from vllm_dsa.kernels import triton_configs
from vllm_dsa.kernels.triton_e4m3 import decode, decode_words
from vllm_dsa.kernels.triton_select import PLACES_BYTES
from vllm_dsa.metadata import Part, Rows, prefill_parts, to_device

SCALE_BYTES = tl.constexpr(cache.SCALE_BYTES)
WIDE_ROWS = 1 << 18  # latent rows widened at a time: 302 MB
PART_BYTES = 1 << 27  # parts of decodes kept at a time


@triton.jit
def _finish(
    top, total, values, out, lse, head, out_stride_h, HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Output at out and natural log-sum-exp at lse, of one row; 0 and -inf where no key was selected."""
    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    value = tl.where(some, (top + tl.log2(divisor)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + head, value, mask=head < HEADS)
    dim = tl.arange(0, BLOCK_R)[None, :]
    result = (values / divisor[:, None]).to(out.dtype.element_ty)
    tl.store(out + head[:, None] * out_stride_h + dim, result, mask=(head < HEADS)[:, None] & (dim < RANK))


@triton.jit(do_not_specialize=["first_request"])
def _widen_kernel(
    latent_cache, block_table, spans, wide, first_request, page_stride, row_stride, table_stride,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, FP8: tl.constexpr, HARDWARE: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Programs (block of keys, request): cached rows as plain ones, RANK + ROPE wide, to where spans says."""
    request, key = first_request + tl.program_id(1), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    known = key < tl.load(spans + request * 2 + 1)
    page = tl.load(block_table + request.to(tl.int64) * table_stride + key // BLOCK_SIZE, mask=known, other=0)
    at = latent_cache + page.to(tl.int64) * page_stride + (key % BLOCK_SIZE) * row_stride
    to = wide + (tl.load(spans + request * 2) + key)[:, None] * (RANK + ROPE)
    dim_p = tl.arange(0, BLOCK_P)[None, :]
    in_p = known[:, None] & (dim_p < ROPE)
    if FP8:
        scales = (at + RANK).to(tl.pointer_type(tl.float32), bitcast=True)
        rotated = (at + RANK + GROUPS * SCALE_BYTES).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    else:
        rotated = at + RANK
    tl.store(to + RANK + dim_p, tl.load(rotated[:, None] + dim_p, mask=in_p, other=0.0).to(wide.dtype.element_ty), in_p)
    for g in tl.static_range(GROUPS):
        dim = g * GROUP + tl.arange(0, GROUP)[None, :]
        in_r = known[:, None] & (dim < RANK)
        if FP8:
            codes = tl.load(at[:, None] + dim, mask=in_r, other=0)
            scale = tl.load(scales + g, mask=known, other=0.0)
            latent = decode(codes, HARDWARE).to(tl.float32) * (scale if HARDWARE else scale * 256.0)[:, None]
        else:
            latent = tl.load(at[:, None] + dim, mask=in_r, other=0.0)
        tl.store(to + dim, latent.to(wide.dtype.element_ty), in_r)


@triton.jit(do_not_specialize=["first_row"])
def _scale_queries_kernel(
    query, scaled, scaled_rope, row_scales, first_row, query_stride_t, query_stride_h,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, HEAD_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Programs (row and block of heads): queries times a power of two that makes their largest value 1 to 2."""
    row = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    head = ((tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    dim, dim_p = tl.arange(0, RANK)[None, :], tl.arange(0, ROPE)[None, :]
    in_h = head < HEADS
    source = query + (first_row + row) * query_stride_t + head * query_stride_h
    q = tl.load(source + dim, mask=in_h, other=0.0).to(tl.float32)
    q_rope = tl.load(source + RANK + dim_p, mask=in_h, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(q), axis=1), tl.max(tl.abs(q_rope), axis=1))[:, None]
    exponent = tl.minimum(tl.maximum(amax.to(tl.int32, bitcast=True) >> 23, 64), 190)
    down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    place = row * HEADS + head
    tl.store(row_scales + place, (exponent << 23).to(tl.float32, bitcast=True), mask=in_h)
    tl.store(scaled + place * RANK + dim, (q * down).to(scaled.dtype.element_ty), mask=in_h)
    tl.store(scaled_rope + place * ROPE + dim_p, (q_rope * down).to(scaled_rope.dtype.element_ty), mask=in_h)


@triton.jit
def _addresses(
    chosen,
    table,
    key,
    last,
    page_stride,
    row_stride,
    PAGED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where latent rows of chosen[key] begin, relative to the cache, or to the request's widened rows. Past the last
    key the last one's is given again, so that no load needs a mask: any other row may hold NaN."""
    position = tl.maximum(tl.load(chosen + tl.maximum(tl.minimum(key, last - 1), 0)), 0)  # no key: anything readable
    if PAGED:
        page = tl.load(table + position // BLOCK_SIZE)
        at = page.to(tl.int64) * page_stride + (position % BLOCK_SIZE) * row_stride
    else:
        at = position * WIDTH
    return at


@triton.jit
def _load(at, dim, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of DIMS values, BLOCK with zeros; without a mask where they are as many."""
    return tl.load(at) if BLOCK == DIMS else tl.load(at, mask=dim < DIMS, other=0.0)


@triton.jit(do_not_specialize=["first_row", "splits_each"])
def _attend_kernel(
    query, query_rope, row_scales, latents, spans, block_table, requests, lengths, selected,
    out, lse, part_values, part_sums, first_row, splits_each, scale,
    query_stride_t, query_stride_h, rope_stride_t, rope_stride_h, page_stride, row_stride, table_stride,
    selected_stride, out_stride_t, out_stride_h,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, TOP_K: tl.constexpr,
    PAGED: tl.constexpr, BLOCK_SIZE: tl.constexpr, FP8: tl.constexpr, HARDWARE: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr,
):  # fmt: skip
    """Programs (row and block of heads, run of splits_each splits); scale is in units of log2. PAGED: latents is the
    cache, else widened rows. FP8: fp8_ds_mla rows, and queries from _scale_queries_kernel."""
    mine = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    row = first_row + mine
    query_row = mine if FP8 else row
    head = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h, dim, dim_p = (head < HEADS)[:, None], tl.arange(0, BLOCK_R)[None, :], tl.arange(0, BLOCK_P)[None, :]
    first = tl.program_id(1) * splits_each * SPLIT_KEYS
    last = tl.minimum(tl.minimum(tl.load(lengths + row), TOP_K), first + splits_each * SPLIT_KEYS)
    chosen = selected + row * selected_stride
    request = tl.load(requests + row).to(tl.int64)
    table = block_table + request * table_stride
    if not PAGED:
        latents += tl.load(spans + request * 2) * (RANK + ROPE)

    at_head = query + query_row * query_stride_t + head[:, None] * query_stride_h
    q = tl.load(at_head + dim, mask=in_h & (dim < RANK), other=0.0)
    at_head = query_rope + query_row * rope_stride_t + head[:, None] * rope_stride_h
    q_rope = tl.load(at_head + dim_p, mask=in_h & (dim_p < ROPE), other=0.0)
    if FP8:
        scale = scale * tl.load(row_scales + mine * HEADS + head, mask=head < HEADS, other=1.0)[:, None]
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    values = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    # Of pages, one tile ahead: the row's loads wait for two others.
    if PAGED:
        key = first + tl.arange(0, BLOCK_K)
        at = _addresses(chosen, table, key, last, page_stride, row_stride, PAGED, BLOCK_SIZE, RANK + ROPE)
    for start in range(first, last, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        if PAGED:
            after = _addresses(
                chosen, table, key + BLOCK_K, last, page_stride, row_stride, PAGED, BLOCK_SIZE, RANK + ROPE
            )
        else:
            at = _addresses(chosen, table, key, last, page_stride, row_stride, PAGED, BLOCK_SIZE, RANK + ROPE)
        source = latents + at[:, None]
        if FP8:
            words = tl.load(source.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, RANK // 4)[None, :])
            scales = (source + RANK).to(tl.pointer_type(tl.float32), bitcast=True)
            scales = tl.load(scales + tl.arange(0, RANK // 128)[None, :])
            latent = decode_words(words, scales, q.dtype, HARDWARE)
            rotated = (source + RANK + RANK // 128 * SCALE_BYTES).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        else:
            latent = _load(source + dim, dim, RANK, BLOCK_R)
            rotated = source + RANK
        rope_keys = _load(rotated + dim_p, dim_p, ROPE, BLOCK_P)
        logits = tl.dot(q, tl.trans(latent), input_precision="ieee")
        logits = tl.dot(q_rope, tl.trans(rope_keys.to(q_rope.dtype)), logits, input_precision="ieee") * scale
        logits = tl.where((key < last)[None, :], logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, axis=1))
        keep = tl.exp2(top - new)
        weights = tl.exp2(logits - new[:, None])
        total = total * keep + tl.sum(weights, axis=1)
        kept = values * keep[:, None]
        values = tl.dot(weights.to(latent.dtype), latent, kept, input_precision="ieee")
        top = new
        if PAGED:
            at = after
        if SPLITS > 1:
            end = start + BLOCK_K
            if (end >= last) | (end % SPLIT_KEYS == 0):
                place = (mine * SPLITS + start // SPLIT_KEYS) * HEADS + head
                tl.store(part_sums + place * 2, top, mask=head < HEADS)
                tl.store(part_sums + place * 2 + 1, total, mask=head < HEADS)
                part = (values / total[:, None]).to(part_values.dtype.element_ty)
                tl.store(part_values + place[:, None] * RANK + dim, part, mask=in_h & (dim < RANK))
                top = tl.full([BLOCK_H], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK_H], tl.float32)
                values = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    if SPLITS == 1:
        _finish(
            top, total, values, out + row * out_stride_t, lse + row * HEADS, head, out_stride_h, HEADS, RANK, BLOCK_R
        )


@triton.jit(do_not_specialize=["first_row"])
def _merge_kernel(
    part_values, part_sums, lengths, out, lse, first_row, out_stride_t, out_stride_h,
    HEADS: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr, HEAD_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr, SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr,
):  # fmt: skip
    """Programs (row and block of heads): parts, each divided by its sum of weights, in order."""
    mine = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    row = first_row + mine
    head = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_R)[None, :]
    count = tl.minimum(tl.load(lengths + row), TOP_K)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        place = (mine * SPLITS + split) * HEADS + head
        there = head < tl.where(split * SPLIT_KEYS < count, HEADS, 0)
        top = tl.maximum(top, tl.load(part_sums + place * 2, mask=there, other=float("-inf")))
    at_least = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_H], tl.float32)
    values = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    for split in tl.static_range(SPLITS):
        place = (mine * SPLITS + split) * HEADS + head
        there = head < tl.where(split * SPLIT_KEYS < count, HEADS, 0)
        part_top = tl.load(part_sums + place * 2, mask=there, other=float("-inf"))
        weight = tl.load(part_sums + place * 2 + 1, mask=there, other=0.0) * tl.exp2(part_top - at_least)
        part = tl.load(part_values + place[:, None] * RANK + dim, mask=there[:, None] & (dim < RANK), other=0.0)
        values += part.to(tl.float32) * weight[:, None]
        total += weight
    _finish(top, total, values, out + row * out_stride_t, lse + row * HEADS, head, out_stride_h, HEADS, RANK, BLOCK_R)


def _spans(rows: Rows) -> torch.Tensor:
    """[requests, 2] int64: the first widened row of each prefill request within its part, and how many it has."""

    def make() -> torch.Tensor:
        spans = [(0, 0)] * max(1, len(rows.ends))
        for part in prefill_parts(rows, WIDE_ROWS):
            spans[part.requests] = [(first, last - first) for first, last in pairwise(part.bounds)]
        return to_device(spans, torch.int64, rows.lengths.device)

    return rows.once("spans", make)


def workspace(request: Any, tokens: int) -> int:
    """Bytes that select or attend may take; neither grows with the rows. A request longer than WIDE_ROWS takes more."""
    selecting = (envs.VLLM_DSA_SCORE_BUDGET_MB << 20) + PLACES_BYTES
    widened = WIDE_ROWS * (request.kv_lora_rank + request.rope_dim) * request.dtype.itemsize
    parts = 9 * PART_BYTES // 4  # and, of fp8_ds_mla, the scaled queries
    return max(selecting, widened, parts)


def attend(
    query: torch.Tensor, latent_cache: torch.Tensor, rows: Rows, selected: torch.Tensor, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """Softmax attention of every row over its selected latent rows; returns the log-sum-exp."""
    lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    attend_decodes(query, latent_cache, rows, selected, scale, out, lse)
    attend_prefills(query, latent_cache, rows, selected, scale, out, lse)
    return lse


def attend_decodes(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """attend of the step's decodes; all tensors are the whole step's."""
    _, heads, rank = out.shape
    config = triton_configs.attend_decodes(out.device, latent_cache.dtype, query.dtype, heads, selected.shape[1])
    each = max(1, PART_BYTES // (out.itemsize * config.splits * heads * rank))
    for first in range(0, rows.decodes, each):
        mine = slice(first, min(first + each, rows.decodes))
        _attend(query, latent_cache, rows, mine, selected, scale, out, lse, config, None)


def attend_prefills(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """attend of the step's prefills; all tensors are the whole step's."""
    tokens, heads, rank = out.shape
    if rows.decodes >= tokens:
        return
    config = triton_configs.attend_prefills(out.device, query.dtype, heads)
    spans = _spans(rows)
    for part in prefill_parts(rows, WIDE_ROWS):
        wide = _widen(latent_cache, rows, part, spans, query.shape[2], rank, query.dtype)
        _attend(query, wide, rows, part.rows, selected, scale, out, lse, config, spans)
        del wide  # before the next is made


def _widen(
    latent_cache: torch.Tensor,
    rows: Rows,
    part: Part,
    spans: torch.Tensor,
    width: int,
    rank: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Latent rows [keys, R + P] of a part's requests."""
    keys, longest = part.bounds[-1], max(rows.ends[part.requests], default=0)
    wide = torch.empty(keys, width, dtype=dtype, device=latent_cache.device)
    group = min(cache.LATENT_GROUP, triton.next_power_of_2(rank))
    block = 32
    if keys:
        _widen_kernel[(triton.cdiv(longest, block), part.requests.stop - part.requests.start)](
            latent_cache,
            rows.block_table,
            spans,
            wide,
            part.requests.start,
            *latent_cache.stride()[:2],
            rows.block_table.stride(0),
            RANK=rank,
            ROPE=width - rank,
            BLOCK_SIZE=rows.block_size,
            FP8=latent_cache.dtype == torch.uint8,
            HARDWARE=triton_configs.hardware_e4m3(wide.device),
            GROUPS=triton.cdiv(rank, group),
            GROUP=group,
            BLOCK_P=max(16, triton.next_power_of_2(width - rank)),
            BLOCK_K=block,
            num_warps=4,
        )
    return wide


def _attend(
    query: torch.Tensor,
    latents: torch.Tensor,
    rows: Rows,
    mine: slice,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    config: triton_configs.Attend,
    spans: torch.Tensor | None,
) -> None:
    """Rows ``mine`` of a step: over the pages ``latents``, or, where spans says which, over widened rows."""
    # Tensors are passed whole: where a slice begins would decide how its address is aligned, and that what is compiled.
    tokens, (_, heads, rank) = mine.stop - mine.start, out.shape
    rope_dim = query.shape[2] - rank
    paged = spans is None
    fp8 = paged and latents.dtype == torch.uint8
    q, q_rope, row_scales = query, query[..., rank:], lse
    if fp8:
        q, q_rope, row_scales = _scaled_queries(query, mine, heads, rank)
    part_values = part_sums = lse
    if config.splits > 1:
        kept = torch.float32 if out.dtype == torch.float32 else torch.float16
        part_values = torch.empty(tokens, config.splits, heads, rank, dtype=kept, device=out.device)
        part_sums = torch.empty(tokens, config.splits, heads, 2, dtype=torch.float32, device=out.device)
    head_blocks = triton.cdiv(heads, config.block_heads)
    block_rank = max(16, triton.next_power_of_2(rank))
    each = triton_configs.splits_each(out.device, config, tokens * head_blocks)
    split_keys = triton.cdiv(selected.shape[1], config.splits * config.block_keys) * config.block_keys
    _attend_kernel[(tokens * head_blocks, config.splits // each)](
        q,
        q_rope,
        row_scales,
        latents,
        rows.lengths if paged else spans,
        rows.block_table,
        rows.requests,
        rows.lengths,
        selected,
        out,
        lse,
        part_values,
        part_sums,
        mine.start,
        each,
        scale / math.log(2),
        *q.stride()[:2],
        *q_rope.stride()[:2],
        *(latents.stride()[:2] if paged else (0, 0)),
        rows.block_table.stride(0),
        selected.stride(0),
        *out.stride()[:2],
        HEADS=heads,
        RANK=rank,
        ROPE=rope_dim,
        TOP_K=selected.shape[1],
        PAGED=paged,
        BLOCK_SIZE=rows.block_size,
        FP8=fp8,
        HARDWARE=triton_configs.hardware_e4m3(out.device),
        HEAD_BLOCKS=head_blocks,
        BLOCK_H=config.block_heads,
        BLOCK_R=block_rank,
        BLOCK_P=max(16, triton.next_power_of_2(rope_dim)),
        BLOCK_K=config.block_keys,
        SPLITS=config.splits,
        SPLIT_KEYS=split_keys,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if config.splits > 1:
        block_heads = min(4, triton.next_power_of_2(heads))
        _merge_kernel[(tokens * triton.cdiv(heads, block_heads),)](
            part_values,
            part_sums,
            rows.lengths,
            out,
            lse,
            mine.start,
            *out.stride()[:2],
            HEADS=heads,
            RANK=rank,
            TOP_K=selected.shape[1],
            HEAD_BLOCKS=triton.cdiv(heads, block_heads),
            BLOCK_H=block_heads,
            BLOCK_R=block_rank,
            SPLITS=config.splits,
            SPLIT_KEYS=split_keys,
            num_warps=4,
        )


def _scaled_queries(
    query: torch.Tensor, mine: slice, heads: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of rows ``mine``, queries float16 and bfloat16 (or both float32), and what to multiply their products by."""
    tokens, device, full = mine.stop - mine.start, query.device, query.dtype == torch.float32
    scaled = torch.empty(tokens, heads, rank, dtype=query.dtype if full else torch.float16, device=device)
    rope_dtype = query.dtype if full else torch.bfloat16
    scaled_rope = torch.empty(tokens, heads, query.shape[2] - rank, dtype=rope_dtype, device=device)
    row_scales = torch.empty(tokens, heads, dtype=torch.float32, device=device)
    block = min(4, triton.next_power_of_2(heads))
    _scale_queries_kernel[(tokens * triton.cdiv(heads, block),)](
        query,
        scaled,
        scaled_rope,
        row_scales,
        mine.start,
        *query.stride()[:2],
        HEADS=heads,
        RANK=rank,
        ROPE=query.shape[2] - rank,
        HEAD_BLOCKS=triton.cdiv(heads, block),
        BLOCK_H=block,
        num_warps=4,
    )
    return scaled, scaled_rope, row_scales
