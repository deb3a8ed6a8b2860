"""attend on GPUs: gather the selected latent rows through the block table and attend. Contracts: ``vllm_dsa.kernels``.

A row's selection is cut into ``splits`` parts, a number that depends on the layer's shape alone. Each part is attended
to on its own and merged in order. One program may take all parts of its row and heads, or one part only, a second
kernel merging these: the choice follows the number of rows, the arithmetic does not, and so the bits do not either.

Over an fp8_ds_mla cache the dot products are float16, which holds a code times its power-of-two scale exactly; queries
are first multiplied by a power of two, head by head, so that they fit. Other scales are rounded to 11 bits. The rotated
part is a second dot product, in bfloat16. Over other caches all is in their own dtype. Accumulation is float32.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_dsa import cache
from vllm_dsa.kernels import triton_configs
from vllm_dsa.kernels.triton_e4m3 import decode
from vllm_dsa.metadata import Rows

SCALE_BYTES = tl.constexpr(cache.SCALE_BYTES)
WIDE_ROWS = 1 << 18  # latent rows widened at a time: 302 MB


@triton.jit
def _nothing(BLOCK_H: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """What attending to no key gives: maximum [n], sum of weights [n] and weighted values, GROUPS times [n, GROUP]."""
    values = ()
    for _ in tl.static_range(GROUPS):
        values = values + (tl.zeros([BLOCK_H, GROUP], tl.float32),)
    return tl.full([BLOCK_H], float("-inf"), tl.float32), tl.zeros([BLOCK_H], tl.float32), values


@triton.jit
def _add(top, total, values, part_top, part_total, part, GROUPS: tl.constexpr):
    """Two parts as one. Exact where either is of no key."""
    new = tl.maximum(top, part_top)
    at_least = tl.where(new == float("-inf"), 0.0, new)
    keep, add = tl.exp2(top - at_least), tl.exp2(part_top - at_least)
    merged = ()
    for g in tl.static_range(GROUPS):
        merged = merged + (tl.fma(part[g], add[:, None], values[g] * keep[:, None]),)
    return new, tl.fma(part_total, add, total * keep), merged


@triton.jit
def _finish(
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


@triton.jit
def _widen_kernel(
    latent_cache, block_table, requests, spans, selected, wide, page_stride, row_stride, table_stride, selected_stride,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, FP8: tl.constexpr, HARDWARE: tl.constexpr,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Cached rows as plain ones, RANK + ROPE wide. TOP_K 0: programs (block of keys, request), all keys of the request
    to where spans says. Else programs (block of keys, row), the row's selected keys to row * TOP_K and on."""
    line, key = tl.program_id(1), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    if TOP_K:
        target = line.to(tl.int64) * TOP_K
        position = tl.load(selected + line.to(tl.int64) * selected_stride + key, mask=key < TOP_K, other=-1)
        known = position >= 0
        line = tl.load(requests + line)
    else:
        target = tl.load(spans + line * 2)
        position = key
        known = key < tl.load(spans + line * 2 + 1)
    page = tl.load(block_table + line.to(tl.int64) * table_stride + position // BLOCK_SIZE, mask=known, other=0)
    at = latent_cache + page.to(tl.int64) * page_stride + (position % BLOCK_SIZE) * row_stride
    to = wide + (target + key)[:, None] * (RANK + ROPE)
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


@triton.jit
def _wide_kernel(
    query, wide, spans, requests, lengths, selected, out, lse, part_values, part_sums, scale,
    query_stride_t, query_stride_h, selected_stride, out_stride_t, out_stride_h,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, TOP_K: tl.constexpr, COMPACT: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Attend to rows that _widen_kernel made; programs (row and block of heads, split); scale is in units of log2.

    COMPACT: the row's own selected keys lie one behind the other. KEYS_FIRST: products are [keys, heads] and
    [dims, heads], so that few heads fill the long side of a tensor core's tile no worse than many.
    """
    row = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    head = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h, dim, dim_p = head < HEADS, tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    split = tl.program_id(1)
    first = split * SPLIT_KEYS
    last = tl.minimum(tl.minimum(tl.load(lengths + row), TOP_K), first + SPLIT_KEYS)
    chosen = selected + row * selected_stride
    if COMPACT:
        base = wide + row * (TOP_K * (RANK + ROPE))
    else:
        base = wide + tl.load(spans + tl.load(requests + row) * 2) * (RANK + ROPE)

    source = query + row * query_stride_t
    if KEYS_FIRST:
        at_head = head[None, :] * query_stride_h
        q = tl.load(source + at_head + dim[:, None], mask=in_h[None, :] & (dim < RANK)[:, None], other=0.0)
        in_p = in_h[None, :] & (dim_p < ROPE)[:, None]
        q_rope = tl.load(source + at_head + RANK + dim_p[:, None], mask=in_p, other=0.0)
        values = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    else:
        at_head = head[:, None] * query_stride_h
        q = tl.load(source + at_head + dim[None, :], mask=in_h[:, None] & (dim < RANK)[None, :], other=0.0)
        in_p = in_h[:, None] & (dim_p < ROPE)[None, :]
        q_rope = tl.load(source + at_head + RANK + dim_p[None, :], mask=in_p, other=0.0)
        values = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for start in range(first, last, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        known = key < last
        # Past the last key the last one is read again, so that no load has a mask: any other row may hold NaN.
        position = tl.minimum(key, last - 1)
        if not COMPACT:
            position = tl.load(chosen + position)
        at = base + (position * (RANK + ROPE))[:, None]
        if BLOCK_R == RANK:
            latent = tl.load(at + dim[None, :])
        else:
            latent = tl.load(at + dim[None, :], mask=(dim < RANK)[None, :], other=0.0)
        if BLOCK_P == ROPE:
            rotated = tl.load(at + RANK + dim_p[None, :])
        else:
            rotated = tl.load(at + RANK + dim_p[None, :], mask=(dim_p < ROPE)[None, :], other=0.0)
        if KEYS_FIRST:
            logits = tl.dot(latent, q, input_precision="ieee")
            logits = tl.dot(rotated, q_rope, logits, input_precision="ieee") * scale
            logits = tl.where(known[:, None], logits, float("-inf"))
            new = tl.maximum(top, tl.max(logits, axis=0))
            keep = tl.exp2(top - new)
            weights = tl.exp2(logits - new[None, :])
            total = total * keep + tl.sum(weights, axis=0)
            kept = values * keep[None, :]
            values = tl.dot(tl.trans(latent), weights.to(latent.dtype), kept, input_precision="ieee")
        else:
            logits = tl.dot(q, tl.trans(latent), input_precision="ieee")
            logits = tl.dot(q_rope, tl.trans(rotated), logits, input_precision="ieee") * scale
            logits = tl.where(known[None, :], logits, float("-inf"))
            new = tl.maximum(top, tl.max(logits, axis=1))
            keep = tl.exp2(top - new)
            weights = tl.exp2(logits - new[:, None])
            total = total * keep + tl.sum(weights, axis=1)
            kept = values * keep[:, None]
            values = tl.dot(weights.to(latent.dtype), latent, kept, input_precision="ieee")
        top = new

    if tl.num_programs(1) == 1:
        some = total > 0.0
        divisor = tl.where(some, total, 1.0)
        value = tl.where(some, (top + tl.log2(divisor)) * 0.6931471805599453, float("-inf"))
        tl.store(lse + row * HEADS + head, value, mask=in_h)
        target = out + row * out_stride_t
        if KEYS_FIRST:
            result = (values / divisor[None, :]).to(out.dtype.element_ty)
            mask = in_h[None, :] & (dim < RANK)[:, None]
            tl.store(target + head[None, :] * out_stride_h + dim[:, None], result, mask=mask)
        else:
            result = (values / divisor[:, None]).to(out.dtype.element_ty)
            mask = in_h[:, None] & (dim < RANK)[None, :]
            tl.store(target + head[:, None] * out_stride_h + dim[None, :], result, mask=mask)
    else:
        place = (row * tl.num_programs(1) + split) * HEADS + head
        tl.store(part_sums + place * 2, top, mask=in_h)
        tl.store(part_sums + place * 2 + 1, total, mask=in_h)
        some = in_h & (top > float("-inf"))
        if KEYS_FIRST:
            mask = some[None, :] & (dim < RANK)[:, None]
            tl.store(part_values + place[None, :] * RANK + dim[:, None], values, mask=mask)
        else:
            mask = some[:, None] & (dim < RANK)[None, :]
            tl.store(part_values + place[:, None] * RANK + dim[None, :], values, mask=mask)


@triton.jit
def _widen_kernel(
    latent_cache, block_table, requests, spans, selected, wide, page_stride, row_stride, table_stride, selected_stride,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, FP8: tl.constexpr, HARDWARE: tl.constexpr,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Cached rows as plain ones, RANK + ROPE wide. TOP_K 0: programs (block of keys, request), all keys of the request
    to where spans says. Else programs (block of keys, row), the row's selected keys to row * TOP_K and on."""
    line, key = tl.program_id(1), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    if TOP_K:
        target = line.to(tl.int64) * TOP_K
        position = tl.load(selected + line.to(tl.int64) * selected_stride + key, mask=key < TOP_K, other=-1)
        known = position >= 0
        line = tl.load(requests + line)
    else:
        target = tl.load(spans + line * 2)
        position = key
        known = key < tl.load(spans + line * 2 + 1)
    page = tl.load(block_table + line.to(tl.int64) * table_stride + position // BLOCK_SIZE, mask=known, other=0)
    at = latent_cache + page.to(tl.int64) * page_stride + (position % BLOCK_SIZE) * row_stride
    to = wide + (target + key)[:, None] * (RANK + ROPE)
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


@triton.jit
def _wide_kernel(
    query, wide, spans, requests, lengths, selected, out, lse, part_values, part_sums, scale,
    query_stride_t, query_stride_h, selected_stride, out_stride_t, out_stride_h,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, TOP_K: tl.constexpr, COMPACT: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_KEYS: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Attend to rows that _widen_kernel made; programs (row and block of heads, split); scale is in units of log2.

    COMPACT: the row's own selected keys lie one behind the other. KEYS_FIRST: products are [keys, heads] and
    [dims, heads], so that few heads fill the long side of a tensor core's tile no worse than many.
    """
    row = (tl.program_id(0) // HEAD_BLOCKS).to(tl.int64)
    head = (tl.program_id(0) % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_h, dim, dim_p = head < HEADS, tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    split = tl.program_id(1)
    first = split * SPLIT_KEYS
    last = tl.minimum(tl.minimum(tl.load(lengths + row), TOP_K), first + SPLIT_KEYS)
    chosen = selected + row * selected_stride
    if COMPACT:
        base = wide + row * (TOP_K * (RANK + ROPE))
    else:
        base = wide + tl.load(spans + tl.load(requests + row) * 2) * (RANK + ROPE)

    source = query + row * query_stride_t
    if KEYS_FIRST:
        at_head = head[None, :] * query_stride_h
        q = tl.load(source + at_head + dim[:, None], mask=in_h[None, :] & (dim < RANK)[:, None], other=0.0)
        in_p = in_h[None, :] & (dim_p < ROPE)[:, None]
        q_rope = tl.load(source + at_head + RANK + dim_p[:, None], mask=in_p, other=0.0)
        values = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    else:
        at_head = head[:, None] * query_stride_h
        q = tl.load(source + at_head + dim[None, :], mask=in_h[:, None] & (dim < RANK)[None, :], other=0.0)
        in_p = in_h[:, None] & (dim_p < ROPE)[None, :]
        q_rope = tl.load(source + at_head + RANK + dim_p[None, :], mask=in_p, other=0.0)
        values = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for start in range(first, last, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        known = key < last
        # Past the last key the last one is read again, so that no load has a mask: any other row may hold NaN.
        position = tl.minimum(key, last - 1)
        if not COMPACT:
            position = tl.load(chosen + position)
        at = base + (position * (RANK + ROPE))[:, None]
        if BLOCK_R == RANK:
            latent = tl.load(at + dim[None, :])
        else:
            latent = tl.load(at + dim[None, :], mask=(dim < RANK)[None, :], other=0.0)
        if BLOCK_P == ROPE:
            rotated = tl.load(at + RANK + dim_p[None, :])
        else:
            rotated = tl.load(at + RANK + dim_p[None, :], mask=(dim_p < ROPE)[None, :], other=0.0)
        if KEYS_FIRST:
            logits = tl.dot(latent, q, input_precision="ieee")
            logits = tl.dot(rotated, q_rope, logits, input_precision="ieee") * scale
            logits = tl.where(known[:, None], logits, float("-inf"))
            new = tl.maximum(top, tl.max(logits, axis=0))
            keep = tl.exp2(top - new)
            weights = tl.exp2(logits - new[None, :])
            total = total * keep + tl.sum(weights, axis=0)
            kept = values * keep[None, :]
            values = tl.dot(tl.trans(latent), weights.to(latent.dtype), kept, input_precision="ieee")
        else:
            logits = tl.dot(q, tl.trans(latent), input_precision="ieee")
            logits = tl.dot(q_rope, tl.trans(rotated), logits, input_precision="ieee") * scale
            logits = tl.where(known[None, :], logits, float("-inf"))
            new = tl.maximum(top, tl.max(logits, axis=1))
            keep = tl.exp2(top - new)
            weights = tl.exp2(logits - new[:, None])
            total = total * keep + tl.sum(weights, axis=1)
            kept = values * keep[:, None]
            values = tl.dot(weights.to(latent.dtype), latent, kept, input_precision="ieee")
        top = new

    if tl.num_programs(1) == 1:
        some = total > 0.0
        divisor = tl.where(some, total, 1.0)
        value = tl.where(some, (top + tl.log2(divisor)) * 0.6931471805599453, float("-inf"))
        tl.store(lse + row * HEADS + head, value, mask=in_h)
        target = out + row * out_stride_t
        if KEYS_FIRST:
            result = (values / divisor[None, :]).to(out.dtype.element_ty)
            mask = in_h[None, :] & (dim < RANK)[:, None]
            tl.store(target + head[None, :] * out_stride_h + dim[:, None], result, mask=mask)
        else:
            result = (values / divisor[:, None]).to(out.dtype.element_ty)
            mask = in_h[:, None] & (dim < RANK)[None, :]
            tl.store(target + head[:, None] * out_stride_h + dim[None, :], result, mask=mask)
    else:
        place = (row * tl.num_programs(1) + split) * HEADS + head
        tl.store(part_sums + place * 2, top, mask=in_h)
        tl.store(part_sums + place * 2 + 1, total, mask=in_h)
        some = in_h & (top > float("-inf"))
        if KEYS_FIRST:
            mask = some[None, :] & (dim < RANK)[:, None]
            tl.store(part_values + place[None, :] * RANK + dim[:, None], values, mask=mask)
        else:
            mask = some[:, None] & (dim < RANK)[None, :]
            tl.store(part_values + place[:, None] * RANK + dim[None, :], values, mask=mask)


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
            top, total, values = _add(top, total, values, part_top, part_total, part, GROUPS)

    if splits_each == SPLITS:
        target = out + row * out_stride_t + head[:, None] * out_stride_h
        _finish(top, total, values, target, lse + row * HEADS + head, head, HEADS, RANK, GROUPS, GROUP)
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
        top, total, values = _add(top, total, values, part_top, part_total, part, GROUPS)
    target = out + row * out_stride_t + head[:, None] * out_stride_h
    _finish(top, total, values, target, lse + row * HEADS + head, head, HEADS, RANK, GROUPS, GROUP)


@dataclass(frozen=True)
class Part:
    """Consecutive prefill requests whose latents are widened together, and their query rows."""

    requests: slice
    rows: slice
    keys: int
    longest: int


def _parts(rows: Rows) -> tuple[list[Part], torch.Tensor]:
    """The step's prefills in parts of at most WIDE_ROWS keys (a longer one alone), and spans [requests, 2] int64: the
    first widened row of each request within its part, and how many it has. Made once a step."""
    if "widened" in rows.step:
        return rows.step["widened"]
    device, count = rows.lengths.device, len(rows.ends)
    spans = [[0, 0]] * max(1, count)
    first = next((i for i in range(count) if rows.starts[i] >= rows.decodes), count)
    parts, begin, keys = [], first, 0
    for request in range(first, count):
        if keys and keys + rows.ends[request] > WIDE_ROWS:
            parts.append((begin, request, keys))
            begin, keys = request, 0
        spans[request] = [keys, rows.ends[request]]
        keys += rows.ends[request]
    parts.append((begin, count, keys))
    made, row = [], rows.decodes
    for begin, end, keys in parts:
        last = rows.starts[end] if end < count else len(rows.lengths)  # rows that pad a step come last
        made.append(Part(slice(begin, end), slice(row, last), keys, max(rows.ends[begin:end], default=0)))
        row = last
    on_host = torch.tensor(spans, dtype=torch.int64)
    if device.type == "cuda":
        on_host = on_host.pin_memory()
    rows.step["widened"] = (
        [part for part in made if part.rows.start < part.rows.stop],
        on_host.to(device, non_blocking=True),
    )
    return rows.step["widened"]


def attend(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Softmax attention of every row over its selected latent rows; returns the log-sum-exp."""
    tokens, heads, _ = out.shape
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=out.device)
    if rows.decodes:
        config = triton_configs.attend(out.device, latent_cache.dtype, query.dtype, heads, selected.shape[1])
        step = min(rows.decodes, max(1, WIDE_ROWS // selected.shape[1])) if config.wide else rows.decodes
        for first in range(0, rows.decodes, step):
            mine = slice(first, min(first + step, rows.decodes))
            attend_some = _attend_widened if config.wide else _attend_cached
            attend_some(query[mine], latent_cache, rows, mine, selected[mine], scale, out[mine], lse[mine], config)
    if rows.decodes < tokens:
        wide_config = triton_configs.attend_wide(out.device, query.dtype, heads)
        parts, spans = _parts(rows)
        for part in parts:
            mine = part.rows
            wide = _widen(query, latent_cache, rows, part.requests, spans, None, part.keys, part.longest, out.shape[2])
            arguments = (query[mine], wide, rows, mine, spans, selected[mine], scale, out[mine], lse[mine], lse, lse)
            _attend_wide(*arguments, wide_config, selected.shape[1], 1)
    return lse


def _widen(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    lines: slice,
    spans: torch.Tensor,
    selected: torch.Tensor | None,
    keys: int,
    longest: int,
    rank: int,
) -> torch.Tensor:
    """Rows [keys, R + P] in the query's dtype: all of requests ``lines``, or what rows ``lines`` selected."""
    fp8, rope_dim = latent_cache.dtype == torch.uint8, query.shape[2] - rank
    wide = torch.empty(keys, query.shape[2], dtype=query.dtype, device=query.device)
    if not longest:
        return wide
    group = min(cache.LATENT_GROUP, triton.next_power_of_2(rank))
    block = 32
    _widen_kernel[(triton.cdiv(longest, block), lines.stop - lines.start)](
        latent_cache,
        rows.block_table if selected is not None else rows.block_table[lines],
        rows.requests[lines] if selected is not None else rows.requests,
        spans if selected is not None else spans[lines],
        rows.requests if selected is None else selected,
        wide,
        *latent_cache.stride()[:2],
        rows.block_table.stride(0),
        selected.stride(0) if selected is not None else 0,
        RANK=rank,
        ROPE=rope_dim,
        BLOCK_SIZE=rows.block_size,
        FP8=fp8,
        HARDWARE=triton_configs.hardware_e4m3(query.device),
        TOP_K=selected.shape[1] if selected is not None else 0,
        GROUPS=triton.cdiv(rank, group),
        GROUP=group,
        BLOCK_P=max(16, triton.next_power_of_2(rope_dim)),
        BLOCK_K=block,
        num_warps=4,
    )
    return wide


def _attend_wide(
    query: torch.Tensor,
    wide: torch.Tensor,
    rows: Rows,
    mine: slice,
    spans: torch.Tensor,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    part_values: torch.Tensor,
    part_sums: torch.Tensor,
    config: triton_configs.Wide,
    split_keys: int,
    splits: int,
    compact: bool = False,
) -> None:
    """Attend to widened rows; with splits > 1 into part_values and part_sums."""
    tokens, heads, rank = out.shape
    head_blocks = triton.cdiv(heads, config.block_heads)
    rope_dim = query.shape[2] - rank
    _wide_kernel[(tokens * head_blocks, splits)](
        query,
        wide,
        spans,
        rows.requests[mine],
        rows.lengths[mine],
        selected,
        out,
        lse,
        part_values,
        part_sums,
        scale / math.log(2),
        *query.stride()[:2],
        selected.stride(0),
        *out.stride()[:2],
        HEADS=heads,
        RANK=rank,
        ROPE=rope_dim,
        TOP_K=selected.shape[1],
        COMPACT=compact,
        HEAD_BLOCKS=head_blocks,
        BLOCK_H=config.block_heads,
        BLOCK_R=max(16, triton.next_power_of_2(rank)),
        BLOCK_P=max(16, triton.next_power_of_2(rope_dim)),
        BLOCK_K=config.block_keys,
        SPLIT_KEYS=split_keys,
        KEYS_FIRST=config.keys_first,
        num_warps=config.warps,
        num_stages=config.stages,
    )


def _attend_widened(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    mine: slice,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    config: triton_configs.Attend,
) -> None:
    """Widen what the rows selected, then attend to that."""
    tokens, top_k = selected.shape
    wide = _widen(query, latent_cache, rows, mine, rows.lengths, selected, tokens * top_k, top_k, out.shape[2])
    values, sums = _part_buffers(out, lse, config.splits)
    arguments = (query, wide, rows, mine, rows.lengths, selected, scale, out, lse, values, sums)
    _attend_wide(*arguments, config.wide, config.split_keys, config.splits, compact=True)
    if config.splits > 1:
        _merge(values, sums, out, lse, config)


def _part_buffers(out: torch.Tensor, lse: torch.Tensor, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What parts leave for _merge: weighted values, and maximum and sum."""
    if splits == 1:
        return lse, lse
    tokens, heads, rank = out.shape
    values = torch.empty(tokens, splits, heads, rank, dtype=torch.float32, device=out.device)
    return values, torch.empty(tokens, splits, heads, 2, dtype=torch.float32, device=out.device)


def _attend_cached(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    mine: slice,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    config: triton_configs.Attend,
) -> None:
    """Attend straight to the cache."""
    tokens, heads, rank = out.shape
    fp8 = latent_cache.dtype == torch.uint8
    top_k, rope_dim = selected.shape[1], query.shape[2] - rank
    group = min(cache.LATENT_GROUP, triton.next_power_of_2(rank))
    head_blocks = triton.cdiv(heads, config.block_heads)
    together = config.splits == 1 or tokens * head_blocks >= config.whole_rows
    part_values, part_sums = _part_buffers(out, lse, 1 if together else config.splits)
    _attend_kernel[(tokens * head_blocks, 1 if together else config.splits)](
        query,
        latent_cache,
        rows.requests[mine],
        rows.lengths[mine],
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
        _merge(part_values, part_sums, out, lse, config)


def _merge(
    part_values: torch.Tensor,
    part_sums: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    config: triton_configs.Attend,
) -> None:
    """Parts in order, into out and lse."""
    tokens, heads, rank = out.shape
    group = min(cache.LATENT_GROUP, triton.next_power_of_2(rank))
    merge_heads = min(config.merge_heads, triton.next_power_of_2(heads))
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
