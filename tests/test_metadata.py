"""Rows of a step: built on the host, built in fixed buffers as on a GPU, cut and shared; slots of positions."""

import random
from dataclasses import replace

import pytest
import torch

from vllm_dsa.metadata import (
    DeviceRows,
    Rows,
    build_rows,
    count_decodes,
    cut,
    dense_parts,
    prefill_parts,
    score_tiles,
    shared_chunks,
    tokens_to_slots,
    without,
)

TABLE = torch.tensor([[3, 1, 9], [7, 0, 9], [5, 2, 4]], dtype=torch.int32)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_rows_of_prefill_chunk_and_decode():
    rows = build_rows(int32(0, 3, 5, 6), int32(3, 34, 40), TABLE, 16, 6)
    assert rows.requests.tolist() == [0, 0, 0, 1, 1, 2]
    assert rows.lengths.tolist() == [1, 2, 3, 33, 34, 40]
    assert rows.requests.dtype == rows.lengths.dtype == torch.int32
    assert (rows.starts, rows.ends, rows.block_size) == ((0, 3, 5, 6), (3, 34, 40), 16)
    assert rows.block_table is TABLE


def test_padding_rows_see_nothing():
    rows = build_rows(int32(0, 2), int32(9), TABLE[:1], 16, 5)
    assert rows.lengths.tolist() == [8, 9, 0, 0, 0]
    assert rows.requests.tolist() == [0, 0, 0, 0, 0]
    assert rows.starts == (0, 2)


def test_a_request_without_rows():
    rows = build_rows(int32(0, 1, 1, 2), int32(7, 12, 3), TABLE, 16, 2)
    assert rows.requests.tolist() == [0, 2]
    assert rows.lengths.tolist() == [7, 3]


def test_no_request():
    rows = build_rows(int32(0), int32(), TABLE[:0], 16, 2)
    assert rows.lengths.tolist() == [0, 0]
    assert (rows.starts, rows.ends) == ((0,), ())


@pytest.mark.parametrize(
    ("starts", "ends", "tokens"),
    [
        ((0, 3, 5, 6), (3, 34, 40), 6),
        ((0, 3, 5, 6), (3, 34, 40), 9),
        ((0, 1, 2, 3), (1, 16, 17), 3),
        ((0, 1, 2, 3), (1, 16, 17), 5),  # one row each, and more rows than requests
        ((0, 1, 2, 2), (7, 16, 99), 3),  # what pads a graph may still have a length
        ((0, 1, 1, 2), (7, 12, 3), 2),
        ((0, 2), (9,), 5),
    ],
)
def test_rows_in_fixed_buffers_are_the_same(starts, ends, tokens):
    table = TABLE[: len(ends)]
    want = build_rows(int32(*starts), int32(*ends), table, 16, tokens)
    builder = DeviceRows(16, torch.device("cpu"))
    builder.build(int32(0, 16), int32(16), table[:1], 16, 16, [0, 16], [16], 1)  # an earlier step's rows are there
    got = builder.build(int32(*starts), int32(*ends), table, 16, tokens, list(starts), list(ends), 1)
    seen = want.lengths > 0
    assert got.lengths.tolist() == want.lengths.tolist()
    assert got.requests[seen].tolist() == want.requests[seen].tolist()
    assert ((got.requests >= 0) & (got.requests < len(ends))).all()
    assert (got.starts, got.ends) == (want.starts, want.ends)
    assert got.lengths.data_ptr() == builder.lengths.data_ptr()


def test_requests_that_pad_a_graph_have_no_rows():
    builder = DeviceRows(8, torch.device("cpu"))
    rows = builder.build(int32(0, 2, 2, 2), int32(5, 0, 0), TABLE, 16, 4, [0, 2], [5], 2)
    assert rows.lengths.tolist() == [4, 5, 0, 0]
    assert rows.requests[:2].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("starts", "longest", "rows"),
    [([0, 1, 2, 3], 1, 3), ([0, 1, 3, 4], 1, 1), ([0, 2, 4, 9], 2, 4), ([0, 5, 6], 1, 0), ([0], 1, 0)],
)
def test_count_decodes(starts, longest, rows):
    assert count_decodes(starts, longest, starts[-1]) == rows
    assert count_decodes(starts, longest, starts[-1] + 3) == (rows + 3 if rows == starts[-1] else rows)


