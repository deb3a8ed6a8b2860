"""Bytes and operations that a step's task needs at least, whatever the kernels do; multiply and add count as two."""

from dataclasses import dataclass

from vllm_dsa import cache
from vllm_dsa.testing.cases import Case


@dataclass(frozen=True)
class Work:
    """bytes moved to and from memory, floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def lengths(case: Case) -> list[int]:
    """Keys that each new token of a case sees."""
    return [context + i + 1 for context, new in case.requests for i in range(new)]


def latent_row_bytes(case: Case) -> int:
    """Bytes of one token in the latent cache."""
    fp8 = case.latent_kind == cache.FP8_DS_MLA
    return cache.FP8_DS_MLA_BYTES if fp8 else (case.rank + case.rope_dim) * case.dtype.itemsize


def write(case: Case) -> Work:
    """New tokens read once and stored in both caches; queries rotated in place, index queries quantised."""
    value, tokens = case.dtype.itemsize, len(lengths(case))
    keys = value * (case.rank + case.rope_dim + case.index_dim) + latent_row_bytes(case)
    keys += case.index_dim + cache.SCALE_BYTES
    queries = 2 * value * case.heads * case.rope_dim
    queries += case.index_heads * ((value + 1) * case.index_dim + value + 4)
    return Work(tokens * (keys + queries), 0)


def select(case: Case) -> Work:
    """Each request's index keys read once, the queries read and the positions written; the scores' products. Rows that
    see no more than top_k keys select them all and need no scores."""
    scored = [n for n in lengths(case) if n > case.top_k]
    contexts = sum(context + new for context, new in case.requests if context + new > case.top_k)
    moved = contexts * (case.index_dim + cache.SCALE_BYTES) + len(scored) * case.index_heads * (case.index_dim + 4)
    moved += len(lengths(case)) * 4 * case.top_k
    return Work(moved, 2.0 * case.index_heads * case.index_dim * sum(scored))


def attend(case: Case) -> Work:
    """Each row's selected latents, queries and outputs; the products of logits and of values."""
    seen = lengths(case)
    keys, width = sum(min(n, case.top_k) for n in seen), 2 * case.rank + case.rope_dim
    moved = keys * latent_row_bytes(case) + case.dtype.itemsize * len(seen) * case.heads * width
    return Work(moved, 2.0 * keys * case.heads * width)


def layer(case: Case) -> Work:
    """The three operations."""
    return write(case) + select(case) + attend(case)


def dense(case: Case, key_dim: int, value_dim: int, key_heads: int) -> Work:
    """Attention to all keys: each request's keys and values read once, queries and outputs; the products."""
    seen, contexts = lengths(case), sum(context + new for context, new in case.requests)
    value, width = case.dtype.itemsize, key_dim + value_dim
    moved = value * (contexts * key_heads * width + len(seen) * case.heads * width)
    return Work(moved, 2.0 * sum(seen) * case.heads * width)


OPS = {"write": write, "select": select, "attend": attend, "layer": layer}
