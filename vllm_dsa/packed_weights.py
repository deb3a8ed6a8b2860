"""Packed weights that are only read, in checkpoints of 4 bits: made plain while loading.

W_UK and W_UV come from kv_b_proj, one joined weight from the indexer's wk and weights_proj. vLLM could show such a
weight only as what its kernel gives for an identity matrix, and kernels round: activations to 8 or 4 bits, or products
of scales and zero points. So these layers are built unquantised, and their weights are dequantised from the
checkpoint's own tensors, exactly as the formats define them. All other layers are vLLM's.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from vllm_dsa.checkpoint import FUSED, ONLY_READ, Expected
from vllm_dsa.checkpoint_files import CheckpointError
from vllm_dsa.config import ConfigError
from vllm_dsa.fp8_weights import BLOCK, dequantise, numbers

Tensors = Mapping[str, torch.Tensor]
# Scales of an FP8 cache: fp8_ds_mla has scales of its own.
CACHE_SCALE = re.compile(r"\.([kqv]|kv|k_cache|v_cache)_(scale|zero_point)$")
GLOBAL_SCALES = ("weight_scale_2", "weight_global_scale")  # one for a whole weight
# vLLM's methods of packed weights, as its configs name themselves.
METHODS = ("auto_awq", "auto_gptq", "moe_wna16", "compressed-tensors", "modelopt", "modelopt_fp4")
METHODS += ("modelopt_mxfp8", "modelopt_mixed")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; 8 to 15 are the same with a minus
AWQ_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 the output columns 0 to 7 lie, in units of 4 bits


def none_if_packed(quant_config: Any) -> Any:
    """Quantisation of a layer whose weight is only read: none where ``with_plain_packed`` brings it plain."""
    packed = quant_config is not None and quant_config.get_name() in METHODS
    return None if packed else quant_config


def exclude_fused(quant_config: Any, modules: Iterable[str]) -> None:
    """Have ModelOpt's patterns of modules that are left out hold for vLLM's fused ``modules`` too, whose names they do
    not match. Raises ConfigError where they match one part of a fused module and not the other."""
    if not hasattr(quant_config, "is_layer_excluded"):
        return
    for module in modules:
        stem, _, name = module.rpartition(".")
        left_out = [part for part in FUSED[name] if quant_config.is_layer_excluded(f"{stem}.{part}")]
        if len(left_out) == len(FUSED[name]):
            quant_config.exclude_modules.append(module)
        elif left_out:
            raise ConfigError(
                f"quantization_config leaves out {stem}.{left_out[0]}, and not all of {', '.join(FUSED[name])} there: "
                f"vLLM multiplies them as one weight, in one format. Quantise the model again with all or none of them "
                f"left out."
            )


def with_plain_packed(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, expected: Expected
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tensors on; those of ONLY_READ modules that are packed at the end, as one ``weight`` in ``dtype`` a module:
    parts come in any order, and some are optional. Scales of caches and orders of inputs are left out.

    Raises CheckpointError for what vLLM would load and compute wrongly with.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    global_scales: dict[str, tuple[str, float]] = {}
    for name, tensor in weights:
        if CACHE_SCALE.search(name):
            continue
        if name.endswith("g_idx"):
            _refuse_reordered(name, tensor)
            continue
        module, _, part = name.rpartition(".")
        if part in GLOBAL_SCALES:
            _refuse_unequal(module, name, tensor, global_scales)
        packed = part != "weight" or tensor.dtype in (torch.uint8, torch.float8_e4m3fn)
        if packed and ONLY_READ.search(name) and expected.shape(f"{module}.weight"):
            waiting.setdefault(module, {})[part] = tensor
        else:
            yield name, tensor
    for module in sorted(waiting):
        weight = plain_weight(module, waiting.pop(module), expected.shape(f"{module}.weight"), expected.exponents)
        yield f"{module}.weight", weight.to(dtype)


def _refuse_reordered(name: str, order: torch.Tensor) -> None:
    """vLLM ignores which group an input is of, and takes groups of consecutive inputs."""
    groups = int(order.max()) + 1
    if len(order) % groups or not torch.equal(
        order.long(), torch.arange(len(order), device=order.device) // (len(order) // groups)
    ):
        raise CheckpointError(
            f"checkpoint tensor {name} puts inputs into groups by importance (activation order), which vLLM would "
            f"compute wrongly with. Quantise the model again with desc_act false (compressed-tensors: actorder static)."
        )


def _refuse_unequal(module: str, name: str, tensor: torch.Tensor, seen: dict[str, tuple[str, float]]) -> None:
    """Of two weights that vLLM multiplies as one, it takes one global scale for both.

    seen: fused module -> name and value of the first.
    """
    stem, _, part = module.rpartition(".")
    fused = next((fused for fused, parts in FUSED.items() if part in parts), None)
    if fused is None:
        return
    scale = tensor.item()
    other, first = seen.setdefault(f"{stem}.{fused}", (name, scale))
    if abs(scale - first) > 1e-3 * abs(first):
        raise CheckpointError(
            f"{other} is {first:g} and {name} is {scale:g}: vLLM multiplies these two weights as one with one of these "
            f"global scales, and the other's values would be wrong by their quotient. Quantise the model again with "
            f"one global scale for both, or leave both modules out (in the ignore list)."
        )


def plain_weight(module: str, parts: Tensors, shape: tuple[int, ...], exponents: bool = False) -> torch.Tensor:
    """Weight of ``shape`` [out, in], float32, of a module that is stored as ``parts``: AWQ, GPTQ, compressed-tensors'
    integers of 4 or 8 bits or NVFP4, ModelOpt's NVFP4, MXFP4, MXFP8 or FP8. exponents: are scales of 8 bits ue8m0?
    Raises CheckpointError."""
    cause: Exception | None = None
    try:
        weight = _decoded(module, parts, shape, exponents)
        if weight.shape == shape:
            return weight
    except (KeyError, RuntimeError, ZeroDivisionError) as error:
        cause = error
    stored = ", ".join(f"{name} {tuple(t.shape)} {t.dtype}".replace("torch.", "") for name, t in parts.items())
    raise CheckpointError(
        f"{module}: its tensors ({stored}) are no weight of shape {tuple(shape)} in a format that is known here: AWQ, "
        f"symmetric GPTQ, compressed-tensors (integers of 4 or 8 bits, NVFP4), ModelOpt NVFP4, MXFP4, MXFP8, FP8. If "
        f"the checkpoint is of one of these, download it again; else quantise the model again with this module left "
        f"out (in the ignore list)."
    ) from cause


def _decoded(module: str, parts: Tensors, shape: tuple[int, ...], exponents: bool) -> torch.Tensor:
    def scales(name: str) -> torch.Tensor:
        return numbers(f"{module}.{name}", parts[name], exponents)

    if "qweight" in parts:
        packed, by_group = parts["qweight"], scales("scales").T  # [out, groups]
        if len(by_group) == packed.shape[1]:  # GPTQ, packed along the inputs; vLLM takes it symmetric only
            bits = 32 * len(packed) // shape[1]
            return _grouped(_integers(packed.T, bits) - 2 ** (bits - 1), by_group)
        codes, zeros = (_awq_columns(parts[name]).T for name in ("qweight", "qzeros"))
        return _grouped(codes, by_group, zeros)
    name = "weight_scale" if "weight_scale" in parts else "weight_scale_inv"
    if "weight_packed" in parts and parts["weight_packed"].dtype == torch.int32:
        bits = 32 * parts["weight_packed"].shape[1] // shape[1]
        codes = _integers(parts["weight_packed"], bits)[:, : shape[1]]
        if "weight_zero_point" not in parts:
            return _grouped(codes - 2 ** (bits - 1), scales(name))
        return _grouped(codes, scales(name), _integers(parts["weight_zero_point"].T, bits).T[: len(codes)])
    weight = parts["weight_packed" if "weight_packed" in parts else "weight"]
    if weight.dtype == torch.uint8:
        overall = next((part for part in GLOBAL_SCALES if part in parts), None)
        if overall is None:
            if not (exponents or parts[name].dtype == torch.float8_e8m0fnu):
                raise KeyError("a global scale")  # NVFP4 has one, MXFP4 has exponents
            return _grouped(_e2m1(weight), scales(name))
        by_group = numbers(f"{module}.{name}", parts[name], False)  # of NVFP4: e4m3
        factor = scales(overall)
        return _grouped(_e2m1(weight), by_group / factor if overall == "weight_global_scale" else by_group * factor)
    return _scaled(module, weight, scales(name))


def _scaled(module: str, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """FP8 [out, in] times one scale, one an output [out] or [out, 1], one a block of 128x128, or one a group of
    consecutive inputs [out, groups] (MXFP8): which of them, their shape says."""
    rows, columns = weight.shape
    if scales.numel() == 1 or scales.shape in ((rows,), (rows, 1)):
        return weight.float() * scales.view(-1, 1)
    if scales.shape == (-(-rows // BLOCK), -(-columns // BLOCK)):
        return dequantise(weight, scales, torch.float32, f"{module}.weight")
    if scales.dim() == 2 and len(scales) == rows:
        return _grouped(weight, scales)
    raise RuntimeError(f"scales of shape {tuple(scales.shape)}")


def _grouped(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """values [out, in], less zeros, times scales, both [out, groups]; a group is consecutive inputs."""
    grouped = values.float().unflatten(1, (scales.shape[1], -1))
    if zeros is not None:
        grouped = grouped - zeros.unsqueeze(-1)
    return (grouped * scales.unsqueeze(-1)).flatten(1)


def _integers(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, m] to unsigned values [n, m * 32 / bits], the lowest bits first."""
    if bits not in (4, 8):
        raise RuntimeError(f"{bits} bits")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def _awq_columns(packed: torch.Tensor) -> torch.Tensor:
    """int32 [n, out / 8] in AWQ's order to unsigned values [n, out]."""
    return _integers(packed, 4).unflatten(1, (-1, 8))[..., list(AWQ_COLUMN)].flatten(1)


def _e2m1(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, m] to FP4 values [n, 2 m] float32, the low half of a byte first."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).int()
    return torch.tensor([*E2M1, *(-value for value in E2M1)], device=packed.device)[codes]