# Three decodes, a prompt's chunk, a request without rows, a whole prompt, two rows of padding.
STARTS, ENDS, PADDED = (0, 1, 2, 3, 43, 43, 63), (9, 30, 2, 140, 5, 20), 65


def mixed(decodes: int = 3) -> Rows:
    table = torch.arange(60, dtype=torch.int32).view(6, 10)
    return replace(build_rows(int32(*STARTS), int32(*ENDS), table, 16, PADDED), decodes=decodes)


def assert_whole(rows: Rows) -> None:
    """What the host knows of the rows is what the device knows."""
    assert rows.starts[0] == 0 and len(rows.starts) == len(rows.ends) + 1 == len(rows.block_table) + 1
    for request, (end, first, last) in enumerate(zip(rows.ends, rows.starts[:-1], rows.starts[1:], strict=True)):
        assert rows.lengths[first:last].tolist() == list(range(end - (last - first) + 1, end + 1))
        assert set(rows.requests[first:last].tolist()) <= {request}
    assert not rows.lengths[rows.starts[-1] :].any()
    assert len(rows.requests) == len(rows.lengths) >= rows.starts[-1]


def test_cut_rows_are_rows():
    rows = mixed()
    assert_whole(rows)
    for first in range(PADDED + 1):
        for last in range(first, PADDED + 1):
            some = cut(rows, slice(first, last))
            assert_whole(some)
            assert some.lengths.equal(rows.lengths[first:last])
            for row in range(some.starts[-1]):
                assert some.block_table[some.requests[row]].equal(rows.block_table[rows.requests[first + row]])
            assert some.decodes == len(range(first, min(last, 3)))


def test_a_request_that_is_cut_ends_with_its_last_row():
    some = cut(mixed(), slice(2, 20))
    assert (some.starts, some.ends, some.decodes) == ((0, 1, 18), (2, 117), 1)
    assert some.requests.tolist() == [0] + 17 * [1]
    assert cut(mixed(), slice(63, 65)).ends == ()


def scores_of(rows: Rows, mine: slice, top_k: int) -> int:
    lengths = rows.lengths[mine]
    return int(lengths[lengths > top_k].sum())


def test_chunks_are_the_rows_past_the_decodes_in_order():
    rows = mixed()
    for ranks in (2, 3, 8, 40):
        chunks = shared_chunks(rows, 4, ranks, 1)
        assert len(chunks) == 2 * ranks
        assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(3, PADDED))
        assert all(chunk.stop - chunk.start <= chunks[0].stop - chunks[0].start for chunk in chunks)


def test_ranks_have_as_much_to_do():
    """A prompt of which the first half of the rows has a quarter of the scores."""
    rows = build_rows(int32(0, 4096), int32(4096), TABLE[:1], 16, 4096)
    for ranks in (2, 4, 8):
        chunks = shared_chunks(rows, 16, ranks, 1)
        done = [sum(scores_of(rows, chunks[i], 16) for i in (rank, -1 - rank)) for rank in range(ranks)]
        assert max(done) < 1.01 * sum(done) / ranks


def test_ranks_share_where_it_pays():
    rows, many = mixed(), slice(3, PADDED)
    scores = scores_of(rows, many, 4)
    assert shared_chunks(rows, 4, 2, scores) and not shared_chunks(rows, 4, 2, scores + 1)
    assert not shared_chunks(rows, 4, 2, 0) and not shared_chunks(rows, 4, 1, 1)
    for top_k in range(1, 140):  # fewer scores than a gather is worth
        assert bool(shared_chunks(rows, top_k, 2, 1)) == (scores_of(rows, many, top_k) >= top_k * (PADDED - 3))
    assert not shared_chunks(mixed(decodes=PADDED), 4, 2, 1)
    assert not shared_chunks(build_rows(int32(0), int32(), TABLE[:0], 16, 0), 4, 2, 1)


