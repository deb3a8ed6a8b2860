"""Every DSA fact of a model's config in one checked place. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Indexer RoPE layout by model type. The published weights fix it; a config cannot change it.
INDEX_ROPE_INTERLEAVED = {"deepseek_v32": False, "glm_moe_dsa": True, "axk2": False}

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
)
_ROPE_TYPES = ("default", "yarn", "deepseek_yarn")
# Keys that circulate in articles and stand in no published config: whoever sets them expects an effect.
_UNKNOWN_KEYS = ("rope_interleaved", "dsa_pattern")
# Of A.X-K2: key -> the value that is served. The gates are part of every published model.
_AXK2_SWITCHES = {"attention_output_gate": True, "attn_gate_fused": True, "gated_norm": True, "attention_bias": False}
_AXK2_LAYER_TYPES = ("indexed_attention", "deepseek_sparse_attention")  # transformers' new and old name of DSA


class ConfigError(ValueError):
    """A model config that this package will not serve; the message names key, value and next step."""


@dataclass(frozen=True)
class DSAConfig:
    """Sizes and choices of one DSA model, names as in its config.json.

    index_rope_interleaved: layout of the indexer's RoPE (MLA's own is interleaved, always).
    index_shared: of every layer, does it reuse the selection of the last layer before it that has an indexer?
    dense_mlp: of every layer, has it one MLP in place of experts?
    output_gate: is the attended value gated, by a part of q_b_proj that reads the raw query latent beside the normed?
    gated_norm_rank: of the gate behind the norms of A.X-K2; 0: plain norms.
    mtp_layers: draft layers that follow the num_hidden_layers of the model.
    rope: rope type, theta and scaling, as one mapping with the key ``rope_type``.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    rms_norm_eps: float
    max_position_embeddings: int
    index_rope_interleaved: bool
    index_shared: tuple[bool, ...]
    dense_mlp: tuple[bool, ...]
    output_gate: bool
    gated_norm_rank: int
    mtp_layers: int
    rope: Mapping[str, Any]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def q_b_inputs(self) -> int:
        """Width of what q_b_proj reads."""
        return self.q_lora_rank * (2 if self.output_gate else 1)

    @property
    def q_b_head_dim(self) -> int:
        """Width of what q_b_proj gives for each head: the query, then the gate."""
        return self.qk_head_dim + (self.v_head_dim if self.output_gate else 0)

    @property
    def latent_dim(self) -> int:
        """Values of one latent row: the latent and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """MLA softmax scale: qk_head_dim^-0.5, times mscale^2 under YaRN."""
        scale: float = self.qk_head_dim**-0.5 * yarn_mscale(self.rope) ** 2
        return scale

    def shares_index(self, layer: int) -> bool:
        """Has this layer no indexer of its own? An MTP layer always has one."""
        return layer < self.num_hidden_layers and self.index_shared[layer]

    def is_dense(self, layer: int) -> bool:
        """Has this layer one MLP in place of experts? An MTP layer always has experts."""
        return layer < self.num_hidden_layers and self.dense_mlp[layer]

    @classmethod
    def from_hf(cls, hf_config: Any) -> "DSAConfig":
        """Read an HF config object, or config.json as a mapping. Raises ConfigError."""
        get = (
            hf_config.get
            if isinstance(hf_config, Mapping)
            else lambda key, default=None: getattr(hf_config, key, default)
        )
        model_type = get("model_type")
        if model_type not in INDEX_ROPE_INTERLEAVED:
            raise ConfigError(
                f"model_type: {model_type!r} is not a DSA model that vllm-dsa serves "
                f"({', '.join(INDEX_ROPE_INTERLEAVED)}). Set VLLM_DSA_DISABLE=1 to serve it with stock vLLM."
            )
        _refuse_layout_keys(get, model_type)
        gated = model_type == "axk2"
        if gated:
            _refuse_axk2_keys(get)
        values = {key: _positive_int(get, key) for key in _SIZES}
        if values["qk_rope_head_dim"] > values["index_head_dim"] or values["qk_rope_head_dim"] % 2:
            raise ConfigError(
                f"qk_rope_head_dim: {values['qk_rope_head_dim']} must be even and at most index_head_dim "
                f"({values['index_head_dim']}), whose first dims it rotates. Restore the published config.json."
            )
        return cls(
            model_type=model_type,
            rms_norm_eps=float(get("rms_norm_eps", 1e-6)),
            max_position_embeddings=_positive_int(get, "max_position_embeddings"),
            index_rope_interleaved=INDEX_ROPE_INTERLEAVED[model_type],
            index_shared=_index_shared(get, values["num_hidden_layers"]),
            dense_mlp=_dense_mlp(get, values["num_hidden_layers"]),
            output_gate=gated,
            gated_norm_rank=_positive_int(get, "gated_norm_rank") if gated else 0,
            # Nothing published says what an MTP layer of A.X-K2 is made of.
            mtp_layers=0 if gated else get("num_nextn_predict_layers") or 0,
            rope=_rope(get),
            **values,
        )


def yarn_mscale(rope: Mapping[str, Any]) -> float:
    """YaRN's mscale = 0.1 * mscale_all_dim * ln(factor) + 1 (DeepSeek-V3 report, section 4.3); 1 without YaRN."""
    from math import log

    factor, all_dim = float(rope.get("factor", 1.0)), float(rope.get("mscale_all_dim", 0.0))
    if rope["rope_type"] == "default" or factor <= 1.0:
        return 1.0
    return 0.1 * all_dim * log(factor) + 1.0


