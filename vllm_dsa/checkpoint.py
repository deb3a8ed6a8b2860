"""What a checkpoint must hold, by its config.json, and whether its files, or the tensors that come from them, do.

Standard library only. How vLLM finds the files: ``checkpoint_files``.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dsa.checkpoint_files import (
    AGAIN,
    INDEX_FILE,
    PICKLED_FORMATS,
    CheckpointError,
    Shape,
    left_out,
    names,
    read,
    refuse_pickles,
    some,
)
from vllm_dsa.config import DSAConfig, refuse_absent

SCALE_SUFFIX = "_scale_inv"
INDEXER = ".self_attn.indexer."
EXPERTS = ".mlp.experts."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MTP_COPIES = (".embed_tokens.", ".shared_head.head.")  # in an MTP layer: of the model's own embedding and head
MTP_MARK = ".eh_proj."  # in every MTP layer, and in no other
# Modules here -> the checkpoint's that each of them holds, in order: vLLM multiplies these as one weight.
FUSED = {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"], "gate_up_proj": ["gate_proj", "up_proj"]}
# Modules whose weights are only read, and the MTP layer's eh_proj: loading makes them plain where they are packed.
ONLY_READ = re.compile(r"\.(self_attn\.kv_b_proj|self_attn\.indexer\.wk|self_attn\.indexer\.weights_proj|eh_proj)\.")
# All experts of a layer in one tensor [experts, out, in], gate before up: as transformers and FSDP hold them.
PACKED_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?(_scale_inv)?")
# A scale by its name. Of integers one can know what number they are if the config says that they are exponents.
SCALE = re.compile(r".*(_scale_inv|\.weight_scale(_2)?|\.weight_global_scale|\.scales|\.input_scale)")
_EXPONENTS = re.compile(r"e8m0|mxfp|scale_dtype\W+(torch\.)?uint8")
_NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0")
# A quantised weight's last name and dtype -> the scales that it needs beside it.
_SCALES = {
    ("qweight", "I32"): ("scales",),
    ("weight_packed", "I32"): ("weight_scale",),
    ("weight_packed", "U8"): ("weight_scale",),
    ("weight", "U8"): ("weight_scale", "weight_scale_2"),
    ("weight", "F8_E4M3"): ("weight_scale",),
}
# torch's names of dtypes -> safetensors'.
_DTYPES = {f"torch.{name}": short for name, short in (("bool", "BOOL"), ("uint8", "U8"), ("bfloat16", "BF16"))}
_DTYPES |= {f"torch.int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}
_DTYPES |= {f"torch.float{bits}": f"F{bits}" for bits in (16, 32, 64)}
_DTYPES |= {"torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e8m0fnu": "F8_E8M0"}
# Segments of names that wrappers of modules leave in a state dict.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def is_packed(method: str) -> bool:
    """Is this quant_method one whose packed weights are known here by their names?"""
    return method in ("awq", "gptq", "compressed-tensors") or method.startswith("modelopt")


@dataclass(frozen=True)
class Expected:
    """Checkpoint name -> shape of every tensor that a config asks for, under the names of plain weights.

    model: what the model cannot do without.
    draft: the MTP layers', needed with speculative decoding only.
    optional: those that may be missing, the indexers of layers that share a selection, MTP_COPIES, and a tied head.
    """

    model: dict[str, Shape]
    draft: dict[str, Shape]
    optional: dict[str, Shape]
    layers: int  # of the model and, by the config, of drafts
    experts: int
    block: tuple[int, int] | None  # of FP8 scales
    packed: str | None = None  # quant_method, where weights may be packed: then a "weight" may have another name
    other: str | None = None  # quant_method, where of a quantised module nothing is known but its name
    exponents: bool = False  # does the config say that scales of 8 bits are exponents (ue8m0)?

    @classmethod
    def from_hf(cls, hf_config: Any) -> "Expected":
        """Of a DSA model."""
        config, get = DSAConfig.from_hf(hf_config), _getter(hf_config)
        refuse_absent(get)
        quantisation = get("quantization_config") or get("compression_config")  # compressed-tensors' own name for it
        block = packed = other = None
        if quantisation:
            # ModelOpt up to 0.29 names no method.
            method = _getter(quantisation)("quant_method") or (
                "modelopt" if _getter(quantisation)("quantization") else ""
            )
            block = _getter(quantisation)("weight_block_size") if method == "fp8" else None
            packed = method if is_packed(method) else None
            other = None if block or packed else method or "unnamed"
        hidden, layers = config.hidden_size, config.num_hidden_layers
        vocabulary = (get("vocab_size"), hidden)
        model: dict[str, Shape] = {EMBEDDING: vocabulary, "model.norm.weight": (hidden,)}
        draft: dict[str, Shape] = {}
        optional: dict[str, Shape] = {}
        (optional if get("tie_word_embeddings") else model)[HEAD] = vocabulary
        for layer in range(layers + config.mtp_layers):
            prefix, group = f"model.layers.{layer}", model if layer < layers else draft
            group |= _norm(config, f"{prefix}.input_layernorm", gated=True)
            group |= _norm(config, f"{prefix}.post_attention_layernorm", gated=not config.is_dense(layer))
            group |= _attention(config, f"{prefix}.self_attn")
            indexer = _indexer(config, f"{prefix}{INDEXER[:-1]}")
            (optional if config.shares_index(layer) else group).update(indexer)
            group |= _mlp(get, config, layer, f"{prefix}.mlp")
            if layer >= layers:
                group |= {f"{prefix}.{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
                group[f"{prefix}.eh_proj.weight"] = (hidden, 2 * hidden)
                optional |= {f"{prefix}{copy}weight": vocabulary for copy in MTP_COPIES}
        return cls(
            model,
            draft,
            optional,
            layers=layers + (get("num_nextn_predict_layers") or 0),
            experts=get("n_routed_experts") or 0,
            block=tuple(block) if block else None,
            packed=packed,
            other=other,
            exponents=bool(_EXPONENTS.search(str(quantisation).lower())),
        )

    def shape(self, name: str) -> Shape | None:
        """Shape that a tensor of this name must have, None for a name that the config does not ask for."""
        if found := PACKED_EXPERTS.fullmatch(name):
            experts, module, scale = found.groups()
            one = self.shape(f"{experts}.0.{FUSED.get(module, [module])[0]}.weight")
            if one is None:
                return None
            one = (len(FUSED.get(module, [module])) * one[0], one[1])
            return (self.experts, *(self._blocks(one) if scale and self.block else one))
        if name.endswith(SCALE_SUFFIX) and self.block:
            weight = self.shape(name.removesuffix(SCALE_SUFFIX))
            return None if weight is None or len(weight) != 2 else self._blocks(weight)
        shape = self.model.get(name) or self.draft.get(name) or self.optional.get(name)
        return None if self.other and shape and len(shape) > 1 else shape

    def _blocks(self, weight: Shape) -> Shape:
        return tuple(math.ceil(n / b) for n, b in zip(weight, self.block or (), strict=True))

    def names(self) -> list[str]:
        """Names that tensors of the model and of drafts may have, those of all experts of a layer too."""
        plain = [*self.model, *self.draft, *self.optional]
        experts = {name.partition(EXPERTS)[0] for name in plain if EXPERTS in name}
        return plain + [f"{layer}{EXPERTS}{module}" for layer in experts for module in ("gate_up_proj", "down_proj")]

    def plain_names(self, name: str) -> list[str]:
        """Names that a stored tensor has in a plain checkpoint with a tensor for each expert; any other as it is."""
        if (found := PACKED_EXPERTS.fullmatch(name)) and not found[3]:
            parts = FUSED.get(found[2], [found[2]])
            return [f"{found[1]}.{expert}.{part}.weight" for expert in range(self.experts) for part in parts]
        stem, _, last = name.rpartition(".")
        return [f"{stem}.weight" if self.packed and last in ("qweight", "weight_packed") else name]

    def missing(self, required: Iterable[str], stored: Iterable[str]) -> list[str]:
        """Those of the ``required`` names that are not ``stored``, be it plain or packed. Where nothing is known of
        quantised modules, any tensor of a module counts for it, and any of a layer's experts if none has a number."""
        names = {plain for name in stored for plain in self.plain_names(name)}
        missing = [name for name in required if name not in names]
        if not self.other:
            return missing
        modules = {name[: match.start()] for name in names for match in re.finditer(r"\.", name)}
        numbered = {stem for stem, _, last in (module.rpartition(".") for module in modules) if last.isdecimal()}

        def present(name: str) -> bool:
            experts, found, _ = name.partition(EXPERTS)
            together = f"{experts}{EXPERTS}"[:-1]
            return name.rpartition(".")[0] in modules or bool(found and together in modules - numbered)

        return [name for name in missing if self.shape(name) is not None or not present(name)]


