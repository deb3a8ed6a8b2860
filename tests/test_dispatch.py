"""Which provider serves: chosen, refused, forced; and the variables that decide it."""

import re
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_dsa import envs
from vllm_dsa.kernels import OPS, cpu, dispatch, reference
from vllm_dsa.kernels.dispatch import Provider, Request, choose
from vllm_dsa.testing import compare
from vllm_dsa.tools import bench, verify

ON_CPU = Request(
    device_type="cpu",
    capability=None,
    dtype=torch.float32,
    latent_kind="auto",
    kv_lora_rank=512,
    rope_dim=64,
    num_heads=16,
    index_heads=64,
    index_dim=128,
    top_k=2048,
    block_size=64,
)
ELSEWHERE = replace(ON_CPU, device_type="xpu")
FUNCTIONS = ("write_keys", "write_queries", "select", "attend")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in envs.TABLE:
        monkeypatch.delenv(name, raising=False)


def test_the_cpu_provider_serves_on_the_cpu():
    kernels = choose(ON_CPU)
    assert [getattr(kernels, name) for name in FUNCTIONS] == [getattr(cpu, name) for name in FUNCTIONS]
    assert kernels.providers == dict.fromkeys(OPS, "cpu")
    assert kernels.query_heads == 16
    assert kernels.summary.startswith("write: cpu, select: cpu, attend: cpu (refused: ")
    for provider in dispatch.PROVIDERS:
        assert (f"{provider.name}: " in kernels.summary.partition("(")[2]) == (provider.name != "cpu")
    assert "reference: it serves only under VLLM_DSA_PROVIDER=reference" in kernels.summary
    assert "\n" not in kernels.summary


def test_no_provider_is_an_error_with_every_reason():
    with pytest.raises(RuntimeError) as error:
        choose(ELSEWHERE)
    text = str(error.value)
    assert text.startswith("No provider serves write, select, attend for Request(device_type='xpu'")
    for provider in dispatch.PROVIDERS:
        assert f"{provider.name}: " in text
    assert "the layer is on xpu" in text
    assert "Set VLLM_DSA_PROVIDER=reference" in text


@pytest.mark.parametrize("request_", [ON_CPU, ELSEWHERE], ids=["cpu", "xpu"])
def test_the_reference_serves_everywhere_when_forced(request_, monkeypatch):
    monkeypatch.setenv("VLLM_DSA_PROVIDER", "reference")
    kernels = choose(request_)
    assert [getattr(kernels, name) for name in FUNCTIONS] == [getattr(reference, name) for name in FUNCTIONS]
    assert "cpu: VLLM_DSA_PROVIDER=reference is set" in kernels.summary


@pytest.mark.parametrize("provider", [provider.name for provider in dispatch.PROVIDERS if provider.name != "reference"])
def test_a_forced_provider_that_refuses_is_an_error_with_its_reasons(provider, monkeypatch):
    monkeypatch.setenv("VLLM_DSA_PROVIDER", provider)
    with pytest.raises(RuntimeError, match=f"Refused: .*{provider}: it .*the layer is on xpu.*Unset VLLM_DSA_PROVIDER"):
        choose(ELSEWHERE)


def test_a_forced_provider_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "PROVIDERS", [p for p in dispatch.PROVIDERS if p.name in ("cpu", "reference")])
    monkeypatch.setenv("VLLM_DSA_PROVIDER", "vendor")
    with pytest.raises(envs.VariableError, match="VLLM_DSA_PROVIDER='vendor' is not one of cpu, reference. Set one"):
        choose(ON_CPU)


def test_an_entry_of_providers_is_all_that_a_new_one_needs(monkeypatch):
    """Its name is known to the variable, to both tools and to what it is held to: the strictest."""
    new = Provider("new", dict.fromkeys(OPS, "vllm_dsa.kernels.cpu"), lambda request: [])
    monkeypatch.setattr(dispatch, "PROVIDERS", (*dispatch.PROVIDERS, new))
    monkeypatch.setenv("VLLM_DSA_PROVIDER", "new")
    assert choose(ON_CPU).providers == dict.fromkeys(OPS, "new")
    for tool in (verify, bench):
        parser = ArgumentParser()
        tool.add_arguments(parser)
        assert parser.parse_args(["--provider", "new"]).provider == "new"
    allowed = compare.allowance("new")
    assert (allowed.tolerance, allowed.scores("cuda")) == (compare.TOLERANCE, torch.float32)
    assert not allowed.published_only


