"""Every VLLM_DSA_* variable: its name, default and meaning. Read when accessed, as ``envs.VLLM_DSA_DISABLE``.

VLLM_DSA_DISABLE          0    1: leave vLLM as it is, as if this package were not installed
VLLM_DSA_REQUIRED         0    1: an error at start where the package would otherwise decline with a warning
VLLM_DSA_PROVIDER              the provider of every kernel, one of kernels/dispatch.py; unset: the first that can
VLLM_DSA_DENSE            0    1: an ablation: attend to every key, leave the indexer out; kernels/dense.py
VLLM_DSA_SCORE_BUDGET_MB  512  MiB that the scores of one select may take; no result depends on it
VLLM_DSA_SHARD_SCORES     2^24 scores of a prefill step from which on the ranks of a TP group share its select; 0: never
VLLM_DSA_SOFTWARE_E4M3    0    1: Triton kernels convert e4m3 in integer arithmetic, as on GPUs without it; for tests
"""

import os
from collections.abc import Callable
from typing import Any


class VariableError(ValueError):
    """A variable that holds what it cannot; the message names it, its value and the next step."""


def _flag(name: str) -> Callable[[], bool]:
    def read() -> bool:
        value = os.environ.get(name, "").strip().lower()
        if value not in ("", "0", "false", "1", "true"):
            raise VariableError(f"{name}={value!r} is neither 0 (false) nor 1 (true). Set one of them, or unset it.")
        return value in ("1", "true")

    return read


def _word(name: str) -> Callable[[], str | None]:
    def read() -> str | None:
        return os.environ.get(name, "").strip() or None

    return read


def _integer(name: str, default: int, least: int) -> Callable[[], int]:
    def read() -> int:
        value = os.environ.get(name, "").strip() or str(default)
        if not value.isdecimal() or int(value) < least:
            raise VariableError(
                f"{name}={value!r} is not an integer of at least {least}. Set one, or unset it for {default}."
            )
        return int(value)

    return read


TABLE: dict[str, Callable[[], Any]] = {
    "VLLM_DSA_DISABLE": _flag("VLLM_DSA_DISABLE"),
    "VLLM_DSA_REQUIRED": _flag("VLLM_DSA_REQUIRED"),
    "VLLM_DSA_PROVIDER": _word("VLLM_DSA_PROVIDER"),  # checked by dispatch.forced, which knows the names
    "VLLM_DSA_DENSE": _flag("VLLM_DSA_DENSE"),
    "VLLM_DSA_SCORE_BUDGET_MB": _integer("VLLM_DSA_SCORE_BUDGET_MB", 512, least=1),
    # An H200 computes and ranks so many in 0.45 ms. Two ranks save half of that, and pay some 0.05 ms for a gather.
    "VLLM_DSA_SHARD_SCORES": _integer("VLLM_DSA_SHARD_SCORES", 1 << 24, least=0),
    "VLLM_DSA_SOFTWARE_E4M3": _flag("VLLM_DSA_SOFTWARE_E4M3"),
}


def __getattr__(name: str) -> Any:
    if name not in TABLE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its variables are {', '.join(TABLE)}")
    return TABLE[name]()
