"""One operation of a provider against reference.py on one case, fed with what reference.py made of the steps before.

``kernels`` is anything with the provider's functions: its module, or what ``dispatch.choose`` returns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from vllm_dsa.kernels import reference
from vllm_dsa.kernels.dispatch import FUNCTIONS, Provider, Request
from vllm_dsa.testing import compare
from vllm_dsa.testing.cases import Case, Inputs, build


def check_write(
    kernels: Any,
    case: Case,
    device: str = "cpu",
    seed: int = 0,
    tolerance: Mapping[torch.dtype, float] = compare.TOLERANCE,
) -> None:
    """Both caches' bytes, the rotated queries, the index queries and their weights; queries also in two calls."""
    got, want = build(case, device, seed), build(case, device, seed)
    kernels.write_keys(*got.keys())
    reference.write_keys(*want.keys())
    compare.check_caches(
        got.latent_cache, got.index_cache, want.latent_cache, want.index_cache, want.slots, case.index_dim
    )
    codes, weights = kernels.write_queries(*got.queries())
    want_codes, want_weights = reference.write_queries(*want.queries())
    compare.assert_close("rotated query", got.query, want.query, tolerance[case.dtype])
    compare.assert_codes_close("index query codes", codes, want_codes)
    compare.assert_close("head weights", weights, want_weights, tolerance[torch.float32])

    rope_query, index_query, head_weights, rope, positions, query = build(case, device, seed).queries()
    if kernels.write_queries(rope_query, None, None, rope, positions, query) is not None:
        raise compare.Mismatch("write_queries without index queries returns something; expected None")
    compare.assert_same_bits("query rotated alone", query[..., case.rank :], got.query[..., case.rank :])
    alone = kernels.write_queries(rope_query[:, :0], index_query, head_weights, rope, positions, query[:, :0])
    for name, part, whole in zip(("codes", "head weights"), alone, (codes, weights), strict=True):
        compare.assert_same_bits(f"{name} of index queries alone", part, whole)


def check_select(
    kernels: Any, case: Case, device: str = "cpu", seed: int = 0, accumulation: torch.dtype = torch.float32
) -> None:
    """Selected positions, by the provider's own scores too where it has a ``scores``."""
    inputs, codes, weights = written(case, device, seed)
    step = (codes, weights, inputs.index_cache, inputs.rows)
    selected = torch.full((case.tokens, case.top_k), -7, dtype=torch.int32, device=device)
    kernels.select(*step, selected)
    assert_selection(kernels, step, selected, range(case.tokens), accumulation)


def assert_selection(
    kernels: Any, step: tuple, selected: torch.Tensor, at: Sequence[int], accumulation: torch.dtype
) -> None:
    """Rows ``at`` of what ``kernels`` selected in a step: (codes, weights, index_cache, rows)."""
    scores = getattr(kernels, "scores", None)
    own = [scores(*step, row) for row in at] if scores else None
    ref = [reference.scores(*step, row) for row in at]
    eps = [compare.score_error(*step, row, compare.SCORE_ERROR[accumulation]) for row in at]
    compare.check_selection(selected[list(at)], own, ref, selected.shape[1], eps)


def check_attend(
    kernels: Any,
    case: Case,
    device: str = "cpu",
    seed: int = 0,
    tolerance: Mapping[torch.dtype, float] = compare.TOLERANCE,
) -> None:
    """Attention's values and log-sum-exp over the positions that reference.py selects."""
    inputs, codes, weights = written(case, device, seed)
    selected = torch.empty(case.tokens, case.top_k, dtype=torch.int32, device=device)
    reference.select(codes, weights, inputs.index_cache, inputs.rows, selected)
    out = torch.full((case.tokens, case.heads, case.rank), float("nan"), dtype=case.dtype, device=device)
    lse = kernels.attend(inputs.query, inputs.latent_cache, inputs.rows, selected, inputs.scale, out)
    assert_attention(inputs, selected, out, lse, range(case.tokens), tolerance)


def assert_attention(
    inputs: Inputs,
    selected: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    at: Sequence[int],
    tolerance: Mapping[torch.dtype, float],
) -> None:
    """Rows ``at`` of a step's attention and log-sum-exp over what was selected."""
    mine = torch.tensor(list(at), dtype=torch.int64, device=out.device)
    rows = replace(inputs.rows, requests=inputs.rows.requests[mine], lengths=inputs.rows.lengths[mine])
    want = torch.empty_like(out[mine])
    query = inputs.query[mine, : out.shape[1]]
    want_lse = reference.attend(query, inputs.latent_cache, rows, selected[mine], inputs.scale, want)
    compare.assert_close("attention", out[mine], want, tolerance[out.dtype])
    compare.assert_close("log-sum-exp", lse[mine], want_lse, tolerance[torch.float32])


CHECKS = {"write": check_write, "select": check_select, "attend": check_attend}


def provider_functions(provider: Provider) -> SimpleNamespace:
    """A provider's functions under the names of their contracts, ``scores`` among them where it has one."""
    functions = {}
    for op, module in ((op, import_module(name)) for op, name in provider.modules.items()):
        functions |= {name: getattr(module, name) for name in FUNCTIONS[op]}
        if op == "select" and hasattr(module, "scores"):
            functions["scores"] = module.scores
    return SimpleNamespace(**functions)


def request_of(case: Case, device: str) -> Request:
    """What dispatch is asked to serve a case on ``device``: "cpu" or "cuda"."""
    return Request(
        device_type=device,
        capability=torch.cuda.get_device_capability() if device == "cuda" else None,
        dtype=case.dtype,
        latent_kind=case.latent_kind,
        kv_lora_rank=case.rank,
        rope_dim=case.rope_dim,
        num_heads=case.heads,
        index_heads=case.index_heads,
        index_dim=case.index_dim,
        top_k=case.top_k,
        block_size=case.block_size,
    )


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
