"""The MTP draft of DeepSeek-V3.2 and GLM-5: one decoder layer that guesses the token after next.

It reads what vLLM hands it: of position i the target's final hidden state and the embedding of token i + 1, to guess
token i + 2. For further guesses it is run again on its own hidden state. Whatever it guesses, the target decides.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vllm_dsa.attention import new_selection
from vllm_dsa.checkpoint import MTP_COPIES
from vllm_dsa.compat import (
    LogitsProcessor,
    ReplicatedLinear,
    RMSNorm,
    maybe_prefix,
    mtp_layer_of_weight,
    reload_in_place,
)
from vllm_dsa.config import DSAConfig
from vllm_dsa.models.deepseek_v32 import DecoderLayer, DeepseekV32ForCausalLM
from vllm_dsa.models.draft_weights import drafts
from vllm_dsa.models.formats import named, require_kernels


class MTPLayer(DecoderLayer):
    """A decoder layer between the fusion of its two inputs and a final norm of its own.

    Parameters carry the checkpoint's names, as the decoder's do.
    """

    def __init__(self, vllm_config: Any, config: DSAConfig, selection: torch.Tensor, prefix: str) -> None:
        super().__init__(vllm_config, config, selection, prefix)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(hidden, eps=eps), RMSNorm(hidden, eps=eps)
        # Unquantised in every checkpoint that its publisher has made.
        self.eh_proj = ReplicatedLinear(2 * hidden, hidden, bias=False, quant_config=None, prefix=f"{prefix}.eh_proj")
        self.shared_head = nn.Module()
        self.shared_head.norm = RMSNorm(hidden, eps=eps)

    def draft(self, positions: torch.Tensor, embedded: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [T], embeddings of the tokens after them and hidden states at them [T, hidden], to [T, hidden]."""
        fused = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden_states)], dim=-1))[0]
        return self.shared_head.norm(*self(positions, fused, None))[0]


class MTPModel(nn.Module):
    """What vLLM reaches into: it sets ``embed_tokens``, and calls the two methods where drafts share a selection."""

    def __init__(self, vllm_config: Any, config: DSAConfig, prefix: str) -> None:
        super().__init__()
        selection = new_selection(vllm_config, config)
        index = str(config.num_hidden_layers)
        self.layers = nn.ModuleDict({index: MTPLayer(vllm_config, config, selection, f"{prefix}.layers.{index}")})

    @property
    def layer(self) -> MTPLayer:
        return next(iter(self.layers.values()))

    def set_skip_topk(self, skip: bool) -> None:
        """index_share_for_mtp_iteration: is the selection of a draft's first step to serve its next ones?"""
        self.layer.self_attn.reuses_selection = skip

    def compact_topk_indices(self, slot_ids: torch.Tensor) -> None:
        """Move the selections of rows slot_ids [n], each request's last, to rows 0:n, where the next step looks."""
        selection = self.layer.self_attn.selection
        selection[: len(slot_ids)] = selection[slot_ids]


class DeepseekV32MTP(DeepseekV32ForCausalLM):
    """The model class that vLLM instantiates for the drafts of both families.

    vLLM rewrites the draft's config (its model type, for one), so every fact is taken from the target's. Embedding and
    head are the target's: after loading, vLLM sets them as ``model.embed_tokens`` and ``lm_head``.
    """

    is_draft = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = self._read(vllm_config)
        with named(vllm_config):
            self.model = MTPModel(vllm_config, config, prefix=maybe_prefix(prefix, "model"))
        require_kernels(self.model, vllm_config)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.model_config = vllm_config.model_config
        self.stored_names: set[str] = set()
        drafts.add(self)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next tokens' ids and positions [T], hidden states [T, hidden] of the target or of the step before.

        Returns the hidden states [T, hidden] that logits come from, and those that the next step reads: the same.
        """
        embedded = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        drafted = self.model.layer.draft(positions, embedded, hidden_states)
        return drafted, drafted

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As the model's; keeps the names, which a reload must bring again."""

        def named() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if not self._is_skipped(name):
                    self.stored_names.add(name)
                    yield name, tensor

        return super().load_weights(named())

    def is_draft_of(self, model: Any) -> bool:
        """Does this draft read the embedding of that model?"""
        shared = getattr(self.model, "embed_tokens", None)
        return shared is not None and shared is model.model.embed_tokens

    def reload(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load these in place of those that it has; embedding and head, which are the model's, stay out of it."""
        places = ((self.model, "embed_tokens"), (self, "lm_head"))
        taken = [(module, name, module._modules.pop(name)) for module, name in places if name in module._modules]
        try:
            reload_in_place(self, weights, self.model_config)
        finally:
            for module, name, child in taken:
                module.add_module(name, child)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """vLLM asks before it reads a file: one that holds nothing else is left alone."""
        return self._is_skipped(name)

    def _is_skipped(self, name: str) -> bool:
        return mtp_layer_of_weight(self.config, name) is None or any(copy in name for copy in MTP_COPIES)
