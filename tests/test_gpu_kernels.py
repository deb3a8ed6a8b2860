"""GPU providers against reference.py on a CUDA device, and their bits: across runs, batches and graph replays.

`python -m pytest -m gpu tests/test_gpu_kernels.py` needs torch and Triton only; the vendor's kernels need vLLM as well.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_dsa import cache
from vllm_dsa.metadata import Rows, build_rows
from vllm_dsa.testing import compare
from vllm_dsa.testing.cases import CASES, PUBLISHED, V32, Case, Inputs, build, with_dtype
from vllm_dsa.testing.check import check_attend, check_select, check_write, written

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# FlashMLA's decode kernel reads 16 bytes at a time: pages are 16 bytes, or whole bfloat16 rows, apart.
WIDE = replace(V32, dtype=torch.bfloat16, latent_kind=cache.FP8_DS_MLA, page_padding=656)
LARGE = (
    replace(WIDE, name="8 heads", requests=((5000, 3), (2040, 16), (1, 1)), heads=8, padding_rows=2),
    replace(WIDE, name="32 heads", requests=((4096, 2), (9000, 1)), heads=32, block_size=16),
    replace(WIDE, name="64 heads", requests=((0, 300), (3000, 40)), heads=64, block_size=128),
    replace(WIDE, name="128 heads", requests=((6000, 5), (2047, 2), (40, 1)), heads=128),
    replace(WIDE, name="128 heads bf16", requests=((6000, 5), (2047, 2), (40, 1)), heads=128, latent_kind="auto"),
    replace(WIDE, name="1 head", requests=((3000, 2),), heads=1, latent_kind="auto"),
    replace(WIDE, name="24 heads", requests=((3000, 2),), heads=24),
    replace(WIDE, name="glm 32k", requests=((32768, 4), (31, 1)), index_heads=32, index_interleaved=True),
    replace(WIDE, name="8 index heads", requests=((4000, 3),), index_heads=8, index_dim=64),
    replace(WIDE, name="top_k 4096", requests=((20000, 2), (4096, 1)), top_k=4096),
    replace(WIDE, name="top_k 16", requests=((20000, 2), (15, 2)), top_k=16),
    replace(WIDE, name="longest", requests=((163838, 2),)),
    replace(WIDE, name="longest bf16", requests=((163838, 2),), latent_kind="auto"),
    replace(WIDE, name="ties all long", requests=((9000, 2),), ties="all"),
    replace(WIDE, name="ties few long", requests=((9000, 2),), ties="few"),
    replace(WIDE, name="latent 256", requests=((4000, 2),), rank=256, rope_dim=32, latent_kind="auto"),
)
FLOATS = tuple(with_dtype(case, torch.bfloat16) for case in CASES)
# Attention weights in bfloat16 are rounded to 2^-9, which adds to the outputs' rounding on both sides.
BF16_WEIGHTS = 2.0**-6
# Tensor cores' sums and the approximate exp2 and log2, as a share of the largest value.
LSE = 1e-5


def triton_provider() -> Any:
    from vllm_dsa.kernels import triton_attend, triton_select, triton_write

    return SimpleNamespace(
        write_keys=triton_write.write_keys,
        write_queries=triton_write.write_queries,
        select=triton_select.select,
        scores=triton_select.scores,
        attend=triton_attend.attend,
    )


@pytest.fixture(params=["triton", "triton, software e4m3"])
def kernels(request, monkeypatch) -> Any:
    monkeypatch.setenv("VLLM_DSA_SOFTWARE_E4M3", str(int("software" in request.param)))
    monkeypatch.setitem(compare.TOLERANCE, torch.bfloat16, BF16_WEIGHTS)
    monkeypatch.setitem(compare.TOLERANCE, torch.float32, LSE)
    return triton_provider()


def all_decodes(kernels: Any) -> Any:
    """attend of a provider, every row a decode."""
    return lambda query, latent_cache, rows, *rest: kernels.attend(query, latent_cache, decodes(rows), *rest)


def decodes(rows: Rows) -> Rows:
    return replace(rows, decodes=len(rows.lengths), made={})


def accumulation(case: Case) -> torch.dtype:
    """What select's dots lose, by configuration."""
    triton_configs = import_module("vllm_dsa.kernels.triton_configs")
    fp8_dot = triton_configs.score(torch.device("cuda", torch.cuda.current_device())).fp8_dot
    return torch.float8_e4m3fn if fp8_dot else torch.float16


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", (*CASES, *FLOATS, *LARGE), ids=lambda case: case.name)
class TestAgainstTheReference:
    def test_write(self, case, kernels):
        check_write(kernels, case, "cuda")

    def test_select(self, case, kernels):
        check_select(kernels, case, "cuda", accumulation=accumulation(case))

    def test_attend(self, case, kernels):
        check_attend(kernels, case, "cuda")

    def test_attend_of_decodes(self, case, kernels):
        check_attend(SimpleNamespace(attend=all_decodes(kernels)), case, "cuda")


