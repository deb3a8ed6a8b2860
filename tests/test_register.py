"""What register() changes in vLLM, what it leaves alone, and when it declines. Told by one fresh process."""

import json
import subprocess
import sys

import pytest

from vllm_dsa.testing.server import initial_environment

STORY = """
import json, logging, os, sys
from vllm_dsa import MODELS, compat, envs, register

import vllm.envs
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.v1.attention.backends.registry import _ATTN_OVERRIDES, AttentionBackendEnum

lines, chapters = [], {}
class Lines(logging.Handler):
    def emit(self, record):
        lines.append((record.levelname, record.getMessage()))
logger = logging.getLogger("vllm.vllm_dsa")
logger.addHandler(Lines())
logger.setLevel("INFO")  # vLLM sets its levels later, when an engine starts

def state():
    backend = AttentionBackendEnum.__members__.get("DSA")
    return {
        "models": {name: repr(model) for name, model in ModelRegistry.models.items()},
        "hooks": {name: f"{id(hook)} {hook.__name__}" for name, hook in MODELS_CONFIG_MAP.items()},
        "backend": backend and backend.get_path(),
        "backends": len(AttentionBackendEnum.__members__) + len(_ATTN_OVERRIDES),
        "variables": sorted(vllm.envs.environment_variables),
    }

def chapter(name, version=None, **environment):
    real, os.environ = compat.vllm_version, {**os.environ, **environment}
    if version:
        compat.vllm_version = lambda: version
    lines.clear()
    error = None
    try:
        register()
        register()
    except RuntimeError as raised:
        error = str(raised)
    compat.vllm_version, os.environ = real, {k: v for k, v in os.environ.items() if k not in environment}
    chapters[name] = {**state(), "lines": list(lines), "error": error}

chapters["stock"] = state()
chapter("0.31", version="0.31.2")
chapter("0.34", version="0.34.0rc1+cpu")
chapter("dev", version="dev")
chapter("0.34 required", version="0.34.0", VLLM_DSA_REQUIRED="1")
chapter("disabled", VLLM_DSA_DISABLE="1")
chapter("disabled and required", VLLM_DSA_DISABLE="1", VLLM_DSA_REQUIRED="1")
chapter("registered")
import torch
chapters["loaded"] = sorted(name for name in sys.modules if name.startswith("vllm_dsa"))
chapters["cuda"] = torch.cuda.is_initialized()
chapters["ours"] = sorted(envs.TABLE)
chapters["classes"] = MODELS
from vllm_dsa import platform
chapters["hooked"] = [*platform.ARCHITECTURES, *platform.DENSE_ARCHITECTURES]
chapter("again")
sys.stdout.write("STORY" + json.dumps(chapters))
"""


@pytest.fixture(scope="module")
def story():
    clean = {key: value for key, value in initial_environment().items() if not key.startswith("VLLM_DSA_")}
    result = subprocess.run([sys.executable, "-c", STORY], env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.partition("STORY")[2])


def registries(chapter):
    return {key: chapter[key] for key in ("models", "hooks", "backend", "backends", "variables")}


@pytest.mark.parametrize(("chapter", "found"), [("0.31", "0.31.2"), ("0.34", "0.34.0rc1+cpu"), ("dev", "dev")])
def test_another_vllm_is_left_alone_with_one_warning(story, chapter, found):
    assert registries(story[chapter]) == registries(story["stock"])
    assert story[chapter]["error"] is None
    ((level, message),) = story[chapter]["lines"]
    assert level == "WARNING"
    assert f"vLLM {found} " in message and "0.32 and 0.33" in message


def test_required_turns_declining_into_an_error(story):
    assert "vLLM 0.34.0 " in story["0.34 required"]["error"]
    assert "VLLM_DSA_DISABLE=1" in story["disabled and required"]["error"]
    assert registries(story["0.34 required"]) == registries(story["stock"])


def test_disabled_gives_stock_vllm_which_knows_our_variables(story):
    disabled, stock = registries(story["disabled"]), registries(story["stock"])
    assert set(disabled.pop("variables")) == set(stock.pop("variables")) | set(story["ours"])
    assert disabled == stock
    assert [level for level, _ in story["disabled"]["lines"]] == ["INFO"]


def test_registers_model_hook_backend_and_variables(story):
    stock, registered = story["stock"], story["registered"]
    for architecture, ours in story["classes"].items():
        assert "vllm_dsa" not in stock["models"].get(architecture, "unknown to vLLM")
        for part in ours.split(":"):
            assert part in registered["models"][architecture]
    for architecture in story["hooked"]:
        assert registered["hooks"][architecture] != stock["hooks"].get(architecture)
    assert (stock["backend"], registered["backend"]) == (None, "vllm_dsa.backend.DSABackend")
    assert {"VLLM_DSA_DISABLE", "VLLM_DSA_REQUIRED"} <= set(story["ours"]) <= set(registered["variables"])
    assert [level for level, _ in registered["lines"]] == ["INFO"]


def test_leaves_every_other_model_alone(story):
    # The draft's config is the target's, and checked with it.
    assert set(story["classes"]) - set(story["hooked"]) <= {"DeepseekV32MTPModel"}
    for table, ours in (("models", story["classes"]), ("hooks", story["hooked"])):
        before, after = story["stock"][table], story["registered"][table]
        assert {k: v for k, v in after.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}


def test_a_second_registration_changes_nothing(story):
    assert registries(story["again"]) == registries(story["registered"])
    assert story["again"]["error"] is None


def test_loads_no_layer_and_no_model_and_leaves_cuda_alone(story):
    heavy = ("vllm_dsa.attention", "vllm_dsa.indexer", "vllm_dsa.models", "vllm_dsa.backend", "vllm_dsa.kernels")
    assert [name for name in story["loaded"] if name.startswith(heavy)] == []
    assert story["cuda"] is False
