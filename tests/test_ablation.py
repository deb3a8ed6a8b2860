"""What is switched off to compare answers: the sparsity (VLLM_DSA_DENSE=1), or its extent (index_topk)."""

from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from engine import engine
from oracle import Oracle
from test_dispatch import ON_CPU
from test_model import LIMITS, config_of, differences, prompts, within
from tiny_checkpoint import write_random

from vllm_dsa import compat, platform
from vllm_dsa.config import ConfigError
from vllm_dsa.kernels import cpu, dense, dispatch, reference
from vllm_dsa.testing import compare
from vllm_dsa.testing.cases import BY_NAME, Case, Inputs, build
from vllm_dsa.testing.compare import BFLOAT16_LOGPROBS

CASES = ("prefill", "mixed", "at top_k", "decode", "one head", "no request", "no row", "fp8", "block of 48")
SIZES = dict(num_attention_heads=2, index_n_heads=8, index_topk=16, num_hidden_layers=3)


on_a_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and find_spec("vllm")), reason="needs a CUDA device and vLLM's CUDA build"
)


def written(case: Case, device: str = "cpu") -> Inputs:
    inputs = build(case, device)
    reference.write_keys(*inputs.keys())
    reference.write_queries(*inputs.queries())
    return inputs


def wanted(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and log-sum-exp over all keys, by the reference."""
    lengths = inputs.rows.lengths.unsqueeze(1)
    positions = torch.arange(max(inputs.rows.ends, default=1), dtype=torch.int32, device=lengths.device)
    everything = torch.where(positions < lengths, positions, -1)
    values = torch.empty(case.tokens, case.heads, case.rank, dtype=case.dtype, device=lengths.device)
    lse = reference.attend(inputs.query, inputs.latent_cache, inputs.rows, everything, inputs.scale, values)
    return values, lse


def check(case: Case, inputs: Inputs, rows=None) -> None:
    device = inputs.query.device
    values = torch.full((case.tokens, case.heads, case.rank), float("nan"), dtype=case.dtype, device=device)
    nothing = torch.full((case.tokens, case.top_k), -1, dtype=torch.int32, device=device)
    lse = dense.attend(inputs.query, inputs.latent_cache, rows or inputs.rows, nothing, inputs.scale, values)
    want, want_lse = wanted(case, inputs)
    compare.assert_close("values", values, want, compare.TOLERANCE[case.dtype])
    compare.assert_close("log-sum-exp", lse, want_lse, compare.TOLERANCE[torch.float32])


@pytest.mark.parametrize("chunk", [16, 4096])
@pytest.mark.parametrize("name", CASES)
def test_dense_attends_to_every_key(name, chunk, monkeypatch, one_thread):
    monkeypatch.setattr(dense, "KEY_CHUNK", chunk)
    monkeypatch.setattr(dense, "LOGIT_BYTES", 4 * 7 * 4 * chunk)  # seven rows at a time, of four heads
    check(BY_NAME[name], written(BY_NAME[name]))


def test_the_devices_lengths_hold_where_the_hosts_exceed_them(one_thread):
    case = BY_NAME["mixed"]
    inputs = written(case)
    ends = tuple(end + case.block_size - 1 - (end - 1) % case.block_size for end in inputs.rows.ends)
    assert ends != inputs.rows.ends
    check(case, inputs, replace(inputs.rows, ends=ends))


def test_bfloat16(one_thread):
    case = replace(BY_NAME["mixed"], name="mixed bfloat16", dtype=torch.bfloat16)
    check(case, written(case))


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CASES, "published mixed"])
def test_dense_on_a_gpu(name, dtype):
    case = replace(BY_NAME[name], dtype=dtype)
    check(case, written(case, "cuda"))


def test_workspace_does_not_grow_with_the_step():
    assert dense.workspace(ON_CPU, 1) == dense.workspace(ON_CPU, 8192) < 200 << 20


def test_dense_takes_the_place_of_every_select_and_attend(monkeypatch):
    monkeypatch.setenv("VLLM_DSA_DENSE", "1")
    for forced, module in ((None, cpu), ("reference", reference)):
        if forced:
            monkeypatch.setenv("VLLM_DSA_PROVIDER", forced)
        kernels = dispatch.choose(ON_CPU)
        assert (kernels.write_keys, kernels.write_queries) == (module.write_keys, module.write_queries)
        assert (kernels.select, kernels.attend, kernels.attend_dense) == (None, dense.attend, None)
        assert kernels.summary.startswith(f"write: {forced or 'cpu'}, select: dense, attend: dense (refused: ")
        assert "cpu: VLLM_DSA_DENSE=1 is set (select, attend)" in kernels.summary


@pytest.mark.parametrize(
    ("on_cpu", "eager", "connector", "says"),
    [
        (False, False, None, "refused on a GPU with CUDA graphs.*Pass --enforce-eager"),
        (False, True, None, None),
        (True, False, None, None),
        (True, False, "ExampleConnector", "refused with KV connector 'ExampleConnector'.*Remove --kv-transfer-config"),
    ],
)
def test_where_dense_is_refused(monkeypatch, on_cpu, eager, connector, says):
    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=eager),
        cache_config=SimpleNamespace(kv_offloading_size=None),
        kv_transfer_config=connector and SimpleNamespace(kv_connector=connector),
    )
    monkeypatch.setitem(vars(compat), "current_platform", SimpleNamespace(is_cpu=lambda: on_cpu))
    platform._refuse_dense(config)  # not asked for
    monkeypatch.setenv("VLLM_DSA_DENSE", "1")
    if says is None:
        platform._refuse_dense(config)
    else:
        with pytest.raises(ConfigError, match=says):
            platform._refuse_dense(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """index_topk -> folder: the same weights."""
    made = {}
    for top_k in (16, 48, 4096):
        made[top_k] = tmp_path_factory.mktemp(f"topk{top_k}")
        write_random(made[top_k], **SIZES | dict(index_topk=top_k))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_ds_mla"])
def test_a_dense_engine_equals_transformers_with_everything_selected(folders, kv_cache_dtype, monkeypatch):
    """Prompts in chunks, beside each other, and once more from the prefix cache; index caches stay as allocated."""
    monkeypatch.setenv("VLLM_DSA_DENSE", "1")
    asked = prompts(config_of(folders[16]))
    with engine(folders[16], kv_cache_dtype=kv_cache_dtype, enable_prefix_caching=True) as running:
        before = [layer.indexer.cache.kv_cache.clone() for layer in running.layers]
        difference = differences(running, Oracle(folders[4096], kv_cache_dtype), asked)
        assert within(difference, LIMITS[kv_cache_dtype])
        assert not within(differences(running, Oracle(folders[16], kv_cache_dtype), asked), LIMITS[kv_cache_dtype])
        first = running.generate(asked, 8)
        assert running.generate(asked, 8) == first
        for layer, unwritten in zip(running.layers, before, strict=True):
            assert torch.equal(layer.indexer.cache.kv_cache, unwritten)
            assert layer.kv_cache.any()


@pytest.mark.slow
def test_another_index_topk_by_hf_overrides(folders):
    asked = prompts(config_of(folders[48]))
    with engine(folders[16], hf_overrides={"index_topk": 48}) as running:
        assert within(differences(running, Oracle(folders[48]), asked), LIMITS["auto"])
        assert not within(differences(running, Oracle(folders[16]), asked), LIMITS["auto"])


@pytest.mark.gpu
@on_a_gpu
def test_a_dense_engine_on_a_gpu(tmp_path, monkeypatch):
    """bfloat16, at sizes that the vendor's kernels would serve; graphs are refused."""
    sizes = dict(num_attention_heads=16, index_n_heads=64, num_hidden_layers=3, dtype="bfloat16")
    for top_k in (128, 4096):
        write_random(tmp_path / str(top_k), index_topk=top_k, **sizes)
    monkeypatch.setenv("VLLM_DSA_DENSE", "1")
    options = dict(dtype="bfloat16", block_size=64, gpu_memory_utilization=0.1, kv_cache_memory_bytes=2 << 30)
    with (
        pytest.raises(ValueError, match="Pass --enforce-eager"),
        engine(tmp_path / "128", **options, enforce_eager=False),
    ):
        pass
    asked = prompts(config_of(tmp_path / "128"), multiples=(1, 4, 12))
    with engine(tmp_path / "128", **options, max_num_batched_tokens=600) as running:
        assert running.layers[0].kernels.summary.partition(" (")[0].endswith("select: dense, attend: dense")
        difference = differences(running, Oracle(tmp_path / "4096"), asked)
    assert within(difference, BFLOAT16_LOGPROBS)
