"""Every DSA fact of a model's config in one checked place. Standard library only."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Indexer RoPE layout by model type. The published weights fix it; a config cannot change it.
INDEX_ROPE_INTERLEAVED = {"deepseek_v32": False, "glm_moe_dsa": True, "axk2": False}
PUBLISHED_TOP_K = 2048

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
# Keys of experts, or of what surrounds attention: each with the least that it may be, where it is there at all.
_LEAST = {
    "vocab_size": 1,
    "intermediate_size": 1,
    "moe_intermediate_size": 1,
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "num_key_value_heads": 1,
    "moe_layer_freq": 1,
    "index_topk_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "index_skip_topk_offset": 0,
    "num_nextn_predict_layers": 0,
}
# Those of them that publishers, or transformers, leave at null.
_MAY_BE_NULL = {"first_k_dense_replace", "moe_layer_freq", "index_topk_freq", "index_skip_topk_offset", "n_group"}
_MAY_BE_NULL |= {"topk_group", "n_shared_experts", "num_nextn_predict_layers", "num_key_value_heads"}
# Of a rope type, the keys that take effect beside rope_type (or type) and rope_theta.
_YARN_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "yarn": (*_YARN_KEYS, "attention_factor", "truncate"),
    "deepseek_yarn": _YARN_KEYS,  # vLLM's name for it; transformers has none
}
# Keys that stand in no published config, or stand elsewhere: whoever sets them expects an effect.
_UNKNOWN_KEYS = ("rope_interleaved", "dsa_pattern", "rotary_emb_base", "rotary_pct", "rotary_emb_fraction", "rope_dim")
_NESTED_KEYS = (
    *("rope_type", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
    *("truncate", "extrapolation_factor", "mrope_section"),
)
_RESTORE = "Restore the published config.json or correct --hf-overrides."
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
    rope: "rope_type" ("default", "yarn") and "rope_theta"; under YaRN also "factor", "attention_factor" (of cosines and
        sines), "mscale" (of the softmax scale, squared), and "low" and "high", the pairs between which it ramps.
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
        scale: float = self.qk_head_dim**-0.5 * self.rope.get("mscale", 1.0) ** 2
        return scale

    def top_k(self, max_model_len: int) -> int:
        """Positions that a row of a selection has room for: index_topk, but no more than there are keys, rounded up to
        what vendor kernels read. What is published stays as it is, for the sake of its bits."""
        return min(self.index_topk, max(PUBLISHED_TOP_K, -(-max_model_len // 128) * 128))

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
        if not isinstance(model_type, str) or model_type not in INDEX_ROPE_INTERLEAVED:
            raise ConfigError(
                f"model_type: {model_type!r} is not a DSA model that vllm-dsa serves "
                f"({', '.join(INDEX_ROPE_INTERLEAVED)}). Set VLLM_DSA_DISABLE=1 to serve it with stock vLLM."
            )
        _refuse_layout_keys(get, model_type)
        gated = model_type == "axk2"
        if gated:
            _refuse_axk2_keys(get)
        _refuse_kinds(get)
        values = {key: _whole(key, get(key)) for key in _SIZES}
        if values["qk_rope_head_dim"] > values["index_head_dim"] or values["qk_rope_head_dim"] % 2:
            raise ConfigError(
                f"qk_rope_head_dim: {values['qk_rope_head_dim']} must be even and at most index_head_dim "
                f"({values['index_head_dim']}), whose first dims it rotates. Restore the published config.json."
            )
        positions = _whole("max_position_embeddings", get("max_position_embeddings"))
        return cls(
            model_type=model_type,
            rms_norm_eps=_number("rms_norm_eps", get("rms_norm_eps", 1e-6), above=0),
            max_position_embeddings=positions,
            index_rope_interleaved=INDEX_ROPE_INTERLEAVED[model_type],
            index_shared=_index_shared(get, values["num_hidden_layers"]),
            dense_mlp=_dense_mlp(get, values["num_hidden_layers"]),
            output_gate=gated,
            gated_norm_rank=_whole("gated_norm_rank", get("gated_norm_rank")) if gated else 0,
            # Nothing published says what an MTP layer of A.X-K2 is made of.
            mtp_layers=0 if gated else get("num_nextn_predict_layers") or 0,
            rope=_rope(get, isinstance(hf_config, Mapping), values["qk_rope_head_dim"], positions),
            **values,
        )


def _refuse_layout_keys(get: Any, model_type: str) -> None:
    for key in _UNKNOWN_KEYS:
        if get(key) is not None:
            raise ConfigError(
                f"{key}: {get(key)!r} is a key of no published DSA config and would have no effect. "
                f"Remove it from config.json (and --hf-overrides)."
            )
    for key in _NESTED_KEYS:
        if get(key) is not None:
            raise ConfigError(
                f"{key}: {get(key)!r} is refused: at the top level of config.json nobody reads it. Move it into "
                f"rope_parameters (--hf-overrides: with all its other keys), or remove it."
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


def _refuse_kinds(get: Any) -> None:
    """Refuse what vLLM or a tool would stumble over later, without a word about the key."""
    for key, least in _LEAST.items():
        value = get(key, least)
        if value is not None or key not in _MAY_BE_NULL:
            _whole(key, value, least)
    _number("routed_scaling_factor", get("routed_scaling_factor", 1.0))
    for key in ("attention_bias", "mlp_bias"):
        if get(key, False) not in (False, None):
            raise ConfigError(
                f"{key}: {get(key)!r} is refused: no DSA model is published with it, and it would have no effect. Set "
                f"it to false; a checkpoint that was trained with biases is not served."
            )
    if get("tie_word_embeddings", False) not in (True, False, None):
        raise ConfigError(
            f"tie_word_embeddings: {get('tie_word_embeddings')!r} is refused: it must be true or false. {_RESTORE}"
        )
    if get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act: {get('hidden_act')!r} is refused: DSA models have 'silu'. {_RESTORE}")
    if not isinstance(get("norm_topk_prob", True), bool):
        raise ConfigError(f"norm_topk_prob: {get('norm_topk_prob')!r} is refused: it must be true or false. {_RESTORE}")
    architectures, quantisation = get("architectures"), get("quantization_config")
    if isinstance(architectures, str) or not isinstance(architectures or (), Sequence):
        raise ConfigError(f"architectures: {architectures!r} is refused: it must be a list of names. {_RESTORE}")
    _refuse_quantisation_kinds(quantisation)
    chosen, experts = get("num_experts_per_tok"), get("n_routed_experts")
    if chosen is not None and experts is not None and chosen > experts:
        raise ConfigError(
            f"num_experts_per_tok: {chosen} is refused: there are n_routed_experts {experts} to choose from. {_RESTORE}"
        )
    groups, chosen_groups = get("n_group"), get("topk_group")
    if groups is None or chosen_groups is None or experts is None:
        return
    # Two experts a group at least: a group's score is the sum of its two best.
    if chosen_groups > groups or experts % groups or experts < 2 * groups:
        raise ConfigError(
            f"n_group: {groups} with topk_group: {chosen_groups} and n_routed_experts: {experts} is refused: experts "
            f"must fall into n_group groups of equal size, two or more in each, of which topk_group are chosen. "
            f"Restore the published config.json."
        )


def refuse_absent(get: Any) -> None:
    """Of what a checkpoint's tensors are counted by: transformers would take a published model's sizes for what is
    missing."""
    for key in ("vocab_size", "intermediate_size", "moe_intermediate_size", "n_routed_experts"):
        if get(key) is None:
            raise ConfigError(f"{key}: it is missing. {_RESTORE}")


def _refuse_quantisation_kinds(quantisation: Any) -> None:
    def refuse(key: str, value: Any, kind: str) -> None:
        raise ConfigError(f"quantization_config{key}: {value!r} is refused: it must be {kind}. {_RESTORE}")

    if isinstance(quantisation, Sequence | int | float):
        refuse("", quantisation, "a mapping with the key quant_method")
    if not isinstance(quantisation, Mapping):
        return  # none, or an object of a library that has read it
    if not isinstance(quantisation.get("quant_method", ""), str | None):
        refuse(".quant_method", quantisation["quant_method"], "a name")
    block = quantisation.get("weight_block_size")
    whole = isinstance(block, list | tuple) and all(type(n) is int and n > 0 for n in block)
    if block is not None and not (whole and len(block) == 2):
        refuse(".weight_block_size", block, "two whole numbers of at least 1")
    groups = quantisation.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        refuse(".config_groups", groups, "a mapping")
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else group
        if not isinstance(weights, Mapping | None):
            refuse(f".config_groups.{name}", group, "a mapping with the mapping weights")


def _refuse_axk2_keys(get: Any) -> None:
    for key, served in _AXK2_SWITCHES.items():
        if get(key, served) is not served:
            raise ConfigError(
                f"{key}: {get(key)!r} is refused: every published A.X-K2 has {served}. Restore the published "
                f"config.json or remove the key."
            )
    kinds = get("layer_types") or ()
    other = [kind for kind in kinds if kind not in _AXK2_LAYER_TYPES] if isinstance(kinds, Sequence) else [kinds]
    if other:
        raise ConfigError(
            f"layer_types: {other[0]!r} is refused: every layer of A.X-K2 is {' or '.join(_AXK2_LAYER_TYPES)}. Restore "
            f"the published config.json."
        )
    if get("n_group") is not None or get("topk_group") is not None:
        for key in ("n_group", "topk_group", "n_routed_experts"):
            _whole(key, get(key))


def _whole(key: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise ConfigError(f"{key}: {value!r} is refused: it must be a whole number of at least {least}. {_RESTORE}")
    return value


def _number(key: str, value: Any, above: float = -math.inf, least: float = -math.inf) -> float:
    """``value``, if it is a finite number above ``above`` and at least ``least``."""
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not above < value < 1e30 or value < least or value < -1e30:
        bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        raise ConfigError(f"{key}: {value!r} is refused: it must be a number{bound}. {_RESTORE}")
    return float(value)


def _dense_mlp(get: Any, layers: int) -> tuple[bool, ...]:
    """Published as the number of dense layers at the start, or as transformers' list of "dense" and "sparse"."""
    kinds = get("mlp_layer_types")
    if get("first_k_dense_replace") is not None or kinds is None:
        first, every = get("first_k_dense_replace") or 0, get("moe_layer_freq") or 1
        return tuple(i < first or i % every != 0 for i in range(layers))
    if not _names(kinds, {"dense", "sparse"}, layers):
        raise ConfigError(
            f"mlp_layer_types: {kinds!r} is refused: it must name 'dense' or 'sparse' for each of the {layers} layers. "
            f"Restore the published config.json."
        )
    return tuple(kind == "dense" for kind in kinds[:layers])


