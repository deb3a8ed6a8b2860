"""Damaged and foreign checkpoints: refused before anything is loaded, by name and with the next step.

What can be seen in a local folder is seen in its headers, when the config is made; what comes from elsewhere, while it
is loaded.
"""

import json
import re
import shutil
import time

import pytest
import torch
from engine import EngineArgs, load, unloaded
from fp8_bytes import read, rewrite
from tiny_checkpoint import write_random

from vllm_dsa.checkpoint import refuse_indexer
from vllm_dsa.checkpoint_files import CheckpointError
from vllm_dsa.testing.server import ServerError, serve

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
WK = "model.layers.2.self_attn.indexer.wk.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    write_random(path, fp8=True, num_hidden_layers=3)
    return path


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def without(*parts):
    """Drop every tensor whose name contains one of ``parts``."""
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def with_tensor(name, change):
    return lambda tensors: tensors | {name: change(tensors[name])}


def damaged_index(change):
    def damage(folder):
        path = folder / INDEX
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def truncated(folder, size=-100):
    file = folder / SECOND
    file.write_bytes(file.read_bytes()[:size])


def unlisted(index):
    """The second shard is in the folder, the index has none of its tensors."""
    return index | {"weight_map": {name: file for name, file in index["weight_map"].items() if file == FIRST}}


def listed(index):
    return index | {"weight_map": {name: [file] for name, file in index["weight_map"].items()}}


def swapped(index):
    names = {FIRST: SECOND, SECOND: FIRST}
    return index | {"weight_map": {name: names[file] for name, file in index["weight_map"].items()}}


def converted(folder):
    """As DeepSeek's convert.py names its files, with a config.json put beside them."""
    (folder / INDEX).unlink()
    for i, file in enumerate((FIRST, SECOND)):
        (folder / file).rename(folder / f"model{i}-mp2.safetensors")


def config_key(folder, key, value):
    (folder / "config.json").write_text(json.dumps(config_of(folder) | {key: value}))


