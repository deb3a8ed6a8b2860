"""The oracle of the whole-model proofs: transformers' model in float32, with our caches' rounding inserted.

transformers rounds nothing, while our index queries, index keys and fp8_ds_mla latents go through e4m3: the same
rounding is put into its forward here, written anew and not taken from ``vllm_dsa``.
"""

import json
import types
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

# By name and not through AutoModel: vLLM maps deepseek_v32 to transformers' V3 config in the process it is loaded in.
MODELS = {"deepseek_v32": "DeepseekV32ForCausalLM", "glm_moe_dsa": "GlmMoeDsaForCausalLM", "axk2": "AXK2ForCausalLM"}


def e4m3(x: torch.Tensor, floor: float, floor_after: bool) -> torch.Tensor:
    """x [..., n] rounded to e4m3 with one power-of-two scale for the last dim."""
    amax = x.abs().amax(-1, keepdim=True)
    ratio = (amax / 448).clamp(min=floor) if floor_after else amax.clamp(min=floor) / 448
    scale = torch.exp2(torch.ceil(torch.log2(ratio)))
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def round_index(x: torch.Tensor) -> torch.Tensor:
    """An index query or key [..., D] as the index-key cache rounds it."""
    return e4m3(x, 1e-4, floor_after=False)


def round_latent(kv: torch.Tensor, rope_key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [..., R] and rotated keys [..., P] as fp8_ds_mla rounds them."""
    groups = kv.unflatten(-1, (-1, 128))
    return e4m3(groups, 1e-4, floor_after=True).flatten(-2), rope_key.to(torch.bfloat16).float()


def _indexer_forward(self, hidden_states, q_resid, position_embeddings, attention_mask, *_, past_key_values=None):
    """transformers' indexer with rounded queries and keys, for one whole prompt."""
    batch, length, _ = hidden_states.shape
    cos, sin = (t.unsqueeze(2) for t in position_embeddings)
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]

    def turn(x):
        rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
        a, b = (rotated[..., 0::2], rotated[..., 1::2]) if self.interleaved else rotated.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    query = turn(self.wq_b(q_resid).view(batch, length, self.n_heads, self.head_dim))
    key = turn(self.k_norm(self.wk(hidden_states)).unsqueeze(2)).squeeze(2)
    query, key = round_index(query), round_index(key)
    dots = F.relu(query @ key.transpose(-1, -2).unsqueeze(1)) * self.head_dim**-0.5
    weights = self.weights_proj(hidden_states) * self.n_heads**-0.5
    scores = (weights.unsqueeze(-2) @ dots).squeeze(-2)
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    scores = scores.masked_fill(~visible, float("-inf"))
    # Stable, because relu makes rows of equal (zero) scores and the smaller position is to win.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.index_topk].to(torch.int32)


def smaller_first(scores: torch.Tensor) -> torch.Tensor:
    """A.X-K2's biased expert scores [T, experts], where those outside the chosen groups are 0, without ties among
    these: which of equal ones torch.topk takes is nobody's to say, and the smaller expert is to win."""
    return scores.where(scores != 0, -1e-30 * torch.arange(scores.shape[-1]))


class Oracle:
    """transformers' model of a checkpoint folder, float32, rounding as the caches of ``kv_cache_dtype`` do."""

    def __init__(self, path: str | Path, kv_cache_dtype: str = "auto") -> None:
        model_type = json.loads((Path(path) / "config.json").read_text())["model_type"]
        model_class = getattr(transformers, MODELS[model_type])
        config = model_class.config_class.from_pretrained(path)
        self.model = model_class.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for layer in self.model.model.layers:
            attention = layer.self_attn
            # transformers leaves these two at 1e-6 whatever the config says; vLLM and SGLang take rms_norm_eps.
            attention.q_a_layernorm.variance_epsilon = config.rms_norm_eps
            attention.kv_a_layernorm.variance_epsilon = config.rms_norm_eps
            if attention.indexer is not None:
                attention.indexer.interleaved = model_type == "glm_moe_dsa"
                attention.indexer.forward = types.MethodType(_indexer_forward, attention.indexer)
            router = getattr(layer.mlp, "gate", None)
            if model_type == "axk2" and router is not None:
                grouped = router.apply_group_scoring
                router.apply_group_scoring = lambda scores, grouped=grouped: smaller_first(grouped(scores))
            if kv_cache_dtype == "fp8_ds_mla":
                expand = attention.expand_kv
                attention.expand_kv = lambda kv, rope_key, expand=expand: expand(*round_latent(kv, rope_key))

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """float32 logits [len(tokens), vocab] of one prompt."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0].float()

    def prompt_logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probability [len(tokens) - 1] of every prompt token but the first."""
        logprobs = self.logits(tokens)[:-1].log_softmax(-1)
        return logprobs.gather(-1, torch.tensor(tokens[1:]).unsqueeze(-1)).squeeze(-1)
