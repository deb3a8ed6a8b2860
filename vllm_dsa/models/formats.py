"""Has vLLM a kernel here for each format that weights are stored in? Asked before the files are read.

vLLM says so in many ways, and at many times: some of its methods fail while layers are built, some once every weight is
loaded, for want of an operation that this build has not, or this processor.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vllm_dsa.compat import LinearBase, ReplicatedLinear, UnquantizedLinearMethod, current_platform
from vllm_dsa.config import ConfigError

FAILURES = (ValueError, RuntimeError, AssertionError, AttributeError, KeyError, TypeError)
OUTPUTS = 512  # of a layer on trial: a multiple of every block and pack
# Keys that tell one format of a quant_method from another.
TELLING = ("quant_algo", "format", "bits", "w_bit", "num_bits", "type", "strategy", "activation_scheme")


@contextmanager
def named(vllm_config: Any) -> Iterator[None]:
    """While layers are built: what vLLM raises for want of a kernel, as a ConfigError that names the format."""
    try:
        yield
    except FAILURES as error:
        # On a GPU it raises for other reasons too, sizes that ranks do not divide say, and names them.
        wanting = current_platform.is_cpu() or isinstance(error, NotImplementedError)
        if vllm_config.quant_config is None or not wanting or _is_ours(error):
            raise
        raise ConfigError(_refused(vllm_config, str(error))) from error


def _is_ours(error: Exception) -> bool:
    """Was it raised by this package?"""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_globals.get("__name__", "").startswith("vllm_dsa")


def require_kernels(model: nn.Module, vllm_config: Any) -> None:
    """On a CPU, try one small layer of each kind that the model is built of. Raises ConfigError."""
    if vllm_config.quant_config is None or not current_platform.is_cpu():
        return
    tried = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if getattr(method, "experts_cls", method) is None and method is not None:
            raise ConfigError(_refused(vllm_config, f"{type(method).__name__} found none for the experts"))
        kind = (type(method), type(getattr(module, "scheme", None)))
        if not isinstance(module, LinearBase) or isinstance(method, UnquantizedLinearMethod) or kind in tried:
            continue
        tried.add(kind)
        try:
            _try(module.input_size, vllm_config, module.prefix)
        except FAILURES as error:
            raise ConfigError(_refused(vllm_config, f"{type(method).__name__}: {error}")) from error


def _try(inputs: int, vllm_config: Any, prefix: str) -> None:
    layer = ReplicatedLinear(inputs, OUTPUTS, bias=False, quant_config=vllm_config.quant_config, prefix=prefix)
    if any(parameter.is_meta for parameter in layer.parameters()):
        return  # quantised while loading (--quantization): there is nothing to multiply yet
    for parameter in layer.parameters():
        parameter.data.fill_(1)
    layer.quant_method.process_weights_after_loading(layer)
    layer(torch.ones(2, inputs, dtype=vllm_config.model_config.dtype))


def _refused(vllm_config: Any, reason: str) -> str:
    model_config = vllm_config.model_config
    stated = getattr(model_config.hf_config, "quantization_config", None)
    if isinstance(stated, Mapping):
        groups = [group for group in (stated.get("config_groups") or {}).values() if isinstance(group, Mapping)]
        facts = {**stated, **((groups[0].get("weights") or {}) if groups else {})}
        telling = [f"{key} {facts[key]!r}" for key in TELLING if facts.get(key) is not None]
        what = ", ".join([f"quantization_config: quant_method {stated.get('quant_method')!r}", *telling])
    else:
        what = f"--quantization {model_config.quantization}"
    reason = " ".join(reason.split()).rstrip(".")
    return (
        f"{what} is refused here: vLLM has no kernel on this {current_platform.device_type} for weights in this format "
        f"({reason}). Serve them on an NVIDIA GPU; on a CPU, serve a checkpoint in bfloat16 or block-scaled FP8, or "
        f"one with 4-bit linear layers (AWQ, GPTQ, W4A16) whose experts are bfloat16."
    )
