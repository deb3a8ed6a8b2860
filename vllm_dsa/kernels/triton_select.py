"""select on GPUs: paged scores, then the exact top-k of each row. Contracts: ``vllm_dsa.kernels``.

Rows go in tiles whose scores stay within VLLM_DSA_SCORE_BUDGET_MB. A score depends on its row and its key alone, not on
the tile, the group or the batch they are computed in. Top-k ranks a row's scores by one program, in three reads:

1. Of the row laid out in lines of some thousand columns (at least twice top_k), the maximum of each column. What about
   top_k of these maxima reach bounds the top_k-th best score from below.
2. How many scores reach that bound: for scores without structure at most about 1.5 top_k, whatever the length.
3. Their positions, in order. If they fit the registers, the rest runs there; rows with many equal scores may exceed
   them and are ranked in memory.

A row of one line is ranked in the first read.

A bound is found by counting: of the interval that it lies in, each step keeps a third.

Nothing here depends on values the host would have to read, so a captured graph serves any lengths.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vllm_dsa import envs
from vllm_dsa.kernels import triton_configs
from vllm_dsa.kernels.triton_e4m3 import decode
from vllm_dsa.metadata import Rows

STEP = 8  # neighbouring scores that one thread counts
LEAST = tl.constexpr(-3.4028234663852886e38)  # of float32
PLACES_BYTES = 1 << 27  # top-k's temporaries


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
def _rank(score):
    """A finite float32 to a uint32; they order alike."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _of_rank(rank):
    """The score of a rank."""
    bits = rank.to(tl.int32, bitcast=True)
    return (bits ^ ((~bits >> 31) | -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _load(scores, position, length, UNIT: tl.constexpr):
    """scores[position], -inf past length; UNIT scores are read at a time. What is not a number counts as the least."""
    found = tl.load(scores + position, mask=position < (length + UNIT - 1) // UNIT * UNIT, other=LEAST)
    return tl.where(position < length, tl.maximum(found, LEAST), float("-inf"))


@triton.jit
def _counts(found, first, second):
    """How many of found [m, n], fewer than 2^16 in all, reach the score of rank first, and how many that of second."""
    both = tl.where(found >= _of_rank(second), 0x10001, tl.where(found >= _of_rank(first), 1, 0))
    both = tl.sum(tl.sum(both, axis=1), axis=0)
    return both & 0xFFFF, both >> 16


@triton.jit
def _thirds(low, high):
    third = (high - low) // 3
    return low + third + 1, tl.minimum(low + 2 * third + 2, high)


@triton.jit
def _split(low, high, many, few, first, second, first_count, second_count, TOP_K: tl.constexpr):
    """The bounds of ``_narrow`` after its next step: how many reach first and second, low < first <= second <= high."""
    if second_count >= TOP_K:
        low, many = second, second_count
    elif first_count >= TOP_K:
        low, many, high, few = first, first_count, second - 1, second_count
    else:
        high, few = first - 1, first_count
    return low, high, many, few


@triton.jit
def _narrow(found, low, high, many, TOP_K: tl.constexpr, ENOUGH: tl.constexpr):
    """The greatest rank ``low`` that at least TOP_K of found [m, n] reach, or one that at most ENOUGH reach.

    high: none ranks above it. many: how many reach low. Returns low, how many reach it, and how many exceed high, which
    is low if more than ENOUGH reach it.
    """
    few = tl.zeros((), tl.int32)
    while (low < high) & (many > ENOUGH):
        first, second = _thirds(low, high)
        first_count, second_count = _counts(found, first, second)
        low, high, many, few = _split(low, high, many, few, first, second, first_count, second_count, TOP_K)
    return low, many, few


@triton.jit
def _narrow_in_memory(scores, length, low, high, many, at, TOP_K: tl.constexpr, UNIT: tl.constexpr):
    """As ``_narrow``, of scores[:length]. at: [m, n], as many positions as are read at a time."""
    few = tl.zeros((), tl.int32)
    while (low < high) & (many > TOP_K):
        first, second = _thirds(low, high)
        first_count, second_count = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
        for start in range(0, length, at.shape[0] * at.shape[1]):
            counts = _counts(_load(scores, start + at, length, UNIT), first, second)
            first_count += counts[0]
            second_count += counts[1]
        low, high, many, few = _split(low, high, many, few, first, second, first_count, second_count, TOP_K)
    return low, many, few


@triton.jit
def _takes(found, low, exact, ties, written):
    """Which of found [m, n], in this order, are taken, and the places of those in the row's output: all that exceed low
    and the first ``ties`` equal to it; if ``exact``, all that reach it. Then the ties left, and how many are written in
    all."""
    equal = ((found == low) & (not exact)).to(tl.int32)
    above = (found >= low).to(tl.int32) - equal
    packed = above + (equal << 16)
    of_line = tl.sum(packed, axis=1)
    before = tl.cumsum(packed, axis=1) - packed + (tl.cumsum(of_line, axis=0) - of_line)[:, None]
    above_before, equal_before = before & 0xFFFF, before >> 16
    taken = (above == 1) | ((equal == 1) & (equal_before < ties))
    place = written + above_before + tl.minimum(equal_before, ties)
    total = tl.sum(of_line, axis=0)
    tied = tl.minimum(total >> 16, ties)
    return taken, place, ties - tied, written + (total & 0xFFFF) + tied


@triton.jit
def _list(
    scores, length, least, places,
    SIZE: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Writes the positions of scores[:length] that reach least to places [SIZE], ascending, as many as fit; returns how
    many there are.

    Parts of STEP scores are counted, PARTS of them are a chunk, and one scan of 16 bits each places those of four
    chunks. Each thread then writes those of its own parts: none waits for another but in the scan.
    """
    part, cell = tl.arange(0, PARTS), tl.arange(0, 4)[None, :]
    listed = tl.zeros((), tl.int32)
    for first in range(0, length, 4 * PARTS * STEP):
        chunks = tl.minimum(tl.cdiv(length - first, PARTS * STEP), 4)
        counts = tl.zeros([PARTS], tl.int64)
        for chunk in range(0, chunks):
            begin = (first + (chunk * PARTS + part) * STEP)[:, None] + cell
            count = tl.zeros([PARTS], tl.int32)
            for i in tl.static_range(0, STEP, 4):
                count += tl.sum((_load(scores, begin + i, length, UNIT) >= least).to(tl.int32), axis=1)
            counts += count.to(tl.int64) << (16 * chunk)
        before, total = tl.cumsum(counts, axis=0) - counts, tl.sum(counts, axis=0)
        for chunk in range(0, chunks):
            begin = (first + (chunk * PARTS + part) * STEP)[:, None] + cell
            place = listed - 1 + ((before >> (16 * chunk)) & 0xFFFF).to(tl.int32)
            for i in tl.static_range(0, STEP, 4):
                reached = _load(scores, begin + i, length, UNIT) >= least
                flags = reached.to(tl.int32)
                to = place[:, None] + tl.cumsum(flags, axis=1)
                tl.store(places + to, begin + i, mask=reached & (to < SIZE))
                place += tl.sum(flags, axis=1)
            listed += ((total >> (16 * chunk)) & 0xFFFF).to(tl.int32)
    return listed


@triton.jit
def _top_k_row(
    scores, length, places, out,
    TOP_K: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The top-k of scores[:length], more than TOP_K, into out. places [SIZE]: this row's."""
    at = tl.arange(0, SIZE // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    whole = length // SIZE * SIZE
    best = _load(scores, whole + at, length, UNIT)
    for start in range(0, whole, SIZE):
        best = tl.maximum(best, tl.load(scores + start + at))
    columns = tl.minimum(length, SIZE)
    highest = tl.max(tl.max(best, axis=1), axis=0)
    lowest = tl.min(tl.min(tl.where(at < columns, best, highest), axis=1), axis=0)
    lowest, highest = _rank(lowest), _rank(highest)
    if whole == 0:  # each score is a column's maximum
        low, many, few = _narrow(best, lowest, highest, columns, TOP_K, TOP_K)
        taken, place, _, _ = _takes(best, _of_rank(low), many == TOP_K, TOP_K - few, 0)
        tl.store(out + place, at, mask=taken & (place < TOP_K))
    else:
        bound, _, _ = _narrow(best, lowest, highest, columns, TOP_K, TOP_K + TOP_K // 16)
        _top_k_above(scores, length, bound, highest, places, out, at, TOP_K, SIZE, PARTS, STEP, UNIT)


@triton.jit
def _top_k_above(
    scores, length, bound, highest, places, out, at,
    TOP_K: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """As ``_top_k_row``, from the rank ``bound`` on, which at least TOP_K scores reach; none ranks above highest."""
    candidates = _list(scores, length, _of_rank(bound), places, SIZE, PARTS, STEP, UNIT)
    if candidates <= SIZE:
        tl.debug_barrier()  # other threads of this program wrote what is read next
        listed = at < candidates
        position = tl.load(places + at, mask=listed, other=0)
        found = tl.load(scores + position, mask=listed, other=0.0)
        found = tl.where(listed, tl.maximum(found, LEAST), float("-inf"))
        low, many, few = _narrow(found, bound, highest, candidates, TOP_K, TOP_K)
        taken, place, _, _ = _takes(found, _of_rank(low), many == TOP_K, TOP_K - few, 0)
        position = tl.load(places + at, mask=listed, other=0)
        tl.store(out + place, position, mask=taken & (place < TOP_K))
    else:
        low, many, few = _narrow_in_memory(scores, length, bound, highest, candidates, at, TOP_K, UNIT)
        ties, written = TOP_K - few, tl.zeros((), tl.int32)
        for start in range(0, length, SIZE):
            found = _load(scores, start + at, length, UNIT)
            taken, place, ties, written = _takes(found, _of_rank(low), many == TOP_K, ties, written)
            tl.store(out + place, start + at, mask=taken & (place < TOP_K))


@triton.jit(do_not_specialize=["scores_stride", "out_stride"], do_not_specialize_on_alignment=["lengths", "out"])
def _top_k_kernel(
    scores, places, lengths, out, scores_stride, out_stride,
    TOP_K: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program a row. places [rows, SIZE] int32: positions of the row's candidates.

    scores_stride counts units of UNIT scores.
    """
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row)
    out += row * out_stride
    if length <= TOP_K:
        at = tl.arange(0, SIZE)
        tl.store(out + at, tl.where(at < length, at, -1), mask=at < TOP_K)
    else:
        scores += row * scores_stride * UNIT
        _top_k_row(scores, length, places + row * SIZE, out, TOP_K, SIZE, PARTS, STEP, UNIT)


def select(
    codes: torch.Tensor,
    weights: torch.Tensor,
    index_cache: torch.Tensor,
    rows: Rows,
    out: torch.Tensor,
    scored: Callable[[], None] | None = None,
) -> None:
    """Top-k positions of every row; the scores stay within VLLM_DSA_SCORE_BUDGET_MB, top-k takes PLACES_BYTES more."""
    tokens, top_k = out.shape
    if not tokens:
        return
    # Where all rows are decodes a captured graph may replay this for other lengths.
    bound = rows.block_table.shape[1] * rows.block_size
    longest = bound if rows.decodes >= tokens else max(rows.ends, default=bound)
    stride = 64 * triton.cdiv(max(1, longest), 64)
    tile = max(1, min(tokens, (envs.VLLM_DSA_SCORE_BUDGET_MB << 20) // (4 * stride)))
    found = torch.empty(tile, stride, dtype=torch.float32, device=out.device)
    for first in range(0, tokens, tile):
        end = min(first + tile, tokens)
        if longest > top_k:
            _score(codes, weights, index_cache, rows, found, first, end, top_k, longest)
        if scored and not first:
            scored()
        top_k_rows(found, rows.lengths[first:end], out[first:end])


def top_k_rows(scored: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor) -> None:
    """Exact top-k of scored [rows, n] float32, of which lengths [rows] count, into out [rows, K] as select's."""
    top_k = out.shape[1]
    size = triton.next_power_of_2(max(2 * top_k, 512))  # candidates of a row that are ranked in registers
    step = max(1, PLACES_BYTES // (4 * size))
    places = torch.empty(min(len(out), step), size, dtype=torch.int32, device=out.device)
    config = triton_configs.rank(len(out), size)
    unit = 4 if scored.stride(0) % 4 == 0 else 1  # 16 bytes a load
    for first in range(0, len(out), step):
        mine = out[first : first + step]
        _top_k_kernel[(len(mine),)](
            scored[first:],
            places,
            lengths[first:],
            mine,
            scored.stride(0) // unit,
            out.stride(0),
            TOP_K=top_k,
            SIZE=size,
            PARTS=max(128, size // 8),
            STEP=STEP,
            UNIT=unit,
            num_warps=config.warps,
            maxnreg=config.registers,
        )


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
