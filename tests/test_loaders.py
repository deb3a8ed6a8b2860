"""vLLM's ways to load weights, each with an FP8 checkpoint: log-probabilities show that each weight is in place."""

import shutil
import weakref

import pytest
import torch
from engine import engine, load, unloaded
from fp8_bytes import all_dequantised, read, rewrite
from oracle import Oracle
from test_model import LIMITS, config_of, differences, prompts, within
from tiny_checkpoint import write_random
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

from vllm_dsa.checkpoint_files import CheckpointError

THREADS = {"enable_multithread_load": True, "num_threads": 4}
WEIGHTS = shutil.ignore_patterns("*.safetensors", "*.index.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("random")
    write_random(path, fp8=True, num_hidden_layers=2, num_attention_heads=6, index_n_heads=8, index_topk=48, seed=2)
    return path


@pytest.fixture(scope="module")
def oracle(folder, tmp_path_factory):
    config = config_of(folder)
    del config["quantization_config"]
    return Oracle(rewrite(folder, tmp_path_factory.mktemp("plain") / "float32", all_dequantised, config))


def is_right(path, oracle, **options) -> bool:
    """Does an engine with these options give transformers' log-probabilities?"""
    asked = prompts(config_of(path), multiples=(1 / 16, 5))
    with engine(path, **options) as running:
        return within(differences(running, oracle, asked), LIMITS["auto"])


def test_multithreaded(folder, oracle):
    assert is_right(folder, oracle, model_loader_extra_config=THREADS)


@pytest.mark.parametrize(
    "options", [{}, {"safetensors_load_strategy": "eager"}, {"model_loader_extra_config": THREADS}]
)
def test_every_loader_sets_the_same_parameters(folder, options):
    with unloaded(folder) as (model, config):
        expected = load(model, config)
    with unloaded(folder, **options) as (model, config):
        found = load(model, config)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert not any(tensor.isnan().any() for tensor in found.values())


def test_sharded_state(folder, oracle, tmp_path):
    """W_UK and W_UV are no part of the state: they come from kv_b_proj, whichever loader has set it.

    The state is that of a model before vLLM's CPU path packs its weights: a running CPU engine has no others to save.
    """
    target = shutil.copytree(folder, tmp_path / "sharded", ignore=WEIGHTS)
    with unloaded(folder) as (model, config):
        load(model, config)
        ShardedStateLoader.save_model(model, str(target), max_size=2**21)
    assert len(list(target.glob("model-rank-0-part-*.safetensors"))) > 1
    assert is_right(target, oracle, load_format="sharded_state")


def test_sharded_state_that_lacks_a_weight_is_refused(folder, tmp_path):
    """As one that a CPU engine has saved: vLLM's CPU path drops the weights that it packs."""
    target = shutil.copytree(folder, tmp_path / "sharded", ignore=WEIGHTS)
    with unloaded(folder) as (model, config):
        load(model, config)
        model.model.layers[1].self_attn.kv_b_proj.weight.data = torch.empty(0)
        ShardedStateLoader.save_model(model, str(target))
    refused = pytest.raises(ValueError, match=r"Missing keys.*layers\.1\.self_attn\.kv_b_proj\.weight")
    with unloaded(target, load_format="sharded_state") as (model, config), refused:
        load(model, config)


def test_dummy(folder, oracle, tmp_path):
    """No weights at all: the model runs, and what it says is chance."""
    target = shutil.copytree(folder, tmp_path / "dummy", ignore=WEIGHTS)
    with engine(target, load_format="dummy") as running:
        asked = prompts(config_of(target), multiples=(5,))
        assert torch.cat(running.prompt_logprobs(asked)).isfinite().all()
        assert not within(differences(running, oracle, asked), LIMITS["auto"])


def test_fastsafetensors(folder):
    """Through the library itself, on the CPU: vLLM's --load-format fastsafetensors places weights on cuda:N only.

    It frees a file's memory once the file is through, while the other half of a pair may be in the next.
    """
    reason = "fastsafetensors is not installed (pip install fastsafetensors; 0.5.0 was run)"
    library = pytest.importorskip("fastsafetensors", reason=reason)
    parallel = pytest.importorskip("fastsafetensors.parallel_loader", reason=reason)
    shards = sorted(map(str, folder.glob("*.safetensors")))
    with unloaded(folder) as (model, config):
        expected = {name: tensor.clone() for name, tensor in load(model, config).items()}
        for tensor in model.parameters():
            tensor.data.fill_(torch.nan)
        reader = parallel.ParallelLoader(library.SingleGroup(), shards, device="cpu", nogds=True)
        model.load_weights(reader.iterate_weights())
        reader.close()
        assert all(torch.equal(tensor.data, expected[name]) for name, tensor in model.named_parameters())


@pytest.mark.parametrize("fp8", [False, True])
def test_weights_are_consumed_one_by_one(tmp_path, fp8):
    """The loader gives an iterator, so that a checkpoint need not fit in memory: few of its tensors live at once."""
    write_random(tmp_path, fp8=fp8, num_hidden_layers=2)
    stored = read(tmp_path)
    alive: dict[str, weakref.ref] = {}
    most = 0

    def stream():
        nonlocal most
        for name in sorted(stored):  # a weight just before its scales, as the published index has them
            for gone in [key for key, tensor in alive.items() if tensor() is None]:
                del alive[gone]
            most = max(most, len(alive))
            tensor = stored[name].clone()
            alive[name] = weakref.ref(tensor)
            yield name, tensor
            del tensor

    with unloaded(tmp_path) as (model, _):
        loaded = model.load_weights(stream())
        assert loaded == {name for name, _ in model.named_parameters()}
    assert len(stored) > 100 and 1 <= most <= 4, most


def test_a_later_load_may_bring_some_weights(folder):
    """Weight updates in place, as reinforcement learning does them; the first load must be complete."""
    norm = "model.layers.1.input_layernorm.weight"
    with unloaded(folder) as (model, config):
        with pytest.raises(CheckpointError, match="lacks"):
            model.load_weights(
                [(norm, torch.ones(128)), ("model.layers.0.self_attn.indexer.k_norm.bias", torch.ones(128))]
            )
        load(model, config)
        assert model.load_weights([(norm, torch.full((128,), 3.0))]) == {norm}
        assert (model.model.layers[1].input_layernorm.weight == 3).all()
        with pytest.raises(CheckpointError, match=rf"{norm} has shape \(64,\), config.json asks for \(128,\)"):
            model.load_weights([(norm, torch.ones(64))])
