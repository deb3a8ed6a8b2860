"""The Triton kernels in Triton's interpreter, on the CPU, against reference.py. test_triton_interpret.py runs this file
in a process of its own, since Triton reads TRITON_INTERPRET when a kernel is defined.

The interpreter runs programs one after the other in numpy: it shows what a kernel computes, not what threads of a GPU
may do to each other. Its own FP8 conversion is inexact, so most cases run with software e4m3, as on sm80.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from vllm_dsa import cache
from vllm_dsa.kernels import triton_attend, triton_configs, triton_e4m3, triton_select, triton_write
from vllm_dsa.testing import compare
from vllm_dsa.testing.cases import V32, Case, with_dtype
from vllm_dsa.testing.check import CHECKS, check_attend, check_select, written

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_empty")

FP8 = Case("fp8", ((0, 3), (90, 2)), latent_kind=cache.FP8_DS_MLA, rank=512, rope_dim=64)
CASES = (
    Case("mixed", ((0, 3), (250, 1), (31, 3), (5, 1)), padding_rows=2),
    Case("at top_k", ((15, 1), (16, 1), (13, 4), (0, 2))),
    Case("at key tiles", ((63, 1), (64, 1), (127, 2))),
    Case("chunks", ((1600, 2),)),
    Case("no request", (), padding_rows=2),
    Case("no row", ()),
    Case("block of 48", ((140, 3), (47, 1)), block_size=48),
    Case("top_k 300", ((0, 2), (299, 2), (700, 1)), top_k=300, rank=64, heads=2),
    Case("top_k 1", ((5, 2),), top_k=1),
    Case("compact pages", ((70, 2),), page_padding=0),
    Case("many heads", ((40, 2),), heads=20, index_heads=20),
    Case("one head", ((40, 2),), heads=1, index_heads=1),
    Case("odd sizes", ((0, 4), (40, 1)), heads=6, index_heads=6, rank=80, rope_dim=16, index_dim=32),
    Case("interleaved", ((40, 3),), index_interleaved=True),
    Case("two groups", ((40, 2),), rank=256, rope_dim=64),
    Case("ties all", ((90, 2), (30, 1)), ties="all"),
    Case("ties few", ((600, 2),), ties="few"),
    Case("ties zero", ((90, 2),), ties="zero"),
    Case("more ties than candidates", ((1500, 1),), ties="all"),
    FP8,
    replace(V32, name="v32", requests=((2047, 2),), heads=2, latent_kind=cache.FP8_DS_MLA),
)
BY_NAME = {case.name: case for case in CASES}
WEIGHTS_IN_BFLOAT16 = 2.0**-6  # of attention: their rounding, 2^-9, adds to the outputs' on both sides


@pytest.fixture(autouse=True)
def exact_bfloat16_dots(monkeypatch):
    """The interpreter keeps bfloat16 as uint16 and would multiply these bits."""
    plain = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest)
    )


@pytest.fixture
def configured(monkeypatch):
    """configured(op, name=value, ...): change fields of an operation's configuration."""

    def change(op, **changes):
        before = getattr(triton_configs, op)
        monkeypatch.setattr(triton_configs, op, lambda *args: replace(before(*args), **changes))

    return change


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setitem(compare.TOLERANCE, torch.bfloat16, WEIGHTS_IN_BFLOAT16)
    return provider()


