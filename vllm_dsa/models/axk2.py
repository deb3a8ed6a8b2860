"""A.X-K2 and A.X-K2-Light: DeepSeek-V3.2's decoder with three changes.

The attended values are gated before o_proj; norms of layer inputs have a low-rank gate behind them, but for the one
before a dense MLP; and where experts are routed in groups, an expert outside the chosen groups scores 0, not -inf.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_dsa.attention import DSAAttention
from vllm_dsa.compat import DeepseekV2MLP, DeepseekV2MoE, FusedMoEFactory, GateLinear, ReplicatedLinear, RMSNorm
from vllm_dsa.config import DSAConfig
from vllm_dsa.models.deepseek_v32 import DecoderLayer, DeepseekV32ForCausalLM, DeepseekV32Model


class GatedAttention(DSAAttention):
    """q_b_proj reads the query latent normed and raw, and gives each head its query and its gate (v_head_dim).

    One projection, as stored: scale blocks of FP8 weights cross the border between the two.
    """

    def queries(self, query_latent: torch.Tensor, raw_latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        both = self.q_b_proj(torch.cat([query_latent, raw_latent], dim=-1))[0]
        queries, gate = both.view(-1, self.heads, config.q_b_head_dim).split(
            [config.qk_head_dim, config.v_head_dim], dim=-1
        )
        return queries, gate

    def output(self, values: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().output(_gated(values, gate), None)


class GatedRMSNorm(nn.Module):
    """RMSNorm times the sigmoid of an MLP of its own output; called as vLLM's RMSNorm is.

    Parameters carry the checkpoint's names; the MLP is unquantised in every published checkpoint.
    """

    def __init__(self, hidden_size: int, rank: int, eps: float, prefix: str) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size, eps=eps)
        self.W_down = ReplicatedLinear(hidden_size, rank, bias=False, quant_config=None, prefix=f"{prefix}.W_down")
        self.W_up = ReplicatedLinear(rank, hidden_size, bias=False, quant_config=None, prefix=f"{prefix}.W_up")

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """x [T, hidden] to the gated norm; with a residual, to that of their sum and the sum."""
        normed, residual = (self.norm(x), None) if residual is None else self.norm(x, residual)
        gated = _gated(normed, self.W_up(F.silu(self.W_down(normed)[0]))[0])
        return gated if residual is None else (gated, residual)


def _gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return (x * torch.sigmoid(gate.float())).to(x.dtype)


class GroupedMoE(DeepseekV2MoE):
    """vLLM's mixture of experts with A.X-K2's grouped routing; only ``forward`` is inherited."""

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        nn.Module.__init__(self)
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.groups, self.chosen_groups = config.n_group, config.topk_group
        self.is_sequence_parallel = vllm_config.parallel_config.use_sequence_parallel_moe
        # The gate's logits decide which experts run: they stay float32.
        self.gate = GateLinear(
            config.hidden_size, config.n_routed_experts, out_dtype=torch.float32, prefix=f"{prefix}.gate"
        )
        self.gate.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts, dtype=torch.float32))
        self.shared_experts = (
            DeepseekV2MLP(
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size * config.n_shared_experts,
                hidden_act=config.hidden_act,
                quant_config=quant_config,
                is_sequence_parallel=self.is_sequence_parallel,
                reduce_results=False,
                prefix=f"{prefix}.shared_experts",
            )
            if config.n_shared_experts
            else None
        )
        self.experts = FusedMoEFactory(
            shared_experts=self.shared_experts,
            gate=self.gate,
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            quant_config=quant_config,
            custom_routing_function=self.route,
            routed_scaling_factor=config.routed_scaling_factor,
            apply_routed_scale_to_output=True,
            is_sequence_parallel=self.is_sequence_parallel,
            router_logits_dtype=torch.float32,
            prefix=f"{prefix}.experts",
        )

    def route(
        self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Router logits [T, experts] to weights [T, topk] float32 and experts [T, topk] int32 of each token.

        Ties go to the smaller expert: those outside the chosen groups all score 0, and where biases are negative they
        are taken before chosen ones.
        """
        scores = gating_output.float().sigmoid()
        biased = (scores + self.gate.e_score_correction_bias).unflatten(-1, (self.groups, -1))  # [T, groups, experts]
        group_scores = biased.topk(2, dim=-1).values.sum(dim=-1)
        best = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, : self.chosen_groups]
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        ranked = biased.masked_fill(outside.unsqueeze(-1), 0.0).flatten(1)
        experts = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
        weights = scores.gather(1, experts)
        if renormalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights, experts.int()


class AXK2DecoderLayer(DecoderLayer):
    """Gated norm, gated DSA attention, then gated norm and experts, or plain norm and an MLP."""

    attention = GatedAttention

    def __init__(self, vllm_config: Any, config: DSAConfig, selection: torch.Tensor, prefix: str) -> None:
        super().__init__(vllm_config, config, selection, prefix)
        gated = ["input_layernorm"]
        if not config.is_dense(int(prefix.rsplit(".", 1)[1])):
            gated.append("post_attention_layernorm")
        for name in gated:
            norm = GatedRMSNorm(config.hidden_size, config.gated_norm_rank, config.rms_norm_eps, f"{prefix}.{name}")
            setattr(self, name, norm)

    def experts(self, vllm_config: Any, prefix: str) -> nn.Module:
        # With one group no expert is outside: vLLM's own routing is the same, and has kernels.
        if vllm_config.model_config.hf_config.n_group > 1:
            return GroupedMoE(vllm_config, prefix)
        return super().experts(vllm_config, prefix)


class AXK2Model(DeepseekV32Model):
    layer = AXK2DecoderLayer


class AXK2ForCausalLM(DeepseekV32ForCausalLM):
    """The model class that vLLM instantiates for AXK2ForCausalLM."""

    decoder = AXK2Model
