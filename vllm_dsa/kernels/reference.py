"""The definition of correct: the three operations in plain float32 torch, one row at a time.

Written to be read and believed, not to be fast. Contracts: ``vllm_dsa.kernels``.
"""

from collections.abc import Callable

import torch

from vllm_dsa import cache
from vllm_dsa.kernels import Norms, Rope
from vllm_dsa.metadata import Rows, tokens_to_slots


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """RoPE of x [T, ..., P] by cos_sin [T, P], in float32.

    Pair i is (x[2i], x[2i+1]) interleaved, else (x[i], x[i+P/2]); it turns to (a cos - b sin, b cos + a sin).
    """
    cos, sin = cos_sin.view(len(cos_sin), *[1] * (x.dim() - 2), cos_sin.shape[-1]).chunk(2, dim=-1)
    x = x.float()
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate_index(x: torch.Tensor, rope: Rope, positions: torch.Tensor) -> torch.Tensor:
    """The indexer's RoPE: the first P of the D dims of x [T, ..., D] turn, the rest stay. float32."""
    cos_sin = rope.cos_sin[positions]
    turned = cos_sin.shape[-1]
    return torch.cat([rotate(x[..., :turned], cos_sin, rope.index_interleaved), x[..., turned:].float()], dim=-1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, R] / sqrt(mean(x^2) + eps) * weight, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias of x [T, D], in float32."""
    x = x.float()
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight.float() + bias.float()


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
    normed = rms_norm(latent, norms.latent_weight, norms.latent_eps)
    cache.store_latent(normed, rotate(rope_key, rope.cos_sin[positions], interleaved=True), slots, latent_cache)
    if index_key is not None:
        normed = layer_norm(index_key, norms.index_weight, norms.index_bias, norms.index_eps)
        cache.store_index_keys(rotate_index(normed, rope, positions), slots, index_cache)


def write_queries(
    rope_query: torch.Tensor,
    index_query: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    rope: Rope,
    positions: torch.Tensor,
    query: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rotate the new tokens' queries into ``query`` and quantise their index queries."""
    turned = rope_query.shape[-1]
    query[..., -turned:] = rotate(rope_query, rope.cos_sin[positions], interleaved=True).to(query.dtype)
    if index_query is None:
        return None
    codes, scales = cache.quantise_index(rotate_index(index_query, rope, positions))
    heads, dim = index_query.shape[1:]
    return codes, head_weights.float() * scales * (heads**-0.5 * dim**-0.5)


def scores(codes: torch.Tensor, weights: torch.Tensor, index_cache: torch.Tensor, rows: Rows, row: int) -> torch.Tensor:
    """Index scores [length] of one row, float32, from the quantised keys of the cache."""
    length = int(rows.lengths[row])
    pages = rows.block_table[int(rows.requests[row]), : -(-length // rows.block_size)]
    key_codes, key_scales = cache.load_index_keys(index_cache, pages, codes.shape[-1])
    dots = codes[row].float() @ key_codes[:length].T  # [H, length]
    return (weights[row].unsqueeze(-1) * dots.relu()).sum(0) * key_scales[:length]


def top_k(row_scores: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the k best scores of [n], ascending, int32 [min(k, n)]; of equal scores the smaller position."""
    order = torch.sort(row_scores, descending=True, stable=True).indices
    return order[:k].sort().values.to(torch.int32)


def select(
    codes: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    rows: Rows,
    out: torch.Tensor,
    scored: Callable[[], None] | None = None,
) -> None:
    """Top-k positions of every row."""
    if scored:
        scored()
    out.fill_(-1)
    for row, length in enumerate(rows.lengths.tolist()):
        if length:
            chosen = top_k(scores(codes, weights, index_cache, rows, row), out.shape[1])
            out[row, : len(chosen)] = chosen


def attend(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Softmax attention of every row over its selected latent rows; returns the log-sum-exp."""
    lse = torch.full(query.shape[:2], float("-inf"), device=query.device)
    out.zero_()
    rank = out.shape[-1]
    for row in range(len(query)):
        positions = selected[row][selected[row] >= 0]
        if len(positions):
            pages = rows.block_table[int(rows.requests[row])]
            latent = cache.load_latent(latent_cache, tokens_to_slots(positions, pages, rows.block_size))  # [k, R + P]
            logits = scale * (query[row].float() @ latent.T)  # [N, k]
            out[row] = (logits.softmax(-1) @ latent[:, :rank]).to(out.dtype)
            lse[row] = logits.logsumexp(-1)
    return lse
