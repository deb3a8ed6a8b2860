"""Forms that a checkpoint has when another program than its publisher has written it: all experts in one tensor, a tied
head, other names, an MTP layer that the config does not name, and quantisation methods that are not known here."""

import re
import shutil
from contextlib import contextmanager

import checkpoint_files as files
import pytest
import torch
from engine import engine, load, unloaded
from fp8_bytes import read, rewrite
from oracle import Oracle
from test_glm import write_glm
from test_hostile_files import INDEX, config_of, engine_config, without
from test_model import LIMITS, differences, prompts, within
from tiny_checkpoint import write_random
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.utils import initialize_model

from vllm_dsa.checkpoint import EXPERTS, check
from vllm_dsa.checkpoint_files import CheckpointError
from vllm_dsa.config import DSAConfig
from vllm_dsa.tools import memory
from vllm_dsa.tools.main import main

SIZES = dict(num_hidden_layers=2, index_topk=16)
GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    write_random(path, seed=5, **SIZES)
    return path


def parameters(folder, **options):
    with unloaded(folder, **options) as (model, config):
        return {name: tensor.clone() for name, tensor in load(model, config).items()}


def equal(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())


def refused(model, folder, message, capsys):
    """By the checks at start, by doctor, and by the model, to whom tensors may come from elsewhere."""
    with pytest.raises(CheckpointError, match=message) as error:
        check(folder, config_of(folder))
    status, said = main(["doctor", str(folder)]), capsys.readouterr().out
    assert status == 1 and "refused" in said
    with pytest.raises(CheckpointError, match=message):
        model.load_weights(iter(read(folder).items()))
    return str(error.value)


@contextmanager
def empty(folder, **options):
    """A model that waits for all of its tensors."""
    with unloaded(folder, load_format="dummy", **options) as (model, _):
        model.required = tuple(model.expected.model)
        yield model


# All experts of a layer in one tensor


def packed(tensors, suffix=""):
    """As transformers' modules hold them."""
    out = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for stem in sorted({name.partition(".experts.")[0] for name in tensors if ".mlp.experts." in name}):
        for scale in ("", "_scale_inv"):
            found = {p: [] for p in ("gate_proj", "up_proj", "down_proj")}
            for part, each in found.items():
                expert = 0
                while (name := f"{stem}.experts.{expert}.{part}.weight{scale}") in tensors:
                    each.append(tensors[name])
                    expert += 1
            if found["down_proj"]:
                both = [torch.cat(pair) for pair in zip(found["gate_proj"], found["up_proj"], strict=True)]
                out[f"{stem}.experts.gate_up_proj{suffix}{scale}"] = torch.stack(both)
                out[f"{stem}.experts.down_proj{suffix}{scale}"] = torch.stack(found["down_proj"])
    return out


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_a_state_dict_of_transformers_is_served(family, tmp_path):
    """The tensors of its live model, under the names that its modules have; those of A.X-K2 differ in more."""
    source = tmp_path / "published"
    if family == "glm_moe_dsa":
        write_glm(source)
    else:
        write_random(source, seed=6, **SIZES)
    state = {name: t.contiguous() for name, t in Oracle(source).model.state_dict().items()}
    assert any(name.endswith(".mlp.experts.gate_up_proj") for name in state)
    folder = tmp_path / "saved"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    files.write(folder, config_of(source), state)
    assert equal(parameters(folder), parameters(source))