GATE = "model.layers.1.mlp.gate.weight"
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
# What is done to a good folder (to its tensors, or to its files), and what must be said.
TENSORS = {
    "no indexer": (
        without(".indexer."),
        r"no indexer tensors \(model\.layers\.0\.self_attn\.indexer\.wq_b.*and 10 more\).*without DSA.*Serve",
    ),
    "one wk": (without(WK), rf"lacks 1 of \d+ tensors of layers 2: {WK}\. Check .*download the checkpoint again"),
    "one expert": (without(".layers.1.mlp.experts.7."), r"lacks 3 of \d+ tensors of layers 1: .*experts\.7\.gate_proj"),
    "no head": (without("lm_head"), r"no lm_head\.weight, and tie_word_embeddings .*--hf-overrides"),
    "shape": (
        with_tensor(GATE, lambda t: t[:, :64].clone()),
        rf"tensor {GATE} has shape \(8, 64\), config.json asks for \(8, 128\).*of the same model",
    ),
    "larger shape": (
        with_tensor("model.norm.weight", lambda t: torch.cat([t, t])),
        r"model\.norm\.weight has shape \(256,\), config.json asks for \(128,\)",
    ),
    "scale shape": (
        with_tensor(f"{DOWN}_scale_inv", lambda t: torch.ones(2, 1)),
        rf"{DOWN}_scale_inv has shape \(2, 1\), config.json asks for \(1, 1\)",
    ),
    "no scale": (
        without(f"{DOWN}_scale_inv"),
        rf"tensor '{DOWN}' has no FP8 partner '{DOWN}_scale_inv' \(1 such.*Download",
    ),
    "E5M2": (
        with_tensor(DOWN, lambda t: t.float().to(torch.float8_e5m2)),
        rf"tensor {DOWN} is FP8 of the kind E5M2.*Convert the model",
    ),
    "integers": (
        with_tensor(f"{DOWN}_scale_inv", lambda t: t.int()),
        rf"tensor {DOWN}_scale_inv holds scales as I32, and quantization_config does not say which.*as float32",
    ),
    "no FP8": (
        with_tensor(DOWN, lambda t: t.float()),
        rf"tensor '{DOWN}_scale_inv' has no FP8 partner '{DOWN}'.*Download",
    ),
}
FILES = {
    "truncated": (truncated, rf"{SECOND} is truncated: \d+ of \d+ bytes are there\. Download it again"),
    "header cut": (lambda folder: truncated(folder, 500), rf"{SECOND} \(500 bytes\) is truncated.*Download it again"),
    "empty": (lambda folder: truncated(folder, 0), rf"{SECOND} \(0 bytes\) is truncated.*Download it again"),
    "git-lfs": (
        lambda folder: (folder / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        rf"{FIRST} is a git-lfs pointer.*git lfs pull",
    ),
    "shard gone": (lambda folder: (folder / SECOND).unlink(), rf"lacks {SECOND}, which {INDEX} names\. Download"),
    "shard unlisted": (
        damaged_index(unlisted),
        rf"lacks \d+ of \d+ tensors.*They are in {SECOND}, which {INDEX} does not name",
    ),
    "index damaged": (lambda folder: (folder / INDEX).write_text("{"), rf"{INDEX} is damaged.*Download"),
    "index of lists": (damaged_index(listed), rf"{INDEX} is damaged: its weight_map holds more.*Download"),
    "convert.py": (converted, r"model0-mp2\.safetensors: DeepSeek's convert\.py.*Serve the published folder"),
    "other config": (
        lambda folder: config_key(folder, "num_hidden_layers", 5),
        r"lacks \d+ of \d+ tensors of layers 4: model\.layers\.4\.",
    ),
    "no quantization_config": (
        lambda folder: config_key(folder, "quantization_config", None),
        r"model\.layers\.\S+ is FP8, but config\.json has no quantization_config\. Restore",
    ),
}


@pytest.fixture(params=[*TENSORS, *FILES])
def hostile(request, good, tmp_path):
    """(folder, what must be said)"""
    if request.param in TENSORS:
        change, message = TENSORS[request.param]
        return rewrite(good, tmp_path / "hostile", change, config_of(good)), message
    damage, message = FILES[request.param]
    folder = shutil.copytree(good, tmp_path / "hostile")
    damage(folder)
    return folder, message


def engine_config(folder, **options):
    defaults = dict(model=str(folder), dtype="float32", max_model_len=2048)
    return EngineArgs(**(defaults | options)).create_engine_config()


def test_refused_when_the_config_is_made(hostile):
    folder, message = hostile
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        engine_config(folder)
    assert time.monotonic() - start < 20


def test_good_folders_pass(good, tmp_path):
    """MTP layers may be left out, vLLM finds tensors by the headers whichever file the index says, and an index is not
    needed. What lies beside: test_checkpoint_files.py."""
    with unloaded(good) as (model, config):
        expected = load(model, config)
    folder = rewrite(good, tmp_path / "less", without("model.layers.3."), config_of(good))
    for change in (damaged_index(swapped), lambda folder: (folder / INDEX).unlink()):
        change(folder)
        with unloaded(folder) as (model, config):
            found = load(model, config)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_weights_that_are_not_read_are_not_checked(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "hostile")
    truncated(folder)
    assert engine_config(folder, load_format="dummy").load_config.load_format == "dummy"


# A repository that vLLM downloads itself has no local folder to look into: load_weights sees what comes.


@pytest.mark.parametrize("case", TENSORS)
def test_refused_while_loading(good, case):
    change, message = TENSORS[case]
    with unloaded(good) as (model, _), pytest.raises(CheckpointError, match=message):
        model.load_weights(iter(change(read(good)).items()))


def test_weights_of_more_layers_or_experts_are_refused(good):
    for extra in (
        "model.layers.9.self_attn.indexer.wk.weight",
        "model.layers.9.self_attn.q_a_proj.weight",
        "model.layers.1.mlp.experts.8.up_proj.weight",
    ):
        with unloaded(good) as (model, _), pytest.raises(CheckpointError, match=rf"{extra}' belongs to no parameter"):
            model.load_weights(iter([(extra, torch.ones(128, 128))]))


# V3.2's weights under a config of V3: vLLM drops the indexer and attends densely.


def as_v3(good, path):
    config = {key: value for key, value in config_of(good).items() if not key.startswith("index_")}
    config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    return rewrite(good, path, lambda tensors: tensors, config)


def test_indexer_under_a_v3_config_is_refused(good, tmp_path):
    folder = as_v3(good, tmp_path / "v3")
    said = r"indexer.*and 23 more: weights of DeepSeek-V3\.2.*config\.json is of DeepSeek-V3.*Restore"
    with pytest.raises(ValueError, match=f"(?s){said}"):
        engine_config(folder)
    v3 = rewrite(folder, tmp_path / "really v3", without(".indexer."), config_of(folder))
    refuse_indexer(v3)
    assert engine_config(v3, dtype="bfloat16").model_config.architectures == ["DeepseekV3ForCausalLM"]


# The real command line


def refused_by_serve(folder, message):
    start = time.monotonic()
    with pytest.raises(ServerError) as refused, serve(folder, "--dtype=float32", timeout=120):
        pytest.fail("served")
    assert time.monotonic() - start < 120
    assert re.search(r"ended with status [1-9]", str(refused.value))
    assert re.search(message, str(refused.value)), refused.value


@pytest.mark.serve
@pytest.mark.parametrize("case", ["one wk"])
def test_vllm_serve_refuses_a_missing_tensor(good, tmp_path, case):
    change, message = TENSORS[case]
    refused_by_serve(rewrite(good, tmp_path / "hostile", change, config_of(good)), message)


@pytest.mark.serve
def test_vllm_serve_refuses_a_truncated_shard(good, tmp_path):
    damage, message = FILES["truncated"]
    folder = shutil.copytree(good, tmp_path / "hostile")
    damage(folder)
    refused_by_serve(folder, message)


@pytest.mark.serve
@pytest.mark.slow
def test_vllm_serve_refuses_each(hostile):
    refused_by_serve(*hostile)


@pytest.mark.serve
@pytest.mark.slow
def test_vllm_serve_refuses_v3_config(good, tmp_path):
    refused_by_serve(as_v3(good, tmp_path / "v3"), "config.json is of DeepSeek-V3 ")
