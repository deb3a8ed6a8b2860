"""What one step asks of the kernels: pure functions from lengths and block tables to rows."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """The query rows of one step, shared by every layer.

    requests  [T] int32: the row's request, an index into block_table
    lengths   [T] int32: keys the row may see, its own included (position + 1); 0 for a padding row
    block_table [requests, max_blocks] int32: physical page of each logical block
    block_size: tokens a page
    starts: host ints, requests + 1: rows starts[i]:starts[i + 1] are request i's, in ascending position
    ends: host ints, one a request: length of its last row, so request i needs no key at or past ends[i]
    """

    requests: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    block_size: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]


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


def tokens_to_slots(positions: torch.Tensor, pages: torch.Tensor, block_size: int) -> torch.Tensor:
    """Slots [n] int64 of token positions [n] whose request's block table is pages [blocks]."""
    positions = positions.long()
    return pages[positions // block_size].long() * block_size + positions % block_size