@pytest.mark.parametrize("family, suffix", [("deepseek_v32", ""), ("deepseek_v32", ".weight"), ("axk2", "")])
def test_packed_experts_are_those_one_by_one(tmp_path, family, suffix, capsys):
    """Of the model, and of its MTP layer; `doctor` finds that one, and `plan` counts the same bytes."""
    source, config = tmp_path / "published", write_random(tmp_path / "published", seed=5, family=family, **SIZES)
    folder = rewrite(source, tmp_path / "packed", lambda t: packed(t, suffix), config)
    assert len(read(folder)) <= len(read(source)) - 2 * 8 + 2
    check(folder, config, drafts=True)
    assert main(["doctor", str(folder)]) == 0 and "MTP weights" not in capsys.readouterr().out
    counted = [memory.weights(path, config, DSAConfig.from_hf(config)).bytes for path in (source, folder)]
    assert counted[0] == counted[1]
    found = []
    for path in (source, folder):
        options = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}} if family != "axk2" else {}
        with unloaded(path, **options) as (model, vllm_config):
            found.append({name: t.clone() for name, t in load(model, vllm_config).items()})
            if options:
                drafter = initialize_model(
                    vllm_config=vllm_config, model_config=vllm_config.speculative_config.draft_model_config
                )
                load(drafter, vllm_config)
                found[-1] |= {f"draft.{name}": t.data.clone() for name, t in drafter.named_parameters()}
    assert equal(*found) and (family == "axk2") == ("draft.model.layers.2.eh_proj.weight" not in found[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp", "enforce_eager": False},
    ],
    ids=["drafts", "tensor parallel", "pipeline parallel"],
)
def test_packed_experts_and_a_tied_head_answer_as_published_ones(good, tmp_path, options, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    asked, tied = prompts(config_of(good), multiples=(1 / 16, 5)), config_of(good) | {"tie_word_embeddings": True}
    folder = rewrite(good, tmp_path / "packed", lambda t: without("lm_head")(packed(t)), tied)
    with_head = rewrite(
        good, tmp_path / "published", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}, tied
    )
    with engine(with_head) as running:
        expected = torch.cat(running.prompt_logprobs(asked))
    with engine(folder, **options) as running:
        assert within((torch.cat(running.prompt_logprobs(asked)) - expected).abs(), LIMITS["auto"])


@pytest.mark.parametrize("width, served", [(128, True), (192, False)])
def test_packed_fp8_experts(tmp_path, width, served, capsys):
    """Block scales of both halves, too, are in one tensor; a block may not hold rows of both."""
    write_random(tmp_path / "fp8", fp8=True, num_hidden_layers=2, moe_intermediate_size=width)
    source = tmp_path / "fp8"
    folder = rewrite(source, tmp_path / "packed", packed, config_of(source))
    if served:
        assert equal(parameters(folder), parameters(source))
    else:
        with empty(folder) as model:
            refused(model, folder, rf"{GATE_UP}_scale_inv .*moe_intermediate_size 192", capsys)


SHAPES = [
    (GATE_UP, lambda t: t.transpose(1, 2), r"shape \(8, 128, 96\), config\.json asks for \(8, 96, 128\)"),
    (DOWN, lambda t: t.transpose(1, 2), r"shape \(8, 48, 128\), config\.json asks for \(8, 128, 48\)"),
    (GATE_UP, lambda t: t[:7], r"shape \(7, 96, 128\), config\.json asks for \(8, 96, 128\)"),
    (DOWN, None, r"lacks 8 of \d+ tensors of layers 1: .*experts\.0\.down_proj\.weight"),
    (GATE_UP, None, r"lacks 16 of \d+ tensors of layers 1: .*experts\.0\.gate_proj\.weight"),
]


def test_packed_experts_of_another_shape_are_refused(tmp_path, capsys):
    source = tmp_path / "source"
    write_random(source, moe_intermediate_size=48, **SIZES)
    with empty(source) as model:
        for i, (name, change, message) in enumerate(SHAPES):
            tensors = packed(read(source))
            tensor = tensors.pop(name)
            if change:
                tensors[name] = change(tensor).contiguous()
            refused(
                model, rewrite(source, tmp_path / str(i), lambda _, t=tensors: t, config_of(source)), message, capsys
            )


# Other names


def renamed(change):
    return lambda tensors: {change(name): t for name, t in tensors.items()}


