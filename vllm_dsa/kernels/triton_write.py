"""write on GPUs: one kernel for what is stored of a token's keys, one for its queries. Contracts: ``vllm_dsa.kernels``.

Both are bound by memory: every input is read once (a rotation reads the partner of a value from the first-level cache),
every output written once. Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl

from vllm_dsa import cache
from vllm_dsa.kernels import Norms, Rope, triton_configs
from vllm_dsa.kernels.triton_e4m3 import encode, power_of_two

E4M3_MAX = tl.constexpr(cache.E4M3_MAX)
LATENT_GROUP = tl.constexpr(cache.LATENT_GROUP)
SCALE_BYTES = tl.constexpr(cache.SCALE_BYTES)
MIN_SCALE = tl.constexpr(1e-4)


@triton.jit
def _partner(dim, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of dims [n] that RoPE turns: the other dim of each one's pair, the pair, and whether the dim is its first."""
    if INTERLEAVED:
        return dim ^ 1, dim >> 1, (dim & 1) == 0
    first = dim < ROPE // 2
    return tl.where(first, dim + ROPE // 2, dim - ROPE // 2), dim % (ROPE // 2), first


@triton.jit
def _turn(x, other, cos, sin, first):
    return tl.where(first, x * cos - other * sin, x * cos + other * sin)


@triton.jit
def _quantise_index(x, HARDWARE: tl.constexpr):
    """Rows x [n, D] float32 to codes [n, D] and scales [n], as cache.quantise_index."""
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), MIN_SCALE)
    scale, inverse = power_of_two(tl.div_rn(amax, E4M3_MAX))
    return encode(x * inverse[:, None], HARDWARE), scale


