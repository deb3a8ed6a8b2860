"""Who may import whom (design table "Who may import whom"), held over the source of every module.

Each rule is also shown to bite: a violation planted in a tree of empty modules must be reported.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vllm_dsa"

FACTS = ("vllm_dsa.config", "vllm_dsa.envs", "vllm_dsa.checkpoint", "vllm_dsa.checkpoint_files")
BYTES = ("vllm_dsa.cache", "vllm_dsa.metadata")
WEIGHTS = ("vllm_dsa.fp8_weights", "vllm_dsa.packed_weights")
SEAM = ("vllm_dsa.backend", "vllm_dsa.compat", "vllm_dsa.platform", "vllm_dsa.metrics", "vllm_dsa.cpu_worker", *WEIGHTS)
LAYERS = ("vllm_dsa.indexer", "vllm_dsa.attention")
CONTRACTS = "vllm_dsa.kernels"
PLAIN_TOOLS = tuple(f"vllm_dsa.tools.{name}" for name in ("main", "output", "model", "memory", "fit", "plan", "doctor"))


@dataclass(frozen=True)
class Layer:
    """Modules (patterns), what they may import besides the standard library, and what only inside a function."""

    modules: tuple[str, ...]
    may: tuple[str, ...] = ()
    in_functions: tuple[str, ...] = ()


# The first layer with a matching pattern holds.
TABLE = (
    Layer(("vllm_dsa",), in_functions=("vllm_dsa.*",)),
    Layer(("vllm_dsa.checkpoint",), ("vllm_dsa.config", "vllm_dsa.checkpoint_files")),
    Layer(FACTS),
    Layer(BYTES, ("torch", *FACTS)),
    Layer(("vllm_dsa.kernels.reference",), ("torch", *BYTES, CONTRACTS)),
    Layer(("vllm_dsa.kernels.limits",), ("torch",)),  # torch for its types only
    Layer(
        ("vllm_dsa.kernels.vendor",),
        ("torch", "triton", *BYTES, "vllm_dsa.envs", "vllm_dsa.kernels*"),
        in_functions=("vllm_dsa.compat",),
    ),
    Layer(
        ("vllm_dsa.kernels", "vllm_dsa.kernels.*"),
        ("torch", "triton", *BYTES, "vllm_dsa.envs", "vllm_dsa.kernels*"),
    ),
    Layer(("vllm_dsa.compat",), ("torch", "vllm"), in_functions=("flash_mla",)),
    Layer(
        ("vllm_dsa.metrics",),
        ("vllm_dsa", "vllm_dsa.config", "vllm_dsa.cache", "vllm_dsa.backend", CONTRACTS, "vllm_dsa.kernels.dispatch"),
        in_functions=("prometheus_client",),
    ),
    Layer(SEAM, ("torch", *FACTS, *BYTES, *SEAM, "vllm_dsa.kernels*")),
    Layer(LAYERS, ("torch", *FACTS, *BYTES, *SEAM, CONTRACTS, "vllm_dsa.kernels.dispatch", *LAYERS)),
    Layer(
        ("vllm_dsa.models", "vllm_dsa.models.*"),
        ("torch", "vllm_dsa", *FACTS, "vllm_dsa.compat", *WEIGHTS, "vllm_dsa.attention", "vllm_dsa.models*"),
    ),
    Layer(
        ("vllm_dsa.testing", "vllm_dsa.testing.*"),
        ("torch", *FACTS, *BYTES, "vllm_dsa.kernels*", "vllm_dsa.testing*"),
    ),
    # These run where neither torch nor vLLM is installed.
    Layer(("vllm_dsa.tools.output",), in_functions=("rich",)),
    Layer(
        PLAIN_TOOLS,
        (
            "vllm_dsa",
            *FACTS,
            "vllm_dsa.compat",
            CONTRACTS,
            "vllm_dsa.kernels.dispatch",
            "vllm_dsa.kernels.limits",
            *PLAIN_TOOLS,
        ),
    ),
    Layer(("vllm_dsa.tools", "vllm_dsa.tools.*"), ("torch", "vllm_dsa.*"), in_functions=("rich", "matplotlib")),
)


def modules_of(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of a package folder named vllm_dsa."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(tree: ast.Module, module: str, is_package: bool, known: set[str]) -> Iterator[tuple[str, int, bool]]:
    """(imported name, line, inside a function?) of every import statement and import_module("literal")."""

    def walk(node: ast.AST, in_function: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, in_function
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = module.split(".")[: len(module.split(".")) - child.level + is_package]
                    base = ".".join([*above, *([base] if base else [])])
                for alias in child.names:
                    inner = f"{base}.{alias.name}"
                    yield inner if inner in known else base, child.lineno, in_function
            elif isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant):
                name = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
                if name in ("import_module", "__import__"):
                    yield str(child.args[0].value), child.lineno, in_function
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, inside)

    return walk(tree, False)


def violations(package: Path) -> list[str]:
    """One line for each import of the package that its layer does not allow, and for each module of no layer."""
    files, found = modules_of(package), []
    for module, path in files.items():
        layer = next((x for x in TABLE if any(fnmatchcase(module, pattern) for pattern in x.modules)), None)
        if layer is None:
            found.append(f"{module} is in no layer: give it one in TABLE")
            continue
        tree = ast.parse(path.read_text(), str(path))
        for name, line, in_function in imports_of(tree, module, path.name == "__init__.py", set(files)):
            root = name.split(".")[0]
            # Our own modules by their full name, others by their package.
            target = name if root == "vllm_dsa" else root
            allowed = layer.may + (layer.in_functions if in_function else ())
            if root not in sys.stdlib_module_names and not any(fnmatchcase(target, pattern) for pattern in allowed):
                where = "" if in_function else " at import"
                found.append(f"{module}:{line} imports {name}{where}")
    return list(dict.fromkeys(found))


def test_every_module_keeps_to_its_layer():
    assert violations(PACKAGE) == []


def test_the_check_sees_the_package():
    assert {"vllm_dsa", "vllm_dsa.compat", "vllm_dsa.config", "vllm_dsa.kernels"} <= set(modules_of(PACKAGE))


PLANTED = [
    ("config", "import torch"),
    ("envs", "from vllm import envs"),
    ("config", "import vllm_dsa.compat"),
    ("checkpoint", "import safetensors"),
    ("cache", "import triton"),
    ("metadata", "def f():\n    import vllm"),
    ("kernels.cpu", "import vllm_dsa.compat"),
    ("kernels.cpu", "from vllm_dsa import compat"),
    ("kernels.cpu", "from ..compat import RMSNorm"),
    ("kernels.cpu", "from importlib import import_module\nimport_module('vllm')"),
    ("kernels.vendor", "from vllm_dsa import compat"),
    ("kernels.vendor", "def f():\n    import vllm"),
    ("kernels.reference", "from vllm_dsa.kernels import cpu"),
    ("kernels.reference", "from . import cpu"),
    ("kernels", "from vllm_dsa.config import DSAConfig"),
    ("backend", "from vllm_dsa import attention"),
    ("backend", "from vllm.config import VllmConfig"),
    ("platform", "def f():\n    from vllm_dsa.models import deepseek_v32"),
    ("metrics", "import prometheus_client"),
    ("metrics", "def f():\n    from vllm_dsa import attention"),
    ("compat", "import vllm_dsa.backend"),
    ("attention", "from vllm_dsa.kernels import cpu"),
    ("indexer", "from vllm_dsa.kernels.reference import select"),
    ("attention", "from vllm_dsa.testing import server"),
    ("models.deepseek_v32", "from vllm_dsa.kernels import dispatch"),
    ("models.deepseek_v32", "import vllm_dsa.backend"),
    ("models.deepseek_v32", "from vllm.model_executor.layers.linear import RowParallelLinear"),
    ("models.deepseek_v32", "import transformers"),
    ("models.axk2", "from vllm.model_executor.layers.layernorm import RMSNorm"),
    ("models.axk2", "from vllm_dsa.kernels.dispatch import choose"),
    ("__init__", "import torch"),
    ("__init__", "from vllm_dsa import compat"),
    ("__init__", "def register():\n    import vllm"),
    ("testing.cases", "import pytest"),
    ("testing.server", "import vllm"),
    ("testing.compare", "from vllm_dsa import compat"),
    ("attention", "from vllm_dsa.tools import cli"),
    ("tools.output", "import rich"),
    ("tools.plan", "def f():\n    import torch"),
    ("tools.doctor", "import vllm"),
    ("tools.memory", "from vllm_dsa import cache"),
    ("tools.main", "import rich"),
    ("tools.verify", "def f():\n    import vllm"),
    ("tools.plot", "import matplotlib"),
    ("kernels.limits", "import triton"),
    ("stray", "import json"),
]
ALLOWED = [
    ("kernels.vendor", "def f():\n    from vllm_dsa import compat"),
    ("compat", "import vllm\ndef f():\n    import flash_mla"),
    ("kernels.triton_select", "import triton.language as tl\nfrom vllm_dsa import cache, envs"),
    ("kernels.reference", "import torch.nn.functional as F\nfrom vllm_dsa.kernels import Rope"),
    ("attention", "from vllm_dsa.kernels import Rope, dispatch\nfrom vllm_dsa.compat import get_rope"),
    ("models.deepseek_v32", "from vllm_dsa.attention import DSAAttention\nimport torch"),
    ("models.axk2", "from vllm_dsa.models.deepseek_v32 import DecoderLayer\nfrom vllm_dsa.compat import RMSNorm"),
    ("__init__", "import os\ndef register():\n    from vllm_dsa import compat"),
    ("tools.verify", "import torch\nfrom vllm_dsa import compat, models\ndef f():\n    import rich, matplotlib"),
    ("tools.output", "def f():\n    from rich.console import Console"),
    ("tools.doctor", "from vllm_dsa import compat\nfrom vllm_dsa.kernels import OPS, dispatch"),
]


def plant(folder: Path, module: str, source: str) -> Path:
    """A package of empty modules, named as ours are, but for one."""
    package = folder / "vllm_dsa"
    names = [pattern.removeprefix("vllm_dsa.") for layer in TABLE for pattern in layer.modules if "*" not in pattern]
    kernels = ("cpu", "dispatch", "triton_select")
    packages = ("kernels", "models", "testing", "tools")
    for name in [*names, *(f"kernels.{k}" for k in kernels), "models.deepseek_v32", "testing.server", "tools.cli"]:
        if name not in (*packages, "vllm_dsa"):
            path = package.joinpath(*name.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    for name in ("", *packages):
        (package / name / "__init__.py").touch()
    path = package.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    path.write_text(source + "\n")
    return package


@pytest.mark.parametrize(("module", "source"), PLANTED)
def test_a_planted_violation_is_reported(tmp_path, module, source):
    found = violations(plant(tmp_path, module, source))
    assert len(found) == 1
    assert found[0].startswith(("vllm_dsa" if module == "__init__" else f"vllm_dsa.{module}",))


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_what_the_table_allows_is_not_reported(tmp_path, module, source):
    assert violations(plant(tmp_path, module, source)) == []


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh Python has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["vllm_dsa", *FACTS, "vllm_dsa.compat", "vllm_dsa.kernels.dispatch", *PLAIN_TOOLS])
def test_importing_facts_loads_neither_torch_nor_vllm(module):
    assert not loaded_by(f"import {module}") & {"torch", "vllm", "triton"}


def test_importing_kernels_and_testing_loads_no_vllm():
    modules = [name for name in modules_of(PACKAGE) if name.startswith(("vllm_dsa.kernels", "vllm_dsa.testing"))]
    assert not loaded_by(f"import {', '.join(modules)}") & {"vllm", "pytest"}


def test_the_subprocess_check_can_fail():
    assert "torch" in loaded_by("import vllm_dsa.cache")
