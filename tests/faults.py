"""Faults planted into a running model, each a thing that DSA implementations have got wrong.

A fault changes the attention layers of a live engine; ``planted`` undoes it. FAULTS names for each the whole-model test
that must turn red under it: that is what shows that those tests can fail. Faults of a single kernel are in
test_kernel_faults.py.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch

from vllm_dsa import cache
from vllm_dsa.kernels import reference
from vllm_dsa.metadata import Rows


class Patched:
    """An object, a layer's kernels say, with some attributes replaced."""

    def __init__(self, original: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _kernels(layer: Any, **functions: Callable) -> dict[str, Any]:
    return {"kernels": Patched(layer.kernels, **functions)}


def _select_by(layer: Any, scores: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """A select that ranks each row by ``scores(codes, weights, index_cache, rows, row)``, and leaves out -inf."""

    def select(codes, weights, index_cache, rows, out):
        out.fill_(-1)
        for row, length in enumerate(rows.lengths.tolist()):
            found = scores(codes, weights, index_cache, rows, row)[:length]
            chosen = reference.top_k(found, min(out.shape[1], int((found > -torch.inf).sum())))
            out[row, : len(chosen)] = chosen

    return _kernels(layer, select=select)


def _select_from(layer: Any, change: Callable[[Rows], Rows]) -> dict[str, Any]:
    """The layer's own select, of changed rows."""
    kernels = layer.kernels

    def select(codes, weights, index_cache, rows, out):
        kernels.select(codes, weights, index_cache, change(rows), out)

    return _kernels(layer, select=select)


def _selected(layer: Any, change: Callable[[torch.Tensor, Rows], torch.Tensor]) -> dict[str, Any]:
    """The layer's own select, then a change of what it selected."""
    kernels = layer.kernels

    def select(codes, weights, index_cache, rows, out):
        kernels.select(codes, weights, index_cache, rows, out)
        out.copy_(change(out.clone(), rows))

    return _kernels(layer, select=select)


def _scaled(layer: Any, change: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """The layer's own write_queries, then a change ``change(weights, index query's scales)`` of the head weights."""
    kernels = layer.kernels

    def write_queries(rope_query, index_query, head_weights, rope, positions, query):
        codes, weights = kernels.write_queries(rope_query, index_query, head_weights, rope, positions, query)
        scales = cache.quantise_index(reference.rotate_index(index_query, rope, positions))[1]
        return codes, change(weights, scales)

    return _kernels(layer, write_queries=write_queries)


def _turned(layer: Any, mla: Callable = lambda x: x, index: Callable = lambda x: x) -> dict[str, Any]:
    """Rotary dims taken in another order: of MLA's queries and keys, or of the indexer's. Keys and queries alike, so
    that the order changes nothing but which dims are turned together, and by which frequency."""
    kernels, norms = layer.kernels, layer.norms
    norms = replace(norms, index_weight=index(norms.index_weight), index_bias=index(norms.index_bias))

    def write_keys(latent, rope_key, index_key, _, *args):
        kernels.write_keys(latent, mla(rope_key), index(index_key), norms, *args)

    def write_queries(rope_query, index_query, *args):
        return kernels.write_queries(mla(rope_query), index(index_query), *args)

    return _kernels(layer, write_keys=write_keys, write_queries=write_queries)


def _scores_without(layer: Any, key_scales: bool = True, relu: bool = True, weights: bool = True) -> dict[str, Any]:
    def scores(codes, head_weights, index_cache, rows, row):
        pages = rows.block_table[int(rows.requests[row]), : -(-int(rows.lengths[row]) // rows.block_size)]
        keys, scales = cache.load_index_keys(index_cache, pages, codes.shape[-1])
        dots = codes[row].float() @ keys.T
        dots = (dots.relu() if relu else dots) * (head_weights[row].unsqueeze(-1) if weights else 1)
        return dots.sum(0) * (scales if key_scales else 1)

    return _select_by(layer, scores)


def rope_swapped(layer: Any) -> dict[str, Any]:
    """The indexer's rotary layout."""
    return {"rope": replace(layer.rope, index_interleaved=not layer.rope.index_interleaved)}


def index_rope_at_the_end(layer: Any) -> dict[str, Any]:
    rope_dim = layer.config.qk_rope_head_dim
    return _turned(layer, index=lambda x: x.roll(rope_dim, -1))


def mla_rope_half_split(layer: Any) -> dict[str, Any]:
    return _turned(layer, mla=lambda x: torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2))


def yarn_left_out(layer: Any) -> dict[str, Any]:
    """Tables of the plain frequencies."""
    half = layer.rope.cos_sin.shape[1] // 2
    frequencies = layer.config.rope["rope_theta"] ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(len(layer.rope.cos_sin)), frequencies)
    return {"rope": replace(layer.rope, cos_sin=torch.cat([angles.cos(), angles.sin()], dim=1).float())}


def attention_factor_left_out(layer: Any) -> dict[str, Any]:
    """YaRN's factor of cosines and sines."""
    return {"rope": replace(layer.rope, cos_sin=layer.rope.cos_sin / layer.config.rope["attention_factor"])}


def mscale_left_out(layer: Any) -> dict[str, Any]:
    """YaRN's mscale^2 in the softmax scale."""
    return {"config": Patched(layer.config, softmax_scale=layer.config.qk_head_dim**-0.5)}


def k_norm_bias_dropped(layer: Any) -> dict[str, Any]:
    return {"norms": replace(layer.norms, index_bias=torch.zeros_like(layer.norms.index_bias))}


def k_norm_weight_dropped(layer: Any) -> dict[str, Any]:
    return {"norms": replace(layer.norms, index_weight=torch.ones_like(layer.norms.index_weight))}


def latent_norm_dropped(layer: Any) -> dict[str, Any]:
    """kv_a_layernorm skipped: latents are cached as projected."""
    kernels = layer.kernels

    def write_keys(latent, rope_key, index_key, norms, rope, positions, slots, latent_cache, index_cache):
        kernels.write_keys(latent, rope_key, index_key, norms, rope, positions, slots, latent_cache, index_cache)
        turned = reference.rotate(rope_key, rope.cos_sin[positions], interleaved=True)
        cache.store_latent(latent.float(), turned, slots, latent_cache)

    return _kernels(layer, write_keys=write_keys)


def index_query_of_raw_latent(layer: Any) -> dict[str, Any]:
    """wq_b reads the query latent before q_a_layernorm."""
    weights_and_key, queries, rank = layer.indexer.weights_and_key, layer.indexer.queries, layer.config.q_lora_rank
    raw = []

    def of_hidden(hidden_states):
        raw[:] = [layer.fused_qkv_a_proj(hidden_states)[0][:, :rank].contiguous()]
        return weights_and_key(hidden_states)

    return {"indexer.weights_and_key": of_hidden, "indexer.queries": lambda _: queries(*raw)}


def relu_dropped(layer: Any) -> dict[str, Any]:
    return _scores_without(layer, relu=False)


def head_weights_dropped(layer: Any) -> dict[str, Any]:
    return _scores_without(layer, weights=False)


def key_scales_dropped(layer: Any) -> dict[str, Any]:
    return _scores_without(layer, key_scales=False)


def query_scales_dropped(layer: Any) -> dict[str, Any]:
    return _scaled(layer, lambda weights, scales: weights / scales)


def query_scales_of_the_first_head(layer: Any) -> dict[str, Any]:
    return _scaled(layer, lambda weights, scales: weights / scales * scales[:, :1])


def index_query_unrounded(layer: Any) -> dict[str, Any]:
    kernels = layer.kernels

    def write_queries(rope_query, index_query, head_weights, rope, positions, query):
        kernels.write_queries(rope_query, index_query, head_weights, rope, positions, query)
        heads, dim = index_query.shape[1:]
        return reference.rotate_index(index_query, rope, positions), head_weights.float() * (heads * dim) ** -0.5

    ranked = _select_by(layer, reference.scores)["kernels"]
    return {"kernels": Patched(ranked, write_queries=write_queries)}


@functools.cache
def _wider(selection: torch.Tensor, length: int) -> torch.Tensor:
    """One wide selection for all layers that share one."""
    return torch.empty(len(selection), length, dtype=torch.int32)


def dense(layer: Any) -> dict[str, Any]:
    length = 4096
    return {"config": replace(layer.config, index_topk=length), "selection": _wider(layer.selection, length)}


def sliding_window(layer: Any) -> dict[str, Any]:
    return _select_by(layer, lambda codes, weights, cache, rows, row: torch.arange(int(rows.lengths[row])))


def own_chunk_only(layer: Any) -> dict[str, Any]:
    """A prompt's chunk selects among its own tokens, not among those that earlier chunks cached."""

    def scores(codes, weights, index_cache, rows, row):
        found = reference.scores(codes, weights, index_cache, rows, row)
        first = rows.starts[int(rows.requests[row])]
        found[: int(rows.lengths[first]) - 1] = -torch.inf
        return found

    return _select_by(layer, scores)


def own_token_unseen(layer: Any) -> dict[str, Any]:
    return _select_from(layer, lambda rows: replace(rows, lengths=(rows.lengths - 1).clamp(min=0)))


def next_token_seen(layer: Any) -> dict[str, Any]:
    """Every row but the last of its request sees one token of the future."""

    def change(rows: Rows) -> Rows:
        ends = torch.tensor(rows.ends, dtype=torch.int32)[rows.requests.long()]
        return replace(rows, lengths=torch.minimum(rows.lengths + 1, ends))

    return _select_from(layer, change)


def pages_of_another_request(layer: Any) -> dict[str, Any]:
    """Selected are the positions that another request of the batch would select."""
    return _select_from(layer, lambda rows: replace(rows, block_table=rows.block_table.roll(1, 0)))


def positions_local_to_the_page(layer: Any) -> dict[str, Any]:
    return _selected(layer, lambda out, rows: torch.where(out < 0, out, out % rows.block_size))


def one_too_few(layer: Any) -> dict[str, Any]:
    """index_topk - 1 of them."""
    kernels = layer.kernels

    def select(codes, weights, index_cache, rows, out):
        out.fill_(-1)
        kernels.select(codes, weights, index_cache, rows, out[:, :-1])

    return _kernels(layer, select=select)


def one_selected_twice(layer: Any) -> dict[str, Any]:
    return _selected(layer, lambda out, _: torch.cat([out[:, :1], out[:, :-1]], dim=1))


def padding_selects_token_0(layer: Any) -> dict[str, Any]:
    return _selected(layer, lambda out, _: out.clamp(min=0))


def padding_keeps_the_last_step(layer: Any) -> dict[str, Any]:
    """Rows with fewer than index_topk keys leave what an earlier step selected behind their own."""
    last = torch.zeros_like(layer.selection)

    def change(out: torch.Tensor, rows: Rows) -> torch.Tensor:
        mine = last[: len(out)]
        mine.copy_(torch.where(out < 0, mine, out))
        return mine

    return _selected(layer, change)


def index_keys_a_slot_late(layer: Any) -> dict[str, Any]:
    kernels = layer.kernels

    def write_keys(latent, rope_key, index_key, norms, rope, positions, slots, latent_cache, index_cache):
        kernels.write_keys(latent, rope_key, None, norms, rope, positions, slots, latent_cache, None)
        normed = reference.layer_norm(index_key, norms.index_weight, norms.index_bias, norms.index_eps)
        cache.store_index_keys(reference.rotate_index(normed, rope, positions), slots + 1, index_cache)

    return _kernels(layer, write_keys=write_keys)


def _latent_scales(layer: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """The layer's own write_keys into an fp8_ds_mla cache, then a change of the new rows' scales [T, 4]."""
    kernels = layer.kernels

    def write_keys(latent, rope_key, index_key, norms, rope, positions, slots, latent_cache, index_cache):
        kernels.write_keys(latent, rope_key, index_key, norms, rope, positions, slots, latent_cache, index_cache)
        at = slots // latent_cache.shape[1], slots % latent_cache.shape[1]
        rows = latent_cache[at]
        rows[:, 512:528] = change(rows[:, 512:528].contiguous().view(torch.float32)).contiguous().view(torch.uint8)
        latent_cache[at] = rows

    return _kernels(layer, write_keys=write_keys)


def latent_scales_dropped(layer: Any) -> dict[str, Any]:
    return _latent_scales(layer, torch.ones_like)


def one_latent_scale_for_all(layer: Any) -> dict[str, Any]:
    """The first 128 latents' for all 512."""
    return _latent_scales(layer, lambda scales: scales[:, :1].expand(-1, 4))


def w_uk_of_the_next_head(layer: Any) -> dict[str, Any]:
    return {"w_uk": layer.w_uk.roll(1, 0)}


def w_uv_of_the_next_head(layer: Any) -> dict[str, Any]:
    return {"w_uv": layer.w_uv.roll(1, 0)}


def w_uv_before_w_uk(layer: Any) -> dict[str, Any]:
    """kv_b_proj split as if each head's values came first."""
    rows = torch.cat([layer.w_uk, layer.w_uv.transpose(1, 2)], dim=1)  # [N, nope + v, R], as in the checkpoint
    w_uv, w_uk = rows.split([layer.config.v_head_dim, layer.config.qk_nope_head_dim], dim=1)
    return {"w_uk": w_uk.contiguous(), "w_uv": w_uv.transpose(1, 2).contiguous()}


def selection_of_the_last_step(layer: Any) -> dict[str, Any]:
    """A layer that shares a selection gets the one of the step before."""
    if layer.indexer is not None:
        return {}
    kernels, kept = layer.kernels, torch.zeros_like(layer.selection)

    def attend(query, latent_cache, rows, selected, scale, out):
        stale = kept[: len(selected)].clone()
        kept[: len(selected)] = selected
        return kernels.attend(query, latent_cache, rows, stale, scale, out)

    return _kernels(layer, attend=attend)


def nothing_shared(layer: Any) -> dict[str, Any]:
    """A layer that shares a selection takes the first tokens instead."""
    if layer.indexer is not None:
        return {}
    window = torch.arange(layer.selection.shape[1], dtype=torch.int32)
    return {"selection": window.expand_as(layer.selection).clone()}


@dataclass(frozen=True)
class Fault:
    """check: the test, as pytest names it, that must turn red. quick: planted by `make test` too."""

    plant: Callable[[Any], dict[str, Any]]
    check: str
    quick: bool = True


_V32 = "tests/test_model.py::test_logprobs_equal_transformers[six_heads_yarn-auto]"
_FP8 = "tests/test_model.py::test_logprobs_equal_transformers[topk48_plain_rope-fp8_ds_mla]"
_ROPE = "tests/test_config_keys.py::test_logprobs_under_other_rope_keys_are_transformers[attention_factor]"
_GLM = "tests/test_glm.py::test_logprobs_equal_transformers[index_topk_pattern]"

FAULTS = (
    Fault(rope_swapped, _V32),
    Fault(index_rope_at_the_end, _V32),
    Fault(mla_rope_half_split, _V32),
    Fault(yarn_left_out, _V32),
    Fault(attention_factor_left_out, _ROPE),
    Fault(mscale_left_out, _V32),
    Fault(k_norm_bias_dropped, _V32),
    Fault(k_norm_weight_dropped, _V32),
    Fault(latent_norm_dropped, _V32),
    Fault(index_query_of_raw_latent, _V32),
    Fault(relu_dropped, _V32),
    Fault(head_weights_dropped, _V32),
    Fault(key_scales_dropped, _V32),
    Fault(query_scales_dropped, _V32),
    Fault(query_scales_of_the_first_head, _V32),
    Fault(index_query_unrounded, _V32),
    Fault(dense, _V32),
    Fault(sliding_window, _V32),
    Fault(own_chunk_only, _V32),
    Fault(own_token_unseen, _V32),
    Fault(next_token_seen, _V32),
    Fault(pages_of_another_request, _V32),
    Fault(positions_local_to_the_page, _V32),
    Fault(one_too_few, _V32),
    Fault(one_selected_twice, _V32),
    Fault(padding_selects_token_0, _V32),
    Fault(padding_keeps_the_last_step, _V32),
    Fault(index_keys_a_slot_late, _V32),
    Fault(w_uk_of_the_next_head, _V32),
    Fault(w_uv_of_the_next_head, _V32),
    Fault(w_uv_before_w_uk, _V32),
    Fault(latent_scales_dropped, _FP8, quick=False),
    Fault(one_latent_scale_for_all, _FP8, quick=False),
    Fault(selection_of_the_last_step, _GLM),
    Fault(nothing_shared, _GLM),
)

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
    """Run the block with ``fault`` in every layer: each "attribute" or "child.attribute" it returns, replaced."""
    before = []
    for layer in layers:
        for path, value in fault(layer).items():
            owner, _, name = path.rpartition(".")
            target = attrgetter(owner)(layer) if owner else layer
            before.append((target, name, getattr(target, name)))
            setattr(target, name, value)
    try:
        yield
    finally:
        for target, name, value in reversed(before):
            setattr(target, name, value)
