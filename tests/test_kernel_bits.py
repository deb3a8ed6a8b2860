"""select and attend of the CPU provider give a row the same bits in any company, chunk, page, thread count, budget."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_dsa import cache
from vllm_dsa.kernels import cpu
from vllm_dsa.metadata import Rows
from vllm_dsa.testing import compare
from vllm_dsa.testing.cases import V32, Case, copy_pages
from vllm_dsa.testing.check import written

REQUESTS = ((0, 150), (700, 1), (1100, 3), (20, 2), (511, 2), (0, 1))
CASES = [
    Case("small", REQUESTS),
    Case("odd", REQUESTS, heads=3, index_heads=6, index_dim=32, rank=80, rope_dim=16, top_k=48, block_size=48),
    Case("single heads", REQUESTS, heads=1, index_heads=1, top_k=300),
    Case("two heads", REQUESTS, heads=2, index_heads=2, top_k=1000, dtype=torch.bfloat16),
    replace(V32, name="v32 bits", requests=((0, 70), (2300, 1), (2047, 3), (4200, 2)), block_size=128),
    replace(V32, name="v32 fp8", requests=((200, 40), (2300, 2)), latent_kind=cache.FP8_DS_MLA, dtype=torch.bfloat16),
    replace(V32, name="v32 top_k 256", requests=((0, 300), (900, 1)), top_k=256),
    replace(V32, name="v32 one head", requests=((2040, 12), (3000, 1)), heads=1),
    replace(V32, name="v32 all heads", requests=((2045, 5), (200, 1)), heads=128),
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def part(rows: Rows, pieces: list[tuple[int, int]]) -> tuple[Rows, torch.Tensor]:
    """A step of only some rows, and which they are. pieces: (first, last) rows, each within one request."""
    index = torch.cat([torch.arange(*piece) for piece in pieces])
    owners = [int(rows.requests[first]) for first, _ in pieces]
    counts = [last - first for first, last in pieces]
    step = Rows(
        requests=torch.arange(len(pieces), dtype=torch.int32).repeat_interleave(torch.tensor(counts)),
        lengths=rows.lengths[index],
        block_table=rows.block_table[owners],
        block_size=rows.block_size,
        starts=(0, *torch.tensor(counts).cumsum(0).tolist()),
        ends=tuple(int(rows.lengths[last - 1]) for _, last in pieces),
    )
    return step, index


class Step:
    """A case, and its select and attend on any of its rows."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.inputs, self.codes, self.weights = written(case)

    def run(self, rows: Rows, index: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = self.inputs
        selected = torch.empty(len(index), self.case.top_k, dtype=torch.int32)
        cpu.select(self.codes[index], self.weights[index], inputs.index_cache, rows, selected)
        out = torch.empty(len(index), self.case.heads, self.case.rank, dtype=self.case.dtype)
        lse = cpu.attend(inputs.query[index], inputs.latent_cache, rows, selected, inputs.scale, out)
        return {"selected": selected, "out": out, "lse": lse}

    def all(self) -> dict[str, torch.Tensor]:
        return self.run(self.inputs.rows, torch.arange(self.case.tokens))


def assert_rows(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], index: torch.Tensor) -> None:
    for name, value in got.items():
        compare.assert_same_bits(name, value, want[name][index])


