"""What each layer's selection holds of its dense attention, measured in vLLM's worker while it reads one text.

``Probe`` is given to vLLM as its worker extension; ``layouts.py`` starts it and collects.
"""

from dataclasses import replace
from typing import Any

import torch

from vllm_dsa import cache
from vllm_dsa.attention import DSAAttention
from vllm_dsa.kernels import Norms, Rope, reference
from vllm_dsa.metadata import Rows, tokens_to_slots
from vllm_dsa.testing import compare


class Probe:
    """Methods that vLLM adds to every worker."""

    def dsa_probe(self, lengths: list[int]) -> int:
        """From now on measure the rows that see so many keys; returns how many layers with an indexer are here."""
        model = self.get_model()  # type: ignore[attr-defined]
        layers = [m for m in model.modules() if isinstance(m, DSAAttention) and m.indexer is not None]
        self.dsa_probed = [ProbedKernels(layer, lengths) for layer in layers]
        for layer, probed in zip(layers, self.dsa_probed, strict=True):
            layer.kernels = probed
        return len(layers)

    def dsa_probed_layers(self) -> list[dict[str, Any]]:
        """What was measured, a layer an entry: see ``ProbedKernels.report``."""
        return [probed.report() for probed in self.dsa_probed]


class ProbedKernels:
    """A layer's kernels; of the rows asked for, of one request, it measures what is selected."""

    def __init__(self, layer: DSAAttention, lengths: list[int]) -> None:
        self._layer, self._kernels = layer, layer.kernels
        self._lengths = torch.tensor(lengths, device=layer.rope.cos_sin.device)
        self._index_keys: list[torch.Tensor] = []
        self._norms: Norms | None = None
        self._index_query: torch.Tensor | None = None
        self._head_weights: torch.Tensor | None = None
        self._measured: list[dict[str, float]] = []
        self._faults: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def write_keys(self, latent: Any, rope_key: Any, index_key: torch.Tensor, norms: Norms, *rest: Any) -> None:
        self._index_keys.append(index_key.clone())
        self._norms = norms
        self._kernels.write_keys(latent, rope_key, index_key, norms, *rest)

    def write_queries(self, rope_query: Any, index_query: Any, head_weights: Any, *rest: Any) -> Any:
        self._index_query, self._head_weights = index_query, head_weights
        return self._kernels.write_queries(rope_query, index_query, head_weights, *rest)

    def select(self, codes: Any, weights: Any, index_cache: Any, rows: Rows, out: torch.Tensor) -> None:
        """Holds the selection against the provider's contract: reference.py on the very codes of its caches."""
        self._kernels.select(codes, weights, index_cache, rows, out)
        allowed = compare.allowance(self._kernels.providers["select"])
        unit = compare.SCORE_ERROR[allowed.scores(out.device.type)]
        step = (codes, weights, index_cache, rows)
        for row in self._wanted(rows):
            try:
                scores = [reference.scores(*step, row)]
                error = [compare.score_error(*step, row, unit)]
                compare.check_selection(out[row : row + 1], None, scores, out.shape[1], error)
            except compare.Mismatch as mismatch:
                self._faults.append(str(mismatch))

    def attend(
        self,
        query: torch.Tensor,
        latent_cache: torch.Tensor,
        rows: Rows,
        selected: torch.Tensor,
        scale: float,
        out: Any,
    ) -> Any:
        wanted = self._wanted(rows)
        if wanted:
            own = query[:, : self._layer.heads]
            self._measure(own, latent_cache, rows, selected, scale, wanted)
        return self._kernels.attend(query, latent_cache, rows, selected, scale, out)

    def _wanted(self, rows: Rows) -> list[int]:
        return torch.nonzero(torch.isin(rows.lengths, self._lengths)).flatten().tolist()

    def _measure(
        self,
        query: torch.Tensor,
        latent_cache: torch.Tensor,
        rows: Rows,
        selected: torch.Tensor,
        scale: float,
        at: list,
    ) -> None:
        """Share of dense softmax mass, mean over heads, of the selections of rows ``at``."""
        lengths = [int(rows.lengths[row]) for row in at]
        positions = torch.arange(max(lengths), device=query.device)
        table = rows.block_table[int(rows.requests[at[0]])]
        latents = cache.load_latent(latent_cache, tokens_to_slots(positions, table, rows.block_size))
        mine = torch.tensor(lengths, device=query.device) - 1
        rope = self._layer.rope
        other = replace(rope, index_interleaved=not rope.index_interleaved)
        scores = [self._scores(layout, positions, at, mine) for layout in (rope, other)]
        for i, (row, length) in enumerate(zip(at, lengths, strict=True)):
            mass = (scale * (query[row].float() @ latents[:length].T)).softmax(-1).mean(0)
            top_k = selected.shape[1]
            few = max(1, min(top_k, length // 4))
            configured, swapped = (reference.top_k(s[i, :length], few).long() for s in scores)
            served = selected[row][selected[row] >= 0].long()
            expected = reference.top_k(scores[0][i, :length], top_k).long()
            self._measured.append(
                {
                    "length": length,
                    "keys": few,
                    "best": mass.topk(few).values.sum().item(),
                    "chance": few / length,
                    "configured": mass[configured].sum().item(),
                    "other": mass[swapped].sum().item(),
                    "served": mass[served].sum().item(),
                    "agreement": torch.isin(served, expected).sum().item() / len(expected),
                }
            )

    def _scores(self, rope: Rope, positions: torch.Tensor, at: list[int], mine: torch.Tensor) -> torch.Tensor:
        """reference.py's index scores [rows, keys] of one RoPE layout, from projections, rounded as in the caches."""
        norms = self._norms
        keys = torch.cat(self._index_keys)[: len(positions)]
        keys = reference.layer_norm(keys, norms.index_weight, norms.index_bias, norms.index_eps)
        key_codes, key_scales = cache.quantise_index(reference.rotate_index(keys, rope, positions))
        queries = reference.rotate_index(self._index_query[at], rope, mine)
        codes, scales = cache.quantise_index(queries)
        weights = self._head_weights[at].float() * scales
        found = [
            (weight.unsqueeze(-1) * (code.float() @ key_codes.float().T).relu()).sum(0) * key_scales
            for code, weight in zip(codes, weights, strict=True)
        ]
        return torch.stack(found)

    def report(self) -> dict[str, Any]:
        """layer: its name; interleaved: the layout served; rows: what was measured of each row; faults: as text.

        Of a row: ``length`` keys it sees, the ``keys`` of them that the layouts are judged by; the shares of dense
        softmax mass that so many keys hold: ``best`` at most, ``chance`` picked at random, ``configured`` and ``other``
        by layout; ``served``: of what was really selected; ``agreement``: share of reference.py's selection in that.
        """
        return {
            "layer": self._layer.layer_name,
            "interleaved": self._layer.rope.index_interleaved,
            "providers": self._kernels.providers,
            "rows": self._measured,
            "faults": self._faults,
        }
