"""attend without a selection: every row attends to every key it sees. Contracts: ``vllm_dsa.kernels``.

VLLM_DSA_DENSE=1 puts this in the place of every provider's select and attend, to compare a model's answers with and
without its sparsity. No index key is then computed, written or scored: the index-key caches stay allocated, and their
bytes may be anything. A process is in one mode for its life, so prefix caching never mixes the modes; KV connectors,
which would hand pages to other processes, are refused.

Plain torch in float32 on any device, and slow: a request's keys are gathered and multiplied chunk by chunk, so that
memory does not grow with the context. How many chunks there are, the host decides: no CUDA graph can hold this.
"""

from itertools import pairwise
from typing import Any

import torch

from vllm_dsa import cache
from vllm_dsa.metadata import Rows, tokens_to_slots

select = None  # nothing to do: the layer leaves its indexer out

KEY_CHUNK = 4096  # keys a product
LOGIT_BYTES = 32 << 20  # of one product, in float32


def attend(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Softmax attention of every row over all keys it sees, whatever ``selected`` holds; returns the log-sum-exp."""
    lse = torch.full(out.shape[:2], float("-inf"), device=out.device)
    out.zero_()
    tile = _row_tile(out.shape[1])
    for request, (first, last) in enumerate(pairwise(rows.starts)):
        for start in range(first, last, tile):
            mine = slice(start, min(start + tile, last))
            longest = rows.ends[request] - (last - mine.stop)
            values, lse[mine] = _attend_rows(query, latent_cache, rows, request, mine, longest, scale, out.shape[2])
            out[mine] = values.to(out.dtype)
    return lse


def workspace(request: Any, tokens: int) -> int:
    """Bytes that attend may take: logits twice, values three times, keys as they are, widened and cleared."""
    rows = _row_tile(request.num_heads) * request.num_heads
    return 4 * (rows * (2 * KEY_CHUNK + 3 * request.kv_lora_rank) + 3 * KEY_CHUNK * (request.kv_lora_rank + 128))


def _row_tile(heads: int) -> int:
    return max(1, LOGIT_BYTES // (4 * heads * KEY_CHUNK))


def _attend_rows(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    request: int,
    mine: slice,
    longest: int,
    scale: float,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [m, N, R] and log-sum-exp [m, N], float32, of rows ``mine`` of one request, none of which sees a key at or
    past ``longest``."""
    (count, heads, _), lengths, pages = query[mine].shape, rows.lengths[mine], rows.block_table[request]
    flat = query[mine].float().flatten(0, 1) * scale
    last, bounds = lengths.amax(), lengths.view(-1, 1, 1)
    top = torch.full((count, heads, 1), float("-inf"), device=query.device)
    total = torch.zeros_like(top)
    values = torch.zeros(count, heads, rank, device=query.device)
    for first in range(0, longest, KEY_CHUNK):
        positions = torch.arange(first, min(first + KEY_CHUNK, longest), device=query.device)
        latents = cache.load_latent(latent_cache, tokens_to_slots(positions, pages, rows.block_size))  # [n, R + P]
        # Past the device's lengths, which the host's may exceed, memory could hold NaN, which no zero weight silences.
        latents = latents.masked_fill((positions >= last).unsqueeze(1), 0)
        logits = (flat @ latents.T).view(count, heads, -1)
        logits.masked_fill_(positions >= bounds, float("-inf"))
        new = torch.maximum(top, logits.amax(-1, keepdim=True))
        base = new.clamp(min=torch.finfo(torch.float32).min)  # of a row that sees no key
        weights = logits.sub_(base).exp_()
        keep = torch.exp(top - base)
        total = total * keep + weights.sum(-1, keepdim=True)
        values = values * keep + (weights.flatten(0, 1) @ latents[:, :rank]).view(count, heads, rank)
        top = new
    lse = (top + total.log()).squeeze(-1)
    return values / total.clamp(min=torch.finfo(torch.float32).tiny), lse