def _norm(config: DSAConfig, prefix: str, gated: bool) -> dict[str, Shape]:
    """A norm before attention or MLP; A.X-K2 has a gate behind some of them."""
    hidden, rank = config.hidden_size, config.gated_norm_rank
    if not (gated and rank):
        return {f"{prefix}.weight": (hidden,)}
    shapes = {"norm": (hidden,), "W_down": (rank, hidden), "W_up": (hidden, rank)}
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def _attention(config: DSAConfig, prefix: str) -> dict[str, Shape]:
    heads, rank, hidden = config.num_attention_heads, config.kv_lora_rank, config.hidden_size
    shapes = {
        "q_a_proj": (config.q_lora_rank, hidden),
        "q_a_layernorm": (config.q_lora_rank,),
        "q_b_proj": (heads * config.q_b_head_dim, config.q_b_inputs),
        "kv_a_proj_with_mqa": (config.latent_dim, hidden),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), rank),
        "o_proj": (hidden, heads * config.v_head_dim),
    }
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def _indexer(config: DSAConfig, prefix: str) -> dict[str, Shape]:
    heads, dim = config.index_n_heads, config.index_head_dim
    return {
        f"{prefix}.wq_b.weight": (heads * dim, config.q_lora_rank),
        f"{prefix}.wk.weight": (dim, config.hidden_size),
        f"{prefix}.k_norm.weight": (dim,),
        f"{prefix}.k_norm.bias": (dim,),
        f"{prefix}.weights_proj.weight": (heads, config.hidden_size),
    }


