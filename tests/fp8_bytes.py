"""FP8 read by the book, byte by byte and block by block: what the tests hold the package's own reading against."""

import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoint_files as files
import numpy as np
import torch
from safetensors.torch import load_file


def _e4m3(byte: int) -> float:
    """Sign, 4 exponent bits with bias 7, 3 mantissa bits; no infinity, NaN where all of them are 1."""
    sign, exponent, mantissa = (-1.0) ** (byte >> 7), (byte >> 3) & 15, byte & 7
    if byte & 127 == 127:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([_e4m3(byte) for byte in range(256)], dtype=np.float32)  # value of each byte


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """e4m3 [out, in] and its float32 scale for each block of 128x128 to float32 [out, in]."""
    codes = E4M3[weight.view(torch.uint8).numpy()]
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            codes[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= np.float32(scale[i, j].item())
    return torch.from_numpy(codes)


Tensors = dict[str, torch.Tensor]


def read(folder: Path) -> Tensors:
    """Every tensor of a folder as it is stored."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def all_dequantised(tensors: Tensors) -> Tensors:
    """The same checkpoint without FP8, in float32."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    for name, tensor in plain.items():
        if tensor.dtype == torch.float8_e4m3fn:
            plain[name] = dequantised(tensor, tensors[f"{name}_scale_inv"])
    return plain


def rewrite(source: Path, target: Path, change: Callable[[Tensors], Tensors], config: dict) -> Path:
    """A copy of a folder with other tensors and another config.json."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    files.write(target, config, change(read(source)))
    return target
