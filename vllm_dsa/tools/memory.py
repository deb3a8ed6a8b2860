"""Bytes of a model's weights, by part and by GPU, and the pages that its caches are cut into. Standard library only.

Weights are counted as they lie on a GPU: sharded as vLLM shards them, and with those that this package derives while it
loads: W_UK and W_UV beside kv_b_proj, and one weight of the indexer's wk and weights_proj beside both.

They are counted from safetensors headers where the files are there, else from config.json, which is exact for plain and
block-scaled FP8 checkpoints under their published names and an estimate for other quantisations.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vllm_dsa import checkpoint
from vllm_dsa.checkpoint_files import CheckpointError, read
from vllm_dsa.config import ConfigError, DSAConfig
from vllm_dsa.tools import model as models

PARTS = (
    "embedding",
    "attention",
    "derived",
    "indexer",
    "dense MLP",
    "shared experts",
    "experts",
    "router, norms",
    "head",
    "MTP",
)
BLOCK = 64  # tokens a page, vllm_dsa.platform's choice on GPUs
STORED_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
STORED_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
# The modules that a quantised checkpoint quantises, less those that it lists as left out.
LINEAR = re.compile(
    r"\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|wq_b|wk|gate_proj|up_proj|down_proj)\.weight$"
)
_SHARDED_ATTENTION = re.compile(r"\.self_attn\.(q_b_proj|kv_b_proj|o_proj)\.")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Layout:
    """How a model is spread: tensor, data and pipeline parallel sizes, and whether experts go whole to ranks."""

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: bool = False

    @property
    def gpus(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def shared_expert_ranks(self) -> int:
        """Ranks that a shared expert is split over; vLLM keeps it whole where it splits an MoE's tokens instead."""
        return 1 if self.ep and self.tp > 1 and self.dp > 1 else self.tp


@dataclass(frozen=True)
class Weights:
    """Bytes by (part, layer, how it is sharded); layer is -1 for what belongs to none. Sharding: see ``_sharding``."""

    bytes: Mapping[tuple[str, int, str], int]
    format: str  # "bfloat16", "fp8", "awq 4 bits", ...
    source: str  # what was counted
    exact: bool

    def total(self, part: str) -> int:
        """Bytes of one part of the whole model, once."""
        return sum(size for (name, _, _), size in self.bytes.items() if name == part)

    def on_gpu(self, part: str, layout: Layout, stage: range, last: int) -> int:
        """Bytes of one part on a GPU of the pipeline stage that has the layers ``stage``, of 0 to ``last``."""
        ranks = {"whole": 1, "tp": layout.tp, "shared": layout.shared_expert_ranks, "experts": layout.tp * layout.dp}
        kept = ((key, size) for key, size in self.bytes.items() if key[0] == part and key[2] != "dropped")
        total = 0
        for (_, layer, sharding), size in kept:
            here = layer in stage if layer >= 0 else (0 if part == "embedding" else last) in stage
            total += math.ceil(size / ranks[sharding]) if here else 0
        return total


def stages(config: DSAConfig, pp: int, drafts: bool = False) -> list[range]:
    """Layers of each pipeline stage: as vLLM divides them, each start moved to the nearest layer with an indexer. With
    ``drafts`` the last stage has the MTP layers too."""
    layers = config.num_hidden_layers
    sizes = vllm_stages(layers, pp)
    starts = [sum(sizes[:i]) for i in range(pp)]
    full = [i for i, shares in enumerate(config.index_shared) if not shares]
    starts = [min(full, key=lambda i: (abs(i - start), i)) for start in starts]
    if sorted(set(starts)) != starts:
        raise ConfigError(
            f"--pp {pp} is refused: a pipeline stage must start at a layer with an indexer, and this model has "
            f"{len(full)} of them. Choose fewer stages."
        )
    end = layers + (config.mtp_layers if drafts else 0)
    return [range(a, b) for a, b in zip(starts, [*starts[1:], end], strict=True)]