OTHER = {
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "a layer compiled": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "FSDP 1": lambda name: "_fsdp_wrapped_module." + name.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "multimodal": lambda name: f"language_model.{name}",
    "multimodal, transformers 5": lambda name: name.replace("model.", "model.language_model.", 1),
    "base model": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("how", [lambda tensors: tensors, packed], ids=["published", "packed"])
def test_other_names_are_named(good, tmp_path, how, capsys):
    message = (
        r"names \d+ tensors otherwise than the published models do: '\S+' for '(model|lm_head)\.\S+'.*Save the state"
    )
    with empty(good) as model:
        for case, change in OTHER.items():
            folder = rewrite(good, tmp_path / case, lambda t, change=change: renamed(change)(how(t)), config_of(good))
            assert "ownload" not in refused(model, folder, message, capsys), case
            experts = [item for item in read(folder).items() if "layers.1." in item[0] and ".mlp.experts." in item[0]]
            with pytest.raises(CheckpointError, match=message):
                model.load_weights(iter(experts))


# The head


def test_a_tied_head_is_the_embedding(good, tmp_path, capsys):
    config = config_of(good) | {"tie_word_embeddings": True}
    folder = rewrite(good, tmp_path / "tied", without("lm_head"), config)
    found = parameters(folder)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert main(["doctor", str(folder)]) == 0, capsys.readouterr().out
    asked = prompts(config, multiples=(1 / 16, 5))
    with engine(folder) as running:
        assert within(differences(running, Oracle(folder), asked), LIMITS["auto"])
    counted, published = (memory.weights(f, config, DSAConfig.from_hf(config)) for f in (folder, good))
    assert counted.bytes == published.bytes


def test_a_head_in_the_files_is_not_tied(good, tmp_path):
    """As transformers and vLLM decide."""
    folder = rewrite(good, tmp_path / "both", lambda t: t, config_of(good) | {"tie_word_embeddings": True})
    assert equal(parameters(folder), parameters(good))


def test_a_missing_head_is_named(good, tmp_path, capsys):
    folder = rewrite(good, tmp_path / "headless", without("lm_head"), config_of(good))
    message = r"no lm_head\.weight.*--hf-overrides '{\"tie_word_embeddings\": true}'.*add the file"
    with empty(folder) as model:
        refused(model, folder, message, capsys)
    with pytest.raises(ValueError, match=message):
        engine_config(folder)
    found = parameters(folder, hf_overrides={"tie_word_embeddings": True})
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


# An MTP layer that the config does not name


@pytest.mark.parametrize("family, key", [("deepseek_v32", 0), ("deepseek_v32", None), ("glm_moe_dsa", "absent")])
def test_an_mtp_layer_without_its_key(good, tmp_path, family, key, capsys):
    architecture = {"deepseek_v32": "DeepseekV32ForCausalLM", "glm_moe_dsa": "GlmMoeDsaForCausalLM"}[family]
    named = config_of(good) | {"model_type": family, "architectures": [architecture]}
    without_key = {name: value for name, value in named.items() if name != "num_nextn_predict_layers"}
    if key != "absent":
        without_key["num_nextn_predict_layers"] = key
    source, folder = (
        rewrite(good, tmp_path / str(i), lambda t: t, config) for i, config in enumerate((named, without_key))
    )
    assert equal(parameters(folder), parameters(source)), "served, without drafts"
    drafts = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    for path, found in ((source, False), (folder, True)):
        assert main(["doctor", str(path)]) == 0
        assert ("set the key to 1" in " ".join(capsys.readouterr().out.split())) == found
    said = r"num_nextn_predict_layers in config\.json is (0|None), .*set the key to 1 there"
    with pytest.raises(ValueError, match=said):
        engine_config(folder, **drafts)


def test_v32_has_one_mtp_layer_where_the_key_is_absent(good, tmp_path, capsys):
    """By the class with which vLLM reads its config: doctor says no other."""
    config = config_of(good)
    del config["num_nextn_predict_layers"]
    folder = rewrite(good, tmp_path / "absent", lambda t: t, config)
    engine_config(folder, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
    assert main(["doctor", str(folder)]) == 0
    assert re.search(r"MTP +1 layer", said := capsys.readouterr().out) and "MTP weights" not in said


def test_a_layer_of_the_model_without_its_number_is_refused(good, tmp_path, capsys):
    """num_hidden_layers one too small: what follows is no MTP layer."""
    config = config_of(good) | {"num_hidden_layers": 1, "num_nextn_predict_layers": 0}
    folder = rewrite(good, tmp_path / "short", lambda t: t, config)
    with empty(folder) as model:
        refused(model, folder, r"'model\.layers\.1\.\S+' belongs to no parameter: config\.json names 1 layers", capsys)


@pytest.mark.parametrize("part", ["model.layers.2.", "indexer.wk", "_scale_inv"])
def test_tensors_in_a_file_that_the_index_does_not_name(tmp_path, part, capsys):
    """They are there, and not loaded: the way out is the index."""
    write_random(tmp_path, fp8=True, num_hidden_layers=2)
    tensors = read(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    aside = {name: t for name, t in tensors.items() if part in name}
    files.write(tmp_path, config_of(tmp_path), {n: t for n, t in tensors.items() if n not in aside})
    files.save_file(aside, tmp_path / "extra.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        check(tmp_path, config_of(tmp_path), drafts=True)
    assert f"extra.safetensors, which {INDEX} does not name" in str(error.value)
    assert "add them to its weight_map" in str(error.value) and "ownload" not in str(error.value)
    status = main(["doctor", str(tmp_path)])
    assert "extra.safetensors" in capsys.readouterr().out and status == (0 if "layers" in part else 1)


# Quantisation methods of which nothing is known here


@register_quantization_config("invented")
class Invented(QuantizationConfig):
    """Leaves every layer as it is."""

    get_name = lambda self: "invented"  # noqa: E731
    get_supported_act_dtypes = lambda self: [torch.float32, torch.bfloat16]  # noqa: E731
    get_min_capability = classmethod(lambda cls: 0)
    get_config_filenames = staticmethod(lambda: [])
    from_config = classmethod(lambda cls, config: cls())

    def get_quant_method(self, layer, prefix):
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


UNKNOWN = {
    "invented": {"quant_method": "invented"},
    "mxfp4": {"quant_method": "mxfp4"},
}
DROPPED = {
    ".indexer.": r"no indexer tensors .*and 5 more\).*a conversion has dropped the indexer",
    "layers.0.self_attn.indexer.k_norm.bias": r"lacks 1 of \d+ tensors of layers 0: .*k_norm\.bias",
    "layers.1.self_attn.indexer.weights_proj": r"lacks 1 of \d+ tensors of layers 1: .*weights_proj\.weight",
    "input_layernorm": r"lacks 2 of \d+ tensors of layers 0, 1: .*input_layernorm\.weight",
    "layers.1.self_attn.o_proj": r"lacks 1 of \d+ tensors of layers 1: .*o_proj\.weight",
    "model.norm": r"lacks 1 of \d+ tensors: model\.norm\.weight",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Without experts, for which methods need kernels."""
    path = tmp_path_factory.mktemp("dense")
    write_random(path, seed=8, dtype="bfloat16", first_k_dense_replace=2, num_nextn_predict_layers=0, **SIZES)
    return path


@pytest.mark.parametrize("method", UNKNOWN)
def test_an_unknown_method_is_served_whole(dense, tmp_path, method, capsys):
    config = config_of(dense) | {"quantization_config": UNKNOWN[method]}
    folder = rewrite(dense, tmp_path / "whole", lambda t: t, config)
    assert equal(parameters(folder, dtype="bfloat16"), parameters(dense, dtype="bfloat16"))
    assert main(["doctor", str(folder)]) == 0
    assert f"quant_method '{method}': that no module is missing" in capsys.readouterr().out


@pytest.mark.parametrize("method", UNKNOWN)
def test_what_an_unknown_method_lacks_is_refused(dense, tmp_path, method, capsys):
    config = config_of(dense) | {"quantization_config": UNKNOWN[method]}
    with empty(rewrite(dense, tmp_path / "whole", lambda t: t, config), dtype="bfloat16") as model:
        for i, (part, message) in enumerate(DROPPED.items()):
            refused(model, rewrite(dense, tmp_path / str(i), without(part), config), message, capsys)
    with pytest.raises(ValueError, match=r"no indexer tensors"):
        engine_config(tmp_path / "0", dtype="bfloat16")


def test_modules_of_an_unknown_method_have_any_tensors(dense, tmp_path):
    """bitsandbytes, torchao and others keep a weight in several, with names of their own; experts may be fused."""
    config = config_of(dense) | {"quantization_config": {"quant_method": "bitsandbytes"}}

    def taken_apart(tensors):
        out = {}
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                out |= {f"{name}.absmax": torch.ones(1), f"{name}.quant_map": torch.ones(1)}
            else:
                out[name] = tensor
        return out

    check(rewrite(dense, tmp_path / "apart", taken_apart, config), config)


@pytest.mark.parametrize("how", [lambda t: t, packed, renamed(lambda n: n.replace(".weight", ".blocks"))])
def test_experts_of_an_unknown_method(good, tmp_path, how):
    """All of a layer in one tensor of any name, or each with its number."""
    config = config_of(good) | {"quantization_config": {"quant_method": "mxfp4"}}

    def changed(tensors):
        experts = {name: t for name, t in tensors.items() if EXPERTS in name}
        return {name: t for name, t in tensors.items() if name not in experts} | how(experts)

    check(rewrite(good, tmp_path / "whole", changed, config), config)
    for i, part in enumerate([EXPERTS, *([] if how is packed else [".experts.3.", ".experts.7.up_proj"])]):
        folder = rewrite(good, tmp_path / str(i), lambda t, part=part: without(part)(changed(t)), config)
        with pytest.raises(CheckpointError, match=rf"lacks \d+ of \d+ tensors of layers 1: .*{re.escape(part)}"):
            check(folder, config)
