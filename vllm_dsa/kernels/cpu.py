"""The CPU provider: torch's own vectorised loops and GEMMs, tiled. Contracts: ``vllm_dsa.kernels``.

Two rules make a row's bits independent of what else is in the batch. Every GEMM has a shape that only the layer sets:
one row's heads times KEY_TILE index keys, or times one chunk of at most ATTEND_CHUNK selected latents; a batch is many
such GEMMs, never a larger one. (A GEMM's bits change with its shape, and with its neighbours too where it is large: MKL
splits a contraction of 2,048 over its threads when it has one to do, and not when it has several.) Every other step is
elementwise, a softmax over one row, or an exact sort of integers.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from vllm_dsa import cache, envs
from vllm_dsa.kernels import Norms, Rope
from vllm_dsa.metadata import Rows

KEY_TILE = 512  # keys a GEMM of select
ATTEND_CHUNK = 256  # selected latents a GEMM of attend

# How much at a time, which no result depends on: more costs cache misses, less costs calls.
LOGIT_BYTES = 4 << 20  # index logits
KEY_BLOCK = 8 * KEY_TILE  # converted index keys
LATENT_BYTES = 10 << 20  # gathered latents
WRITE_ROWS = 64  # index queries

_LOWEST = torch.iinfo(torch.int64).min
_LOW_WORD = 0x7FFFFFFF


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
    cos_sin = rope.cos_sin[positions]
    normed = latent.to(torch.float32, copy=True)
    normed *= torch.rsqrt(normed.square().mean(-1, keepdim=True) + norms.latent_eps)
    normed *= norms.latent_weight
    turned = rope_key.to(torch.float32, copy=True)
    _turn(turned, cos_sin, interleaved=True)
    cache.store_latent(normed, turned, slots, latent_cache)
    if index_key is not None:
        key = index_key.float()
        key = key - key.mean(-1, keepdim=True)
        key *= torch.rsqrt(key.square().mean(-1, keepdim=True) + norms.index_eps)
        key = key * norms.index_weight + norms.index_bias
        _turn(key[:, : cos_sin.shape[-1]], cos_sin, rope.index_interleaved)
        cache.store_index_keys(key, slots, index_cache)


def write_queries(
    rope_query: torch.Tensor,
    index_query: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    rope: Rope,
    positions: torch.Tensor,
    query: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rotate the new tokens' queries into ``query`` and quantise their index queries."""
    cos_sin = rope.cos_sin[positions].unsqueeze(1)
    turned = rope_query.to(torch.float32, copy=True)
    _turn(turned, cos_sin, interleaved=True)
    query[..., -turned.shape[-1] :] = turned
    if index_query is None:
        return None
    tokens, heads, dim = index_query.shape
    codes = torch.empty(index_query.shape, dtype=cache.E4M3)
    scales = torch.empty(tokens, heads)
    for first in range(0, tokens, WRITE_ROWS):
        tile = slice(first, first + WRITE_ROWS)
        x = index_query[tile].to(torch.float32, copy=True)
        _turn(x[..., : cos_sin.shape[-1]], cos_sin[tile], rope.index_interleaved)
        codes[tile], scales[tile] = cache.quantise_index(x)
    return codes, head_weights.float() * scales * (heads**-0.5 * dim**-0.5)


def select(
    codes: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    rows: Rows,
    out: torch.Tensor,
    scored: Callable[[], None] | None = None,
) -> None:
    """Top-k positions of every row; temporaries stay within VLLM_DSA_SCORE_BUDGET_MB."""
    if scored:
        scored()
    budget = envs.VLLM_DSA_SCORE_BUDGET_MB << 20
    top_k = out.shape[1]
    positions = torch.arange(top_k, dtype=torch.int32)
    out.copy_(positions).masked_fill_(positions >= rows.lengths.unsqueeze(1), -1)
    lengths = rows.lengths.tolist()
    for request, last in enumerate(rows.starts[1:]):
        # Rows of at most top_k keys are done: they select them all.
        first = next((r for r in range(rows.starts[request], last) if lengths[r] > top_k), last)
        if first < last:
            mine = slice(first, last)
            pages = rows.block_table[request]
            _select_long(codes[mine], weights[mine], index_cache, pages, rows.lengths[mine], out[mine], budget)


