"""The CPU provider: torch's own vectorised loops and GEMMs, tiled. Contracts: ``vllm_dsa.kernels``.

Two rules make a row's bits independent of what else is in the batch. Every GEMM has a shape that only the layer sets:
one row's heads times KEY_TILE index keys, or times one chunk of at most ATTEND_CHUNK selected latents; a batch is many
such GEMMs, never a larger one. (A GEMM's bits change with its shape, and with its neighbours too where it is large: MKL
splits a contraction of 2,048 over its threads when it has one to do, and not when it has several.) Every other step is
elementwise, a softmax over one row, or an exact sort of integers.
"""

import math

import torch
import torch.nn.functional as F

from vllm_dsa import cache, envs
from vllm_dsa.kernels import Norms, Rope
from vllm_dsa.metadata import Rows

KEY_TILE = 512  # keys a GEMM of select
ATTEND_CHUNK = 256  # selected latents a GEMM of attend
LOGIT_BYTES = 2 << 20  # index logits at a time: about a second-level cache
LATENT_BYTES = 5 << 20  # gathered latents at a time: more rows cost cache, fewer cost calls
WRITE_ROWS = 64

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
    codes: torch.Tensor, weights: torch.Tensor, index_cache: torch.Tensor, rows: Rows, out: torch.Tensor
) -> None:
    """Top-k positions of every row; temporaries stay within VLLM_DSA_SCORE_BUDGET_MB."""
    budget = envs.VLLM_DSA_SCORE_BUDGET_MB << 20
    top_k = out.shape[1]
    positions = torch.arange(top_k, dtype=torch.int32)
    out.copy_(torch.where(positions < rows.lengths.unsqueeze(1), positions, -1))
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
    chunk = min(ATTEND_CHUNK, _ceil(selected.shape[1], 16) * 16)
    chunks = ((selected >= 0).sum(1) + (chunk - 1)) // chunk  # a row's share of work depends on the row alone
    for count in chunks.unique().tolist():
        if count == 0:
            continue
        row_tile = max(1, LATENT_BYTES // (count * chunk * query.shape[-1] * 4))
        for tile in torch.nonzero(chunks == count).squeeze(1).split(row_tile):
            picked = selected[tile, : count * chunk]
            picked = F.pad(picked, (0, count * chunk - picked.shape[1]), value=-1)
            values, lse[tile] = _attend_rows(
                query[tile].float(), latent_cache, rows, rows.requests[tile], picked, scale, chunk, out.shape[-1]
            )
            out[tile] = values.to(out.dtype)
    return lse


def scores(codes: torch.Tensor, weights: torch.Tensor, index_cache: torch.Tensor, rows: Rows, row: int) -> torch.Tensor:
    """Index scores [length] of one row, the very ones that select ranks."""
    length = int(rows.lengths[row])
    one = slice(row, row + 1)
    queries, weights = _index_queries(codes[one], weights[one])
    keys, key_scales = _index_keys(index_cache, rows.block_table[int(rows.requests[row])], codes.shape[-1], 0, length)
    return _scores(queries, weights, keys, LOGIT_BYTES).mul_(key_scales)[0, :length]


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


def _index_queries(codes: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index queries [b, H, D] float32 and head weights [b, 1, H] for ``_scores``."""
    queries = _decode(codes.view(torch.uint8)).float()
    weights = weights.unsqueeze(1) * 2.0**16  # queries and keys are decoded to 2^-8 of their value
    if queries.shape[1] == 1:  # one head would make the GEMM a matrix-vector product, whose bits vary with the batch
        return F.pad(queries, (0, 0, 0, 1)), F.pad(weights, (0, 1))
    return queries, weights


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


def _scores(queries: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, logit_bytes: int) -> torch.Tensor:
    """sum_h weights[b, 0, h] * relu(queries[b, h] . keys[t, i]) as [b, t * KEY_TILE], keys unscaled."""
    (b, heads, _), tiles = queries.shape, len(keys)
    out = torch.empty(b, tiles * KEY_TILE)
    keys = keys.transpose(1, 2)  # [t, D, KEY_TILE]
    if b >= min(tiles, 4):
        for t in range(tiles):
            dots = torch.bmm(queries, keys[t].expand(b, -1, -1)).relu_()
            out[:, t * KEY_TILE : (t + 1) * KEY_TILE] = torch.bmm(weights, dots).squeeze(1)
        return out
    step = max(1, logit_bytes // (heads * KEY_TILE * 4))
    for row in range(b):
        for t in range(0, tiles, step):
            batch = keys[t : t + step]
            dots = torch.bmm(queries[row].expand(len(batch), -1, -1), batch).relu_()
            summed = torch.bmm(weights[row].expand(len(batch), -1, -1), dots)
            out[row, t * KEY_TILE : (t + len(batch)) * KEY_TILE] = summed.flatten()
    return out


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

    Keys are taken in segments, rows in tiles, both as large as half the budget allows; what a segment leaves is merged
    with the next one's.
    """
    heads, dim = codes.shape[1:]
    top_k, end = out.shape[1], int(lengths[-1])
    logit_bytes = heads * KEY_TILE * 4  # of one row and one tile
    # A key is held as bytes, float16 and float32; a score as three float32 / int32 and two int64.
    segment = KEY_TILE * min(_ceil(end, KEY_TILE), max(1, budget // 2 // (KEY_TILE * dim * 8)))
    row_tile = max(1, min(LOGIT_BYTES // logit_bytes, budget // 2 // (logit_bytes + 28 * segment)))
    keys = _index_keys(index_cache, pages, dim, 0, end) if end <= segment else None
    for first_row in range(0, len(codes), row_tile):
        tile = slice(first_row, first_row + row_tile)
        queries, head_weights = _index_queries(codes[tile], weights[tile])
        best, last = None, int(lengths[tile][-1])
        for first in range(0, last, segment):
            tile_keys, scales = keys or _index_keys(index_cache, pages, dim, first, min(first + segment, end))
            tiles = _ceil(min(last - first, segment), KEY_TILE)
            found = _scores(queries, head_weights, tile_keys[:tiles], min(LOGIT_BYTES, budget // 2))
            found *= scales[: tiles * KEY_TILE]
            ranks = _rank(found, first, lengths[tile])
            if best is not None:
                ranks = torch.cat([best, ranks], dim=1)
            best = ranks.topk(min(top_k, ranks.shape[1]), sorted=False).values
        out[tile] = (_LOW_WORD - (best & _LOW_WORD)).int().sort(dim=1).values


def _attend_rows(
    query: torch.Tensor,
    latent_cache: torch.Tensor,
    rows: Rows,
    requests: torch.Tensor,
    picked: torch.Tensor,
    scale: float,
    chunk: int,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [b, N, R + P] float32, picked [b, chunks * chunk], -1 past each row's last: values [b, N, R], lse [b, N]."""
    (b, heads, width), picks = query.shape, picked.shape[1]
    chunks = picks // chunk
    padding = picked < 0
    # Padding reads the row's first pick again: any other memory could hold NaN, which a zero weight does not silence.
    latents = _gather(latent_cache, rows, requests, torch.where(padding, picked[:, :1], picked)).view(-1, chunk, width)

    each = query.unsqueeze(1).expand(-1, chunks, -1, -1).reshape(-1, heads, width)
    logits = torch.bmm(each, latents.transpose(1, 2))  # [b * chunks, N, chunk]
    logits = logits.view(b, chunks, heads, chunk).transpose(1, 2).reshape(b, heads, picks) * scale
    logits.masked_fill_(padding.unsqueeze(1), float("-inf"))
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


def _gather(latent_cache: torch.Tensor, rows: Rows, requests: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Latent rows of positions [b, n] of each row's request, float32 [b * n, R + P]."""
    blocks = positions // rows.block_size
    pages = rows.block_table[requests.long().unsqueeze(1), blocks.long()].long()
    # One index over a view whose rows overlap: index_select copies whole rows, indexing by page and offset does not.
    page_stride, token_stride, _ = latent_cache.stride()
    step = math.gcd(page_stride, token_stride)
    extent = (latent_cache.shape[0] - 1) * page_stride + (latent_cache.shape[1] - 1) * token_stride
    source = latent_cache.as_strided((extent // step + 1, latent_cache.shape[2]), (step, 1))
    offsets = positions - blocks * rows.block_size
    index = pages * (page_stride // step) + offsets * (token_stride // step)
    raw = source.index_select(0, index.flatten())
    if raw.dtype != torch.uint8:
        return raw.float()
    latents = torch.empty(len(raw), 576)
    latents[:, :512] = _decode(raw[:, :512])
    latents[:, :512].unflatten(1, (4, cache.LATENT_GROUP)).mul_(raw[:, 512:528].view(torch.float32).unsqueeze(-1) * 256)
    latents[:, 512:] = raw[:, 528:].view(torch.bfloat16)
    return latents