def chunks(first: int, last: int, size: int) -> list[tuple[int, int]]:
    return [(i, min(i + size, last)) for i in range(first, last, size)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_row_has_the_same_bits_in_every_company(case, threads):
    step = Step(case)
    rows = step.inputs.rows
    threads(1)
    want = step.all()
    requests = list(zip(rows.starts[:-1], rows.starts[1:], strict=True))
    alone = [(row, row + 1) for row in range(0, case.tokens, 1 + case.tokens // 12)]
    for count in (1, 2):
        threads(count)
        assert_rows(step.all(), want, torch.arange(case.tokens))
        for piece in alone:
            assert_rows(step.run(*(part(rows, [piece]))), want, torch.arange(*piece))
        for size in (64, 7):
            for first, last in requests:
                for piece in chunks(first, last, size)[-3:]:
                    assert_rows(step.run(*part(rows, [piece])), want, torch.arange(*piece))
        backwards, index = part(rows, [piece for request in reversed(requests) for piece in chunks(*request, 33)])
        assert_rows(step.run(backwards, index), want, index)


def test_more_threads_than_cores_change_no_bit(threads):
    """How MKL shares out one product depends on the threads, and on how many there are to share out with it."""
    step = Step(replace(V32, name="v32 threads", requests=((2300, 2), (900, 1)), heads=8))
    threads(1)
    want = step.all()
    for count in (3, 8):
        threads(count)
        assert_rows(step.all(), want, torch.arange(3))
        assert_rows(step.run(*part(step.inputs.rows, [(1, 2)])), want, torch.arange(1, 2))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scores_have_the_same_bits_alone_and_in_a_batch(case, threads, monkeypatch):
    """Selected positions hide most differences of scores, so the scores themselves are compared."""
    step = Step(case)
    seen = []

    def rank(scores, first, lengths, cpu_rank=cpu._rank):
        seen.extend((int(n), s[:n].clone()) for n, s in zip(lengths, scores, strict=True) if first == 0)
        return cpu_rank(scores, first, lengths)

    monkeypatch.setattr(cpu, "_rank", rank)
    for count in (1, 2):
        threads(count)
        seen.clear()
        step.all()
        long = [row for row, n in enumerate(step.inputs.rows.lengths.tolist()) if n > case.top_k]
        assert [n for n, _ in seen] == step.inputs.rows.lengths[long].tolist()
        for (_, batched), row in list(zip(seen, long, strict=True))[:: 1 + len(long) // 12]:
            alone = cpu.scores(step.codes, step.weights, step.inputs.index_cache, step.inputs.rows, row)
            compare.assert_same_bits(f"scores of row {row}", batched, alone)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES[:2] + CASES[5:6], ids=lambda case: case.name)
def test_physical_pages_and_their_stride_do_not_matter(case):
    step = Step(case)
    want = step.all()
    inputs, order = step.inputs, torch.randperm(len(step.inputs.latent_cache))
    for name, padding in (("latent_cache", 24), ("index_cache", 4)):
        pages = getattr(inputs, name)
        moved = copy_pages(pages, padding, 0xFF, "cpu")
        moved[order] = pages
        setattr(inputs, name, moved)
    table = torch.where(inputs.rows.block_table < len(order), order[inputs.rows.block_table % len(order)], -5)
    inputs.rows = replace(inputs.rows, block_table=table.int())
    assert_rows(step.all(), want, torch.arange(case.tokens))


class Peak(TorchDispatchMode):
    """Most bytes that tensors made inside hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.is_mutable:
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not any(tensor is x for x in tree_leaves((args, kwargs))):
                storage = tensor.untyped_storage()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "case",
    [
        Case("budget", ((0, 600), (5000, 20), (20_000, 1)), top_k=64, index_heads=16),
        replace(V32, name="v32 budget", requests=((4090, 6), (9000, 1)), rank=16, rope_dim=16, heads=1),
    ],
    ids=lambda case: case.name,
)
def test_budget_bounds_memory_and_changes_no_bit(case, monkeypatch):
    step = Step(case)
    selections = {}
    for megabytes in (1, 3, 256):
        monkeypatch.setenv("VLLM_DSA_SCORE_BUDGET_MB", str(megabytes))
        selections[megabytes] = torch.empty(case.tokens, case.top_k, dtype=torch.int32)
        with Peak() as memory:
            cpu.select(step.codes, step.weights, step.inputs.index_cache, step.inputs.rows, selections[megabytes])
        assert 0 < memory.peak <= megabytes << 20
    assert torch.equal(selections[1], selections[256])
    assert torch.equal(selections[3], selections[256])