def provider(**changed):
    """The Triton provider, modules replaced by name."""
    modules = {"triton_write": triton_write, "triton_select": triton_select, "triton_attend": triton_attend} | changed
    write, select, attend = modules.values()
    return SimpleNamespace(
        write_keys=write.write_keys,
        write_queries=write.write_queries,
        select=select.select,
        scores=select.scores,
        attend=attend.attend,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("op", CHECKS)
def test_op_agrees_with_the_reference(op, case, kernels):
    CHECKS[op](kernels, case)


@pytest.mark.parametrize("name", ["mixed", "interleaved", "fp8"])
@pytest.mark.parametrize("op", CHECKS)
def test_op_agrees_in_bfloat16(op, name, kernels):
    CHECKS[op](kernels, with_dtype(BY_NAME[name], torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["select", "attend"])
def test_op_agrees_where_the_chip_converts(op, dtype, kernels, monkeypatch):
    monkeypatch.setattr(triton_configs, "arch", lambda device: 89)
    CHECKS[op](kernels, with_dtype(FP8, dtype))


class Decoding:
    """attend of a provider, every row a decode."""

    def __init__(self, kernels):
        self.kernels = kernels

    def attend(self, query, latent_cache, rows, *rest):
        return self.kernels.attend(query, latent_cache, replace(rows, decodes=len(rows.lengths), made={}), *rest)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decodes_agree(case, kernels):
    check_attend(Decoding(kernels), case)


def test_prefills_in_parts(kernels, monkeypatch):
    monkeypatch.setattr(triton_attend, "WIDE_ROWS", 40)
    check_attend(kernels, BY_NAME["mixed"])


def test_decodes_in_groups(kernels, monkeypatch):
    monkeypatch.setattr(triton_attend, "PART_BYTES", 2 * 4 * 4 * 128 * 2)  # two rows
    check_attend(Decoding(kernels), BY_NAME["mixed"])
    check_attend(Decoding(kernels), BY_NAME["top_k 300"])


def test_bits_do_not_depend_on_how_many_splits_a_program_does(kernels, monkeypatch):
    case = BY_NAME["top_k 300"]
    inputs, selected = selection(kernels, case)
    results = []
    for each in (1, 2):
        monkeypatch.setattr(triton_configs, "splits_each", lambda *_, each=each: each)
        out = torch.empty(case.tokens, case.heads, case.rank, dtype=case.dtype)
        arguments = inputs.query, inputs.latent_cache, inputs.rows, selected, inputs.scale
        results.append((out, Decoding(kernels).attend(*arguments, out)))
    for name, a, b in zip(("attention", "log-sum-exp"), *results, strict=True):
        compare.assert_same_bits(name, a, b)


def test_prefills_beside_decodes(kernels):
    check_attend(kernels, Case("mixed step", ((250, 1), (31, 1), (40, 20), (0, 3)), padding_rows=2, decode_rows=1))


def test_fp8_dots_agree(kernels, configured, monkeypatch):
    monkeypatch.setattr(triton_configs, "arch", lambda device: 90)
    configured("score", block_keys=32)
    assert triton_configs.score(torch.device("cpu")).fp8_dot
    check_select(kernels, BY_NAME["mixed"])


def test_software_is_forced_by_the_variable(monkeypatch):
    monkeypatch.setattr(triton_configs, "arch", lambda device: 90)
    monkeypatch.setenv("VLLM_DSA_SOFTWARE_E4M3", "1")
    configs = (triton_configs.write, triton_configs.score)
    assert not any(config(torch.device("cpu")).hardware_e4m3 for config in configs)
    assert not triton_configs.score(torch.device("cpu")).fp8_dot


def selection(kernels, case):
    inputs, codes, weights = written(case)
    selected = torch.empty(case.tokens, case.top_k, dtype=torch.int32)
    kernels.select(codes, weights, inputs.index_cache, inputs.rows, selected)
    return inputs, selected


@pytest.mark.parametrize("changes", [{"spread_rows": 0}, {"spread_rows": 0, "group_rows": 2}, {"programs": 1}], ids=str)
def test_scores_do_not_depend_on_how_rows_are_grouped(changes, kernels, configured):
    case = BY_NAME["mixed"]
    _, alone = selection(kernels, case)
    configured("score", **changes)
    check_select(kernels, case)
    compare.assert_same_bits("selected", selection(kernels, case)[1], alone)


def test_selection_in_row_tiles(kernels, monkeypatch):
    monkeypatch.setattr(triton_select, "envs", SimpleNamespace(VLLM_DSA_SCORE_BUDGET_MB=0))
    check_select(kernels, BY_NAME["mixed"])


def test_lengths_are_read_on_the_device(kernels):
    """As in a captured graph: the host's lengths are of another step, and all rows are decodes."""
    case = Case("replayed", ((99, 1), (16, 1), (300, 1)))
    inputs, expected = selection(kernels, case)
    inputs.rows = replace(inputs.rows, ends=(1, 1, 1), decodes=3)
    _, codes, weights = written(case)
    selected = torch.empty_like(expected)
    kernels.select(codes, weights, inputs.index_cache, inputs.rows, selected)
    compare.assert_same_bits("selected", selected, expected)


@triton.jit
def _decode(codes, x, N: tl.constexpr, HARDWARE: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x + i, triton_e4m3.decode(tl.load(codes + i), HARDWARE).to(tl.float32))


@pytest.mark.parametrize("hardware", [False, True])
def test_decode_of_every_code(hardware):
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    got = torch.empty(256)
    _decode[(1,)](codes, got, N=256, HARDWARE=hardware)
    number = (codes & 0x7F) != 0x7F
    compare.assert_same_bits("values", got[number] * (1 if hardware else 256), codes.view(cache.E4M3).float()[number])


@triton.jit
def _decode_words(words, scales, x, HARDWARE: tl.constexpr):
    w, g, i = tl.arange(0, 64)[None, :], tl.arange(0, 4)[None, :], tl.arange(0, 256)[None, :]
    codes = triton_e4m3.decode_words(tl.load(words + w), tl.load(scales + g), tl.float16, HARDWARE)
    tl.store(x + i, codes.to(tl.float32))


def wrongly_decoded():
    """How many words of all codes are, by the smallest and the largest scales that float16 takes among others."""
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    scales, got = torch.tensor([2.0**-14, 2.0**-3, 1.0, 2.0**7]), torch.empty(256)
    wrong = 0
    for order in (codes, codes.view(2, 128).T.flatten()):  # signs alternate
        _decode_words[(1,)](order.view(torch.int32), scales, got, HARDWARE=False)
        want = order.view(cache.E4M3).float() * scales.repeat_interleave(64)
        wrong += int(((got != want) & ((order & 0x7F) != 0x7F)).sum())
    return wrong


def test_decode_of_words():
    assert wrongly_decoded() == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [("tl.join(a, c)", "tl.join(c, a)"), ("(words >> 1)", "(words >> 2)"), ("(words << 8)", "words"), ("256.0", "1.0")],
)
def test_a_wrong_decoding_is_seen(old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(triton_e4m3, "decode_words", faulty("triton_e4m3", (old, new), tmp_path).decode_words)
    assert wrongly_decoded()


@triton.jit
def _encode(x, codes, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(codes + i, triton_e4m3.encode(tl.load(x + i), False))


def wrongly_encoded():
    """(value, code) of what is not encoded as torch does, of every code, the halves between, their neighbours."""
    values = torch.arange(127, dtype=torch.uint8).view(cache.E4M3).float()
    halves = (values[1:] + values[:-1]) / 2
    near = [torch.nextafter(halves, halves + sign) for sign in (-1, 1)]
    special = torch.tensor([0.0, 448, 449, 463.9, 464, 465, 480, 1e9, 3e38, 1e-45, 1e-38, 2**-10, 2**-11, float("inf")])
    spread = torch.randn(4096) * 2.0 ** torch.randint(-12, 9, (4096,))
    x = torch.cat([values, halves, *near, special, spread])
    x = torch.cat([x, -x, torch.tensor([float("nan")])])
    x = torch.cat([x, torch.zeros(-len(x) % 1024)])
    codes = torch.empty(len(x), dtype=torch.uint8)
    _encode[(len(x) // 1024,)](x, codes, N=1024)
    differ = codes != x.to(cache.E4M3).view(torch.uint8)
    return list(zip(x[differ].tolist(), codes[differ].tolist(), strict=True))


def test_encode_rounds_as_torch_does():
    assert wrongly_encoded() == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("+ ((magnitude >> 20) & 1)", "+ 1"),
        ("0x3C800000, steps", "0x3D800000, steps"),
        ("0x7E)", "0x7F)"),
        ("16384.0", "8192.0"),
        ("& 0x80)", "& 0)"),
    ],
)
def test_a_wrong_rounding_is_seen(old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(triton_e4m3, "encode", faulty("triton_e4m3", (old, new), tmp_path).encode)
    assert wrongly_encoded()


MANY = 5000  # scores: more than top-k places at a time


@pytest.mark.parametrize("top_k", [1, 16, 300])
def test_top_k_of_hostile_scores(top_k):
    zeros = torch.tensor([0.0, -0.0])
    kinds = {
        "spread": torch.randn(MANY) * 10.0 ** torch.randint(-38, 37, (MANY,)),
        "few": torch.randint(-2, 3, (MANY,)).float(),
        "zeros": zeros[torch.randint(2, (MANY,))],
        "rising": torch.arange(float(MANY)),
        "falling": -torch.arange(float(MANY)),
        "few above many ties": (torch.randperm(MANY) < 10).float(),
        "tied at the end": torch.cat([torch.zeros(MANY - 500), torch.ones(500)]),
    }
    lengths = torch.tensor([MANY, 2500, 1500, 1025, 1024, 301, 17, 1, 0], dtype=torch.int32)
    for name, scores in kinds.items():
        scored = scores.repeat(len(lengths), 1)
        scored[torch.arange(MANY) >= lengths.unsqueeze(1)] = float("nan")
        out = torch.empty(len(lengths), top_k, dtype=torch.int32)
        triton_select.top_k_rows(scored, lengths, out)
        own = [row[:length] for row, length in zip(scored, lengths.tolist(), strict=True)]
        try:
            compare.check_selection(out, own, own, top_k, [0.0] * len(lengths))
        except compare.Mismatch as mismatch:
            raise AssertionError(name) from mismatch


# Each: module, operation, case, then what is replaced in the module's source, and by what.
WRITE, SELECT, ATTEND = (f"triton_{op}" for op in CHECKS)
FAULTS = {
    "no rounding": ("triton_e4m3", "write", "mixed", "magnitude + 0x7FFFF + ((magnitude >> 20) & 1)", "magnitude"),
    "exponent bias": ("triton_e4m3", "write", "mixed", "120 << 3", "119 << 3"),
    "scale rounded down": ("triton_e4m3", "write", "mixed", "+ 0x7FFFFF", ""),
    "scales of one group": (
        WRITE,
        "write",
        "fp8",
        "max(tl.abs(x), axis=1)\n",
        "max(tl.abs(x), axis=1) * 0 + tl.max(x)\n",
    ),
    "mean of squares": (WRITE, "write", "mixed", "square / RANK", "square"),
    "sines for cosines": (WRITE, "write", "mixed", "tl.load(angles + ROPE // 2 + pair", "tl.load(angles + pair"),
    "index layout": (WRITE, "write", "interleaved", "    if INTERLEAVED:", "    if not INTERLEAVED:"),
    "key scales of a page": (WRITE, "write", "mixed", "scales + offset +", "scales +"),
    "head weights not scaled": (WRITE, "write", "mixed", "* weight_scale", ""),
    "relu dropped": (SELECT, "select", "mixed", "tl.maximum(dots, 0.0)", "dots"),
    "key scale of a page": (SELECT, "select", "mixed", "scales + offset", "scales + offset * 0"),
    "another request's pages": (SELECT, "select", "block of 48", "block_table + request * table_stride", "block_table"),
    "one request a group": (SELECT, "select", "block of 48", "other=-1) != request", "other=-1) == -1"),
    "past the length": (
        *(SELECT, "select", "mixed", 'tl.where(position < length, tl.maximum(found, LEAST), float("-inf"))'),
        "tl.where(position < length, tl.maximum(found, LEAST), 1e30)",
    ),
    "four neighbours counted for eight": (
        *(SELECT, "select", "chunks", "begin + i, length, UNIT) >= least).to"),
        "begin, length, UNIT) >= least).to",
    ),
    "parts of another chunk": (SELECT, "select", "chunks", "(before >> (16 * chunk))", "before"),
    "chunks over each other": (SELECT, "select", "chunks", "place = listed - 1 +", "place = -1 +"),
    "lower third dropped": (
        SELECT,
        "select",
        "mixed",
        "high, few = first - 1, first_count",
        "low, high, few = first, first, first_count",
    ),
    "ties miscounted": (SELECT, "select", "ties all", "TOP_K - few", "TOP_K - few - 1"),
    "ties to the larger position": (
        *(SELECT, "select", "ties all", "(equal_before < ties)", "(equal_before >= tl.sum(equal, axis=0) - ties)"),
        *("tl.minimum(equal_before, ties)", "tl.maximum(equal_before - tl.sum(equal, axis=0) + ties, 0)"),
    ),
    "the last key twice": (ATTEND, "attend", "at top_k", "(key < last)", "(key <= last)"),
    "latent scale of another group": (ATTEND, "attend", "fp8", "scales + g", "scales"),
    "latent scales of another row": (
        ATTEND,
        "decode",
        "fp8",
        "(source + RANK).to(tl.pointer_type(tl.float32)",
        "(source + RANK + 4).to(tl.pointer_type(tl.float32)",
    ),
    "rotated key left out": (ATTEND, "attend", "mixed", "tl.dot(q_rope,", "tl.dot(q_rope * 0,"),
    "query scaled once": (ATTEND, "decode", "fp8", "scale = scale * tl", "scale = scale + 0 * tl"),
    "sums not rescaled": (ATTEND, "attend", "top_k 300", "kept = values * keep[:, None]", "kept = values"),
    "parts merged unweighted": (ATTEND, "decode", "top_k 300", "tl.exp2(part_top - at_least)", "1.0"),
    "part left out": (
        ATTEND,
        "decode",
        "top_k 300",
        "for split in tl.static_range(SPLITS)",
        "for split in tl.static_range(SPLITS - 1)",
    ),
    "log-sum-exp in base 2": (ATTEND, "attend", "mixed", "* 0.6931471805599453", ""),
    "page stride": (ATTEND, "decode", "mixed", "* page_stride", "* (BLOCK_SIZE * row_stride)"),
    "page stride, widened": (ATTEND, "attend", "mixed", "* page_stride", "* (BLOCK_SIZE * row_stride)"),
    "page of one tile before": (ATTEND, "decode", "top_k 300", "at = after", "at = at"),
    "another request's latents": (ATTEND, "attend", "mixed", "spans + request * 2) * (RANK", "spans) * (RANK"),
    "another request's pages, attending": (
        ATTEND,
        "decode",
        "block of 48",
        "block_table + request * table_stride",
        "block_table",
    ),
}


def faulty(name, changes, folder):
    """A module of the package with parts of its source replaced, and the provider that has it."""
    module = sys.modules[f"vllm_dsa.kernels.{name}"]
    source = Path(module.__file__).read_text()
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in source, f"{name} has no {old!r}: it changed, and this fault with it"
        source = source.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"faulty_{name}", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, tmp_path, monkeypatch, kernels, configured):
    name, op, case, *changes = FAULTS[fault]
    copy = faulty(name, changes, tmp_path)
    if name == "triton_e4m3":
        for helper in ("encode", "power_of_two"):
            monkeypatch.setattr(triton_write, helper, getattr(copy, helper))
        changed = kernels
    else:
        changed = provider(**{name: copy})
    configured("score", spread_rows=0)
    with pytest.raises(compare.Mismatch):
        (CHECKS | {"decode": lambda it, case: check_attend(Decoding(it), case)})[op](changed, BY_NAME[case])