def _refuse_layout_keys(get: Any, model_type: str) -> None:
    for key in _UNKNOWN_KEYS:
        if get(key) is not None:
            raise ConfigError(
                f"{key}: {get(key)!r} is a key of no published DSA config and would have no effect. "
                f"Remove it from config.json (and --hf-overrides)."
            )
    if get("rope_interleave", True) is not True:
        raise ConfigError(
            f"rope_interleave: {get('rope_interleave')!r} is refused: MLA's RoPE is interleaved in every DSA model, "
            f"another layout gives fluent text up to index_topk tokens and garbage after. Remove the key."
        )
    wanted = INDEX_ROPE_INTERLEAVED[model_type]
    if get("indexer_rope_interleave", wanted) is not wanted:
        raise ConfigError(
            f"indexer_rope_interleave: {get('indexer_rope_interleave')!r} is refused: the indexer of {model_type} has "
            f"{'interleaved' if wanted else 'non-interleaved'} RoPE, another layout gives fluent text up to index_topk "
            f"tokens and garbage after. Remove the key or set it to {str(wanted).lower()}."
        )


def _refuse_axk2_keys(get: Any) -> None:
    for key, served in _AXK2_SWITCHES.items():
        if get(key, served) is not served:
            raise ConfigError(
                f"{key}: {get(key)!r} is refused: every published A.X-K2 has {served}. Restore the published "
                f"config.json or remove the key."
            )
    other = sorted(set(get("layer_types") or ()) - set(_AXK2_LAYER_TYPES))
    if other:
        raise ConfigError(
            f"layer_types: {other[0]!r} is refused: every layer of A.X-K2 is {' or '.join(_AXK2_LAYER_TYPES)}. Restore "
            f"the published config.json."
        )
    groups, chosen, experts = get("n_group"), get("topk_group"), get("n_routed_experts")
    if groups is None and chosen is None:
        return
    for key in ("n_group", "topk_group", "n_routed_experts"):
        _positive_int(get, key)
    # Two experts a group at least: a group's score is the sum of its two best.
    if chosen > groups or experts % groups or experts < 2 * groups:
        raise ConfigError(
            f"n_group: {groups} with topk_group: {chosen} and n_routed_experts: {experts} is refused: experts must "
            f"fall into n_group groups of equal size, two or more in each, of which topk_group are chosen. Restore the "
            f"published config.json."
        )


def _positive_int(get: Any, key: str) -> int:
    value = get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{key}: {value!r} is refused: it must be a whole number of at least 1. "
            f"Restore the published config.json or correct --hf-overrides."
        )
    return value


def _dense_mlp(get: Any, layers: int) -> tuple[bool, ...]:
    """Published as the number of dense layers at the start, or as transformers' list of "dense" and "sparse"."""
    kinds = get("mlp_layer_types")
    if get("first_k_dense_replace") is not None or kinds is None:
        first, every = get("first_k_dense_replace") or 0, get("moe_layer_freq") or 1
        return tuple(i < first or i % every != 0 for i in range(layers))
    if len(kinds) < layers or not set(kinds) <= {"dense", "sparse"}:
        raise ConfigError(
            f"mlp_layer_types: {kinds!r} is refused: it must name 'dense' or 'sparse' for each of the {layers} layers. "
            f"Restore the published config.json."
        )
    return tuple(kind == "dense" for kind in kinds[:layers])


def _index_shared(get: Any, layers: int) -> tuple[bool, ...]:
    """Layer sharing as published in one of three ways, which must agree: a list of "full" and "shared", a pattern of F
    and S, or one full layer in every index_topk_freq, counted from layer index_skip_topk_offset - 1."""
    found: dict[str, tuple[bool, ...]] = {}
    for key, full, shared in (("indexer_types", "full", "shared"), ("index_topk_pattern", "F", "S")):
        kinds = get(key)
        if kinds is None:
            continue
        if len(kinds) < layers or not set(kinds) <= {full, shared} or kinds[0] != full:
            raise ConfigError(
                f"{key}: {kinds!r} is refused: it must name {full!r} or {shared!r} for each of the {layers} layers, "
                f"the first being {full!r}. Restore the published config.json."
            )
        found[key] = tuple(kind == shared for kind in kinds[:layers])
    if get("index_topk_freq") is not None and "index_topk_pattern" not in found:
        every, offset = _positive_int(get, "index_topk_freq"), get("index_skip_topk_offset", 2)
        found["index_topk_freq"] = tuple(max(i - offset + 1, 0) % every != 0 for i in range(layers))
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"{' and '.join(found)} contradict each other on which layers share a selection. Restore the published "
            f"config.json, or override both keys."
        )
    return next(iter(found.values()), (False,) * layers)


def _rope(get: Any) -> dict[str, Any]:
    """One mapping from either spelling: rope_parameters, or rope_scaling with rope_theta beside it."""
    rope = dict(get("rope_parameters") or get("rope_scaling") or {})
    rope_type = rope.get("rope_type") or rope.pop("type", None) or "default"
    if rope_type not in _ROPE_TYPES:
        raise ConfigError(
            f"rope type: {rope_type!r} is refused: DSA models use {' or '.join(_ROPE_TYPES[:2])}. "
            f"Restore rope_scaling of the published config.json."
        )
    rope["rope_type"] = rope_type
    rope.setdefault("rope_theta", get("rope_theta") or 10000.0)
    return rope