def _mlp(get: Any, config: DSAConfig, layer: int, prefix: str) -> dict[str, Shape]:
    hidden = config.hidden_size

    def gated(prefix: str, width: int) -> dict[str, Shape]:
        up, down = (width, hidden), (hidden, width)
        return {f"{prefix}.gate_proj.weight": up, f"{prefix}.up_proj.weight": up, f"{prefix}.down_proj.weight": down}

    if config.is_dense(layer):
        return gated(prefix, get("intermediate_size"))
    experts, width, shared = get("n_routed_experts"), get("moe_intermediate_size"), get("n_shared_experts") or 0
    shapes: dict[str, Shape] = {f"{prefix}.gate.weight": (experts, hidden)}
    shapes[f"{prefix}.gate.e_score_correction_bias"] = (experts,)
    for expert in range(experts):
        shapes |= gated(f"{prefix}.experts.{expert}", width)
    return shapes | (gated(f"{prefix}.shared_experts", width * shared) if shared else {})


def _getter(config: Any) -> Any:
    return config.get if isinstance(config, Mapping) else lambda key: getattr(config, key, None)


def check(folder: Path, hf_config: Any, drafts: bool = False, load_format: str = "hf") -> None:
    """Refuse a local folder whose files do not hold what its config.json asks for, its MTP layer too if ``drafts``.
    Raises CheckpointError."""
    if load_format in PICKLED_FORMATS:
        raise CheckpointError(
            f"--load-format {load_format} is refused: it reads pickled weights, and reading a pickle may run code that "
            f"is in it. Remove it, and serve the published safetensors files."
        )
    stored, expected = read(folder, load_format), Expected.from_hf(hf_config)
    if not stored:
        refuse_pickles(folder)
        return
    for name, tensor in stored.items():
        _check_tensor(name, tensor.dtype, tensor.shape, expected)
    _check_layers(stored, expected)
    files = {tensor.file for tensor in stored.values()}

    def unlisted(missing: list[str]) -> str:
        return unlisted_text(folder, files, missing, expected)

    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    _check_complete(dtypes, expected, expected.model, unlisted)
    if drafts:
        _check_complete(dtypes, expected, expected.draft, unlisted)
    _check_scales(dtypes, expected, unlisted)


