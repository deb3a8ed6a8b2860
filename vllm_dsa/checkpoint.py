"""What a checkpoint must hold, by its config.json, and what its files do hold, by their safetensors headers.

Standard library only. Of the files nothing but headers is read, so that a damaged or foreign checkpoint is refused
before anything is loaded, and a right one costs next to no time.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dsa.config import DSAConfig, refuse_absent

INDEX_FILE = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"
INDEXER = ".self_attn.indexer."
MTP_COPIES = (".embed_tokens.", ".shared_head.head.")  # in an MTP layer: of the model's own embedding and head
# Modules here -> the checkpoint's that each of them holds, in order: vLLM multiplies these as one weight.
FUSED = {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"], "gate_up_proj": ["gate_proj", "up_proj"]}
AGAIN = "Download the checkpoint again."
Shape = tuple[int, ...]
_CONVERTED = re.compile(r"model\d+-mp\d+\.safetensors")
_NAMED = 5  # names that a message lists
# Modules whose weights are only read, and the MTP layer's eh_proj: loading makes them plain where they are packed.
ONLY_READ = re.compile(r"\.(self_attn\.kv_b_proj|self_attn\.indexer\.wk|self_attn\.indexer\.weights_proj|eh_proj)\.")
# A quantised weight's last name and dtype -> the scales that it needs beside it.
_SCALES = {
    ("qweight", "I32"): ("scales",),
    ("weight_packed", "I32"): ("weight_scale",),
    ("weight_packed", "U8"): ("weight_scale",),
    ("weight", "U8"): ("weight_scale", "weight_scale_2"),
    ("weight", "F8_E4M3"): ("weight_scale",),
}
# torch's names of the dtypes that are looked at -> safetensors'.
_DTYPES = {"torch.int32": "I32", "torch.uint8": "U8", "torch.float8_e4m3fn": "F8_E4M3"}


class CheckpointError(ValueError):
    """Files that this package will not serve; the message names file or tensor and the next step."""


def is_packed(method: str) -> bool:
    """Is this quant_method one whose packed weights are known here by their names?"""
    return method in ("awq", "gptq", "compressed-tensors") or method.startswith("modelopt")


@dataclass(frozen=True)
class Stored:
    """One tensor as a file's header has it; dtype as safetensors spells it (BF16, F32, F8_E4M3)."""

    file: Path
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Expected:
    """Checkpoint name -> shape of every tensor that a config asks for, under the names of plain weights.

    model: what the model cannot do without.
    draft: the MTP layers', needed with speculative decoding only.
    optional: those that may be missing, the indexers of layers that share a selection and MTP_COPIES.
    """

    model: dict[str, Shape]
    draft: dict[str, Shape]
    optional: dict[str, Shape]
    block: tuple[int, int] | None  # of FP8 scales
    packed: str | None = None  # quant_method, where weights may be packed: then a "weight" may have another name

    @classmethod
    def from_hf(cls, hf_config: Any) -> "Expected | None":
        """Of a DSA model. None where weights are neither plain, nor block-scaled FP8, nor in a packed format: names and
        shapes are not known."""
        config, get = DSAConfig.from_hf(hf_config), _getter(hf_config)
        refuse_absent(get)
        quantisation = get("quantization_config")
        block = packed = None
        if quantisation:
            method = _getter(quantisation)("quant_method") or ""
            if is_packed(method):
                packed = method
            else:
                block = _getter(quantisation)("weight_block_size")
                if method != "fp8" or not block:
                    return None
        hidden, layers = config.hidden_size, config.num_hidden_layers
        vocabulary = (get("vocab_size"), hidden)
        model: dict[str, Shape] = {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary}
        model["model.norm.weight"] = (hidden,)
        draft: dict[str, Shape] = {}
        optional: dict[str, Shape] = {}
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
        return cls(model, draft, optional, tuple(block) if block else None, packed)

    def shape(self, name: str) -> Shape | None:
        """Shape that a tensor of this name must have, None for a name that the config does not ask for."""
        if name.endswith(SCALE_SUFFIX) and self.block:
            weight = self.shape(name.removesuffix(SCALE_SUFFIX))
            if weight is None or len(weight) != 2:
                return None
            return tuple(math.ceil(n / b) for n, b in zip(weight, self.block, strict=True))
        return self.model.get(name) or self.draft.get(name) or self.optional.get(name)

    def plain_name(self, name: str) -> str:
        """Name that a packed weight has in its plain form; any other name as it is."""
        stem, _, last = name.rpartition(".")
        return f"{stem}.weight" if self.packed and last in ("qweight", "weight_packed") else name

    def missing(self, required: Iterable[str], stored: Iterable[str]) -> list[str]:
        """Those of the ``required`` names that are not ``stored``, be it plain or packed."""
        names = {self.plain_name(name) for name in stored}
        return [name for name in required if name not in names]


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


