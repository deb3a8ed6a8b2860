"""The committed list of vLLM's names (scripts/vllm_symbols.py): it is complete, and the installed vLLM is as listed."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from vllm_dsa import compat

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import vllm_symbols as symbols  # noqa: E402

LISTED = json.loads(symbols.LIST.read_text())
INSTALLED = symbols.Sources(Path(importlib.util.find_spec("vllm").origin).parents[1])
VERSION = symbols.minor(INSTALLED.version())
USED = symbols.uses()
AGAIN = "Run scripts/vllm_symbols.py on the sources of each supported vLLM."
# compat.vendor_refusals turns DeepGEMM away on vLLM 0.32, whose functions differ.
NOT_CALLED = {"0.32": ("vllm.utils.deep_gemm:",)}


def of(version):
    return {target: versions.get(version) for target, versions in LISTED["names"].items()}


def misfits(version, used=USED, found=None):
    lines = symbols.misfits(used, found or of(version))
    return [line for line in lines if not line.startswith(NOT_CALLED.get(version, ()) or "\0")]


def comparable(entries):
    """All but FlashMLA's functions, which CUDA builds only have: elsewhere vLLM has stubs under their names."""
    stubs = "vllm.v1.attention.ops.flashmla:"
    return {target: entry for target, entry in entries.items() if not target.startswith(stubs)}


def planted(tmp_path, module, source):
    """A copy of the package's sources with one more line in a module."""
    package = tmp_path / "vllm_dsa"
    shutil.copytree(symbols.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / f"{module}.py"
    path.write_text(f"{path.read_text()}\n{source}\n")
    return symbols.uses(package)


def test_the_list_names_all_that_is_used_in_every_supported_version():
    assert set(LISTED["names"]) == set(USED), AGAIN
    assert set(compat.NAMES.values()) <= set(USED)
    assert sorted(LISTED["versions"]) == sorted(compat.SUPPORTED)
    for target, versions in LISTED["names"].items():
        assert [target, *versions] == [target, *sorted(compat.SUPPORTED)], AGAIN


def test_the_installed_vllm_is_as_listed():
    found = symbols.entries(INSTALLED, USED)
    assert comparable(found) == comparable(of(VERSION)), AGAIN


@pytest.mark.parametrize("version", compat.SUPPORTED)
def test_every_name_is_there_and_every_call_and_override_fits(version):
    assert misfits(version) == []


def test_the_names_of_functions_and_of_gpu_libraries_are_found():
    for target in (
        "vllm:__version__",
        "vllm:_custom_ops",
        "vllm.utils.deep_gemm:fp8_fp4_paged_mqa_logits",
        "vllm.v1.attention.ops.flashmla:flash_mla_sparse_fwd",
    ):
        assert USED[target], target
    parameters = of("0.33")["vllm.v1.attention.ops.flashmla:flash_mla_with_kvcache"]["parameters"]
    assert {"q", "tile_scheduler_metadata", "indices="} <= set(parameters)


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("compat", "def f():\n    from vllm.config import gone", "vllm.config:gone: missing"),
        ("compat", "def f():\n    from vllm.nowhere import gone", "vllm.nowhere:gone: missing"),
        ("compat", "def f():\n    from vllm import _custom_ops\n    _custom_ops.gone()", "_custom_ops.gone: missing"),
        ("attention", "RowParallelLinear(1, 2, gone=3)", "passes gone"),
        ("attention", "RowParallelLinear(1)", "does not pass output_size"),
        ("attention", "get_tensor_model_parallel_world_size(1)", "passes 1 positional arguments"),
        ("attention", "MLAAttentionSpec(16, num_kv_heads=1, head_size=1, dtype=1)", "passes 1 positional arguments"),
        ("platform", "compat.current_platform.is_cpu(1)", "passes 1 positional arguments"),
        ("backend", "AttentionCGSupport.GONE", "AttentionCGSupport.GONE: missing"),
        (
            "fp8_weights",
            "class C(compat.QuantizationConfig):\n    def get_quant_method(self, layer): ...",
            "get_quant_method: ours does not take prefix",
        ),
    ],
)
def test_a_planted_misuse_is_reported(tmp_path, module, source, said):
    used = planted(tmp_path, module, source)
    (line,) = misfits(VERSION, used, symbols.entries(INSTALLED, used))
    assert said in line


def test_a_planted_name_of_the_table_is_missing_from_list_and_vllm(tmp_path):
    package = tmp_path / "vllm_dsa"
    package.mkdir()
    source = (symbols.PACKAGE / "compat.py").read_text()
    (package / "compat.py").write_text(source.replace("NAMES = {", 'NAMES = {\n    "gone": "vllm.config:gone",', 1))
    used = symbols.uses(package)
    assert "vllm.config:gone" not in LISTED["names"]
    assert "vllm.config:gone: missing" in misfits(VERSION, used, symbols.entries(INSTALLED, used))


def test_a_changed_signature_shows(tmp_path):
    """As a vLLM would look that had renamed a parameter."""
    module = tmp_path / "vllm" / "model_executor" / "models" / "utils.py"
    module.parent.mkdir(parents=True)
    module.write_text("def maybe_prefix(prefix, key): ...\n")
    target = "vllm.model_executor.models.utils:maybe_prefix"
    assert symbols.Sources(tmp_path).entry(target, []) != of(VERSION)[target]
