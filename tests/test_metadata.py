"""Rows of a step: built on the host, built in fixed buffers as on a GPU, and the slots of positions."""

import pytest
import torch

from vllm_dsa.metadata import DeviceRows, build_rows, count_decodes, tokens_to_slots

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
    [((0, 3, 5, 6), (3, 34, 40), 6), ((0, 3, 5, 6), (3, 34, 40), 9), ((0, 1, 2, 3), (1, 16, 17), 3), ((0, 2), (9,), 5)],
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
    assert count_decodes(starts, longest) == rows


def test_tokens_to_slots_follows_the_block_table():
    slots = tokens_to_slots(int32(0, 15, 16, 31, 17), int32(3, 1, 1_000_000_007), 16)
    assert slots.tolist() == [48, 63, 16, 31, 17]
    assert slots.dtype == torch.int64
    # A page number times the block size passes 2^31 in caches of many pages.
    assert tokens_to_slots(int32(5), int32(30_000_000), 256).tolist() == [30_000_000 * 256 + 5]