def unlisted_text(folder: Path, loaded: Collection[Path], missing: Iterable[str], expected: Expected) -> str:
    """What to do where ``missing`` tensors are in files of a folder that vLLM does not load; empty if they are not."""
    found = {plain: file for name, file in left_out(folder, loaded).items() for plain in expected.plain_names(name)}
    held = sorted({found[name] for name in missing if name in found})
    if not held:
        return ""
    return (
        f" They are in {some(held)}, which {INDEX_FILE} does not name, so vLLM does not load them: add them to its "
        f"weight_map, or restore the published index."
    )


def checked(
    weights: Iterable[tuple[str, Any]], expected: Expected, required: Collection[str]
) -> Iterator[tuple[str, Any]]:
    """Pass tensors on as they come, but for MTP layers that the config does not name. Raises CheckpointError at the
    first of a wrong shape, and at the end if there are ``required`` ones and not all of them came, or not all scales of
    a quantised one."""
    dtypes: dict[str, str] = {}
    for name, tensor in weights:
        dtypes[name] = _DTYPES.get(str(tensor.dtype), "")
        _check_tensor(name, dtypes[name], tuple(tensor.shape), expected)
        if _layer(name) < expected.layers:
            yield name, tensor
    _check_layers(dtypes, expected)
    if required:
        _check_complete(dtypes, expected, required)
        _check_scales(dtypes, expected)


