"""select on GPUs: paged scores, then the exact top-k of each row. Contracts: ``vllm_dsa.kernels``.

Rows go in tiles whose scores stay within VLLM_DSA_SCORE_BUDGET_MB. A score depends on its row and its key alone, not on
the tile, the group or the batch they are computed in. Top-k ranks a row's scores by one program, in two reads:

1. Of the row laid out in lines of CHUNK columns (at least twice top_k), the maximum of each column. What about top_k
   of these maxima reach bounds the top_k-th best score from below.
2. The keys that score at least that bound, in order of position, and how many they are: for scores without structure
   at most about 1.5 top_k, whatever the length. If they fit CHUNK, the rest runs in registers; rows with many equal
   scores may exceed it and are then ranked in memory.

A bound is found by counting: of the interval that it lies in, each step keeps a third.

Nothing here depends on values the host would have to read, so a captured graph serves any lengths.
"""

import torch
import triton
import triton.language as tl

from vllm_dsa import envs
from vllm_dsa.kernels import triton_configs
from vllm_dsa.kernels.triton_e4m3 import decode
from vllm_dsa.metadata import Rows

SCAN = 1024
ROWS = 4096  # ranked at a time: 134 MB of candidates at a top_k of 2048
FEW_ROWS = 256  # so few programs leave most of a chip idle: more warps for each


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
def _split(low, high, many, few, first, second, first_count, second_count, TOP_K: tl.constexpr):
    """``_narrow``'s next bounds, by how many ranks reach ``first`` and ``second``, low < first <= second <= high."""
    if second_count >= TOP_K:
        low, many = second, second_count
    elif first_count >= TOP_K:
        low, many, high, few = first, first_count, second - 1, second_count
    else:
        high, few = first - 1, first_count
    return low, high, many, few


@triton.jit
def _thirds(low, high):
    third = (high - low) // 3
    return low + third + 1, tl.minimum(low + 2 * third + 2, high)


@triton.jit
def _narrow(ranks, low, high, many, TOP_K: tl.constexpr, ENOUGH: tl.constexpr):
    """The greatest ``low`` that at least TOP_K of ranks [n] reach, or one that at most ENOUGH reach.

    high: no rank is greater. many: ranks that reach low. Returns low, how many reach it, and how many exceed high,
    which is low if more than ENOUGH reach it.
    """
    few = tl.zeros((), tl.int32)
    while (low < high) & (many > ENOUGH):
        first, second = _thirds(low, high)
        both = tl.sum((ranks >= first).to(tl.int32) + ((ranks >= second).to(tl.int32) << 16), axis=0)
        low, high, many, few = _split(low, high, many, few, first, second, both & 0xFFFF, both >> 16, TOP_K)
    return low, many, few


