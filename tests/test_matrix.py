"""Who serves DSA models: this package, stock vLLM, or nobody, by our variables, VLLM_PLUGINS and vLLM's version.

One process imports vLLM once and forks a child for each cell of the matrix, in which vLLM itself finds, filters and
runs the plugin. Only the version is faked.
"""

import json
import subprocess
import sys
from itertools import product

import pytest
from tiny_checkpoint import write_random

from vllm_dsa import MODELS
from vllm_dsa.testing.server import SERVE_ENV, ServerError, initial_environment, serve

VERSIONS = ("0.31.2", "0.32.0+cpu", "0.33.1", "0.34.0")
OURS = VERSIONS[1:3]
SETTINGS = {
    "": {},
    "DISABLE": {"VLLM_DSA_DISABLE": "1"},
    "REQUIRED": {"VLLM_DSA_REQUIRED": "1"},
    "DISABLE, REQUIRED": {"VLLM_DSA_DISABLE": "1", "VLLM_DSA_REQUIRED": "1"},
    "PLUGINS=dsa": {"VLLM_PLUGINS": "dsa"},
    "PLUGINS=dsa, REQUIRED": {"VLLM_PLUGINS": "dsa", "VLLM_DSA_REQUIRED": "1"},
    "PLUGINS=": {"VLLM_PLUGINS": ""},
    "PLUGINS=other": {"VLLM_PLUGINS": "other"},
    # Nothing of ours runs then, so nothing can refuse.
    "PLUGINS=, REQUIRED": {"VLLM_PLUGINS": "", "VLLM_DSA_REQUIRED": "1"},
    "PLUGINS=other, DISABLE, REQUIRED": {
        "VLLM_PLUGINS": "other",
        "VLLM_DSA_DISABLE": "1",
        "VLLM_DSA_REQUIRED": "1",
    },
}


def expected(settings: dict[str, str], version: str) -> str:
    """plugin, stock or error, as README tells it."""
    if settings.get("VLLM_PLUGINS", "dsa") != "dsa":
        return "stock"
    if "VLLM_DSA_DISABLE" not in settings and version in OURS:
        return "plugin"
    return "error" if "VLLM_DSA_REQUIRED" in settings else "stock"


MATRIX = """
import json, multiprocessing, os, sys
import vllm.plugins
import vllm.model_executor.layers.quantization.base_config, vllm.model_executor.models.config
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs  # the first thing that vLLM's entry points make; loads the plugins

cells, architectures, checkpoint = json.loads(sys.argv[1])

def served(cell):
    environment, version = cell
    os.environ.update(environment)
    vllm.__version__ = version
    try:
        EngineArgs(model=checkpoint)
    except RuntimeError as error:
        return ["error", str(error)]
    ours = {"vllm_dsa" in repr(ModelRegistry.models.get(name)) for name in architectures}  # stock vLLM lacks some
    return [{(True,): "plugin", (False,): "stock"}.get(tuple(ours), "some"), ""]

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        sys.stdout.write("MATRIX" + json.dumps(pool.map(served, cells, chunksize=1)))
"""


def clean_environment() -> dict[str, str]:
    """This process's own, without what would decide a cell."""
    return {
        key: value
        for key, value in initial_environment().items()
        if not key.startswith("VLLM_DSA_") and key != "VLLM_PLUGINS"
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random(folder)
    return folder


@pytest.fixture(scope="module")
def matrix(checkpoint):
    keys = list(product(SETTINGS, VERSIONS))
    cells = [(SETTINGS[settings], version) for settings, version in keys]
    argument = json.dumps([cells, list(MODELS), str(checkpoint)])
    result = subprocess.run(
        [sys.executable, "-c", MATRIX, argument],
        env={**clean_environment(), **SERVE_ENV},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return dict(zip(keys, json.loads(result.stdout.partition("MATRIX")[2]), strict=True))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_who_serves(matrix, settings, version):
    who, error = matrix[settings, version]
    assert who == expected(SETTINGS[settings], version)
    if who == "error":
        assert error.startswith("VLLM_DSA_REQUIRED=1, but vllm-dsa would not serve: ")
        assert ("VLLM_DSA_DISABLE=1" if "DISABLE" in settings else f"vLLM {version} ") in error


def test_the_matrix_has_every_outcome(matrix):
    """Else a process in which nothing is ever registered, or everything always, would pass as well."""
    assert {who for who, _ in matrix.values()} == {"plugin", "stock", "error"}


START = """
import sys
import vllm
vllm.__version__ = sys.argv[2] or vllm.__version__
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model=sys.argv[1], max_model_len=64).create_engine_config()
print("STARTED", config.model_config.registry.models[config.model_config.architecture])
"""


def start(checkpoint, version="", **environment):
    return subprocess.run(
        [sys.executable, "-c", START, str(checkpoint), version],
        env={**clean_environment(), **SERVE_ENV, **environment},
        capture_output=True,
        text=True,
    )


def test_required_ends_the_start_of_an_engine_on_another_vllm(checkpoint):
    result = start(checkpoint, "0.34.0", VLLM_DSA_REQUIRED="1")
    assert result.returncode == 1 and "STARTED" not in result.stdout
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: VLLM_DSA_REQUIRED=1, but vllm-dsa would not serve: vLLM 0.34.0 is installed")


def test_required_lets_an_engine_start_on_the_installed_vllm(checkpoint):
    result = start(checkpoint, VLLM_DSA_REQUIRED="1")
    assert result.returncode == 0, result.stderr
    assert "vllm_dsa.models" in result.stdout.partition("STARTED")[2]


@pytest.mark.serve
def test_required_ends_vllm_serve(checkpoint):
    environment = {"VLLM_DSA_REQUIRED": "1", "VLLM_DSA_DISABLE": "1"}
    with pytest.raises(ServerError) as raised, serve(checkpoint, env=environment, timeout=120):
        pass
    assert "ended with status 1" in str(raised.value)
    assert raised.value.cause.startswith("RuntimeError: VLLM_DSA_REQUIRED=1, but vllm-dsa would not serve: ")
