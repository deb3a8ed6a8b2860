"""vllm_dsa_info: what it says of an engine's config, on a CPU and (gpu) a GPU, and (slow) of a real server."""

import json
import subprocess
import sys
import urllib.request
from importlib.metadata import distribution
from importlib.util import find_spec

import prometheus_client
import pytest
import torch
from planted_text import build_prompt
from prometheus_client.parser import text_string_to_metric_families
from test_platform import engine_config
from tiny_checkpoint import write_planted, write_random

from vllm_dsa import __version__, metrics
from vllm_dsa.testing.server import serve

MTP = {"method": "mtp", "num_speculative_tokens": 2}
DSA = dict(version=__version__, cache="float32", index_bytes="132", index_topk="16", latent_bytes="2304")
ON_CPU = dict(write="cpu", select="cpu", attend="cpu")


def info(text: str) -> list[dict[str, str]]:
    """Labels of every sample of vllm_dsa_info in what /metrics returns."""
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families[metrics.NAME].samples if metrics.NAME in families else []
    assert all(sample.value == 1 for sample in samples)
    return [sample.labels for sample in samples]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    write_planted(path, check=False, first_k_dense_replace=2)  # no experts: a CPU runs these on one rank alone
    return path


@pytest.mark.parametrize(
    ("env", "options", "changed"),
    [
        (None, dict(speculative_config=MTP), {}),
        ("VLLM_DSA_PROVIDER=reference", {}, dict.fromkeys(("write", "select", "attend"), "reference")),
        ("VLLM_DSA_DENSE=1", {}, dict.fromkeys(("select", "attend"), "dense")),
        (None, dict(kv_cache_dtype="fp8"), dict(cache="fp8_ds_mla", latent_bytes="656")),
        (None, dict(dtype="bfloat16", kv_cache_dtype="bfloat16"), dict(cache="bfloat16", latent_bytes="1152")),
        (None, dict(hf_overrides={"index_topk": 48}), dict(index_topk="48")),
    ],
)
def test_info_follows_the_config(folder, monkeypatch, env, options, changed):
    if env:
        monkeypatch.setenv(*env.split("="))
    name = f"model {env} {options}"
    engine_config(folder, served_model_name=name, **options)
    (labels,) = (x for x in info(prometheus_client.generate_latest().decode()) if x["model_name"] == name)
    assert labels == {"model_name": name, **DSA, **ON_CPU, **changed}


def test_it_is_no_stat_logger():
    """One would have vLLM gather statistics of every model, whatever --disable-log-stats says."""
    groups = {entry.group for entry in distribution("vllm-dsa").entry_points}
    assert "vllm.general_plugins" in groups and "vllm.stat_logger_plugins" not in groups


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and find_spec("vllm")), reason="needs a CUDA device and vLLM's CUDA build"
)
def test_on_a_gpu_it_leaves_cuda_to_the_workers_and_says_what_they_choose(tmp_path):
    write_random(tmp_path, dtype="bfloat16", num_attention_heads=16, index_n_heads=64, index_topk=128)
    config = f"engine_config({str(tmp_path)!r}, served_model_name='tiny', dtype='bfloat16', kv_cache_dtype='fp8')"
    program = f"""
import json, sys, prometheus_client, torch
sys.path[:0] = {sys.path!r}
from test_metrics import info
from test_platform import engine_config
{config}
print("RESULT", json.dumps([info(prometheus_client.generate_latest().decode()), torch.cuda.is_initialized()]))
from engine import engine
options = dict(dtype="bfloat16", kv_cache_dtype="fp8", block_size=64, gpu_memory_utilization=0.1)
options |= dict(kv_cache_memory_bytes=2 << 30)
with engine({str(tmp_path)!r}, **options) as running:
    print("RESULT", json.dumps(running.layers[0].kernels.providers))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT "))
    (labels,), initialised = first
    assert not initialised
    assert second.items() <= labels.items()
    assert (labels["cache"], labels["latent_bytes"]) == ("fp8_ds_mla", "656")


@pytest.mark.slow
@pytest.mark.serve
@pytest.mark.parametrize(
    "options",
    [
        ("--speculative-config", json.dumps(MTP)),
        ("--api-server-count=2",),  # which gather their metrics from files
        ("--data-parallel-size=2",),
        ("--disable-log-stats",),  # which stays what it is
    ],
    ids=lambda options: options[0],
)
def test_a_server_shows_it(folder, options):
    options = ("--served-model-name=tiny", "--max-model-len=2048", "--dtype=float32", *options)
    with serve(folder, *options) as running:
        body = json.dumps({"model": "tiny", "prompt": build_prompt(400, 1).text, "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"{running.base_url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=120).close()
        with urllib.request.urlopen(f"{running.base_url}/metrics", timeout=30) as reply:
            text = reply.read().decode()
    (labels,) = info(text)
    labels.pop("pid", None)
    assert labels == {"model_name": "tiny", **DSA, **ON_CPU}
    assert ("vllm:num_requests_running" in text) == ("--disable-log-stats" not in options)