def selection(kernels: Any, case: Case, inputs: Inputs, codes: Any, weights: Any, rows: Rows, mine: slice) -> Any:
    """(selected, attention, log-sum-exp) of rows ``mine`` of a case, which ``rows`` describes."""
    count = len(rows.lengths)
    selected = torch.empty(count, case.top_k, dtype=torch.int32, device="cuda")
    kernels.select(codes[mine], weights[mine], inputs.index_cache, rows, selected)
    out = torch.empty(count, case.heads, case.rank, dtype=case.dtype, device="cuda")
    lse = kernels.attend(inputs.query[mine], inputs.latent_cache, rows, selected, inputs.scale, out)
    return selected, out, lse


def same(got: Any, want: Any, mine: slice = slice(None)) -> None:
    for name, a, b in zip(("selected", "attention", "log-sum-exp"), got, want, strict=True):
        compare.assert_same_bits(name, a, b[mine])


MIX = tuple(
    replace(WIDE, name=f"mix {heads} {kind}", heads=heads, latent_kind=kind, requests=((0, 70), (2000, 300), (9000, 1)))
    for heads in (16, 128)
    for kind in (cache.FP8_DS_MLA, "auto")
)


def parts(case: Case, inputs: Inputs) -> list[tuple[Rows, slice]]:
    """The rows of a case cut into steps of their own: one request each, in chunks of 1, 32, 33 and the rest."""
    found, first = [], 0
    for request, (context, new) in enumerate(case.requests):
        at = 0
        for size in (1, 32, 33, new):
            size = min(size, new - at)
            if size > 0:
                starts, ends = torch.tensor([0, size]).int(), torch.tensor([context + at + size]).int()
                table = inputs.rows.block_table[request : request + 1]
                rows = build_rows(starts, ends, table, case.block_size, size)
                found.append((rows, slice(first + at, first + at + size)))
                at += size
        first += new
    return found


@pytest.mark.parametrize("kind", [decodes, lambda rows: rows], ids=["decodes", "prefills"])
@pytest.mark.parametrize("case", MIX, ids=lambda case: case.name)
def test_bits_depend_on_the_row_alone(case, kind, kernels):
    check_bits(case, kind, kernels)


def check_bits(case: Case, kind: Callable[[Rows], Rows], kernels: Any, least: int = 1) -> None:
    """A row's results in a step of many rows, again, and in its parts of at least so many rows."""
    inputs, codes, weights = written(case, "cuda")
    whole = selection(kernels, case, inputs, codes, weights, kind(inputs.rows), slice(None))
    for _ in range(3):
        same(selection(kernels, case, inputs, codes, weights, kind(inputs.rows), slice(None)), whole)
    for rows, mine in parts(case, inputs):
        if len(rows.lengths) >= least:
            same(selection(kernels, case, inputs, codes, weights, kind(rows), mine), whole, mine)


