"""select on GPUs: paged scores, then the exact top-k of each row. Contracts: ``vllm_dsa.kernels``.

Rows go in tiles whose scores stay within VLLM_DSA_SCORE_BUDGET_MB. A score depends on its row and its key alone, not on
the tile, the group or the batch they are computed in. Top-k ranks a row's scores by one program, in two reads:

1. Of the row laid out in lines of CHUNK columns (at least twice top_k), the maximum of each column. The top_k-th best
   of these maxima bounds the top_k-th best score from below.
2. The keys that score at least that bound, in order of position, and how many they are: for scores without structure
   at most about 1.4 top_k, whatever the length. If they fit CHUNK, the rest runs in registers; rows with many equal
   scores may exceed it and are then ranked in memory.

Nothing here depends on values the host would have to read, so a captured graph serves any lengths.
"""

import torch
import triton
import triton.language as tl

from vllm_dsa import envs
from vllm_dsa.kernels import triton_configs
from vllm_dsa.kernels.triton_e4m3 import decode
from vllm_dsa.metadata import Rows


@triton.jit(do_not_specialize=["first_row", "end_row", "least", "group_rows", "scores_stride"])
def _score_kernel(
    codes, weights, index_cache, requests, lengths, block_table, scores,
    first_row, end_row, least, group_rows, scores_stride, page_stride, table_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, HARDWARE: tl.constexpr, FP8_DOT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MAX_GROUP: tl.constexpr,
):  # fmt: skip
    """Programs (group of rows, every so manieth tile of BLOCK_N keys); scores [rows, scores_stride] of rows longer than
    ``least``."""
    row = first_row + tl.program_id(0) * group_rows
    last = tl.minimum(row + group_rows, end_row)
    head, dim, member = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, MAX_GROUP)
    in_h, in_d = head < HEADS, (dim < DIM)[None, :]
    UNIT: tl.constexpr = 1.0 if HARDWARE else 65536.0  # queries and keys may be decoded to 2^-8 of their value
    while row < last:
        # The rows from here on that share a request share the keys.
        request = tl.load(requests + row).to(tl.int64)
        others = tl.load(requests + row + member, mask=row + member < last, other=-1) != request
        end = tl.minimum(row + tl.min(tl.where(others, member, MAX_GROUP), axis=0), last)
        longest = tl.max(tl.load(lengths + row + member, mask=row + member < end, other=0), axis=0)
        longest = tl.where(longest > least, longest, 0)
        first = row.to(tl.int64)
        queries, row_weights = codes + first * (HEADS * DIM), weights + first * HEADS
        row_scores = scores + (first - first_row) * scores_stride
        for start in range(tl.program_id(1) * BLOCK_N, longest, tl.num_programs(1) * BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            known = key < longest
            page = tl.load(block_table + request * table_stride + key // BLOCK_SIZE, mask=known, other=0)
            base = index_cache + page.to(tl.int64) * page_stride  # [BLOCK_N]
            offset = key % BLOCK_SIZE
            key_codes = tl.load((base + offset * DIM)[:, None] + dim[None, :], mask=known[:, None] & in_d, other=0)
            scales = (base + BLOCK_SIZE * DIM).to(tl.pointer_type(tl.float32), bitcast=True)
            scale = tl.load(scales + offset, mask=known, other=0.0) * UNIT
            keys = key_codes.to(tl.float8e4nv, bitcast=True) if FP8_DOT else decode(key_codes, HARDWARE)
            for r in range(0, end - row):
                places = queries + (r * HEADS + head[:, None]) * DIM + dim[None, :]
                query_codes = tl.load(places, mask=in_h[:, None] & in_d, other=0)
                query = query_codes.to(tl.float8e4nv, bitcast=True) if FP8_DOT else decode(query_codes, HARDWARE)
                weight = tl.load(row_weights + r * HEADS + head, mask=in_h, other=0.0)
                dots = tl.dot(keys, tl.trans(query))  # [BLOCK_N, BLOCK_H]
                found = tl.sum(tl.maximum(dots, 0.0) * weight[None, :], axis=1) * scale
                tl.store(row_scores + r * scores_stride + key, found, mask=key < tl.load(lengths + row + r))
        row = end


@triton.jit
def _rank(scores):
    """float32 to uint32 that order as they do; 0.0 and -0.0 are equal, and nothing finite becomes 0."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _kth(ranks, TOP_K: tl.constexpr):
    """The TOP_K-th largest of ranks [n], uint32, at least TOP_K of them above 0."""
    found = tl.zeros((), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(0, 32):
        tried = found | bit
        bit = bit >> 1
        found = tl.where(tl.sum((ranks >= tried).to(tl.int32), axis=0) >= TOP_K, tried, found)
    return found


@triton.jit
def _kth_in_memory(scores, length, TOP_K: tl.constexpr, CHUNK: tl.constexpr):
    """As ``_kth``, of the ranks of scores[:length]."""
    column = tl.arange(0, CHUNK)
    found = tl.zeros((), tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(0, 32):
        tried = found | bit
        bit = bit >> 1
        count = tl.zeros((), tl.int32)
        for start in range(0, length, CHUNK):
            ranks = _rank(tl.load(scores + start + column, mask=start + column < length, other=float("-inf")))
            count += tl.sum(((ranks >= tried) & (start + column < length)).to(tl.int32), axis=0)
        found = tl.where(count >= TOP_K, tried, found)
    return found


@triton.jit
def _emit(out, ranks, position, threshold, ties, written, TOP_K: tl.constexpr):
    """Of keys in order of position, append those above the threshold and the first ``ties`` equal to it to ``out``.

    Returns how many ties are left and how many positions are written.
    """
    above, equal = (ranks > threshold).to(tl.int32), (ranks == threshold).to(tl.int32)
    both = tl.cumsum(above + (equal << 16), axis=0)  # of fewer than 2^16 keys
    above_before, equal_before = (both & 0xFFFF) - above, (both >> 16) - equal
    taken = (above == 1) | ((equal == 1) & (equal_before < ties))
    place = written + above_before + tl.minimum(equal_before, ties)
    tl.store(out + place, position, mask=taken & (place < TOP_K))
    tied = tl.minimum(tl.sum(equal, axis=0), ties)
    return ties - tied, written + tl.sum(above, axis=0) + tied


@triton.jit(do_not_specialize=["scores_stride"])
def _top_k_kernel(
    scores, candidates, lengths, out, scores_stride, out_stride,
    TOP_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program a row. candidates [rows, 2, CHUNK] int32: positions of the candidates, then their scores' bits."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    out += row * out_stride
    column = tl.arange(0, CHUNK)
    if length <= TOP_K:
        tl.store(out + column, tl.where(column < length, column, -1), mask=column < TOP_K)
        return
    scores += row * scores_stride
    places = candidates + row * (2 * CHUNK)
    kept = (places + CHUNK).to(tl.pointer_type(tl.float32), bitcast=True)

    best = tl.full([CHUNK], float("-inf"), tl.float32)
    for start in range(0, length, CHUNK):
        best = tl.maximum(best, tl.load(scores + start + column, mask=start + column < length, other=float("-inf")))
    bound = _kth(tl.where(column < length, _rank(best), 0), TOP_K)

    count = tl.zeros((), tl.int32)
    for start in range(0, length, CHUNK):
        position = start + column
        found = tl.load(scores + position, mask=position < length, other=float("-inf"))
        candidate = ((_rank(found) >= bound) & (position < length)).to(tl.int32)
        place = count + tl.cumsum(candidate, axis=0) - candidate
        fits = (candidate == 1) & (place < CHUNK)
        tl.store(places + place, position, mask=fits)
        tl.store(kept + place, found, mask=fits)
        count += tl.sum(candidate, axis=0)

    written = tl.zeros((), tl.int32)
    if count <= CHUNK:
        tl.debug_barrier()  # other threads of this program wrote what is read next
        position = tl.load(places + column, mask=column < count, other=0)
        ranks = _rank(tl.load(kept + column, mask=column < count, other=float("-inf")))
        ranks = tl.where(column < count, ranks, 0)
        threshold = _kth(ranks, TOP_K)
        ties = TOP_K - tl.sum((ranks > threshold).to(tl.int32), axis=0)
        _emit(out, ranks, position, threshold, ties, written, TOP_K)
    else:
        threshold = _kth_in_memory(scores, length, TOP_K, CHUNK)
        above = tl.zeros((), tl.int32)
        for start in range(0, length, CHUNK):
            ranks = _rank(tl.load(scores + start + column, mask=start + column < length, other=float("-inf")))
            above += tl.sum(((ranks > threshold) & (start + column < length)).to(tl.int32), axis=0)
        ties = TOP_K - above
        for start in range(0, length, CHUNK):
            position = start + column
            ranks = _rank(tl.load(scores + position, mask=position < length, other=float("-inf")))
            ranks = tl.where(position < length, ranks, 0)
            ties, written = _emit(out, ranks, position, threshold, ties, written, TOP_K)


def select(
    codes: torch.Tensor, weights: torch.Tensor, index_cache: torch.Tensor, rows: Rows, out: torch.Tensor
) -> None:
    """Top-k positions of every row; temporaries stay within VLLM_DSA_SCORE_BUDGET_MB."""
    tokens, top_k = out.shape
    if not tokens:
        return
    # Where all rows are decodes a captured graph may replay this for other lengths.
    bound = rows.block_table.shape[1] * rows.block_size
    longest = bound if rows.decodes >= tokens else max(rows.ends, default=bound)
    stride = 64 * triton.cdiv(max(1, longest), 64)
    tile = max(1, min(tokens, (envs.VLLM_DSA_SCORE_BUDGET_MB << 20) // (4 * stride + 8 * _chunk(top_k))))
    scored = torch.empty(tile, stride, dtype=torch.float32, device=out.device)
    for first in range(0, tokens, tile):
        end = min(first + tile, tokens)
        if longest > top_k:
            _score(codes, weights, index_cache, rows, scored, first, end, top_k, longest)
        top_k_rows(scored, rows.lengths[first:end], out[first:end])


def top_k_rows(scored: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor) -> None:
    """Exact top-k of scored [rows, n] float32, of which lengths [rows] count, into out [rows, K] as select's."""
    top_k, chunk = out.shape[1], _chunk(out.shape[1])
    candidates = torch.empty(len(out), 2, chunk, dtype=torch.int32, device=out.device)
    _top_k_kernel[(len(out),)](
        scored,
        candidates,
        lengths,
        out,
        scored.stride(0),
        out.stride(0),
        TOP_K=top_k,
        CHUNK=chunk,
        num_warps=8,
    )


def _chunk(top_k: int) -> int:
    return max(1024, 2 * triton.next_power_of_2(top_k))


def scores(codes: torch.Tensor, weights: torch.Tensor, index_cache: torch.Tensor, rows: Rows, row: int) -> torch.Tensor:
    """Index scores [length] of one row, the very ones that select ranks."""
    length = int(rows.lengths[row])
    found = torch.empty(1, max(1, length), dtype=torch.float32, device=codes.device)
    if length:
        _score(codes, weights, index_cache, rows, found, row, row + 1, 0, length)
    return found[0, :length]


def _score(
    codes: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    rows: Rows,
    scored: torch.Tensor,
    first: int,
    end: int,
    least: int,
    longest: int,
) -> None:
    """Scores of rows first:end of more than ``least`` keys into ``scored``; no row has more than ``longest``."""
    heads, dim = codes.shape[1:]
    config = triton_configs.score(codes.device)
    # Few rows: spread over the chip. Many: a group reads its keys once.
    group = 1 if end - first <= config.spread_rows else config.group_rows
    groups, tiles = triton.cdiv(end - first, group), triton.cdiv(longest, config.block_keys)
    _score_kernel[(groups, min(tiles, triton.cdiv(config.programs, groups)))](
        codes.view(torch.uint8),
        weights,
        index_cache,
        rows.requests,
        rows.lengths,
        rows.block_table,
        scored,
        first,
        end,
        least,
        group,
        scored.stride(0),
        index_cache.stride(0),
        rows.block_table.stride(0),
        HEADS=heads,
        DIM=dim,
        BLOCK_SIZE=rows.block_size,
        HARDWARE=config.hardware_e4m3,
        FP8_DOT=config.fp8_dot,
        BLOCK_H=max(16, triton.next_power_of_2(heads)),
        BLOCK_D=max(32, triton.next_power_of_2(dim)),
        BLOCK_N=config.block_keys,
        MAX_GROUP=config.group_rows,
        num_warps=config.warps,
        num_stages=config.stages,
    )
