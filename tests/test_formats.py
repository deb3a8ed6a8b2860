"""On a CPU: formats of weights that vLLM has no kernel for are refused before a file is read, all others are built."""

import json

import pytest
import torch
from engine import engine, unloaded
from tiny_checkpoint import write_random

from vllm_dsa.config import ConfigError

EXPERTS = "re:.*mlp\\.experts.*"


def compressed(form, bits, kind, strategy, activations=None, ignore=(), **weights):
    stated = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **weights}
    if activations:
        activations = {"num_bits": 8, "type": kind, "symmetric": True, **activations}
    group = {"targets": ["Linear"], "weights": stated, "input_activations": activations, "format": form}
    facts = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return facts | {"config_groups": {"group_0": group}, "ignore": ["lm_head", *ignore]}


TOKENS, STATIC = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}
GPTQ = {"quant_method": "gptq", "group_size": 32, "desc_act": False, "sym": True, "lm_head": False}
INT8, FP8 = ("int-quantized", 8, "int"), ("float-quantized", 8, "float")
PACKED8 = ("pack-quantized", 8, "int")
# The config, and what the refusal names of it.
REFUSED = {
    "8-bit integers in groups": (compressed(*PACKED8, "group", group_size=32), "num_bits 8, type 'int'"),
    "8-bit integers, a scale an output": (compressed(*PACKED8, "channel", ignore=[EXPERTS]), "strategy 'channel'"),
    "GPTQ of 8 bits": (GPTQ | {"bits": 8}, "quant_method 'gptq', bits 8"),
    "experts of FP8, a scale an output": (compressed(*FP8, "channel", TOKENS), "type 'float', strategy 'channel'"),
    "FP8, a scale a weight": ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme 'static'"),
    "such FP8 of compressed-tensors": (compressed(*FP8, "tensor", STATIC, [EXPERTS]), "strategy 'tensor'"),
    "such FP8 of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": []}, "quant_algo 'FP8'"),
    "MXFP8": ({"quant_method": "modelopt", "quant_algo": "MXFP8", "ignore": []}, "quant_algo 'MXFP8'"),
}
BUILT = {
    "W8A8, plain experts": compressed(*INT8, "channel", TOKENS, [EXPERTS]),
    "FP8 a scale an output, plain experts": compressed(*FP8, "channel", TOKENS, [EXPERTS]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("formats")
    write_random(path, num_hidden_layers=2, dtype="bfloat16")
    return path


def stated(folder, quantisation):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantisation}))
    return folder


@pytest.mark.parametrize("quantisation, said", REFUSED.values(), ids=REFUSED)
def test_without_a_kernel_it_is_refused_before_a_file_is_read(folder, quantisation, said):
    with (
        pytest.raises(ConfigError, match=f"(?s)^quantization_config: .*{said}.* is refused here: .*on a CPU, serve a"),
        unloaded(stated(folder, quantisation), dtype="bfloat16", load_format="dummy"),
    ):
        pytest.fail("built")


def test_a_format_that_is_asked_for_is_named_by_its_flag(folder):
    stated(folder, None)
    with (
        pytest.raises(ConfigError, match="^--quantization mxfp8 is refused here: .*on a CPU"),
        unloaded(folder, dtype="bfloat16", load_format="dummy", quantization="mxfp8"),
    ):
        pytest.fail("built")


def test_an_error_of_our_own_keeps_its_words(folder, monkeypatch):
    monkeypatch.setenv("VLLM_DSA_PROVIDER", "triton")
    quantisation = BUILT["W8A8, plain experts"]
    with (
        pytest.raises(RuntimeError, match="^No provider serves .*Unset VLLM_DSA_PROVIDER"),
        unloaded(stated(folder, quantisation), dtype="bfloat16", load_format="dummy"),
    ):
        pytest.fail("built")


@pytest.mark.parametrize("quantisation", BUILT.values(), ids=BUILT)
def test_with_a_kernel_it_is_built(folder, quantisation):
    with unloaded(stated(folder, quantisation), dtype="bfloat16", load_format="dummy") as (model, _):
        assert model.model.layers[0].self_attn.o_proj.weight.dtype in (torch.int8, torch.float8_e4m3fn)


@pytest.mark.slow
@pytest.mark.parametrize("quantisation", BUILT.values(), ids=BUILT)
def test_with_a_kernel_it_runs(folder, quantisation):
    with engine(stated(folder, quantisation), dtype="bfloat16", load_format="dummy", max_model_len=256) as running:
        (logprobs,) = running.prompt_logprobs([list(range(8, 40))])
    assert torch.isfinite(logprobs).all()
