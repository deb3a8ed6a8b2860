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

LATENT_GROUP = tl.constexpr(cache.LATENT_GROUP)
SCALE_BYTES = tl.constexpr(cache.SCALE_BYTES)


@triton.jit
def _merge(top, total, values, part_top, part_total, part_values):
    """Running maximum [n], sum of weights [n] and weighted values [n, R] of two parts, as of one."""
    new = tl.maximum(top, part_top)
    at = tl.where(new == float("-inf"), 0.0, new)
    keep, add = tl.exp2(top - at), tl.exp2(part_top - at)
    values = tl.fma(part_values, add[:, None], values * keep[:, None])
    return new, tl.fma(part_total, add, total * keep), values


@triton.jit
def _finish(top, total, values):
    """Output [n, R] and natural log-sum-exp [n]; 0 and -inf where nothing was selected."""
    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    lse = tl.where(some, (top + tl.log2(divisor)) * 0.6931471805599453, float("-inf"))
    return values / divisor[:, None], lse


@triton.jit(do_not_specialize=["splits_each"])
def _attend_kernel(
    query, latent_cache, requests, lengths, block_table, selected, out, lse, part_values, part_sums,
    scale, splits_each, query_stride_t, query_stride_h, page_stride, row_stride, table_stride, selected_stride,
    out_stride_t, out_stride_h,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, TOP_K: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr, HARDWARE: tl.constexpr, COMPUTE: tl.constexpr, HEAD_BLOCKS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, SPLIT_KEYS: tl.constexpr,
):  # fmt: skip
    """Programs (row and block of heads, run of splits_each splits); scale is in units of log2."""
    row = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    head = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    first_split = tl.program_id(1) * splits_each
    in_h = head < HEADS
    dim, dim_p = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    in_r, in_p = dim < RANK, dim_p < ROPE

    source = query + row * query_stride_t + head[:, None] * query_stride_h
    q = tl.load(source + dim[None, :], mask=in_h[:, None] & in_r[None, :], other=0.0)
    q_rope = tl.load(source + RANK + dim_p[None, :], mask=in_h[:, None] & in_p[None, :], other=0.0)
    row_scale = tl.full([BLOCK_H], 1.0, tl.float32) * scale
    if FP8:
        amax = tl.maximum(
            tl.max(tl.abs(q.to(tl.float32)), axis=1), tl.max(tl.abs(q_rope.to(tl.float32)), axis=1)
        )
        exponent = tl.minimum(tl.maximum(amax.to(tl.int32, bitcast=True) >> 23, 64), 190)
        down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        row_scale = row_scale * (exponent << 23).to(tl.float32, bitcast=True)
        q = (q.to(tl.float32) * down[:, None]).to(COMPUTE)
        q_rope = (q_rope.to(tl.float32) * down[:, None]).to(tl.bfloat16 if COMPUTE == tl.float16 else COMPUTE)

    count = tl.minimum(tl.load(lengths + row), TOP_K)  # no row selects more
    table = block_table + tl.load(requests + row).to(tl.int64) * table_stride
    chosen = selected + row * selected_stride

    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    values = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    for split in range(first_split, first_split + splits_each):
        part_top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        part_total = tl.zeros([BLOCK_H], tl.float32)
        part = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
        for start in range(split * SPLIT_KEYS, tl.minimum((split + 1) * SPLIT_KEYS, count), BLOCK_K):
            key = start + tl.arange(0, BLOCK_K)
            position = tl.load(chosen + key, mask=key < count, other=-1)
            known = position >= 0
            position = tl.where(known, position, 0)
            page = tl.load(table + position // BLOCK_SIZE, mask=known, other=0)
            at = latent_cache + page.to(tl.int64) * page_stride + (position % BLOCK_SIZE) * row_stride  # [BLOCK_K]
            if FP8:
                group, within = tl.arange(0, BLOCK_R // LATENT_GROUP), tl.arange(0, LATENT_GROUP)
                byte = group[:, None] * LATENT_GROUP + within[None, :]
                codes = tl.load(at[:, None, None] + byte[None, :, :], mask=known[:, None, None], other=0)
                scales = (at + RANK).to(tl.pointer_type(tl.float32), bitcast=True)
                each = tl.load(scales[:, None] + group[None, :], mask=known[:, None], other=0.0)
                each = (each if HARDWARE else each * 256.0).to(COMPUTE)
                latents = tl.reshape(decode(codes, HARDWARE).to(COMPUTE) * each[:, :, None], [BLOCK_K, BLOCK_R])
                rotated = (at + RANK + BLOCK_R // LATENT_GROUP * SCALE_BYTES).to(
                    tl.pointer_type(tl.bfloat16), bitcast=True
                )
            else:
                latents = tl.load(at[:, None] + dim[None, :], mask=known[:, None] & in_r[None, :], other=0.0)
                rotated = at + RANK
            rope_keys = tl.load(rotated[:, None] + dim_p[None, :], mask=known[:, None] & in_p[None, :], other=0.0)
            logits = tl.dot(q, tl.trans(latents), input_precision="ieee")
            logits = tl.dot(q_rope, tl.trans(rope_keys.to(q_rope.dtype)), logits, input_precision="ieee")
            logits = tl.where(known[None, :], logits * row_scale[:, None], float("-inf"))

            new = tl.maximum(part_top, tl.max(logits, axis=1))
            at_least = tl.where(new == float("-inf"), 0.0, new)
            keep = tl.exp2(part_top - at_least)
            p = tl.exp2(logits - at_least[:, None])
            part_total = part_total * keep + tl.sum(p, axis=1)
            part = tl.dot(p.to(latents.dtype), latents, part * keep[:, None], input_precision="ieee")
            part_top = new
        top, total, values = _merge(top, total, values, part_top, part_total, part)

    if splits_each == SPLITS:
        result, sums = _finish(top, total, values)
        target = out + row * out_stride_t + head[:, None] * out_stride_h + dim[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=in_h[:, None] & in_r[None, :])
        tl.store(lse + row * HEADS + head, sums, mask=in_h)
    else:
        place = (row * SPLITS + first_split) * HEADS + head
        tl.store(part_sums + place * 2, top, mask=in_h)
        tl.store(part_sums + place * 2 + 1, total, mask=in_h)
        some = (top > float("-inf")) & in_h
        part_target = part_values + place[:, None] * RANK + dim[None, :]
        tl.store(part_target, values, mask=some[:, None] & in_r[None, :])


@triton.jit
def _merge_kernel(
    part_values, part_sums, out, lse, out_stride_t, out_stride_h,
    HEADS: tl.constexpr, RANK: tl.constexpr, HEAD_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Programs (row and block of heads)."""
    row = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    head = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_R)
    in_h, in_r = head < HEADS, dim < RANK
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    values = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    for split in range(0, SPLITS):
        place = (row * SPLITS + split) * HEADS + head
        part_top = tl.load(part_sums + place * 2, mask=in_h, other=float("-inf"))
        part_total = tl.load(part_sums + place * 2 + 1, mask=in_h, other=0.0)
        some = part_top > float("-inf")  # of the others no values were stored
        part = tl.load(part_values + place[:, None] * RANK + dim[None, :], mask=some[:, None] & in_r[None, :], other=0.0)
        top, total, values = _merge(top, total, values, part_top, part_total, part)
    result, sums = _finish(top, total, values)
    target = out + row * out_stride_t + head[:, None] * out_stride_h + dim[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=in_h[:, None] & in_r[None, :])
    tl.store(lse + row * HEADS + head, sums, mask=in_h)


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
        HEAD_BLOCKS=head_blocks,
        BLOCK_H=config.block_heads,
        BLOCK_R=triton.next_power_of_2(rank),
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
            HEAD_BLOCKS=blocks,
            BLOCK_H=merge_heads,
            BLOCK_R=triton.next_power_of_2(rank),
            SPLITS=config.splits,
            num_warps=4,
        )
    return lse