@triton.jit
def _load(scores, position, length, UNIT: tl.constexpr):
    """scores[position], something past length; UNIT scores are read at a time."""
    return tl.load(scores + position, mask=position < (length + UNIT - 1) // UNIT * UNIT, other=0.0)


@triton.jit
def _load_ranks(scores, position, length, UNIT: tl.constexpr):
    """Ranks of scores[position], 0 past length."""
    return tl.where(position < length, _rank(_load(scores, position, length, UNIT)), 0)


@triton.jit
def _narrow_in_memory(scores, length, low, high, many, TOP_K: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """As ``_narrow``, of the ranks of scores[:length]."""
    column = tl.arange(0, CHUNK)
    few = tl.zeros((), tl.int32)
    while (low < high) & (many > TOP_K):
        first, second = _thirds(low, high)
        first_count, second_count = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
        for start in range(0, length, CHUNK):
            ranks = _load_ranks(scores, start + column, length, UNIT)
            both = tl.sum((ranks >= first).to(tl.int32) + ((ranks >= second).to(tl.int32) << 16), axis=0)
            first_count += both & 0xFFFF
            second_count += both >> 16
        low, high, many, few = _split(low, high, many, few, first, second, first_count, second_count, TOP_K)
    return low, many, few


@triton.jit
def _top_k_row(
    scores, length, places, out, TOP_K: tl.constexpr, CHUNK: tl.constexpr, SCAN: tl.constexpr, UNIT: tl.constexpr
):
    """The top-k of scores[:length], more than TOP_K, into out. places: one program's of ``candidates`` below."""
    column = tl.arange(0, CHUNK)
    kept = (places + CHUNK).to(tl.pointer_type(tl.float32), bitcast=True)

    best = tl.zeros([CHUNK], tl.uint32)
    for start in range(0, length, CHUNK):
        best = tl.maximum(best, _load_ranks(scores, start + column, length, UNIT))
    highest = tl.max(best, axis=0)
    lowest = tl.min(tl.where(column < length, best, highest), axis=0)
    columns = tl.minimum(length, CHUNK)
    bound, _, _ = _narrow(best, lowest, highest, columns, TOP_K, TOP_K + TOP_K // 16)

    count = tl.zeros((), tl.int32)
    part = tl.arange(0, SCAN)
    for start in range(0, length, SCAN):
        position = start + part
        found = _load(scores, position, length, UNIT)
        candidate = ((_rank(found) >= bound) & (position < length)).to(tl.int32)
        place = count + tl.cumsum(candidate, axis=0) - candidate
        fits = (candidate == 1) & (place < CHUNK)
        tl.store(places + place, position, mask=fits)
        tl.store(kept + place, found, mask=fits)
        count += tl.sum(candidate, axis=0)
    tl.debug_barrier()  # other threads of this program wrote what is read next

    gathered = count <= CHUNK
    if gathered:
        ranks = _load_ranks(kept, column, count, UNIT)
        low, many, few = _narrow(ranks, bound, highest, count, TOP_K, TOP_K)
        source, total = kept, count
    else:
        low, many, few = _narrow_in_memory(scores, length, bound, highest, count, TOP_K, SCAN, UNIT)
        source, total = scores, length
    # Above: those that reach low, if they are TOP_K, else those that exceed it, and of its equals the first.
    exact = many == TOP_K
    ties = tl.where(exact, 0, TOP_K - few)
    written = tl.zeros((), tl.int32)
    for start in range(0, total, SCAN):
        position = start + part
        ranks = _load_ranks(source, position, total, UNIT)
        equal = ((ranks == low) & (not exact)).to(tl.int32)
        above = (ranks >= low).to(tl.int32) - equal
        both = tl.cumsum(above + (equal << 16), axis=0)  # of fewer than 2^16 keys
        above_before, equal_before = (both & 0xFFFF) - above, (both >> 16) - equal
        taken = (above == 1) | ((equal == 1) & (equal_before < ties))
        place = written + above_before + tl.minimum(equal_before, ties)
        if gathered:
            position = tl.load(places + position, mask=position < total, other=0)
        tl.store(out + place, position, mask=taken & (place < TOP_K))
        tied = tl.minimum(tl.sum(equal, axis=0), ties)
        ties -= tied
        written += tl.sum(above, axis=0) + tied


@triton.jit(do_not_specialize=["scores_stride", "out_stride"], do_not_specialize_on_alignment=["lengths", "out"])
def _top_k_kernel(
    scores, candidates, lengths, out, scores_stride, out_stride,
    TOP_K: tl.constexpr, CHUNK: tl.constexpr, SCAN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program a row, which appends SCAN positions at a time.

    candidates [rows, 2, CHUNK] int32: positions of the row's candidates, then their scores' bits. scores_stride counts
    units of UNIT scores.
    """
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    out += row * out_stride
    if length <= TOP_K:
        column = tl.arange(0, CHUNK)
        tl.store(out + column, tl.where(column < length, column, -1), mask=column < TOP_K)
    else:
        scores += row * scores_stride * UNIT
        _top_k_row(scores, length, candidates + row * (2 * CHUNK), out, TOP_K, CHUNK, SCAN, UNIT)


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
    tile = max(1, min(tokens, (envs.VLLM_DSA_SCORE_BUDGET_MB << 20) // (4 * stride)))
    scored = torch.empty(tile, stride, dtype=torch.float32, device=out.device)
    for first in range(0, tokens, tile):
        end = min(first + tile, tokens)
        if longest > top_k:
            _score(codes, weights, index_cache, rows, scored, first, end, top_k, longest)
        top_k_rows(scored, rows.lengths[first:end], out[first:end])


def top_k_rows(scored: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor) -> None:
    """Exact top-k of scored [rows, n] float32, of which lengths [rows] count, into out [rows, K] as select's."""
    top_k, chunk = out.shape[1], _chunk(out.shape[1])
    candidates = torch.empty(min(len(out), ROWS), 2, chunk, dtype=torch.int32, device=out.device)
    unit = 4 if scored.stride(0) % 4 == 0 else 1  # 16 bytes a load
    for first in range(0, len(out), ROWS):
        mine = out[first : first + ROWS]
        _top_k_kernel[(len(mine),)](
            scored[first:],
            candidates,
            lengths[first:],
            mine,
            scored.stride(0) // unit,
            out.stride(0),
            TOP_K=top_k,
            CHUNK=chunk,
            SCAN=SCAN,
            UNIT=unit,
            num_warps=8 if len(mine) > FEW_ROWS else 16,
        )


def top_k_workspace(top_k: int) -> int:
    """Bytes that top_k_rows may take."""
    return ROWS * 2 * _chunk(top_k) * 4


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