def attend(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    selected: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Softmax attention of every row over its selected latent rows; returns the log-sum-exp."""
    lse = torch.full(query.shape[:2], float("-inf"))
    out.zero_()
    chunk = min(ATTEND_CHUNK, 16 * _ceil(selected.shape[1], 16))
    chunks = ((selected >= 0).sum(1) + (chunk - 1)) // chunk  # a row's share of work depends on the row alone
    source = _row_view(latent_cache)
    for count in chunks.unique().tolist():
        row_tile = max(1, LATENT_BYTES // (max(1, count) * chunk * query.shape[-1] * 4))
        for group in torch.nonzero(chunks == count).squeeze(1).split(16 * row_tile) if count else ():
            picked = selected.index_select(0, group)[:, : count * chunk].long()
            picked = F.pad(picked, (0, count * chunk - picked.shape[1]), value=-1)
            padding = (picked < 0).view(-1, 1, count, chunk)
            # Padding reads the row's first pick again: other memory could hold NaN, which no zero weight silences.
            index = _row_index(latent_cache, rows, group, torch.where(picked < 0, picked[:, :1], picked))
            queries = _two_heads(query.index_select(0, group).float())
            parts = [
                _attend_rows(queries[tile], _latents(source, index[tile]), padding[tile], scale, out.shape[-1])
                for tile in (slice(i, i + row_tile) for i in range(0, len(group), row_tile))
            ]
            out[group] = torch.cat([values[:, : out.shape[1]] for values, _ in parts]).to(out.dtype)
            lse[group] = torch.cat([lse[:, : out.shape[1]] for _, lse in parts])
    return lse


def scores(codes: torch.Tensor, weights: torch.Tensor, index_cache: torch.Tensor, rows: Rows, row: int) -> torch.Tensor:
    """Index scores [length] of one row, the very ones that select ranks."""
    length, pages = int(rows.lengths[row]), rows.block_table[int(rows.requests[row])]
    queries, weights = _index_queries(codes[row : row + 1], weights[row : row + 1])
    keys, key_scales = _index_keys(index_cache, pages, codes.shape[-1], 0, length)
    found = torch.empty(1, len(key_scales))
    _scores(queries, weights, keys, found)
    return (found * key_scales)[0, :length]


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _turn(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> None:
    """RoPE in place: x [T, ..., P] float32 by cos_sin [T, ..., P]."""
    cos, sin = cos_sin.chunk(2, dim=-1)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = a * cos - b * sin
    b.copy_(b * cos + a * sin)
    a.copy_(turned)


def _decode(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 codes (uint8) as float16 of 2^-8 their value, exactly; torch's own conversion is ten times slower.

    Moved up by 7 bits, a code is a float16 whose exponent is 8 too small, subnormals included. (NaN becomes 480.)
    """
    bits = codes.view(torch.int8).to(torch.int16)  # repeats the sign in bits 7 to 15
    bits <<= 7
    bits &= ~0x4000
    return bits.view(torch.float16)


def _two_heads(queries: torch.Tensor) -> torch.Tensor:
    """Queries [b, N, R] with a second head of zeros where there is one: a GEMM of one head would be a matrix-vector
    product, whose bits change with the batch."""
    return F.pad(queries, (0, 0, 0, 1)) if queries.shape[1] == 1 else queries


def _index_queries(codes: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index queries [b, H, D] float32 and head weights [b, 1, H] for ``_scores``."""
    queries = _decode(codes.view(torch.uint8)).float()
    weights = weights.unsqueeze(1) * 2.0**16  # queries and keys are decoded to 2^-8 of their value
    queries = _two_heads(queries)
    return queries, F.pad(weights, (0, queries.shape[1] - weights.shape[2]))


def _index_keys(
    index_cache: torch.Tensor, pages: torch.Tensor, dim: int, first: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys first:end of the request of ``pages``: [tiles, KEY_TILE, D] float32 and scales [tiles * KEY_TILE]."""
    block_size = index_cache.shape[1] // (dim + cache.SCALE_BYTES)
    first_page = first // block_size
    raw = index_cache.index_select(0, pages[first_page : _ceil(end, block_size)])
    mine = slice(first - first_page * block_size, end - first_page * block_size)
    count = end - first
    padded = _ceil(count, KEY_TILE) * KEY_TILE
    keys, scales = torch.empty(padded, dim), torch.empty(padded)
    keys[:count] = _decode(raw[:, : block_size * dim]).view(-1, dim)[mine]
    scales[:count] = raw[:, block_size * dim :].contiguous().view(torch.float32).flatten()[mine]
    keys[count:], scales[count:] = 0, 0
    return keys.view(-1, KEY_TILE, dim), scales


def _scores(queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, out: torch.Tensor) -> None:
    """sum_h weights[b, 0, h] * relu(queries[b, h] . keys[t, i]) into out [b, t * KEY_TILE]; keys unscaled."""
    b, tiles = len(queries), len(keys)
    out = out.unflatten(1, (tiles, KEY_TILE))
    keys = keys.transpose(1, 2)  # [t, D, KEY_TILE]
    dots = torch.empty(max(b, tiles), queries.shape[1], KEY_TILE)
    if b >= tiles:
        for tile in range(tiles):
            torch.bmm(queries, keys[tile].expand(b, -1, -1), out=dots).relu_()
            out[:, tile] = torch.bmm(weights, dots).squeeze(1)
    else:
        for row in range(b):
            torch.bmm(queries[row].expand(tiles, -1, -1), keys, out=dots).relu_()
            out[row] = torch.bmm(weights[row].expand(tiles, -1, -1), dots).squeeze(1)


def _rank(row_scores: torch.Tensor, first: int, lengths: torch.Tensor) -> torch.Tensor:
    """Scores [b, n] of positions first: as int64 whose order is that of select, no two alike.

    The high word orders as the score does, the low word falls with the position. Positions past a row's length come
    last, whatever their score.
    """
    positions = torch.arange(first, first + row_scores.shape[1])
    bits = (row_scores + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    bits ^= (bits >> 31) & _LOW_WORD
    ranks = (bits.long() << 32) | (_LOW_WORD - positions)
    return ranks.masked_fill_(positions >= lengths.unsqueeze(1), _LOWEST)


def _select_long(
    codes: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    budget: int,
) -> None:
    """Select for rows of one request, ascending, that all have more than top_k keys.

    Rows go in tiles, keys in blocks, scores in segments of blocks; what one segment leaves is merged with the next
    one's. Each takes a quarter of the budget: a key 8 bytes a dim while it is converted, a ranked score 28.
    """
    (heads, dim), top_k, end, part = codes.shape[1:], out.shape[1], int(lengths[-1]), budget // 4
    block = KEY_TILE * max(1, min(KEY_BLOCK, part // (8 * dim)) // KEY_TILE)
    row_tile = max(1, min(min(LOGIT_BYTES, part) // (heads * KEY_TILE * 4), part // (28 * block)))
    segment = block * max(1, part // (28 * row_tile * block))

    def load(first: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _index_keys(index_cache, pages, dim, first, min(first + block, end))

    held = None  # keys that several row tiles share
    if len(codes) > row_tile and 4 * dim * end <= part:
        held = {first: load(first) for first in range(0, end, block)}
    for first_row in range(0, len(codes), row_tile):
        tile = slice(first_row, first_row + row_tile)
        queries, head_weights = _index_queries(codes[tile], weights[tile])
        best, last = None, int(lengths[tile][-1])
        for start in range(0, last, segment):
            count = KEY_TILE * _ceil(min(segment, last - start), KEY_TILE)
            found = torch.empty(len(queries), count)
            for first in range(start, start + count, block):
                keys, scales = held[first] if held else load(first)
                mine = slice(first - start, min(first - start + block, count))
                tiles = (mine.stop - mine.start) // KEY_TILE
                _scores(queries, head_weights, keys[:tiles], found[:, mine])
                found[:, mine] *= scales[: tiles * KEY_TILE]
            ranks = _rank(found, start, lengths[tile])
            if best is not None:
                ranks = torch.cat([best, ranks], dim=1)
            best = ranks.topk(min(top_k, ranks.shape[1]), sorted=False).values
        out[tile] = (_LOW_WORD - (best & _LOW_WORD)).int().sort(dim=1).values


def _row_view(latent_cache: torch.Tensor) -> torch.Tensor:
    """The cache as a matrix of overlapping rows, one a step, so that index_select copies whole rows."""
    pages, block_size, width = latent_cache.shape
    page_stride, token_stride, _ = latent_cache.stride()
    step = math.gcd(page_stride, token_stride)
    last = (pages - 1) * page_stride + (block_size - 1) * token_stride
    return latent_cache.as_strided((last // step + 1, width), (step, 1))


def _row_index(latent_cache: torch.Tensor, rows: Rows, group: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Where ``_row_view`` has positions [b, n] int64 of the requests of rows ``group``."""
    page_stride, token_stride, _ = latent_cache.stride()
    step = math.gcd(page_stride, token_stride)
    blocks = positions // rows.block_size
    pages = rows.block_table[rows.requests[group].long().unsqueeze(1), blocks].long()
    offsets = positions - blocks * rows.block_size
    return pages * (page_stride // step) + offsets * (token_stride // step)


def _latents(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Latent rows index [b, n], float32 [b, n, R + P]."""
    raw = source.index_select(0, index.flatten())
    if raw.dtype == torch.uint8:
        latents = torch.empty(len(raw), 576)
        latents[:, :512] = _decode(raw[:, :512])
        scales = raw[:, 512:528].view(torch.float32) * 2.0**8  # codes are decoded to 2^-8 of their value
        latents[:, :512].unflatten(1, (4, cache.LATENT_GROUP)).mul_(scales.unsqueeze(-1))
        latents[:, 512:] = raw[:, 528:].view(torch.bfloat16)
    else:
        latents = raw.float()
    return latents.view(*index.shape, -1)


def _attend_rows(
    query: torch.Tensor, latents: torch.Tensor, padding: torch.Tensor, scale: float, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [b, N, R + P], latents [b, n, R + P], padding [b, 1, chunks, chunk]: values [b, N, R], lse [b, N]."""
    (b, heads, width), (chunks, chunk) = query.shape, padding.shape[2:]
    latents = latents.view(b * chunks, chunk, width)

    each = query.unsqueeze(1).expand(-1, chunks, -1, -1).reshape(-1, heads, width)
    logits = torch.bmm(each, latents.transpose(1, 2)).view(b, chunks, heads, chunk).transpose(1, 2) * scale
    logits = logits.masked_fill(padding, float("-inf")).flatten(2)  # [b, N, n]
    weights = logits.softmax(-1)
    # The largest weight is exp(largest logit - lse). In float64, where an elementwise log's last bit, which may depend
    # on an element's place in the vector, is rounded away.
    lse = (logits.amax(-1).double() - weights.amax(-1).double().log()).float()

    each = weights.view(b, heads, chunks, chunk).transpose(1, 2).reshape(-1, heads, chunk)
    parts = torch.bmm(each, latents[..., :rank]).view(b, chunks, heads, rank)
    values = parts[:, 0]
    for part in range(1, chunks):
        values = values + parts[:, part]
    return values, lse