def split_experts(weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Pass tensors on, those of all experts of a layer as one of each, under the published names."""
    for name, tensor in weights:
        found = PACKED_EXPERTS.fullmatch(name)
        if not found:
            yield name, tensor
            continue
        experts, module, scale = found.groups()
        parts = FUSED.get(module, [module])
        rows = tensor.shape[1] // len(parts)
        for expert in range(len(tensor)):
            for i, part in enumerate(parts):
                yield f"{experts}.{expert}.{part}.weight{scale or ''}", tensor[expert, i * rows : (i + 1) * rows]


def unnamed_drafts(stored: Iterable[str], expected: Expected) -> list[int]:
    """MTP layers among the ``stored`` tensors that the config does not name."""
    return sorted({_layer(name) for name in stored if MTP_MARK in name and _layer(name) >= expected.layers})


def _layer(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _check_layers(stored: Collection[str], expected: Expected) -> None:
    """Layers that a config does not name may be MTP layers, which are not loaded."""
    drafts = unnamed_drafts(stored, expected)
    beyond = [name for name in stored if _layer(name) >= expected.layers and _layer(name) not in drafts]
    if beyond:
        raise CheckpointError(
            f"checkpoint tensor {beyond[0]!r} belongs to no parameter: config.json names {expected.layers} layers "
            f"(num_hidden_layers and num_nextn_predict_layers), and the checkpoint holds more. Check that config.json "
            f"(and --hf-overrides) and the weights are of the same model."
        )


def refuse_indexer(folder: Path, load_format: str = "auto") -> None:
    """Refuse a folder with indexer tensors under a config without one: vLLM would drop them and attend densely."""
    if load_format in PICKLED_FORMATS:
        return
    found = [name for name in names(folder, load_format) if INDEXER in name]
    if found:
        raise CheckpointError(
            f"{folder} holds {some(found)}: weights of DeepSeek-V3.2 or another DSA model, while its config.json is "
            f"of DeepSeek-V3 and names no indexer. Attention would be dense, and the answers wrong. Restore the "
            f"published config.json (model_type deepseek_v32)."
        )


def _check_tensor(name: str, dtype: str, shape: Shape, expected: Expected) -> None:
    packed = PACKED_EXPERTS.fullmatch(name)
    if packed and packed[3] and expected.block and packed[2] in FUSED:
        gate = expected.shape(f"{packed[1]}.0.{FUSED[packed[2]][0]}.weight")
        if gate and gate[0] % expected.block[0]:
            raise CheckpointError(
                f"checkpoint tensor {name} is refused with moe_intermediate_size {gate[0]}: that is no multiple of "
                f"{expected.block[0]}, so a block would have one scale for rows of gate and up. Store each expert's "
                f"gate_proj and up_proj as tensors of their own, as the published models do."
            )
    plain = expected.shape(name if packed else expected.plain_names(name)[0])
    if plain is not None:
        # Packed formats differ in which dim they pack and how much.
        fits = expected.packed and len(shape) == 2 and math.prod(plain) in [math.prod(shape) * n for n in (2, 4, 8)]
        if shape != plain and not fits:
            raise CheckpointError(
                f"checkpoint tensor {name} has shape {shape}, config.json asks for {plain}. Check that config.json "
                f"(and --hf-overrides) and the weights are of the same model; if they are, download that file again."
            )
    if dtype == "F8_E5M2":
        raise CheckpointError(
            f"checkpoint tensor {name} is FP8 of the kind E5M2 (5 bits of exponent): DSA models are served from "
            f"bfloat16 or from FP8 of the kind E4M3, which is another number format. Convert the model to one of them."
        )
    if dtype == "F8_E4M3" and not (expected.block or expected.packed or expected.other):
        raise CheckpointError(
            f"checkpoint tensor {name} is FP8, but config.json has no quantization_config. "
            f"Restore the published config.json."
        )
    known = not dtype or dtype in _NUMBERS or (dtype == "U8" and expected.exponents)
    if (expected.block or expected.packed) and not known and SCALE.fullmatch(name):
        raise CheckpointError(unknown_scale(name, dtype))


def unknown_scale(name: str, dtype: str) -> str:
    """Why a scale of integers is not taken for numbers."""
    return (
        f"checkpoint tensor {name} holds scales as {dtype}, and quantization_config does not say which numbers they "
        f'stand for. If they are exponents (ue8m0) of 8 bits, add "scale_fmt": "ue8m0" to quantization_config; else '
        f"store them as float32."
    )


Hint = Callable[[list[str]], str]


def _check_scales(dtypes: Mapping[str, str], expected: Expected, unlisted: Hint | None = None) -> None:
    """Of every tensor, by name and dtype. vLLM would leave scales that never come as they are in fresh memory."""
    if expected.block:
        fp8 = {name for name, dtype in dtypes.items() if dtype == "F8_E4M3"}
        alone = [name for name in fp8 if name + SCALE_SUFFIX not in dtypes]
        alone += [n for n in dtypes if n.endswith(SCALE_SUFFIX) and n.removesuffix(SCALE_SUFFIX) not in fp8]
        refuse_unpaired(alone, unlisted)
    if not expected.packed:
        return
    lacking = []
    for name, dtype in dtypes.items():
        stem, _, last = name.rpartition(".")
        scales = _SCALES.get((last, dtype), ())
        if scales and expected.packed == "awq":
            scales = (*scales, "qzeros")
        lacking += [f"{stem}.{scale}" for scale in scales if f"{stem}.{scale}" not in dtypes]
    if lacking:
        step = (unlisted(lacking) if unlisted else "") or f" {AGAIN}"
        raise CheckpointError(
            f"the checkpoint lacks {some(lacking)}: {expected.packed} stores them beside every quantised weight.{step}"
        )


def refuse_unpaired(alone: Collection[str], unlisted: Hint | None = None) -> None:
    """Refuse a checkpoint that has FP8 weights without scales, or scales without FP8 weights: ``alone`` names them."""
    if not alone:
        return
    name, partners = min(alone), {name: _partner(name) for name in alone}
    step = (unlisted(list(partners.values())) if unlisted else "") or f" {AGAIN}"
    raise CheckpointError(
        f"checkpoint tensor {name!r} has no FP8 partner {partners[name]!r} ({len(alone)} such tensors): an FP8 weight "
        f"and its scales belong together.{step}"
    )


def _partner(name: str) -> str:
    return name.removesuffix(SCALE_SUFFIX) if name.endswith(SCALE_SUFFIX) else name + SCALE_SUFFIX


def _check_complete(
    stored: Collection[str], expected: Expected, required: Collection[str], unlisted: Hint | None = None
) -> None:
    missing = expected.missing(required, stored)
    if not missing:
        return
    elsewhere = unlisted(missing) if unlisted else ""
    if any(MTP_MARK in name for name in required):
        step = " Some conversions leave that layer out. Serve the published files, or remove --speculative-config."
        raise CheckpointError(
            f"--speculative-config with method mtp is refused: the checkpoint lacks {len(missing)} of {len(required)} "
            f"tensors of its MTP layer: {some(missing)}.{elsewhere or step}"
        )
    if not elsewhere and (text := other_names(missing, stored)):
        raise CheckpointError(text)
    if stored and not elsewhere and not any(INDEXER in name for name in stored):
        raise CheckpointError(
            f"the checkpoint has no indexer tensors ({some([n for n in missing if INDEXER in n])}), config.json asks "
            f"for them. These are weights of a model without DSA (DeepSeek-V3, V3.1, R1?), or a conversion has dropped "
            f"the indexer. Serve the published DeepSeek-V3.2 files, or weights and config.json of the same model."
        )
    if missing == [HEAD] and not elsewhere:
        raise CheckpointError(
            f"the checkpoint has no {HEAD}, and tie_word_embeddings in config.json is not true. If this model's head "
            f"is its embedding, set it: --hf-overrides '{{\"tie_word_embeddings\": true}}'. Else the head was left out "
            f"when the model was saved: add the file that holds it, and its entry in {INDEX_FILE}."
        )
    layers = sorted({_layer(name) for name in missing} - {-1})
    where = f" of layers {some(layers)}" if layers else ""
    step = " Check that config.json is of the same model, or download the checkpoint again."
    raise CheckpointError(
        f"the checkpoint lacks {len(missing)} of {len(required)} tensors{where}: {some(missing)}.{elsewhere or step}"
    )


def other_names(wanted: Iterable[str], stored: Iterable[str]) -> str:
    """What to do where ``wanted`` tensors are ``stored`` under names with another beginning, or with the segments of a
    wrapper; empty if they are not."""
    by_bare_name = {_bare(name): name for name in stored}
    pairs = [(name, other) for name in wanted if (other := by_bare_name.get(_bare(name), name)) != name]
    if not pairs:
        return ""
    return (
        f"the checkpoint names {len(pairs)} tensors otherwise than the published models do: {pairs[0][1]!r} for "
        f"{pairs[0][0]!r}. A wrapper (torch.compile, DDP, FSDP, PEFT, a multimodal model) was saved with the model, or "
        f"the model without its head. Save the state dict of the model itself, or rename the tensors in the files and "
        f"in {INDEX_FILE}."
    )


def _bare(name: str) -> str:
    """A tensor's name without the segments that depend on what the model is wrapped in."""
    segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    starts = [segments.index(mark) for mark in ("layers", "embed_tokens", "lm_head") if mark in segments]
    if not starts and len(segments) > 1 and segments[-2] == "norm":
        starts = [len(segments) - 2]
    return ".".join(segments[min(starts, default=0) :])
