"""`vllm-dsa bench`: it times what is right, refuses what is wrong, and counts bytes and operations as they are."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vllm_dsa import cache
from vllm_dsa.kernels import cpu
from vllm_dsa.testing import clock, work
from vllm_dsa.testing.cases import V32, Case
from vllm_dsa.tools import stock
from vllm_dsa.tools.main import main

SMALL = ("--lengths", "100,2100", "--rows", "1,3", "--heads", "2", "--seconds", "0.01")


def bench(*options: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vllm_dsa.tools.main", "bench", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | env)


def test_every_operation_is_timed_and_compared_with_dense(tmp_path):
    file = tmp_path / "bench.json"
    done = bench(*SMALL, "--compare", "dense", "--json", str(file), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    results = report["results"]
    timed = {(r["op"], r["series"], r["context"], r["rows"]) for r in results}
    ops = [(op, "cpu") for op in ("write", "select", "attend", "layer")] + [("attend", "dense")]
    assert timed == {(*op, context, rows) for op in ops for context in (100, 2100) for rows in (1, 3)}
    for r in results:
        assert r["ms"] > 0 and r["runs"] >= 5 and r["limit_share"] > 0
    by_op = {r["op"]: r for r in results if (r["context"], r["rows"], r["series"]) == (2100, 3, "cpu")}
    assert by_op["layer"]["ms"] > 0.5 * max(by_op[op]["ms"] for op in ("select", "attend"))
    assert report["limits"]["bandwidth"] > 1e8
    assert len(done.stdout.splitlines()) == 5 + len(results)
    assert done.stdout.startswith("CPU, ")


def test_a_wrong_kernel_is_not_timed(monkeypatch, capsys, one_thread):
    """The gate sees the last of many rows too, and each operation."""
    timed = []
    monkeypatch.setattr(clock, "measure", lambda *a, **k: timed.append(a) or clock.Timing(1, 1, 0, 1))
    monkeypatch.setattr(clock, "limits", lambda device: clock.Limits(1, 1, 1, ""))
    select, attend, write_keys = cpu.select, cpu.attend, cpu.write_keys
    faults = {
        "select": lambda *a: (select(*a), a[-1][-1].copy_(a[-1][-1].roll(1))),
        "attend": lambda *a: (attend(*a), a[-1][-1].zero_())[0],
        "write_keys": lambda *a: write_keys(*a[:5], a[5] - 1, *a[6:]),
    }
    for name, fault in faults.items():
        with monkeypatch.context() as planted:
            planted.setattr(cpu, name, fault)
            assert main(["bench", "--op", "write", "--lengths", "2100", "--rows", "20", "--heads", "2"]) == 1
        assert "nothing was timed" in capsys.readouterr().err
    assert timed == []
    assert main(["bench", "--op", "write", "--lengths", "2100", "--rows", "20", "--heads", "2"]) == 0
    assert len(timed) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--op", "everything"), "--op everything"),
        (("--lengths", "0"), "--lengths 0"),
        (("--heads", "a"), "--heads a"),
        (("--seconds", "nan"), "--seconds nan"),
        (("--op", "select", "--compare", "dense"), "dense attention has no select"),
        (("--compare", "stock"), "Pass --op layer"),
        (("--op", "layer", "--compare", "stock"), "no sparse attention on a CPU"),
        (("--provider", "triton", "--lengths", "16"), "it runs on CUDA GPUs"),
        (("--json", "/nowhere/x.json", "--lengths", "16", "--rows", "1", "--seconds", "0.01"), "/nowhere/x.json"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused on a CPU")
def test_what_cannot_be_timed_says_why(options, says, capsys, one_thread):
    assert main(["bench", *options]) == 2
    assert says in capsys.readouterr().err


def test_a_provider_that_is_unknown_is_named(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_DSA_PROVIDER", "cuda")
    assert main(["bench", "--op", "write", "--lengths", "16", "--rows", "1"]) == 2
    assert "VLLM_DSA_PROVIDER='cuda' is not one of vendor" in capsys.readouterr().err


@pytest.mark.skipif(bool(find_spec("matplotlib")), reason="without matplotlib")
def test_without_matplotlib_it_says_how_to_get_it(capsys):
    assert main(["bench", "--png", "x.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_help_has_an_example():
    done = bench("--help")
    assert done.returncode == 0
    assert "examples:\n  vllm-dsa bench" in done.stdout
    words = " ".join(done.stdout.split())
    assert "--kv-cache-dtype {auto,fp8_ds_mla} default: fp8_ds_mla" in words


CASE = Case(
    "work", ((10, 2), (40, 1)), torch.bfloat16, rank=8, rope_dim=4, heads=3, index_heads=5, index_dim=6, top_k=16
)


def test_work_of_each_operation_counted_by_hand():
    assert work.lengths(CASE) == [11, 12, 41]
    # Three tokens: 18 values of 2 bytes read, a latent row of 24 bytes and an index row of 10 written; of queries, 3 x
    # 4 values read and written, and 5 heads of 6 values read, 6 codes written, a weight read (2) and written (4).
    assert work.write(CASE) == work.Work(3 * (36 + 24 + 10 + 48 + 5 * (12 + 6 + 2 + 4)), 0)
    # Only the row of 41 keys has more than 16: its keys of 10 bytes, its query (6 codes, a weight); 3 x 16 positions.
    assert work.select(CASE) == work.Work(41 * 10 + 5 * 10 + 3 * 16 * 4, 2 * 5 * 6 * 41)
    keys = 11 + 12 + 16
    assert work.attend(CASE) == work.Work(keys * 24 + 3 * 3 * 20 * 2, 2 * keys * 3 * (12 + 8))
    total = work.write(CASE) + work.select(CASE) + work.attend(CASE)
    assert work.layer(CASE) == total
    contexts = 12 + 41
    assert work.dense(CASE, 12, 8, 3) == work.Work(2 * (contexts * 3 * 20 + 3 * 3 * 20), 2 * 64 * 3 * 20)


def test_a_published_token_takes_656_bytes_in_the_latent_cache():
    assert work.latent_row_bytes(replace(V32, latent_kind=cache.FP8_DS_MLA)) == 656
    assert work.latent_row_bytes(replace(V32, dtype=torch.bfloat16)) == 1152


def test_the_least_time_is_that_of_the_scarcer_limit():
    limits = clock.Limits(bandwidth=100, flops=10, fp8_flops=20, source="")
    assert limits.seconds(200, 10, fp8=False) == 2
    assert limits.seconds(200, 80, fp8=False) == 8
    assert limits.seconds(200, 80, fp8=True) == 4


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2e12),
        ("NVIDIA H20", 4e12),
        ("NVIDIA A100-SXM4-80GB", 2.04e12),
        ("NVIDIA A100-SXM4-40GB", 1.56e12),
        ("NVIDIA GeForce RTX 4090", 1.01e12),
    ],
)
def test_limits_of_known_chips(name, bandwidth, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    found = clock.limits("cuda")
    assert found.bandwidth == pytest.approx(bandwidth)
    assert found.fp8_flops >= found.flops


def test_a_timing_is_the_median_and_the_range_of_most(monkeypatch):
    durations = iter([9.0, *[1.0, 2.0, 3.0, 4.0] * 4, 0.5, 8.0, 3.0, 3.0])
    ends = iter([0.0, *[0.5] * 15, 2.0])
    monkeypatch.setattr(clock, "measure_cpu", lambda run: next(durations))
    monkeypatch.setattr(clock.time, "monotonic", lambda: next(ends))
    runs = []
    timing = clock.measure(lambda: runs.append(1), "cpu", seconds=1)
    # Twenty runs in a second, after one that is not timed; of the twenty two are left out at either end.
    assert (timing.runs, timing.least, timing.seconds, len(runs)) == (20, 0.5, 3.0, 1)
    assert timing.spread == pytest.approx((4 - 1) / 3)


@pytest.mark.slow
def test_a_turn_of_the_engine(tmp_path: Path):
    """The child process of --compare stock, on a CPU and so with the plugin."""
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 2,
        "q_lora_rank": 32,
        "vocab_size": 128,
    }
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64, "index_topk": 16}
    settings = {"lengths": [100, 300], "requests": 2, "kv_cache_dtype": "fp8_ds_mla", "steps": 5, "repeats": 2}
    rows = stock.turn(tmp_path, stock.SIZES | sizes, settings, {"VLLM_CPU_KVCACHE_SPACE": "1"})
    assert [(row["context"], row["rows"], row["requests"], len(row["ms"])) for row in rows] == [
        (100, 100, 1, 2),
        (100, 1, 2, 5),
        (300, 300, 1, 2),
        (300, 1, 2, 5),
    ]
    assert all(ms > 0 for row in rows for ms in row["ms"])
