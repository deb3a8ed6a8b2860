"""One operation of a provider against reference.py on one case, fed with what reference.py made of the steps before.

``kernels`` is anything with the provider's functions: its module, or what ``dispatch.choose`` returns.
"""

from types import SimpleNamespace
from typing import Any

import torch

from vllm_dsa.kernels import reference
from vllm_dsa.testing import compare
from vllm_dsa.testing.cases import Case, Inputs, build


def check_write(kernels: Any, case: Case, device: str = "cpu", seed: int = 0) -> None:
    """Both caches' bytes, the rotated queries, the index queries and their weights."""
    got, want = build(case, device, seed), build(case, device, seed)
    kernels.write_keys(*got.keys())
    reference.write_keys(*want.keys())
    compare.check_caches(
        got.latent_cache, got.index_cache, want.latent_cache, want.index_cache, want.slots, case.index_dim
    )
    codes, weights = kernels.write_queries(*got.queries())
    want_codes, want_weights = reference.write_queries(*want.queries())
    compare.assert_close("rotated query", got.query, want.query, compare.TOLERANCE[case.dtype])
    compare.assert_codes_close("index query codes", codes, want_codes)
    compare.assert_close("head weights", weights, want_weights, compare.TOLERANCE[torch.float32])


def check_select(
    kernels: Any, case: Case, device: str = "cpu", seed: int = 0, accumulation: torch.dtype = torch.float32
) -> None:
    """Selected positions, by the provider's own scores too where it has a ``scores``."""
    inputs, codes, weights = written(case, device, seed)
    step = (codes, weights, inputs.index_cache, inputs.rows)
    selected = torch.full((case.tokens, case.top_k), -7, dtype=torch.int32, device=device)
    kernels.select(*step, selected)
    rows = range(case.tokens)
    scores = getattr(kernels, "scores", None)
    own = [scores(*step, row) for row in rows] if scores else None
    ref = [reference.scores(*step, row) for row in rows]
    eps = [compare.score_error(*step, row, compare.SCORE_ERROR[accumulation]) for row in rows]
    compare.check_selection(selected, own, ref, case.top_k, eps)


def check_attend(kernels: Any, case: Case, device: str = "cpu", seed: int = 0) -> None:
    """Attention's values and log-sum-exp over the positions that reference.py selects."""
    inputs, codes, weights = written(case, device, seed)
    selected = torch.empty(case.tokens, case.top_k, dtype=torch.int32, device=device)
    reference.select(codes, weights, inputs.index_cache, inputs.rows, selected)
    results = []
    for provider in (kernels, reference):
        out = torch.full((case.tokens, case.heads, case.rank), float("nan"), dtype=case.dtype, device=device)
        lse = provider.attend(inputs.query, inputs.latent_cache, inputs.rows, selected, inputs.scale, out)
        results.append((out, lse))
    (out, lse), (want, want_lse) = results
    compare.assert_close("attention", out, want, compare.TOLERANCE[case.dtype])
    compare.assert_close("log-sum-exp", lse, want_lse, compare.TOLERANCE[torch.float32])


CHECKS = {"write": check_write, "select": check_select, "attend": check_attend}


def written(case: Case, device: str = "cpu", seed: int = 0) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
    """A case's inputs after reference.py has written them, and its index query codes and weights."""
    inputs = build(case, device, seed)
    reference.write_keys(*inputs.keys())
    return inputs, *reference.write_queries(*inputs.queries())


def replaced(kernels: Any, **functions: Any) -> SimpleNamespace:
    """``kernels`` with some functions replaced."""
    names = ("write_keys", "write_queries", "select", "attend", "scores")
    own = {name: getattr(kernels, name) for name in names if hasattr(kernels, name)}
    return SimpleNamespace(**own | functions)