def _names(kinds: Any, allowed: set[str], layers: int) -> bool:
    """Is this a list, or a string of letters, that gives each of so many layers one of the allowed names?"""
    return isinstance(kinds, Sequence) and len(kinds) >= layers and all(kind in tuple(allowed) for kind in kinds)


def _index_shared(get: Any, layers: int) -> tuple[bool, ...]:
    """Layer sharing as published in one of three ways, which must agree: a list of "full" and "shared", a pattern of F
    and S, or one full layer in every index_topk_freq, counted from layer index_skip_topk_offset - 1."""
    found: dict[str, tuple[bool, ...]] = {}
    for key, full, shared in (("indexer_types", "full", "shared"), ("index_topk_pattern", "F", "S")):
        kinds = get(key)
        if kinds is None:
            continue
        if not _names(kinds, {full, shared}, layers) or kinds[0] != full:
            raise ConfigError(
                f"{key}: {kinds!r} is refused: it must name {full!r} or {shared!r} for each of the {layers} layers, "
                f"the first being {full!r}. Restore the published config.json."
            )
        found[key] = tuple(kind == shared for kind in kinds[:layers])
    if get("index_topk_freq") is not None and "index_topk_pattern" not in found:
        every, offset = _whole("index_topk_freq", get("index_topk_freq")), get("index_skip_topk_offset")
        offset = 2 if offset is None else offset
        found["index_topk_freq"] = tuple(max(i - offset + 1, 0) % every != 0 for i in range(layers))
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"{' and '.join(found)} contradict each other on which layers share a selection. Restore the published "
            f"config.json, or override both keys."
        )
    return next(iter(found.values()), (False,) * layers)


