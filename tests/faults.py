"""Faults planted into a running model, each a thing that DSA implementations have got wrong.

A fault changes the attention layers of a live engine; ``planted`` undoes it. Whole-model tests must turn red under
each: that is what shows that they can fail.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from vllm_dsa.kernels import reference
from vllm_dsa.metadata import Rows


class Patched:
    """A layer's kernels with some functions replaced."""

    def __init__(self, kernels: Any, **functions: Callable) -> None:
        self.__dict__.update(functions)
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


def _select_by(scores: Callable[..., torch.Tensor]) -> Callable:
    """A select that ranks each row by ``scores(codes, weights, index_cache, rows, row)``."""

    def select(codes, weights, index_cache, rows, out):
        out.fill_(-1)
        for row, length in enumerate(rows.lengths.tolist()):
            chosen = reference.top_k(scores(codes, weights, index_cache, rows, row)[:length], out.shape[1])
            out[row, : len(chosen)] = chosen

    return select


def rope_swapped(layer: Any) -> dict[str, Any]:
    return {"rope": replace(layer.rope, index_interleaved=not layer.rope.index_interleaved)}


def k_norm_bias_dropped(layer: Any) -> dict[str, Any]:
    return {"norms": replace(layer.norms, index_bias=torch.zeros_like(layer.norms.index_bias))}


def relu_dropped(layer: Any) -> dict[str, Any]:
    def scores(codes, weights, index_cache, rows, row):
        both = [reference.scores(sign * codes.float(), weights, index_cache, rows, row) for sign in (1, -1)]
        return both[0] - both[1]  # w * (relu(x) - relu(-x)) = w * x

    return {"kernels": Patched(layer.kernels, select=_select_by(scores))}


def index_query_unrounded(layer: Any) -> dict[str, Any]:
    def write_queries(rope_query, index_query, head_weights, rope, positions, query):
        layer_kernels.write_queries(rope_query, index_query, head_weights, rope, positions, query)
        heads, dim = index_query.shape[1:]
        return reference.rotate_index(index_query, rope, positions), head_weights.float() * (heads * dim) ** -0.5

    layer_kernels = layer.kernels
    return {"kernels": Patched(layer.kernels, write_queries=write_queries, select=_select_by(reference.scores))}


@functools.cache
def _wider(selection: torch.Tensor, length: int) -> torch.Tensor:
    """One wide selection for all layers that share one."""
    return torch.empty(len(selection), length, dtype=torch.int32)


def dense(layer: Any) -> dict[str, Any]:
    length = 4096
    return {"config": replace(layer.config, index_topk=length), "selection": _wider(layer.selection, length)}


def sliding_window(layer: Any) -> dict[str, Any]:
    return {
        "kernels": Patched(
            layer.kernels,
            select=_select_by(lambda codes, weights, cache, rows, row: torch.arange(int(rows.lengths[row]))),
        )
    }


def own_token_unseen(layer: Any) -> dict[str, Any]:
    def select(codes, weights, index_cache, rows: Rows, out):
        kernels.select(codes, weights, index_cache, replace(rows, lengths=(rows.lengths - 1).clamp(min=0)), out)

    kernels = layer.kernels
    return {"kernels": Patched(kernels, select=select)}


SELECTION_FAULTS = (
    rope_swapped,
    k_norm_bias_dropped,
    relu_dropped,
    index_query_unrounded,
    dense,
    sliding_window,
    own_token_unseen,
)


@contextmanager
def planted(fault: Callable[[Any], dict[str, Any]], layers: list[Any]) -> Iterator[None]:
    """Run the block with ``fault`` in every layer."""
    before = []
    for layer in layers:
        changes = fault(layer)
        before.append({name: getattr(layer, name) for name in changes})
        for name, value in changes.items():
            setattr(layer, name, value)
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name, value in values.items():
                setattr(layer, name, value)