def read(folder: Path) -> dict[str, Stored]:
    """Every tensor of the safetensors files that vLLM would load from a folder. Raises CheckpointError."""
    files = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    converted = [name for name in files if _CONVERTED.fullmatch(name)]
    if converted:
        raise CheckpointError(
            f"{folder} holds {converted[0]}: DeepSeek's convert.py wrote it for DeepSeek's own demo, with other names "
            f"and shapes. Serve the published folder that convert.py read (its --hf-ckpt-path)."
        )
    index = _read_index(folder)
    absent = sorted(set(index.values()) - set(files))
    if absent:
        raise CheckpointError(
            f"{folder} lacks {_some(absent)}, which {INDEX_FILE} names. Download what is missing, or the whole "
            f"checkpoint again."
        )
    stored: dict[str, Stored] = {}
    # As vLLM does: the index says which files, their headers say what is in them.
    for name in sorted(set(index.values())) or files:
        stored |= _read_header(files[name])
    return stored


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file name by the index, empty if there is none."""
    path = folder / INDEX_FILE
    if not path.exists():
        return {}
    try:
        index = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: it has no readable weight_map. {AGAIN}") from error
    if not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{path} is damaged: its weight_map holds more than names of files. {AGAIN}")
    return index


def _read_header(path: Path) -> dict[str, Stored]:
    """The safetensors format: 8 bytes with the header's length, the header (JSON), then the tensors' bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(f"{path} is a git-lfs pointer and not the file. Run `git lfs pull` in its folder.")
        length = int.from_bytes(start, "little")
        header = file.read(length) if length <= size - 8 else b""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        stored = {name: Stored(path, entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or no safetensors file: its header cannot be read. Download it again."
        ) from error
    if size < end:
        raise CheckpointError(f"{path} is truncated: {size} of {end} bytes are there. Download it again.")
    return stored


def check(folder: Path, hf_config: Any, drafts: bool = False) -> None:
    """Refuse a local folder whose files do not hold what its config.json asks for, its MTP layer too if ``drafts``.
    Raises CheckpointError."""
    stored, expected = read(folder), Expected.from_hf(hf_config)
    if not stored:
        refuse_pickles(folder)
    if not stored or expected is None:
        return
    dtypes = {name: tensor.dtype for name, tensor in stored.items()}
    for name, tensor in stored.items():
        _check_tensor(name, tensor.dtype, tensor.shape, expected)
    unlisted = {file.name for file in folder.glob("*.safetensors")} - {tensor.file.name for tensor in stored.values()}
    hint = f" ({INDEX_FILE} does not name {_some(sorted(unlisted))})" if unlisted else ""
    _check_complete(dtypes, expected, expected.model, hint)
    if drafts:
        _check_complete(dtypes, expected, expected.draft)
    _check_scales(dtypes, expected)


def checked(
    weights: Iterable[tuple[str, Any]], expected: Expected, required: Collection[str]
) -> Iterator[tuple[str, Any]]:
    """Pass tensors on as they come. Raises CheckpointError at the first of a wrong shape, and at the end if there are
    ``required`` ones and not all of them came, or not all scales of a quantised one."""
    dtypes: dict[str, str] = {}
    for name, tensor in weights:
        dtypes[name] = _DTYPES.get(str(tensor.dtype), "")
        _check_tensor(name, dtypes[name], tuple(tensor.shape), expected)
        yield name, tensor
    if required:
        _check_complete(dtypes, expected, required)
        _check_scales(dtypes, expected)


def refuse_indexer(folder: Path) -> None:
    """Refuse a folder with indexer tensors under a config without one: vLLM would drop them and attend densely."""
    found = [name for name in _read_index(folder) or read(folder) if INDEXER in name]
    if found:
        raise CheckpointError(
            f"{folder} holds {_some(found)}: weights of DeepSeek-V3.2 or another DSA model, while its config.json is "
            f"of DeepSeek-V3 and names no indexer. Attention would be dense, and the answers wrong. Restore the "
            f"published config.json (model_type deepseek_v32)."
        )


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose only weights are pickles, which vLLM would read."""
    found = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    if found:
        raise CheckpointError(
            f"{folder} holds {_some(found)} and no safetensors file: pickled weights are refused, reading a pickle may "
            f"run code that is in it. Serve the published safetensors files."
        )


def _check_tensor(name: str, dtype: str, shape: Shape, expected: Expected) -> None:
    plain = expected.shape(expected.plain_name(name))
    if plain is not None:
        # Packed formats differ in which dim they pack and how much.
        fits = expected.packed and len(shape) == 2 and math.prod(plain) in [math.prod(shape) * n for n in (2, 4, 8)]
        if shape != plain and not fits:
            raise CheckpointError(
                f"checkpoint tensor {name} has shape {shape}, config.json asks for {plain}. Check that config.json "
                f"(and --hf-overrides) and the weights are of the same model; if they are, download that file again."
            )
    if dtype == "F8_E4M3" and expected.block is None and expected.packed is None:
        raise CheckpointError(
            f"checkpoint tensor {name} is FP8, but config.json has no quantization_config. "
            f"Restore the published config.json."
        )


def _check_scales(dtypes: Mapping[str, str], expected: Expected) -> None:
    """Of every tensor, by name and dtype. vLLM would leave scales that never come as they are in fresh memory."""
    if expected.block:
        fp8 = {name for name, dtype in dtypes.items() if dtype == "F8_E4M3"}
        alone = [name for name in fp8 if name + SCALE_SUFFIX not in dtypes]
        alone += [n for n in dtypes if n.endswith(SCALE_SUFFIX) and n.removesuffix(SCALE_SUFFIX) not in fp8]
        refuse_unpaired(alone)
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
        raise CheckpointError(
            f"the checkpoint lacks {_some(lacking)}: {expected.packed} stores them beside every quantised weight. "
            f"{AGAIN}"
        )


def refuse_unpaired(alone: Collection[str]) -> None:
    """Refuse a checkpoint that has FP8 weights without scales, or scales without FP8 weights: ``alone`` names them."""
    if not alone:
        return
    name = min(alone)
    partner = name.removesuffix(SCALE_SUFFIX) if name.endswith(SCALE_SUFFIX) else name + SCALE_SUFFIX
    raise CheckpointError(
        f"checkpoint tensor {name!r} has no FP8 partner {partner!r} ({len(alone)} such tensors): an FP8 weight and its "
        f"scales belong together. {AGAIN}"
    )


def _check_complete(stored: Collection[str], expected: Expected, required: Collection[str], hint: str = "") -> None:
    missing = expected.missing(required, stored)
    if not missing:
        return
    if any(".eh_proj." in name for name in required):
        raise CheckpointError(
            f"--speculative-config with method mtp is refused: the checkpoint lacks {len(missing)} of {len(required)} "
            f"tensors of its MTP layer: {_some(missing)}. Some conversions leave that layer out. Serve the published "
            f"files, or remove --speculative-config."
        )
    if stored and not any(INDEXER in name for name in stored):
        raise CheckpointError(
            f"the checkpoint has no indexer tensors ({_some([n for n in missing if INDEXER in n])}), config.json asks "
            f"for them. These are weights of a model without DSA (DeepSeek-V3, V3.1, R1?), or a conversion has dropped "
            f"the indexer. Serve the published DeepSeek-V3.2 files, or weights and config.json of the same model."
        )
    layers = sorted({int(name.split(".")[2]) for name in missing if name.startswith("model.layers.")})
    where = f" of layers {_some(layers)}" if layers else ""
    raise CheckpointError(
        f"the checkpoint lacks {len(missing)} of {len(required)} tensors{where}: {_some(missing)}{hint}. Check that "
        f"config.json is of the same model, or download the checkpoint again."
    )


def _some(names: Collection[Any]) -> str:
    listed = ", ".join(str(name) for name in list(names)[:_NAMED])
    return listed if len(names) <= _NAMED else f"{listed} and {len(names) - _NAMED} more"
