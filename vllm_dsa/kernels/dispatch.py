"""Which provider serves each operation here, and why every other one was refused.

``choose`` runs once, when a layer is built, never per step. Nothing falls back silently: the choice and the refusals
are in ``Kernels.summary``, and where no provider can serve, that is an error. A new provider is one entry of PROVIDERS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from vllm_dsa import envs
from vllm_dsa.kernels import OPS

FUNCTIONS = {"write": ("write_keys", "write_queries"), "select": ("select",), "attend": ("attend",)}


@dataclass(frozen=True)
class Request:
    """What a layer needs of its kernels."""

    device_type: str  # "cpu", "cuda"
    capability: tuple[int, int] | None  # CUDA compute capability
    dtype: torch.dtype  # of the model
    latent_kind: str  # "auto", "fp8_ds_mla"
    kv_lora_rank: int
    rope_dim: int
    num_heads: int  # of this rank
    index_heads: int
    index_dim: int
    top_k: int
    block_size: int


@dataclass(frozen=True)
class Provider:
    """Where the functions of each operation live, and the reasons not to use them (none: it can serve)."""

    name: str
    modules: dict[str, str]
    refusals: Callable[[Request], list[str]]
    only_forced: bool = False


def _cpu_refusals(request: Request) -> list[str]:
    return [] if request.device_type == "cpu" else [f"it runs on the CPU, the layer is on {request.device_type}"]


def _triton_refusals(request: Request) -> list[str]:
    if request.device_type != "cuda":
        return [f"it runs on CUDA GPUs, the layer is on {request.device_type}"]
    if request.capability is None or request.capability < (8, 0):
        return [f"it needs compute capability 8.0 or newer, this GPU has {request.capability}"]
    if not find_spec("triton"):
        return ["Triton is not installed: pip install 'vllm-dsa[cuda]'"]
    from vllm_dsa.kernels import triton_configs

    return triton_configs.refusals(request)


def _vendor_refusals(request: Request) -> list[str]:
    refused = _triton_refusals(request)
    if not refused:
        from vllm_dsa.kernels import vendor

        refused = vendor.refusals(request)
    return refused


def _everywhere(module: str) -> dict[str, str]:
    return dict.fromkeys(OPS, module)


_TRITON = {op: f"vllm_dsa.kernels.triton_{op}" for op in OPS}
_VENDOR = {op: "vllm_dsa.kernels.triton_write" if op == "write" else "vllm_dsa.kernels.vendor" for op in OPS}
PROVIDERS = (
    Provider("vendor", _VENDOR, _vendor_refusals),
    Provider("triton", _TRITON, _triton_refusals),
    Provider("cpu", _everywhere("vllm_dsa.kernels.cpu"), _cpu_refusals),
    Provider("reference", _everywhere("vllm_dsa.kernels.reference"), lambda request: [], only_forced=True),
)


@dataclass(frozen=True)
class Kernels:
    """The chosen functions; their contracts are in ``vllm_dsa.kernels``."""

    write_keys: Callable[..., Any]
    write_queries: Callable[..., Any]
    select: Callable[..., Any]
    attend: Callable[..., Any]
    query_heads: int  # heads to allocate attend's query with, at least num_heads
    providers: dict[str, str]  # operation -> provider
    summary: str


def refusals(provider: Provider, op: str, request: Request, forced: str | None) -> list[str]:
    """Why ``provider`` does not serve ``op`` here; empty: it can."""
    if forced and forced != provider.name:
        return [f"VLLM_DSA_PROVIDER={forced} is set"]
    if provider.only_forced and not forced:
        return [f"it serves only under VLLM_DSA_PROVIDER={provider.name}"]
    if op not in provider.modules:
        return [f"it has no {op}"]
    return provider.refusals(request)


def choose(request: Request) -> Kernels:
    """The functions that serve ``request``: of each operation, those of the first provider without a refusal."""
    forced = envs.VLLM_DSA_PROVIDER
    names = [provider.name for provider in PROVIDERS]
    if forced and forced not in names:
        raise RuntimeError(
            f"VLLM_DSA_PROVIDER={forced}: this version has no such provider, it has {', '.join(names)}. "
            f"Set one of these, or unset the variable."
        )
    chosen: dict[str, Provider] = {}
    refused: dict[str, list[str]] = {}  # "provider: reason" -> operations
    for provider in PROVIDERS:
        for op in OPS:
            reasons = refusals(provider, op, request, forced)
            if not reasons:
                chosen.setdefault(op, provider)
            for reason in reasons:
                refused.setdefault(f"{provider.name}: {reason}", []).append(op)
    against = "; ".join(line if len(ops) == len(OPS) else f"{line} ({', '.join(ops)})" for line, ops in refused.items())
    if len(chosen) < len(OPS):
        missing = ", ".join(op for op in OPS if op not in chosen)
        step = "Unset VLLM_DSA_PROVIDER" if forced else "Set VLLM_DSA_PROVIDER=reference, which is slow"
        raise RuntimeError(
            f"No provider serves {missing} for {request}. Refused: {against}. "
            f"{step}, or run on a device that a provider serves."
        )
    functions = {
        function: getattr(import_module(chosen[op].modules[op]), function) for op in OPS for function in FUNCTIONS[op]
    }
    providers = {op: chosen[op].name for op in OPS}
    pad = getattr(import_module(chosen["attend"].modules["attend"]), "query_heads", None)
    query_heads = pad(request) if pad else request.num_heads
    served = ", ".join(f"{op}: {name}" for op, name in providers.items())
    summary = f"{served} (refused: {against or 'none'})"
    return Kernels(**functions, query_heads=query_heads, providers=providers, summary=summary)