def vllm_stages(layers: int, pp: int) -> list[int]:
    """Layers a stage, as vLLM divides them unless VLLM_PP_LAYER_PARTITION says otherwise."""
    sizes = [layers // pp] * pp
    for i in range(2, layers % pp + 2):  # it spares the last stage, which has the head
        sizes[-i] += 1
    return sizes


def cache_bytes(config: DSAConfig, kind: str, dtype: str, stage: range) -> tuple[int, int]:
    """Bytes that one token takes on every GPU of a stage: in the latent caches, in the index-key caches."""
    full = sum(not config.shares_index(layer) for layer in stage)
    return len(stage) * models.latent_bytes(config, kind, dtype), full * models.index_bytes(config)


def blocks(available: int, bytes_per_token: int) -> int:
    """Pages that vLLM cuts a stage's cache memory into; one of them, the null block, holds no token."""
    return max(0, available // (BLOCK * bytes_per_token))


def blocks_of(tokens: int) -> int:
    """Pages of one request."""
    return math.ceil(tokens / BLOCK)


def weights(folder: Path, hf_config: dict[str, Any], config: DSAConfig) -> Weights:
    """Count a model's weights. Raises ConfigError, CheckpointError."""
    try:
        stored = read(folder)
    except CheckpointError:
        if any(folder.glob("*.safetensors")):
            raise
        stored = {}  # an index and none of its files: as good as config.json alone
    quantisation = hf_config.get("quantization_config")
    dtype = models.dtype_of(hf_config)
    if dtype not in models.DTYPE_BYTES:
        raise ConfigError(
            f"torch_dtype: {dtype!r} is refused: DSA layers run in {' or '.join(models.DTYPE_BYTES)}. Restore the "
            f"published config.json."
        )
    name = _format_name(quantisation, dtype)
    sizes: dict[tuple[str, int, str], int] = {}

    def add(tensor: str, size: int) -> None:
        part, layer = _part(tensor)
        if part == "indexer" and config.shares_index(layer):
            return  # in the files, but not loaded
        drafts = layer >= config.num_hidden_layers
        dropped = drafts and any(copy in tensor for copy in checkpoint.MTP_COPIES)
        key = ("MTP" if drafts else part, layer, "dropped" if dropped else _sharding(tensor, part))
        sizes[key] = sizes.get(key, 0) + size

    expected = checkpoint.Expected.from_hf({**hf_config, "quantization_config": None, "compression_config": None})
    packed = is_packed(quantisation)
    if stored:
        made_plain = {
            f"{tensor[: module.end()]}weight" for tensor in stored if (module := checkpoint.ONLY_READ.search(tensor))
        }
        for tensor in made_plain if packed else ():
            add(tensor, math.prod(expected.shape(tensor) or ()) * models.DTYPE_BYTES[dtype])
        if hf_config.get("tie_word_embeddings") and checkpoint.HEAD not in stored:  # it has a parameter of its own
            add(checkpoint.HEAD, math.prod(expected.shape(checkpoint.HEAD) or ()) * models.DTYPE_BYTES[dtype])
        for tensor, entry in stored.items():
            if packed and (checkpoint.ONLY_READ.search(tensor) or tensor.endswith("g_idx")):
                continue  # made plain while loading, or not loaded
            if entry.dtype not in STORED_BYTES:
                raise CheckpointError(
                    f"tensor {tensor} in {entry.file} has dtype {entry.dtype}, whose size is not known here. Move the "
                    f"files away to plan from config.json alone."
                )
            # However block scales are stored, vLLM holds float32.
            block_scale = _blocks(quantisation or {}) and tensor.endswith(checkpoint.SCALE_SUFFIX)
            add(tensor, math.prod(entry.shape) * (4 if block_scale else STORED_BYTES[entry.dtype]))
    else:
        for tensor, shape in (expected.model | expected.draft | expected.optional).items():
            add(tensor, _stored_bytes(tensor, shape, quantisation, dtype))
    absorbed = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
    fused = (config.index_n_heads + config.index_head_dim) * config.hidden_size
    for layer in range(config.num_hidden_layers + config.mtp_layers):
        sizes["derived", layer, "tp"] = absorbed * models.DTYPE_BYTES[dtype]
        if not config.shares_index(layer):
            sizes["derived", layer, "whole"] = fused * models.DTYPE_BYTES[dtype]
    plain = not quantisation or bool(_blocks(quantisation))
    source = f"the headers of {len({entry.file for entry in stored.values()})} files" if stored else "config.json"
    return Weights(sizes, name, source, exact=bool(stored) or plain)


def is_packed(quantisation: Mapping[str, Any] | None) -> bool:
    """Are weights in one of the packed formats that are loaded with names and shapes checked?"""
    return bool(quantisation) and checkpoint.is_packed((quantisation or {}).get("quant_method") or "")


def inputs_of_a_scale(quantisation: Mapping[str, Any]) -> int:
    """Consecutive inputs of a weight that share a scale, and must lie on one rank; 1 where there are none."""
    if block := _blocks(quantisation):
        return block[1]
    return _group(quantisation) if is_packed(quantisation) else 1


def four_bit_experts(weights: Weights) -> Weights | None:
    """The same model with experts of 4 bits and a 16-bit scale for each 128 values; None if they are no larger now."""
    if weights.format not in ("bfloat16", "float32", "fp8"):
        return None
    now = {"float32": 32.0, "bfloat16": 16.0, "fp8": 8 + 32 / 128**2}[weights.format]
    shrink = (4 + 16 / 128) / now
    sizes = {key: int(size * shrink) if key[0] == "experts" else size for key, size in weights.bytes.items()}
    return Weights(sizes, "experts of 4 bits", weights.source, exact=False)


def _part(tensor: str) -> tuple[str, int]:
    """Part of the model, or of an MTP layer, that a tensor belongs to; and its layer, -1 for none."""
    match = _LAYER.match(tensor)
    if not match:
        if tensor.startswith("lm_head."):
            return "head", -1
        return ("embedding", -1) if "embed_tokens" in tensor else ("router, norms", -1)
    layer = int(match[1])
    for mark, part in (
        (".indexer.", "indexer"),
        (".self_attn.", "attention"),
        (".mlp.experts.", "experts"),
        (".mlp.shared_experts.", "shared experts"),
        (".mlp.gate.", "router, norms"),
        (".mlp.", "dense MLP"),
    ):
        if mark in tensor:
            return part, layer
    return "router, norms", layer


def _sharding(tensor: str, part: str) -> str:
    """ "whole" on every rank of a stage, "tp", "shared" or "experts": split over those ranks. (And "dropped": a copy
    that an MTP layer's files hold, in place of which the model's own is used.)"""
    if part == "experts":
        return "experts"
    if part == "shared experts":
        return "shared"
    if part in ("embedding", "head", "dense MLP") or (part == "attention" and _SHARDED_ATTENTION.search(tensor)):
        return "tp"
    return "whole"


def _format_name(quantisation: Mapping[str, Any] | None, dtype: str) -> str:
    if not quantisation:
        return dtype
    if _blocks(quantisation):
        return "fp8"
    return f"{quantisation.get('quant_method')}, {_bits(quantisation):g} bits a value with its scales"


def _blocks(quantisation: Mapping[str, Any]) -> tuple[int, int] | None:
    """Block of FP8 scales, None for other quantisations."""
    block = quantisation.get("weight_block_size")
    return tuple(block) if quantisation.get("quant_method") == "fp8" and block else None


def _stored_bytes(tensor: str, shape: tuple[int, ...], quantisation: Mapping[str, Any] | None, dtype: str) -> int:
    values = math.prod(shape)
    if tensor.endswith("e_score_correction_bias") or ".indexer.k_norm." in tensor:
        return values * 4
    packed = quantisation and LINEAR.search(tensor) and not _left_out(tensor, quantisation)
    if quantisation and packed and (_blocks(quantisation) or not checkpoint.ONLY_READ.search(tensor)):
        if block := _blocks(quantisation):
            return values + 4 * math.prod(math.ceil(n / b) for n, b in zip(shape, block, strict=True))
        return math.ceil(values * _bits(quantisation) / 8)
    return values * models.DTYPE_BYTES[dtype]


def _left_out(tensor: str, quantisation: Mapping[str, Any]) -> bool:
    """Does the checkpoint keep this module as it was? Each format has its own key and kind of pattern for that."""
    module = tensor.removesuffix(".weight")
    for key in ("modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers"):
        for pattern in quantisation.get(key) or ():
            if pattern.startswith("re:"):
                found = re.match(pattern[3:], module) is not None
            elif "*" in pattern:
                found = fnmatchcase(module, pattern)
            else:
                found = f".{pattern}." in f".{module}."
            if found:
                return True
    return False


def _bits(quantisation: Mapping[str, Any]) -> float:
    """Bits of one quantised value, with its share of the group's scale and zero point."""
    stated, group = _stated(quantisation), _group(quantisation)
    bits = quantisation.get("bits") or quantisation.get("w_bit") or stated.get("num_bits")
    named = _named(quantisation)
    if "fp4" in named:
        return 4 + 8 / group  # a scale is one byte
    if bits is None and "fp8" in named:
        bits = 8
    if not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ConfigError(
            f"quantization_config: quant_method {quantisation.get('quant_method')!r} does not say how many bits a "
            f"weight takes. Download the safetensors files, whose headers do."
        )
    zero = bits if quantisation.get("zero_point") or stated.get("symmetric") is False else 0
    return float(bits + (16 + zero) / group) if group > 1 else float(bits)


def _stated(quantisation: Mapping[str, Any]) -> Mapping[str, Any]:
    """What compressed-tensors says of weights in its first group of modules."""
    groups = quantisation.get("config_groups") or {}
    return next((group.get("weights") or {} for group in groups.values() if isinstance(group, Mapping)), {})


def _named(quantisation: Mapping[str, Any]) -> str:
    parts = [quantisation.get(key) or "" for key in ("quant_algo", "quant_method", "format")]
    return " ".join(parts).lower()


def _group(quantisation: Mapping[str, Any]) -> int:
    """Consecutive inputs that share a scale; 1 where an output has one scale, or none is stated."""
    group = (
        quantisation.get("group_size") or quantisation.get("q_group_size") or _stated(quantisation).get("group_size")
    )
    if not group and "fp4" in (named := _named(quantisation)):
        return 32 if "mxfp4" in named else 16
    return group if isinstance(group, int) and group > 0 else 1
