"""attend on GPUs: gather the selected latent rows through the block table and attend. Contracts: ``vllm_dsa.kernels``.

A row's selection is cut into ``splits`` parts, a number that depends on the layer's shape alone. Each part is attended
to on its own and merged in order. One program may take all parts of its row and heads, or one part only, a second
kernel merging these: the choice follows the number of rows, the arithmetic does not, and so the bits do not either.

Over an fp8_ds_mla cache the dot products are float16, which holds a code times its power-of-two scale exactly; queries
are first multiplied by a power of two, head by head, so that they fit. Other scales are rounded to 11 bits. The rotated
part is a second dot product, in bfloat16. Over other caches all is in their own dtype. Accumulation is float32.
"""

import math

import torch
import triton
import triton.language as tl

from vllm_dsa import cache
from vllm_dsa.kernels import triton_configs
from vllm_dsa.kernels.triton_e4m3 import decode
from vllm_dsa.metadata import Rows

SCALE_BYTES = tl.constexpr(cache.SCALE_BYTES)


@triton.jit
def _nothing(BLOCK_H: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """What attending to no key gives: maximum [n], sum of weights [n] and weighted values, GROUPS times [n, GROUP]."""
    values = ()
    for _ in tl.static_range(GROUPS):
        values = values + (tl.zeros([BLOCK_H, GROUP], tl.float32),)
    return tl.full([BLOCK_H], float("-inf"), tl.float32), tl.zeros([BLOCK_H], tl.float32), values


@triton.jit
def _merge(top, total, values, part_top, part_total, part, GROUPS: tl.constexpr):
    """Two parts as one. Exact where either is of no key."""
    new = tl.maximum(top, part_top)
    at_least = tl.where(new == float("-inf"), 0.0, new)
    keep, add = tl.exp2(top - at_least), tl.exp2(part_top - at_least)
    merged = ()
    for g in tl.static_range(GROUPS):
        merged = merged + (tl.fma(part[g], add[:, None], values[g] * keep[:, None]),)
    return new, tl.fma(part_total, add, total * keep), merged


@triton.jit
def _store(
    top, total, values, out, lse, head,
    HEADS: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Output at pointers out [n, 1] and natural log-sum-exp at lse [n]; 0 and -inf where no key was selected."""
    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    tl.store(lse, tl.where(some, (top + tl.log2(divisor)) * 0.6931471805599453, float("-inf")), mask=head < HEADS)
    for g in tl.static_range(GROUPS):
        dim = g * GROUP + tl.arange(0, GROUP)[None, :]
        result = (values[g] / divisor[:, None]).to(out.dtype.element_ty)
        tl.store(out + dim, result, mask=(head < HEADS)[:, None] & (dim < RANK))


@triton.jit
def _attend_part(
    q, q_rope, row_scale, latent_cache, table, chosen, first, last, page_stride, row_stride,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, FP8: tl.constexpr, HARDWARE: tl.constexpr,
    COMPUTE: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Attend to chosen[first:last]."""
    within, dim_p = tl.arange(0, GROUP)[None, :], tl.arange(0, BLOCK_P)[None, :]
    top, total, values = _nothing(BLOCK_H, GROUPS, GROUP)
    for start in range(first, last, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        position = tl.load(chosen + key, mask=key < last, other=-1)
        known = position >= 0
        position = tl.where(known, position, 0)
        page = tl.load(table + position // BLOCK_SIZE, mask=known, other=0)
        at = latent_cache + page.to(tl.int64) * page_stride + (position % BLOCK_SIZE) * row_stride  # [BLOCK_K]
        if FP8:
            scales = (at + RANK).to(tl.pointer_type(tl.float32), bitcast=True)
            rotated = (at + RANK + GROUPS * SCALE_BYTES).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        else:
            rotated = at + RANK
        rope_keys = tl.load(rotated[:, None] + dim_p, mask=known[:, None] & (dim_p < ROPE), other=0.0)
        logits = tl.dot(q_rope, tl.trans(rope_keys.to(q_rope.dtype)), input_precision="ieee")
        latents = ()
        for g in tl.static_range(GROUPS):
            if FP8:
                codes = tl.load(at[:, None] + g * GROUP + within, mask=known[:, None], other=0)
                scale = tl.load(scales + g, mask=known, other=0.0)
                scale = (scale if HARDWARE else scale * 256.0).to(COMPUTE)
                latent = decode(codes, HARDWARE).to(COMPUTE) * scale[:, None]
            else:
                dim = g * GROUP + within
                latent = tl.load(at[:, None] + dim, mask=known[:, None] & (dim < RANK), other=0.0)
            logits = tl.dot(q[g], tl.trans(latent), logits, input_precision="ieee")
            latents = latents + (latent,)
        logits = tl.where(known[None, :], logits * row_scale[:, None], float("-inf"))

        new = tl.maximum(top, tl.max(logits, axis=1))
        at_least = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.exp2(top - at_least)
        weights = tl.exp2(logits - at_least[:, None])
        total = total * keep + tl.sum(weights, axis=1)
        summed = ()
        for g in tl.static_range(GROUPS):
            kept = values[g] * keep[:, None]
            summed = summed + (tl.dot(weights.to(latents[g].dtype), latents[g], kept, input_precision="ieee"),)
        values = summed
        top = new
    return top, total, values


@triton.jit(do_not_specialize=["splits_each"])
def _attend_kernel(
    query, latent_cache, requests, lengths, block_table, selected, out, lse, part_values, part_sums,
    scale, splits_each, query_stride_t, query_stride_h, page_stride, row_stride, table_stride, selected_stride,
    out_stride_t, out_stride_h,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, TOP_K: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr, HARDWARE: tl.constexpr, COMPUTE: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr,
):  # fmt: skip
    """Programs (row and block of heads, run of splits_each splits); scale is in units of log2."""
    row = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    head = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    first_split = tl.program_id(1) * splits_each
    in_h, dim_p = (head < HEADS)[:, None], tl.arange(0, BLOCK_P)[None, :]

    source = query + row * query_stride_t + head[:, None] * query_stride_h
    q_rope = tl.load(source + RANK + dim_p, mask=in_h & (dim_p < ROPE), other=0.0)
    row_scale = tl.full([BLOCK_H], 1.0, tl.float32) * scale
    q = ()
    for g in tl.static_range(GROUPS):
        dim = g * GROUP + tl.arange(0, GROUP)[None, :]
        q = q + (tl.load(source + dim, mask=in_h & (dim < RANK), other=0.0),)
    if FP8:
        amax = tl.max(tl.abs(q_rope.to(tl.float32)), axis=1)
        for g in tl.static_range(GROUPS):
            amax = tl.maximum(amax, tl.max(tl.abs(q[g].to(tl.float32)), axis=1))
        exponent = tl.minimum(tl.maximum(amax.to(tl.int32, bitcast=True) >> 23, 64), 190)
        row_scale = row_scale * (exponent << 23).to(tl.float32, bitcast=True)
        down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        q_rope = (q_rope.to(tl.float32) * down).to(tl.bfloat16 if tl.float16 == COMPUTE else COMPUTE)
        scaled = ()
        for g in tl.static_range(GROUPS):
            scaled = scaled + ((q[g].to(tl.float32) * down).to(COMPUTE),)
        q = scaled

    count = tl.minimum(tl.load(lengths + row), TOP_K)  # no row selects more
    table = block_table + tl.load(requests + row).to(tl.int64) * table_stride
    chosen = selected + row * selected_stride
    if SPLITS == 1:
        top, total, values = _attend_part(
            q, q_rope, row_scale, latent_cache, table, chosen, 0, count, page_stride, row_stride,
            RANK, ROPE, BLOCK_SIZE, FP8, HARDWARE, COMPUTE, GROUPS, GROUP, BLOCK_H, BLOCK_P, BLOCK_K,
        )  # fmt: skip
    else:
        top, total, values = _nothing(BLOCK_H, GROUPS, GROUP)
        for split in range(first_split, first_split + splits_each):
            part_top, part_total, part = _attend_part(
                q, q_rope, row_scale, latent_cache, table, chosen,
                split * SPLIT_KEYS, tl.minimum((split + 1) * SPLIT_KEYS, count), page_stride, row_stride,
                RANK, ROPE, BLOCK_SIZE, FP8, HARDWARE, COMPUTE, GROUPS, GROUP, BLOCK_H, BLOCK_P, BLOCK_K,
            )  # fmt: skip
            top, total, values = _merge(top, total, values, part_top, part_total, part, GROUPS)

    if splits_each == SPLITS:
        target = out + row * out_stride_t + head[:, None] * out_stride_h
        _store(top, total, values, target, lse + row * HEADS + head, head, HEADS, RANK, GROUPS, GROUP)
    else:
        place = (row * SPLITS + first_split) * HEADS + head
        tl.store(part_sums + place * 2, top, mask=head < HEADS)
        tl.store(part_sums + place * 2 + 1, total, mask=head < HEADS)
        some = (top > float("-inf"))[:, None] & in_h
        for g in tl.static_range(GROUPS):
            part_dim = g * GROUP + tl.arange(0, GROUP)[None, :]
            tl.store(part_values + place[:, None] * RANK + part_dim, values[g], mask=some & (part_dim < RANK))


@triton.jit
def _merge_kernel(
    part_values, part_sums, out, lse, out_stride_t, out_stride_h,
    HEADS: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Programs (row and block of heads)."""
    row = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    head = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h = head < HEADS
    top, total, values = _nothing(BLOCK_H, GROUPS, GROUP)
    for split in range(0, SPLITS):
        place = (row * SPLITS + split) * HEADS + head
        part_top = tl.load(part_sums + place * 2, mask=in_h, other=float("-inf"))
        part_total = tl.load(part_sums + place * 2 + 1, mask=in_h, other=0.0)
        some = (part_top > float("-inf"))[:, None]  # of the others no values were stored
        part = ()
        for g in tl.static_range(GROUPS):
            dim = g * GROUP + tl.arange(0, GROUP)[None, :]
            part = part + (tl.load(part_values + place[:, None] * RANK + dim, mask=some & (dim < RANK), other=0.0),)
        top, total, values = _merge(top, total, values, part_top, part_total, part, GROUPS)
    target = out + row * out_stride_t + head[:, None] * out_stride_h
    _store(top, total, values, target, lse + row * HEADS + head, head, HEADS, RANK, GROUPS, GROUP)


def attend(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Softmax attention of every row over its selected latent rows; returns the log-sum-exp."""
    tokens, heads, rank = out.shape
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=out.device)
    if not tokens:
        return lse
    fp8 = latent_cache.dtype == torch.uint8
    top_k, rope_dim = selected.shape[1], query.shape[2] - rank
    config = triton_configs.attend(out.device, latent_cache.dtype, query.dtype, heads, top_k)
    group = min(cache.LATENT_GROUP, triton.next_power_of_2(rank))
    head_blocks = triton.cdiv(heads, config.block_heads)
    together = config.splits == 1 or tokens * head_blocks >= config.whole_rows
    if together:
        part_values = part_sums = lse
    else:
        part_values = torch.empty(tokens, config.splits, heads, rank, dtype=torch.float32, device=out.device)
        part_sums = torch.empty(tokens, config.splits, heads, 2, dtype=torch.float32, device=out.device)
    _attend_kernel[(tokens * head_blocks, 1 if together else config.splits)](
        query,
        latent_cache,
        rows.requests,
        rows.lengths,
        rows.block_table,
        selected,
        out,
        lse,
        part_values,
        part_sums,
        scale / math.log(2),
        config.splits if together else 1,
        *query.stride()[:2],
        *latent_cache.stride()[:2],
        rows.block_table.stride(0),
        selected.stride(0),
        *out.stride()[:2],
        HEADS=heads,
        RANK=rank,
        ROPE=rope_dim,
        TOP_K=top_k,
        BLOCK_SIZE=rows.block_size,
        FP8=fp8,
        HARDWARE=config.hardware_e4m3,
        COMPUTE=tl.float32 if query.dtype == torch.float32 else tl.float16,
        GROUPS=triton.cdiv(rank, group),
        GROUP=group,
        HEAD_BLOCKS=head_blocks,
        BLOCK_H=config.block_heads,
        BLOCK_P=max(16, triton.next_power_of_2(rope_dim)),
        BLOCK_K=config.block_keys,
        SPLITS=config.splits,
        SPLIT_KEYS=config.split_keys,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if not together:
        merge_heads = min(config.merge_heads, config.block_heads)
        blocks = triton.cdiv(heads, merge_heads)
        _merge_kernel[(tokens * blocks,)](
            part_values,
            part_sums,
            out,
            lse,
            *out.stride()[:2],
            HEADS=heads,
            RANK=rank,
            GROUPS=triton.cdiv(rank, group),
            GROUP=group,
            HEAD_BLOCKS=blocks,
            BLOCK_H=merge_heads,
            SPLITS=config.splits,
            num_warps=4,
        )
    return lse