def test_allowances_are_of_providers_that_exist_and_none_is_stricter_than_the_defaults():
    assert set(compare.ALLOWANCES) <= set(dispatch.names())
    for allowed in compare.ALLOWANCES.values():
        assert all(value >= compare.TOLERANCE[dtype] for dtype, value in allowed.tolerance.items())
        assert allowed.tolerance.keys() == compare.TOLERANCE.keys()


def test_the_readme_names_the_providers():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (row,) = re.findall(r"^\| `VLLM_DSA_PROVIDER` \|.*$", text, re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", row)[1:]) == dispatch.names()
    assert tuple(re.findall(r"^\| `(\w+)` \| .* \| .* \|$", text.partition("| provider |")[2], re.MULTILINE)[:4]) == (
        dispatch.names()
    )


def test_operations_are_chosen_one_by_one(monkeypatch):
    half = Provider(
        "half",
        {"select": "vllm_dsa.kernels.reference", "attend": "vllm_dsa.kernels.reference"},
        lambda request: ["its top_k is too large", "it is Sunday"] if request.top_k > 1024 else [],
    )
    monkeypatch.setattr(dispatch, "PROVIDERS", (half, *dispatch.PROVIDERS))
    kernels = choose(ON_CPU)
    assert set(kernels.providers.values()) == {"cpu"}
    assert "half: it has no write (write); half: its top_k is too large (select, attend); " in kernels.summary
    assert "half: it is Sunday (select, attend)" in kernels.summary
    kernels = choose(replace(ON_CPU, top_k=64))
    assert kernels.providers == {"write": "cpu", "select": "half", "attend": "half"}
    assert (kernels.write_keys, kernels.select) == (cpu.write_keys, reference.select)


def test_importing_dispatch_loads_no_provider_and_no_torch():
    loaded = "[n for n in sys.modules if n.startswith('vllm_dsa.kernels.') or n in ('torch', 'triton')]"
    code = f"import sys, vllm_dsa.kernels.dispatch; print(*{loaded})"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert sorted(result.stdout.split()) == ["vllm_dsa.kernels.dispatch", "vllm_dsa.kernels.limits"]


@pytest.mark.parametrize("name", ["VLLM_DSA_DISABLE", "VLLM_DSA_REQUIRED"])
def test_flags(name, monkeypatch):
    assert getattr(envs, name) is False
    for text, value in (("1", True), ("true", True), ("0", False), ("False", False), ("", False), (" 1 ", True)):
        monkeypatch.setenv(name, text)
        assert getattr(envs, name) is value
    monkeypatch.setenv(name, "yes")
    with pytest.raises(ValueError, match=f"{name}='yes' is neither 0"):
        getattr(envs, name)


def test_provider_variable(monkeypatch):
    assert envs.VLLM_DSA_PROVIDER is None
    for value in ("cuda", "cpu,reference", "CPU"):
        monkeypatch.setenv("VLLM_DSA_PROVIDER", value)
        with pytest.raises(
            ValueError, match=f"VLLM_DSA_PROVIDER='{value}' is not one of vendor, triton, cpu, reference"
        ):
            choose(ON_CPU)
    monkeypatch.setenv("VLLM_DSA_PROVIDER", " cpu ")
    assert choose(ON_CPU).providers == dict.fromkeys(OPS, "cpu")


def test_budget_variable(monkeypatch):
    assert envs.VLLM_DSA_SCORE_BUDGET_MB == 512
    monkeypatch.setenv("VLLM_DSA_SCORE_BUDGET_MB", "3")
    assert envs.VLLM_DSA_SCORE_BUDGET_MB == 3
    for text in ("0", "-1", "1.5", "lots"):
        monkeypatch.setenv("VLLM_DSA_SCORE_BUDGET_MB", text)
        with pytest.raises(ValueError, match=f"VLLM_DSA_SCORE_BUDGET_MB='{text}' is not an integer of at least 1"):
            _ = envs.VLLM_DSA_SCORE_BUDGET_MB


def test_every_variable_is_documented_and_read_on_access():
    for name, read in envs.TABLE.items():
        assert name in envs.__doc__
        assert getattr(envs, name) == read()
    with pytest.raises(AttributeError, match="VLLM_DSA_TYPO"):
        _ = envs.VLLM_DSA_TYPO
