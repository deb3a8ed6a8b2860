"""Block-scaled FP8 weights on a CPU: dequantised while loading.

DeepSeek publishes weights as e4m3 with one float32 scale for each 128x128 block (``weight`` and ``weight_scale_inv``).
Others store the scale's exponent alone, in 8 bits (ue8m0). vLLM multiplies weights as they are on GPUs; on a CPU the
layers are built unquantised and fed dequantised weights.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from vllm_dsa import compat
from vllm_dsa.checkpoint import SCALE, SCALE_SUFFIX, refuse_unpaired, unknown_scale
from vllm_dsa.checkpoint_files import CheckpointError
from vllm_dsa.config import INDEX_ROPE_INTERLEAVED, ConfigError
from vllm_dsa.platform import DRAFT_ARCHITECTURE

METHOD = "dsa_fp8_dequantised"
BLOCK = 128


class DequantisedFp8Config(compat.QuantizationConfig):
    """Stands in for vLLM's fp8 method on a CPU: every layer is unquantised, ``with_plain_fp8`` brings the weights."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take block-scaled FP8 checkpoints of DSA models on a CPU, and nothing else."""
        ours = (
            compat.current_platform.is_cpu()
            and (
                getattr(hf_config, "model_type", None) in INDEX_ROPE_INTERLEAVED
                # vLLM gives a draft another model type.
                or DRAFT_ARCHITECTURE in (getattr(hf_config, "architectures", None) or ())
            )
            and hf_quant_cfg.get("quant_method") == "fp8"
            and hf_quant_cfg.get("weight_block_size") is not None
            and user_quant in (None, "fp8", METHOD)
        )
        return METHOD if ours else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "DequantisedFp8Config":
        if config["weight_block_size"] != [BLOCK, BLOCK]:
            raise ConfigError(
                f"quantization_config.weight_block_size: {config['weight_block_size']} is refused: FP8 weights of DSA "
                f"models are scaled in blocks of [{BLOCK}, {BLOCK}]. Restore the published config.json."
            )
        return cls()

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if isinstance(layer, compat.LinearBase):
            return compat.UnquantizedLinearMethod()
        if isinstance(layer, compat.RoutedExperts):
            return compat.UnquantizedFusedMoEMethod(layer.moe_config)
        return None


def register() -> None:
    """Make the method known to vLLM. Idempotent."""
    if METHOD not in compat.QUANTIZATION_METHODS:
        compat.register_quantization_config(METHOD)(DequantisedFp8Config)


def numbers(name: str, scale: torch.Tensor, exponents: bool) -> torch.Tensor:
    """Scales as float32, whatever they are stored as. exponents: does the config say that 8 bits are ue8m0? Raises
    CheckpointError where they could stand for any numbers."""
    if scale.dtype == torch.uint8 and exponents:
        scale = scale.view(torch.float8_e8m0fnu)
    if not scale.is_floating_point():
        raise CheckpointError(unknown_scale(name, str(scale.dtype).removeprefix("torch.")))
    return scale.float()


def fitted(name: str, tensor: torch.Tensor, parameter: torch.Tensor, exponents: bool) -> torch.Tensor:
    """A tensor for vLLM to copy into ``parameter``: scales as that holds them, since a copy takes bits for integers.
    Raises CheckpointError for other integers where numbers belong."""
    held = parameter.dtype
    if tensor.dtype == torch.float8_e8m0fnu:
        return tensor.view(torch.uint8) if held == torch.uint8 else tensor
    if tensor.is_floating_point() or not held.is_floating_point:
        return tensor
    if held == torch.float8_e8m0fnu:
        return tensor.view(held)
    if SCALE.fullmatch(name):
        return numbers(name, tensor, exponents and held != torch.float8_e4m3fn)
    raise CheckpointError(
        f"checkpoint tensor {name} holds integers ({str(tensor.dtype).removeprefix('torch.')}), and by config.json "
        f"this weight is not quantised. Restore the published config.json (quantization_config)."
    )


def dequantise(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """e4m3 [out, in] times scales [ceil(out / 128), ceil(in / 128)] float32, in ``dtype``; last blocks may be ragged.

    Works one row of blocks at a time in one buffer, so that no float32 copy of the whole weight exists.
    """
    rows, columns = weight.shape
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    if tuple(scale.shape) != blocks:
        raise CheckpointError(
            f"{name}{SCALE_SUFFIX}: shape {tuple(scale.shape)} does not fit weight {tuple(weight.shape)}, which has "
            f"{blocks} blocks of {BLOCK}x{BLOCK}. The checkpoint is damaged: download it again."
        )
    out = torch.empty(rows, columns, dtype=dtype)
    wide = scale.repeat_interleave(BLOCK, dim=1)[:, :columns]  # [row blocks, in]
    buffer = torch.empty(BLOCK, columns, dtype=torch.float32)
    for i, start in enumerate(range(0, rows, BLOCK)):
        band = buffer[: rows - start].copy_(weight[start : start + BLOCK]).mul_(wide[i])
        out[start : start + BLOCK] = band
    return out


def with_plain_fp8(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, exponents: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tensors on under their names, each e4m3 weight dequantised once its scale has come, in whatever order.

    Raises CheckpointError for a weight or scale that stays alone.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}  # weight's name -> that weight or its scale, by name
    for name, tensor in weights:
        weight = name.removesuffix(SCALE_SUFFIX)
        if weight == name and tensor.dtype != torch.float8_e4m3fn:
            yield name, tensor
            continue
        pair = waiting.setdefault(weight, {})
        pair[name] = tensor
        if len(pair) == 2:
            del waiting[weight]
            scale = numbers(weight + SCALE_SUFFIX, pair[weight + SCALE_SUFFIX], exponents)
            yield weight, dequantise(pair[weight], scale, dtype, weight)
    refuse_unpaired([name for pair in waiting.values() for name in pair])
