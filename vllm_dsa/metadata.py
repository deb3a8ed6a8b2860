"""What one step asks of the kernels: pure functions from lengths and block tables to rows."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """The query rows of one step, shared by every layer.

    requests  [T] int32: the row's request, an index into block_table
    lengths   [T] int32: keys the row may see, its own included (position + 1); 0 for a padding row
    block_table [requests, max_blocks] int32: physical page of each logical block
    block_size: tokens a page
    starts: host ints, requests + 1: rows starts[i]:starts[i + 1] are request i's, in ascending position
    ends: host ints, one a request: length of its last row, so request i needs no key at or past ends[i]
    decodes: host int: the first so many rows are of requests that bring few rows each (decode, draft verification)
    """

    requests: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    block_size: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    decodes: int = 0
    made: dict[Hashable, Any] = field(default_factory=dict, compare=False)

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What make() returned the first time in this step: the same for every layer, and for ``without``'s rows."""
        if name not in self.made:
            self.made[name] = make()
        found: T = self.made[name]
        return found


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host numbers as a tensor on a device, without waiting for it."""
    on_host = torch.tensor(values, dtype=dtype)
    return (on_host.pin_memory() if device.type == "cuda" else on_host).to(device, non_blocking=True)


def build_rows(
    query_starts: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, block_size: int, num_tokens: int
) -> Rows:
    """Rows of a step whose lengths are known on the host.

    query_starts [requests + 1] and seq_lens [requests], int32 on the CPU: request i brings rows
    query_starts[i]:query_starts[i + 1] and is seq_lens[i] tokens long once they are written. num_tokens may
    exceed query_starts[-1]: the rows past it are padding.
    """
    starts = query_starts.tolist()
    ends = seq_lens.tolist()
    requests = torch.zeros(num_tokens, dtype=torch.int32)
    lengths = torch.zeros(num_tokens, dtype=torch.int32)
    for i, end in enumerate(ends):
        first, last = starts[i], starts[i + 1]
        requests[first:last] = i
        lengths[first:last] = torch.arange(end - (last - first) + 1, end + 1, dtype=torch.int32)
    device = block_table.device
    return Rows(
        requests=requests.to(device),
        lengths=lengths.to(device),
        block_table=block_table,
        block_size=block_size,
        starts=tuple(starts),
        ends=tuple(ends),
    )


def dense_parts(rows: Rows, top_k: int, least: int) -> tuple[tuple[int, slice], ...]:
    """Requests past the decodes that bring at least ``least`` rows which see at most top_k keys, each with those rows.

    Such rows select every key they see, so that dense attention serves them as well.
    """

    def make() -> tuple[tuple[int, slice], ...]:
        found = []
        for request, (first, last) in enumerate(pairwise(rows.starts)):
            count = min(last - first, top_k - (rows.ends[request] - (last - first)))
            if first >= rows.decodes and count >= least:
                found.append((request, slice(first, first + count)))
        return tuple(found)

    return rows.once(("dense parts", top_k, least), make)


def between(parts: Sequence[slice], count: int) -> tuple[slice, ...]:
    """The ranges of 0:count that are in none of parts, which ascend; none is empty."""
    borders = [0, *(border for part in parts for border in (part.start, part.stop)), count]
    return tuple(slice(first, last) for first, last in zip(borders[::2], borders[1::2], strict=True) if first < last)


def without(rows: Rows, parts: tuple[tuple[int, slice], ...]) -> Rows:
    """Rows that see no key in ``parts``, as dense_parts returns them, and are the same elsewhere."""

    def make() -> Rows:
        lengths = rows.lengths.clone()
        for _, part in parts:
            lengths[part] = 0
        return replace(rows, lengths=lengths)

    return rows.once(("without", *((part.start, part.stop) for _, part in parts)), make) if parts else rows


def cut(rows: Rows, mine: slice) -> Rows:
    """Rows ``mine`` of a step as a step of their own, with the requests that these rows are of.

    A request may be cut: it then ends with the last of its rows that is in. Made once a step.
    """
    first, last = mine.start, mine.stop

    def make() -> Rows:
        owners = [i for i, (start, stop) in enumerate(pairwise(rows.starts)) if max(start, first) < min(stop, last)]
        low, high = (owners[0], owners[-1] + 1) if owners else (0, 0)
        return Rows(
            requests=rows.requests[mine] - low,
            lengths=rows.lengths[mine],
            block_table=rows.block_table[low:high],
            block_size=rows.block_size,
            starts=tuple(min(max(start, first), last) - first for start in rows.starts[low : high + 1]),
            ends=tuple(rows.ends[i] - max(0, rows.starts[i + 1] - last) for i in range(low, high)),
            decodes=min(max(rows.decodes, first), last) - first,
        )

    return rows.once(("cut", first, last, id(rows.lengths)), make)  # ``without`` has other lengths


@dataclass(frozen=True)
class Part:
    """Consecutive prefill requests whose keys are gathered together: ``requests`` and their ``rows``.

    bounds: host ints, requests + 1: the first gathered key of each request, then how many there are
    """

    requests: slice
    rows: slice
    bounds: tuple[int, ...]


def prefill_parts(rows: Rows, most: int) -> tuple[Part, ...]:
    """The rows past the decodes in parts of at most ``most`` keys; a longer request is alone.

    Rows that pad the step are the last part's, which then may be of no request.
    """

    def make() -> tuple[Part, ...]:
        parts, requests, tokens = list[Part](), len(rows.ends), len(rows.lengths)
        first = next((i for i in range(requests) if rows.starts[i] >= rows.decodes), requests)
        row = rows.decodes
        while row < tokens:
            last, bounds = first, [0]
            while last < requests and (last == first or bounds[-1] + rows.ends[last] <= most):
                bounds.append(bounds[-1] + rows.ends[last])
                last += 1
            stop = rows.starts[last] if last < requests else tokens
            if stop > row:
                parts.append(Part(slice(first, last), slice(row, stop), tuple(bounds)))
            first, row = last, stop
        return tuple(parts)

    return rows.once(("prefill parts", most), make)


def score_tiles(rows: Rows, requests: slice, top_k: int, most: int, least: int) -> list[tuple[slice, int]]:
    """The rows of some requests, from the first of them on, in tiles of at most ``most`` scores (or one row), each with
    a bound of its rows' lengths. A tile may be of several requests.

    A request's first rows that see at most top_k keys, if they are ``least`` or more, are tiles of their own: nobody
    has to score them.
    """
    base = rows.starts[requests.start]
    tiles: list[tuple[slice, int]] = []
    start = stop = base  # the tile that may still grow
    longest = 0

    def close(first: int, last: int, bound: int) -> None:
        if first < last:
            tiles.append((slice(first - base, last - base), bound))

    for request in range(requests.start, requests.stop):
        (first, last), end = rows.starts[request : request + 2], rows.ends[request]
        short = top_k - (end - (last - first))
        if least <= short < last - first:
            close(start, stop, longest)
            close(first, first + short, top_k)
            first, longest = first + short, 0
            start = stop = first
        while first < last:
            if (last - start) * max(longest, end) <= most:
                first, stop, longest = last, last, max(longest, end)
                continue
            close(start, stop, longest)
            longest = 0
            if start == stop:  # too many scores for one tile
                stop = min(first + max(1, most // end), last)
                close(first, stop, end - (last - stop))
                first = stop
            start = stop = first
    close(start, stop, longest)
    return tiles


def count_scores(rows: Rows, top_k: int) -> int:
    """Scores that select computes for the rows past the decodes: one a key of each row that sees more than top_k."""
    total = 0
    for end, (first, last) in zip(rows.ends, pairwise(rows.starts), strict=True):
        if first >= rows.decodes:
            count = max(0, min(last - first, end - top_k))
            total += count * (2 * end - count + 1) // 2
    return total


def shared_chunks(rows: Rows, top_k: int, ranks: int, least: int) -> tuple[slice, ...]:
    """The rows past the decodes in 2 * ranks chunks, of which rank i selects for the i-th and the i-th from the end:
    later rows of a prompt see more keys, so that all ranks have about as much to do. The last chunks may be shorter, or
    empty.

    Empty where the ranks do not share: where select computes fewer than ``least`` scores (0: never share), or fewer
    than top_k a row, since what is gathered grows with the rows. All ranks decide alike, by what their hosts know.
    """

    def make() -> tuple[slice, ...]:
        tokens = len(rows.lengths)
        count, borders = tokens - rows.decodes, list[int]()
        if ranks > 1 and least and count and count_scores(rows, top_k) >= max(least, count * top_k):
            size = -(-count // (2 * ranks))
            borders = [min(rows.decodes + i * size, tokens) for i in range(2 * ranks + 1)]
        return tuple(slice(first, last) for first, last in pairwise(borders))

    return rows.once(("shared chunks", top_k, ranks, least), make)


def count_decodes(starts: Sequence[int], longest: int, tokens: int) -> int:
    """Rows of the leading requests that bring at most ``longest`` rows each; starts as in Rows. If that are all, the
    rows that pad the step to ``tokens`` are decodes as well."""
    for first, last in pairwise(starts):
        if last - first > longest:
            return first
    return tokens


def one_row_each(starts: Sequence[int], rows: int) -> bool:
    """Are the first ``rows`` rows of as many requests, one of each? starts as in Rows."""
    return list(starts[: rows + 1]) == list(range(rows + 1))


class DeviceRows:
    """Rows of steps on a GPU: always in the same buffers, so that a CUDA graph can be replayed on the next step.

    The device's lengths are exact; the host's may exceed them under asynchronous speculation, and only bound.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.tokens = torch.arange(max_tokens, dtype=torch.int32, device=device)
        self.requests = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(max_tokens, dtype=torch.int32, device=device)

    def build(
        self,
        query_starts: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        block_size: int,
        num_tokens: int,
        host_starts: list[int],
        host_ends: list[int],
        decode_rows: int,
    ) -> Rows:
        """query_starts [requests + 1] and seq_lens [requests] int32 on the device; requests that pad a graph have no
        rows or a length of 0. host_starts and host_ends: the same as host ints. decode_rows: most rows of a request
        that counts as decoding."""
        tokens, requests = self.tokens[:num_tokens], self.requests[:num_tokens]
        written, used = self.lengths[:num_tokens], host_starts[-1]
        if num_tokens <= len(seq_lens) and one_row_each(host_starts, used):
            # As in most steps: a request's last token. Three small kernels in place of eleven.
            requests.copy_(tokens)
            written[:used].copy_(seq_lens[:used])
            written[used:].zero_()
        else:
            torch.searchsorted(query_starts[1:], tokens, right=True, out_int32=True, out=requests)
            requests.clamp_(max=len(seq_lens) - 1)
            request = requests.long()
            lengths = seq_lens[request] - query_starts[1:][request] + tokens + 1
            lengths.masked_fill_(tokens >= query_starts[-1], 0)
            torch.clamp(lengths, min=0, out=written)
        return Rows(
            requests=requests,
            lengths=written,
            block_table=block_table,
            block_size=block_size,
            starts=tuple(host_starts),
            ends=tuple(host_ends),
            decodes=count_decodes(host_starts, decode_rows, num_tokens),
        )


def tokens_to_slots(positions: torch.Tensor, pages: torch.Tensor, block_size: int) -> torch.Tensor:
    """Slots [n] int64 of token positions [n] whose request's block table is pages [blocks]."""
    positions = positions.long()
    return pages[positions // block_size].long() * block_size + positions % block_size
