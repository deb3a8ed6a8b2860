"""The files of a published checkpoint: tensors in two shards with an index, as they are or as block-scaled FP8.

Published FP8 keeps the projections, the indexer's wq_b and wk, MLPs and experts as e4m3, with one float32 scale for
each block of 128x128 (`weight_scale_inv`; weight = code x scale). All else stays in the checkpoint's dtype.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

BLOCK = 128
E4M3_MAX = 448.0
SCALE = "_scale_inv"
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0"}
QUANTIZATION |= {"weight_block_size": [BLOCK, BLOCK]}
_ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "indexer.wq_b", "indexer.wk")
FP8_MODULES = tuple(f".{name}.weight" for name in (*_ATTENTION, "gate_proj", "up_proj", "down_proj"))


def to_fp8(tensors: Tensors, seed: int | None) -> Tensors:
    """The same tensors, with those that are FP8 in published checkpoints in two: codes, and their scales.

    seed: of scales that are any float32, up to twice the least; None takes powers of two, which round the least.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(FP8_MODULES):
            out[name], out[name + SCALE] = _quantise(tensor.float(), generator)
        else:
            out[name] = tensor
    return out


def _quantise(weight: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] to e4m3 codes [out, in] and scales [ceil(out / 128), ceil(in / 128)]; last blocks may be ragged."""
    bands = weight.abs().split(BLOCK, dim=0)
    amax = torch.stack([torch.stack([block.amax() for block in band.split(BLOCK, dim=1)]) for band in bands])
    scale = torch.where(amax > 0, amax / E4M3_MAX, 1.0)
    if generator is None:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    else:
        scale *= 1 + torch.rand(scale.shape, generator=generator)
    return (weight / _spread(scale, weight.shape)).to(torch.float8_e4m3fn), scale


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Scales of blocks to scales of elements, [out, in]."""
    return scale.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def write(path: Path, config: dict[str, Any], tensors: Tensors) -> None:
    """config.json, the shards and their index. Of FP8 pairs, each third lies in two shards."""
    path.mkdir(parents=True, exist_ok=True)
    shard_of = {name: int(i >= len(tensors) // 2) for i, name in enumerate(tensors)}
    for name in [name for name in tensors if name.endswith(SCALE)][::3]:
        shard_of[name] = 1 - shard_of[name.removesuffix(SCALE)]
    files = {name: f"model-{shard + 1:05d}-of-00002.safetensors" for name, shard in shard_of.items()}
    for file in sorted(set(files.values())):
        content = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(content, path / file, metadata={"format": "pt"})
    size = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    write_json(path / "model.safetensors.index.json", {"metadata": size, "weight_map": files})
    write_json(path / "config.json", config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_dequantised(path: Path) -> Tensors:
    """Every tensor of a folder, FP8 ones as float32."""
    stored: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        stored |= load_file(file)
    for name in [name for name in stored if name.endswith(SCALE)]:
        weight = stored[name.removesuffix(SCALE)]
        stored[name.removesuffix(SCALE)] = weight.float() * _spread(stored.pop(name), weight.shape)
    return stored


def load_model(path: str | Path, dtype: str = "float32") -> Any:
    """transformers' model of a folder, eager attention: an implementation that is not this project's."""
    import transformers
    from transformers.utils import logging

    (architecture,) = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["architectures"]
    model_class = getattr(transformers, architecture)

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports the MTP layer's tensors, which it does not use
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    config = model_class.config_class.from_pretrained(path)
    if hasattr(config, "quantization_config"):  # transformers does not take ragged blocks
        del config.quantization_config
        source = {"pretrained_model_name_or_path": None, "state_dict": read_dequantised(Path(path))}
    model = model_class.from_pretrained(**source, config=config, dtype=DTYPES[dtype], attn_implementation="eager")
    logging.set_verbosity(verbosity)
    return model.eval()