@triton.jit
def _write_keys_kernel(
    latent, rope_key, index_key, latent_weight, index_weight, index_bias, cos_sin, positions, slots,
    latent_cache, index_cache, latent_eps, index_eps,
    latent_stride, rope_stride, index_stride, angle_stride, page_stride, row_stride, index_page_stride,
    RANK: tl.constexpr, ROPE: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, FP8: tl.constexpr,
    INDEX: tl.constexpr, INTERLEAVED: tl.constexpr, HARDWARE: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    position = tl.load(positions + token)
    page, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    row = latent_cache + page * page_stride + offset * row_stride

    group, within = tl.arange(0, GROUPS)[:, None], tl.arange(0, GROUP)[None, :]
    dim = group * GROUP + within  # [GROUPS, GROUP]
    x = tl.load(latent + token * latent_stride + dim, mask=dim < RANK, other=0.0).to(tl.float32)
    weight = tl.load(latent_weight + dim, mask=dim < RANK, other=0.0).to(tl.float32)
    square = tl.sum(tl.sum(x * x, axis=1), axis=0)
    x = x * tl.rsqrt(square / RANK + latent_eps) * weight

    dim_p = tl.arange(0, BLOCK_P)
    in_p = dim_p < ROPE
    other_p, pair, first = _partner(dim_p, ROPE, True)
    angles = cos_sin + position * angle_stride
    cos = tl.load(angles + pair, mask=in_p, other=0.0)
    sin = tl.load(angles + ROPE // 2 + pair, mask=in_p, other=0.0)
    key = tl.load(rope_key + token * rope_stride + dim_p, mask=in_p, other=0.0).to(tl.float32)
    partner = tl.load(rope_key + token * rope_stride + other_p, mask=in_p, other=0.0).to(tl.float32)
    key = _turn(key, partner, cos, sin, first)

    if slot >= 0:
        if FP8:
            amax = tl.max(tl.abs(x), axis=1)
            scale, inverse = power_of_two(tl.maximum(tl.div_rn(amax, E4M3_MAX), MIN_SCALE))
            tl.store(row + dim, encode(x * inverse[:, None], HARDWARE))
            scales = (row + RANK).to(tl.pointer_type(tl.float32), bitcast=True)
            tl.store(scales + tl.arange(0, GROUPS), scale)
            keys = (row + RANK + GROUPS * SCALE_BYTES).to(tl.pointer_type(tl.bfloat16), bitcast=True)
            tl.store(keys + dim_p, key.to(tl.bfloat16), mask=in_p)
        else:
            tl.store(row + dim, x.to(latent_cache.dtype.element_ty), mask=dim < RANK)
            tl.store(row + RANK + dim_p, key.to(latent_cache.dtype.element_ty), mask=in_p)

    if INDEX:
        dim_d = tl.arange(0, BLOCK_D)
        in_d, turned = dim_d < DIM, dim_d < ROPE
        other_d, pair, first = _partner(dim_d, ROPE, INTERLEAVED)
        source = index_key + token * index_stride
        x = tl.load(source + dim_d, mask=in_d, other=0.0).to(tl.float32)
        partner = tl.load(source + other_d, mask=turned, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=0) / DIM
        centred = tl.where(in_d, x - mean, 0.0)
        spread = tl.rsqrt(tl.sum(centred * centred, axis=0) / DIM + index_eps)
        weight = tl.load(index_weight + dim_d, mask=in_d, other=0.0).to(tl.float32)
        bias = tl.load(index_bias + dim_d, mask=in_d, other=0.0).to(tl.float32)
        x = centred * spread * weight + bias
        weight = tl.load(index_weight + other_d, mask=turned, other=0.0).to(tl.float32)
        bias = tl.load(index_bias + other_d, mask=turned, other=0.0).to(tl.float32)
        partner = (partner - mean) * spread * weight + bias
        cos = tl.load(angles + pair, mask=turned, other=1.0)
        sin = tl.load(angles + ROPE // 2 + pair, mask=turned, other=0.0)
        codes, scale = _quantise_index(_turn(x, partner, cos, sin, first)[None, :], HARDWARE)
        if slot >= 0:
            index_page = index_cache + page * index_page_stride
            tl.store(index_page + offset * DIM + dim_d[None, :], codes, mask=in_d[None, :])
            scales = (index_page + BLOCK_SIZE * DIM).to(tl.pointer_type(tl.float32), bitcast=True)
            tl.store(scales + offset + tl.arange(0, 1), scale)


@triton.jit
def _turn_heads(
    source, stride, head, HEADS, angles,
    ROPE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rows head [n] of source, float32 [n, BLOCK], the first ROPE of their DIM dims turned; 0 past HEADS and DIM."""
    dim = tl.arange(0, BLOCK)
    inside, turned = (head < HEADS)[:, None], dim < ROPE
    other, pair, first = _partner(dim, ROPE, INTERLEAVED)
    rows = source + head[:, None] * stride
    x = tl.load(rows + dim[None, :], mask=inside & (dim < DIM)[None, :], other=0.0).to(tl.float32)
    partner = tl.load(rows + other[None, :], mask=inside & turned[None, :], other=0.0).to(tl.float32)
    cos = tl.load(angles + pair, mask=turned, other=1.0)
    sin = tl.load(angles + ROPE // 2 + pair, mask=turned, other=0.0)
    return _turn(x, partner, cos[None, :], sin[None, :], first[None, :])


@triton.jit
def _write_queries_kernel(
    rope_query, index_query, head_weights, cos_sin, positions, query, codes, weights, weight_scale,
    rope_stride_t, rope_stride_h, index_stride_t, index_stride_h, weight_stride, angle_stride,
    query_stride_t, query_stride_h,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, INDEX_HEADS: tl.constexpr, DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, HARDWARE: tl.constexpr, INDEX_BLOCKS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (token, block): the first INDEX_BLOCKS take BLOCK_H index heads, the rest BLOCK_N attention heads."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angles = cos_sin + tl.load(positions + token) * angle_stride
    if block < INDEX_BLOCKS:
        index_head, dim = block * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
        source = index_query + token * index_stride_t
        x = _turn_heads(source, index_stride_h, index_head, INDEX_HEADS, angles, ROPE, DIM, BLOCK_D, INTERLEAVED)
        found, scale = _quantise_index(x, HARDWARE)
        in_h = index_head < INDEX_HEADS
        target = codes + (token * INDEX_HEADS + index_head[:, None]) * DIM + dim[None, :]
        tl.store(target, found, mask=in_h[:, None] & (dim < DIM)[None, :])
        weight = tl.load(head_weights + token * weight_stride + index_head, mask=in_h, other=0.0).to(tl.float32)
        tl.store(weights + token * INDEX_HEADS + index_head, weight * scale * weight_scale, mask=in_h)
    else:
        head, dim_p = (block - INDEX_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
        y = _turn_heads(
            rope_query + token * rope_stride_t, rope_stride_h, head, HEADS, angles, ROPE, ROPE, BLOCK_P, True
        )
        target_p = query + token * query_stride_t + head[:, None] * query_stride_h + RANK + dim_p[None, :]
        tl.store(target_p, y.to(query.dtype.element_ty), mask=(head < HEADS)[:, None] & (dim_p < ROPE)[None, :])


def write_keys(
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    index_key: torch.Tensor | None,
    norms: Norms,
    rope: Rope,
    positions: torch.Tensor,
    slots: torch.Tensor,
    latent_cache: torch.Tensor,
    index_cache: torch.Tensor | None,
) -> None:
    """Norm and rotate the new tokens' keys and store them in both caches."""
    (tokens, rank), rope_dim = latent.shape, rope_key.shape[1]
    if not tokens:
        return
    index = index_key is not None
    group = min(cache.LATENT_GROUP, triton.next_power_of_2(rank))
    config = triton_configs.write(latent.device)
    _write_keys_kernel[(tokens,)](
        latent,
        rope_key,
        index_key if index else latent,
        norms.latent_weight,
        norms.index_weight if index else norms.latent_weight,
        norms.index_bias if index else norms.latent_weight,
        rope.cos_sin,
        positions,
        slots,
        latent_cache,
        index_cache if index else latent_cache,
        norms.latent_eps,
        norms.index_eps,
        latent.stride(0),
        rope_key.stride(0),
        index_key.stride(0) if index else 0,
        rope.cos_sin.stride(0),
        latent_cache.stride(0),
        latent_cache.stride(1),
        index_cache.stride(0) if index else 0,
        RANK=rank,
        ROPE=rope_dim,
        DIM=index_key.shape[1] if index else 1,
        BLOCK_SIZE=latent_cache.shape[1],
        FP8=latent_cache.dtype == torch.uint8,
        INDEX=index,
        INTERLEAVED=rope.index_interleaved,
        HARDWARE=config.hardware_e4m3,
        GROUPS=triton.next_power_of_2(triton.cdiv(rank, group)),
        GROUP=group,
        BLOCK_P=triton.next_power_of_2(rope_dim),
        BLOCK_D=triton.next_power_of_2(index_key.shape[1]) if index else 1,
        num_warps=config.key_warps,
    )


def write_queries(
    rope_query: torch.Tensor,
    index_query: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    rope: Rope,
    positions: torch.Tensor,
    query: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rotate the new tokens' queries into ``query`` and quantise their index queries."""
    tokens, heads, rope_dim = rope_query.shape
    index = index_query is not None
    index_heads, dim = index_query.shape[1:] if index else (0, 1)
    codes = torch.empty(tokens, index_heads, dim, dtype=cache.E4M3, device=query.device)
    weights = torch.empty(tokens, index_heads, dtype=torch.float32, device=query.device)
    if tokens:
        config = triton_configs.write(query.device)
        block_h = min(config.index_heads, triton.next_power_of_2(max(1, index_heads)))
        block_n = min(config.heads, triton.next_power_of_2(max(1, heads)))
        index_blocks = triton.cdiv(index_heads, block_h)
        _write_queries_kernel[(tokens, index_blocks + triton.cdiv(heads, block_n))](
            rope_query,
            index_query if index else rope_query,
            head_weights if index else rope_query,
            rope.cos_sin,
            positions,
            query,
            codes.view(torch.uint8),
            weights,
            index_heads**-0.5 * dim**-0.5 if index else 0.0,
            *rope_query.stride()[:2],
            *(index_query.stride()[:2] if index else (0, 0)),
            head_weights.stride(0) if index else 0,
            rope.cos_sin.stride(0),
            *query.stride()[:2],
            HEADS=heads,
            RANK=query.shape[2] - rope_dim,
            ROPE=rope_dim,
            INDEX_HEADS=index_heads,
            DIM=dim,
            INTERLEAVED=rope.index_interleaved,
            HARDWARE=config.hardware_e4m3,
            INDEX_BLOCKS=index_blocks,
            BLOCK_H=block_h,
            BLOCK_N=block_n,
            BLOCK_P=triton.next_power_of_2(rope_dim),
            BLOCK_D=triton.next_power_of_2(dim),
            num_warps=config.query_warps,
        )
    return (codes, weights) if index else None
