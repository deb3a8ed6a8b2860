"""What each provider can serve, by the layer's device and sizes.

Imports neither torch nor Triton, so that `vllm-dsa doctor` can ask on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VENDOR_PAGE = 64  # tokens a page: the only size that FlashMLA and DeepGEMM both read
VENDOR_HEADS = (8, 16, 32, 64, 128)  # of FlashMLA's prefill kernel


@dataclass(frozen=True)
class Request:
    """What a layer needs of its kernels."""

    device_type: str  # "cpu", "cuda"
    capability: tuple[int, int] | None  # CUDA compute capability
    dtype: torch.dtype | str  # of the model; the string is torch's name for it, "bfloat16"
    latent_kind: str  # "auto", "fp8_ds_mla"
    kv_lora_rank: int
    rope_dim: int
    num_heads: int  # of this rank
    index_heads: int
    index_dim: int
    top_k: int
    block_size: int


def cpu(request: Request) -> list[str]:
    """Why the CPU kernels cannot serve; empty if they can."""
    return [] if request.device_type == "cpu" else [f"it runs on the CPU, the layer is on {request.device_type}"]


def triton(request: Request) -> list[str]:
    """Why the Triton kernels cannot serve; empty if they can."""
    if request.device_type != "cuda":
        return [f"it runs on CUDA GPUs, the layer is on {request.device_type}"]
    if request.capability is None or request.capability < (8, 0):
        return [f"it needs compute capability 8.0 or newer, this GPU has {request.capability}"]
    if not find_spec("triton"):
        return ["Triton is not installed: pip install 'vllm-dsa[cuda]'"]
    limits = (
        ("kv_lora_rank", request.kv_lora_rank, 512),
        ("qk_rope_head_dim", request.rope_dim, min(128, request.index_dim)),
        ("index_head_dim", request.index_dim, 128),
        ("index_n_heads", request.index_heads, 128),
        ("min(index_topk, --max-model-len)", request.top_k, 4096),
    )
    reasons = [f"it takes {name} up to {most}, this is {value}" for name, value, most in limits if value > most]
    if request.rope_dim % 2:
        reasons.append(f"it rotates pairs, qk_rope_head_dim is {request.rope_dim}")
    return reasons


def vendor(request: Request) -> list[str]:
    """Why FlashMLA and DeepGEMM cannot serve, were they there; empty if they can."""
    reasons = triton(request)  # it writes, and picks the top-k
    if reasons:
        return reasons
    if request.capability is None or request.capability[0] != 9:
        return [f"it is tested on sm90 only, the layer is on {request.device_type} {request.capability or ''}".rstrip()]
    if (request.kv_lora_rank, request.rope_dim) != (512, 64):
        reasons.append(f"FlashMLA reads latents of 512 + 64, these have {request.kv_lora_rank} + {request.rope_dim}")
    if request.index_dim != 128 or request.index_heads not in (32, 64):
        reasons.append(
            f"DeepGEMM scores 32 or 64 index heads of 128, this model has {request.index_heads} of {request.index_dim}"
        )
    if request.num_heads not in VENDOR_HEADS:
        heads = ", ".join(map(str, VENDOR_HEADS))
        reasons.append(f"FlashMLA attends with {heads} heads a rank, not {request.num_heads}")
    if request.block_size != VENDOR_PAGE:
        reasons.append(
            f"its pages hold {VENDOR_PAGE} tokens, not {request.block_size}: pass --block-size {VENDOR_PAGE}"
        )
    multiple = 128 if request.num_heads >= 64 else 64
    if request.top_k % multiple:
        reasons.append(f"FlashMLA reads selections of a multiple of {multiple} here, index_topk is {request.top_k}")
    if str(request.dtype).removeprefix("torch.") != "bfloat16":
        reasons.append(f"FlashMLA computes in bfloat16, the model is {request.dtype}")
    return reasons