def test_bits_do_not_depend_on_the_score_budget(kernels, monkeypatch):
    inputs, codes, weights = written(MIX[0], "cuda")
    whole = selection(kernels, MIX[0], inputs, codes, weights, inputs.rows, slice(None))
    monkeypatch.setenv("VLLM_DSA_SCORE_BUDGET_MB", "1")
    same(selection(kernels, MIX[0], inputs, codes, weights, inputs.rows, slice(None)), whole)


@pytest.mark.parametrize("heads", [16, 128])
def test_a_captured_step_replays_for_other_lengths(heads, kernels):
    """A decode step's graph, replayed with other rows in the same buffers, padding rows among them."""
    case = replace(WIDE, name="replayed", heads=heads, requests=((5000, 1), (2048, 1), (300, 1), (9000, 1)))
    inputs, codes, weights = written(case, "cuda")
    count, step = case.tokens, inputs.rows
    rows = replace(step, requests=step.requests.clone(), lengths=step.lengths.clone(), decodes=count, made={})

    run: Callable[[], Any] = lambda: selection(kernels, case, inputs, codes, weights, rows, slice(None))  # noqa: E731
    run()  # compiles
    rows.made.clear()  # a captured step makes its schedules itself
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    lengths = step.lengths.tolist()
    for change in (lengths, [n // 2 for n in lengths], [0, 1, 0, 2049], lengths):
        rows.lengths.copy_(torch.tensor(change))
        for x in captured:
            x.view(torch.uint8).fill_(0xFF)
        graph.replay()
        rows.made.clear()
        same(captured, run())
    same(captured, selection(kernels, case, inputs, codes, weights, decodes(step), slice(None)))


def test_attention_has_the_same_bits_where_the_chip_converts(monkeypatch):
    kernels, results = triton_provider(), []
    inputs, codes, weights = written(MIX[0], "cuda")
    selected = torch.empty(MIX[0].tokens, MIX[0].top_k, dtype=torch.int32, device="cuda")
    kernels.select(codes, weights, inputs.index_cache, inputs.rows, selected)
    for software in (0, 1):
        monkeypatch.setenv("VLLM_DSA_SOFTWARE_E4M3", str(software))
        for rows in (inputs.rows, decodes(inputs.rows)):
            out = torch.empty(len(rows.lengths), MIX[0].heads, MIX[0].rank, dtype=MIX[0].dtype, device="cuda")
            kernels.attend(inputs.query, inputs.latent_cache, rows, selected, inputs.scale, out)
            results.append(out)
    compare.assert_same_bits("attention of prefills", results[0], results[2])
    compare.assert_same_bits("attention of decodes", results[1], results[3])


@pytest.mark.parametrize("kind", [decodes, lambda rows: rows], ids=["decodes", "prefills"])
def test_attend_takes_no_more_than_it_says(kind, kernels, monkeypatch):
    triton_attend = import_module("vllm_dsa.kernels.triton_attend")
    for name, value in {"WIDE_ROWS": 1000, "PART_BYTES": 1 << 20, "PLACES_BYTES": 0}.items():
        monkeypatch.setattr(triton_attend, name, value)
    monkeypatch.setenv("VLLM_DSA_SCORE_BUDGET_MB", "1")
    case = replace(WIDE, name="memory", requests=((0, 300),) * 8, heads=64)
    inputs, codes, weights = written(case, "cuda")
    rows = kind(inputs.rows)
    selection(kernels, case, inputs, codes, weights, rows, slice(None))  # compiles
    selected, out, _ = selection(kernels, case, inputs, codes, weights, rows, slice(None))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lse = kernels.attend(inputs.query, inputs.latent_cache, rows, selected, inputs.scale, out)
    taken = torch.cuda.max_memory_allocated() - before - lse.nbytes
    sizes = SimpleNamespace(kv_lora_rank=case.rank, rope_dim=case.rope_dim, dtype=case.dtype)
    assert taken <= triton_attend.workspace(sizes, case.tokens) + 4096  # of what each allocation is rounded up by


def test_no_host_synchronisation(kernels):
    case = MIX[0]
    inputs, codes, weights = written(case, "cuda")
    step = build(case, "cuda")
    selection(kernels, case, inputs, codes, weights, inputs.rows, slice(None))
    kernels.write_keys(*step.keys())
    kernels.write_queries(*step.queries())
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.write_keys(*step.keys())
        kernels.write_queries(*step.queries())
        selection(kernels, case, inputs, codes, weights, inputs.rows, slice(None))
    finally:
        torch.cuda.set_sync_debug_mode("default")


STEP = ((6000, 5), (2047, 2), (40, 1), (0, 300))
VENDOR = (
    *PUBLISHED,
    *(
        replace(WIDE, name=f"{heads} heads {kind}", requests=STEP, heads=heads, latent_kind=kind, page_padding=padding)
        for heads in (8, 16, 32, 64, 128)
        for kind, padding in ((cache.FP8_DS_MLA, 656), ("auto", 576))
    ),
    replace(WIDE, name="32 index heads", requests=STEP, heads=64, index_heads=32, index_interleaved=True),
    replace(WIDE, name="longest 16", requests=((163838, 2), (163838, 1)), heads=16),
    replace(WIDE, name="longest 128", requests=((163838, 2), (163838, 1)), heads=128),
    replace(WIDE, name="longest bf16", requests=((163838, 2),), heads=128, latent_kind="auto", page_padding=576),
)


@pytest.fixture
def vendor(monkeypatch) -> Any:
    monkeypatch.setitem(compare.TOLERANCE, torch.bfloat16, BF16_WEIGHTS)
    monkeypatch.setitem(compare.TOLERANCE, torch.float32, 2e-4)
    found = import_module("vllm_dsa.kernels.vendor")
    assert not found.library_refusals()
    return found


@pytest.mark.skipif(not find_spec("vllm"), reason="the vendor's kernels come with vLLM")
class TestVendor:
    @pytest.mark.usefixtures("poisoned_empty")
    @pytest.mark.parametrize("case", VENDOR, ids=lambda case: case.name)
    def test_against_the_reference(self, case, vendor):
        check_select(vendor, case, "cuda", accumulation=torch.float8_e4m3fn)
        check_attend(vendor, case, "cuda")
        check_attend(SimpleNamespace(attend=all_decodes(vendor)), case, "cuda")

    @pytest.mark.usefixtures("poisoned_empty")
    @pytest.mark.parametrize("seed", range(20))
    def test_random_steps(self, seed, vendor):
        from test_vendor_host import random_step

        case = replace(random_step(seed), index_heads=64, top_k=128)
        check_select(vendor, case, "cuda", accumulation=torch.float8_e4m3fn)
        check_attend(vendor, case, "cuda")

    # FlashMLA's and FlashAttention's decode kernels split the keys by what else is in the batch: their bits are their
    # own batch's. Of 16 heads over an fp8_ds_mla cache FlashMLA takes fewer than TRITON_DECODE_ROWS decodes.
    @pytest.mark.parametrize(
        "case, kind",
        [(MIX[0], "decodes"), (MIX[0], "prefills"), (MIX[1], "decodes"), (MIX[2], "prefills")],
        ids=lambda value: getattr(value, "name", value),
    )
    def test_bits_depend_on_the_row_alone(self, case, kind, vendor):
        least = vendor.TRITON_DECODE_ROWS if (case, kind) == (MIX[0], "decodes") else 1
        check_bits(case, decodes if kind == "decodes" else lambda rows: rows, vendor, least)

    @pytest.mark.parametrize("heads", [16, 128])
    def test_a_captured_step_replays_for_other_lengths(self, heads, vendor):
        test_a_captured_step_replays_for_other_lengths(heads, vendor)
