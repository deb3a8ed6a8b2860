"""Which provider serves each operation here, and why every other one was refused.

``choose`` runs once, when a layer is built, never per step. Nothing falls back silently: the choice and the refusals
are in ``Kernels.summary``, and where no provider can serve, that is an error. A new provider is one entry of PROVIDERS,
the only list of their names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from vllm_dsa import envs
from vllm_dsa.kernels import OPS, limits
from vllm_dsa.kernels.limits import Request

FUNCTIONS = {"write": ("write_keys", "write_queries"), "select": ("select",), "attend": ("attend",)}


@dataclass(frozen=True)
class Provider:
    """Where the functions of each operation live, and the reasons not to use them (none: it can serve).

    libraries: reasons that show only once the libraries it calls are loaded; asked where ``refusals`` gives none.
    """

    name: str
    modules: dict[str, str]
    refusals: Callable[[Request], list[str]]
    only_forced: bool = False
    libraries: Callable[[], list[str]] = list


def _vendor_libraries() -> list[str]:
    from vllm_dsa.kernels import vendor

    return vendor.library_refusals()


def _everywhere(module: str) -> dict[str, str]:
    return dict.fromkeys(OPS, module)


_TRITON = {op: f"vllm_dsa.kernels.triton_{op}" for op in OPS}
_VENDOR = {op: "vllm_dsa.kernels.triton_write" if op == "write" else "vllm_dsa.kernels.vendor" for op in OPS}
PROVIDERS = (
    Provider("vendor", _VENDOR, limits.vendor, libraries=_vendor_libraries),
    Provider("triton", _TRITON, limits.triton),
    Provider("cpu", _everywhere("vllm_dsa.kernels.cpu"), limits.cpu),
    Provider("reference", _everywhere("vllm_dsa.kernels.reference"), lambda request: [], only_forced=True),
)
# Under VLLM_DSA_DENSE=1, in the place of all others.
DENSE = Provider("dense", dict.fromkeys(("select", "attend"), "vllm_dsa.kernels.dense"), lambda request: [])


@dataclass(frozen=True)
class Kernels:
    """The chosen functions; their contracts are in ``vllm_dsa.kernels``."""

    write_keys: Callable[..., Any]
    write_queries: Callable[..., Any]
    select: Callable[..., Any] | None  # None: attend sees every key, and no index key is needed
    attend: Callable[..., Any]
    attend_dense: Callable[..., None] | None  # None: all rows go through attend
    dense_rows: int  # from so many rows of a request on attend_dense is the faster
    query_heads: int  # heads to allocate attend's query with, at least num_heads
    workspace: Callable[[int], int]  # bytes that select and attend may take for so many rows, their outputs aside
    providers: dict[str, str]  # operation -> provider
    summary: str


def names(providers: Sequence[Provider] | None = None) -> tuple[str, ...]:
    """Of ``providers`` (None: PROVIDERS), in the order of preference."""
    return tuple(provider.name for provider in (PROVIDERS if providers is None else providers))


def forced(providers: Sequence[Provider] | None = None) -> str | None:
    """VLLM_DSA_PROVIDER; None: unset. VariableError if it is none of ``names(providers)``."""
    name: str | None = envs.VLLM_DSA_PROVIDER
    known = names(providers)
    if name and name not in known:
        raise envs.VariableError(
            f"VLLM_DSA_PROVIDER={name!r} is not one of {', '.join(known)}. Set one of them, or unset it."
        )
    return name


def refusals(provider: Provider, op: str, request: Request, asked: str | None) -> list[str]:
    """Why ``provider`` does not serve ``op`` here, were ``asked`` forced (None: none is); empty: it can."""
    if envs.VLLM_DSA_DENSE and op in DENSE.modules:
        return ["VLLM_DSA_DENSE=1 is set"]
    if asked and asked != provider.name:
        return [f"VLLM_DSA_PROVIDER={asked} is set"]
    if provider.only_forced and not asked:
        return [f"it serves only under VLLM_DSA_PROVIDER={provider.name}"]
    if op not in provider.modules:
        return [f"it has no {op}"]
    return provider.refusals(request) or provider.libraries()


@dataclass(frozen=True)
class Choice:
    """Operation -> the provider that serves it (none: left out), and the reasons against every other one."""

    providers: dict[str, Provider]
    against: list[str]  # "provider: reason", with the operations in parentheses where it does not hold for all


def survey(request: Request, providers: Sequence[Provider] | None = None) -> Choice:
    """Of each operation the first of ``providers`` (None: PROVIDERS) without a refusal. Raises VariableError."""
    providers = PROVIDERS if providers is None else providers
    asked = forced(providers)
    chosen: dict[str, Provider] = {}
    refused: dict[str, list[str]] = {}  # "provider: reason" -> operations
    for provider in providers:
        for op in OPS:
            reasons = refusals(provider, op, request, asked)
            if not reasons:
                chosen.setdefault(op, provider)
            for reason in reasons:
                refused.setdefault(f"{provider.name}: {reason}", []).append(op)
    if envs.VLLM_DSA_DENSE:
        chosen |= dict.fromkeys(DENSE.modules, DENSE)
    against = [line if len(ops) == len(OPS) else f"{line} ({', '.join(ops)})" for line, ops in refused.items()]
    return Choice({op: chosen[op] for op in OPS if op in chosen}, against)


def choose(request: Request) -> Kernels:
    """The functions that serve ``request``: of each operation, those of the first provider without a refusal."""
    choice = survey(request)
    chosen, against = choice.providers, "; ".join(choice.against)
    if len(chosen) < len(OPS):
        missing = ", ".join(op for op in OPS if op not in chosen)
        step = "Unset VLLM_DSA_PROVIDER" if envs.VLLM_DSA_PROVIDER else "Set VLLM_DSA_PROVIDER=reference, which is slow"
        raise RuntimeError(
            f"No provider serves {missing} for {request}. Refused: {against}. "
            f"{step}, or run on a device that a provider serves."
        )
    functions = {
        function: getattr(import_module(chosen[op].modules[op]), function) for op in OPS for function in FUNCTIONS[op]
    }
    providers = {op: chosen[op].name for op in OPS}
    attend = import_module(chosen["attend"].modules["attend"])
    pad, workspace = getattr(attend, "query_heads", None), getattr(attend, "workspace", None)
    served = ", ".join(f"{op}: {name}" for op, name in providers.items())
    summary = f"{served} (refused: {against or 'none'})"
    return Kernels(
        **functions,
        attend_dense=getattr(attend, "attend_dense", None),
        dense_rows=getattr(attend, "DENSE_ROWS", 0),
        query_heads=pad(request) if pad else request.num_heads,
        workspace=partial(workspace, request) if workspace else lambda tokens: 0,
        providers=providers,
        summary=summary,
    )