def _rope(get: Any, is_file: bool, dims: int, positions: int) -> dict[str, Any]:
    """DSAConfig.rope of either spelling: rope_parameters, or rope_scaling with rope_theta beside it. Every key takes
    the effect that it has in transformers, or is refused; of a file transformers reads rope_scaling first."""
    name = "rope_scaling" if get("rope_scaling") else "rope_parameters"
    given = get(name)
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{name}: {given!r} is refused: it must be a mapping. {_RESTORE}")
    rope = dict(given or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ConfigError(
            f"rope type: {kind!r} is refused: DSA models use default or yarn. Restore rope_scaling of the published "
            f"config.json."
        )
    if rope.get("type", kind) != kind:
        raise ConfigError(f"{name}: rope_type {kind!r} beside type {rope['type']!r} is refused. Remove one of them.")
    rope["rope_theta"] = _theta(get, rope, is_file)
    if get("original_max_position_embeddings", rope) is not rope:  # wherever it is, transformers takes it
        rope["original_max_position_embeddings"] = get("original_max_position_embeddings")
    for key in ("partial_rotary_factor", *rope):
        value = rope.get(key, get(key)) if key == "partial_rotary_factor" else rope[key]
        if key in ("rope_type", "type", "rope_theta", *_ROPE_KEYS[kind]) or value is None:
            continue
        if key == "partial_rotary_factor" and not isinstance(value, bool) and value == 1:
            continue
        raise ConfigError(_no_effect(key, value, kind))
    theta = _number("rope_theta", rope["rope_theta"], above=1)
    return {"rope_type": "default", "rope_theta": theta} if kind == "default" else _yarn(rope, kind, dims, positions)


def _no_effect(key: str, value: Any, kind: str) -> str:
    refused = f"{key}: {value!r} is refused"
    if key == "partial_rotary_factor":
        return f"{refused}: every DSA model rotates all of qk_rope_head_dim. Remove the key."
    if isinstance(value, Mapping):
        return f"{refused}: RoPE is the same in every layer of a DSA model. Write the inner mapping as rope_parameters."
    if key in _ROPE_KEYS["yarn"]:
        return (
            f"{refused} beside rope type {kind!r}, where it has no effect. Set rope_type to 'yarn', or remove the key."
        )
    return f"{refused}: no such key takes effect in a DSA model's rope_parameters or rope_scaling. Remove it."


def _theta(get: Any, rope: Mapping[str, Any], is_file: bool) -> Any:
    """rope_theta of rope_parameters, else the one beside it. vLLM's config has it in rope_parameters, but where
    --hf-overrides replaced these; one that is beside them too came by --hf-overrides, and nobody would read it."""
    beside = get("rope_theta", rope)
    if "rope_theta" not in rope:
        if beside is not rope:
            return beside
        if is_file:
            return 10000.0  # as transformers
        raise ConfigError(
            "rope_theta: it is missing, since --hf-overrides of rope_parameters or rope_scaling replace all their "
            "keys. Name rope_theta among them, as it is in config.json."
        )
    if not is_file and beside is not rope and beside != rope["rope_theta"]:
        raise ConfigError(
            f"rope_theta: {beside!r} is refused beside rope_parameters, whose rope_theta {rope['rope_theta']!r} is the "
            f'one that is read. Pass all keys: --hf-overrides \'{{"rope_parameters": {{"rope_theta": ...}}}}\'.'
        )
    return rope["rope_theta"]


def _yarn(rope: Mapping[str, Any], kind: str, dims: int, positions: int) -> dict[str, Any]:
    """DSAConfig.rope under YaRN, by transformers' formulas (the paper's, arXiv 2309.00071); null is as if absent."""
    given = {key: value for key, value in rope.items() if value is not None}
    original = _number(
        "original_max_position_embeddings", rope.get("original_max_position_embeddings", positions), above=0
    )
    if "factor" not in rope:
        raise ConfigError(
            f"factor: it is missing, and rope type {kind!r} needs it: how many times longer the context has become. "
            f"Restore the published config.json, or add it."
        )
    # 0 counts as absent: transformers asks for truth.
    scales = {key: _number(key, given[key], least=0) if key in given else 0 for key in ("mscale", "mscale_all_dim")}
    if rope["factor"] is None and scales["mscale_all_dim"]:
        raise ConfigError(
            "factor: None is refused beside mscale_all_dim, which is scaled by it. Write the number: "
            "max_position_embeddings / original_max_position_embeddings."
        )
    factor = _number("factor", given.get("factor", positions / original), above=0)
    theta = _number("rope_theta", rope["rope_theta"], above=1)

    def mscale(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if kind == "deepseek_yarn":  # where it is absent, vLLM's class takes 1
        attention = mscale(scales["mscale"] if "mscale" in given else 1) / mscale(scales["mscale_all_dim"])
    elif "attention_factor" in given:
        attention = _number("attention_factor", given["attention_factor"], above=0)
    elif all(scales.values()):
        attention = mscale(scales["mscale"]) / mscale(scales["mscale_all_dim"])
    else:
        attention = mscale(1)
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"truncate: {truncate!r} is refused: it must be true or false. {_RESTORE}")

    def border(key: str, default: float, rounded: Callable[[float], int]) -> float:
        turns = _number(key, given.get(key, default), least=0) or default
        pair = dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        return rounded(pair) if truncate else pair

    low, high = max(border("beta_fast", 32, math.floor), 0), min(border("beta_slow", 1, math.ceil), dims - 1)
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "attention_factor": attention,
        "mscale": mscale(scales["mscale_all_dim"]) if scales["mscale_all_dim"] else 1.0,
        "low": low,
        "high": high if high != low else high + 0.001,
    }