def test_tokens_to_slots_follows_the_block_table():
    slots = tokens_to_slots(int32(0, 15, 16, 31, 17), int32(3, 1, 1_000_000_007), 16)
    assert slots.tolist() == [48, 63, 16, 31, 17]
    assert slots.dtype == torch.int64
    # A page number times the block size passes 2^31 in caches of many pages.
    assert tokens_to_slots(int32(5), int32(30_000_000), 256).tolist() == [30_000_000 * 256 + 5]


def schedule(seed: int) -> Rows:
    """Some decodes, then prompts' chunks, of which some bring no row, then maybe padding."""
    generator = random.Random(seed)
    few = [generator.choice((1, 1, 2, 4)) for _ in range(generator.randrange(4))]
    counts = few + [generator.choice((0, 1, 3, 40, 300)) for _ in range(generator.randrange(6))]
    ends = [count + generator.choice((0, 0, 5, 90, 700)) for count in counts]
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    rows = build_rows(
        int32(*starts), int32(*ends), torch.zeros(len(ends), 1).int(), 16, starts[-1] + generator.choice((0, 7))
    )
    return replace(rows, decodes=sum(few))


@pytest.mark.parametrize("most", [1, 100, 1000])
@pytest.mark.parametrize("seed", range(40))
def test_prefill_parts(seed, most):
    rows = schedule(seed)
    parts = prefill_parts(rows, most)
    assert [row for part in parts for row in range(len(rows.lengths))[part.rows]] == [
        *range(rows.decodes, len(rows.lengths))
    ]
    for part in parts:
        ends = rows.ends[part.requests]
        assert part.bounds == tuple(sum(ends[:i]) for i in range(len(ends) + 1))
        assert len(ends) < 2 or part.bounds[-1] <= most
        real = rows.requests[part.rows][rows.lengths[part.rows] > 0]
        assert set(real.tolist()) <= {*range(part.requests.start, part.requests.stop)}
    assert prefill_parts(rows, most) is parts


@pytest.mark.parametrize("most", [1, 500, 20_000])
@pytest.mark.parametrize("seed", range(40))
def test_score_tiles(seed, most):
    rows, top_k, least = schedule(seed), 64, 16
    for part in prefill_parts(rows, 1000):
        first, last = rows.starts[part.requests.start], rows.starts[part.requests.stop]
        tiles = score_tiles(rows, part.requests, top_k, most, least)
        assert [row for tile, _ in tiles for row in range(first, last)[tile]] == [*range(first, last)]
        for tile, longest in tiles:
            lengths = rows.lengths[first:last][tile]
            assert int(lengths.max()) <= longest
            assert len(lengths) == 1 or longest == top_k or len(lengths) * longest <= most
        # Of what need not be scored, nothing is, but for parts of requests that are short.
        for request in range(part.requests.start, part.requests.stop):
            mine = rows.lengths[rows.starts[request] : rows.starts[request + 1]]
            if least <= (few := int((mine <= top_k).sum())) < len(mine):
                short = slice(rows.starts[request] - first, rows.starts[request] - first + few)
                assert (short, top_k) in tiles


def test_what_layers_share_is_made_once():
    rows, made = mixed(), []
    others = without(rows, dense_parts(rows, 60, 8))
    for _ in range(2):
        assert rows.once("name", lambda: made.append(1) or len(made)) == 1
    assert others.once("name", lambda: 0) == 1
    # But not what comes of the lengths, which differ.
    assert not cut(rows, slice(43, 63)).lengths.equal(cut(others, slice(43, 63)).lengths)
