"""The CPU provider: torch's own vectorised loops and GEMMs, tiled. Contracts: ``vllm_dsa.kernels``.

Two rules make a row's bits independent of what else is in the batch. Every GEMM has a shape that depends on the layer
alone: one row's heads times KEY_TILE index keys, or times one chunk of at most ATTEND_CHUNK selected latents; a batch is
many such GEMMs, never a larger one. And every other step is elementwise, a softmax over one row, or an exact integer
sort. (A GEMM's own bits do change with its shape: MKL splits a contraction of 2,048 over its threads when it has one
to do, and not when it has several.)
"""

import math

import torch
import torch.nn.functional as F

from vllm_dsa import cache, envs
from vllm_dsa.cache import E4M3, FP8_DS_MLA_BYTES, LATENT_GROUP, SCALE_BYTES
from vllm_dsa.kernels import Norms, Rope
from vllm_dsa.metadata import Rows

KEY_TILE = 512  # keys a GEMM of select
ATTEND_CHUNK = 256  # selected latents a GEMM of attend
TILE_BYTES = 4 << 20  # of index logits, or of gathered latents: about what stays in a second-level cache
WRITE_ROWS = 128

_POSITION_BITS = 0x7FFFFFFF
_LOWEST = torch.iinfo(torch.int64).min


# ---------------------------------------------------------------------------------------------------------------- write


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> None:
    """RoPE in place: x [T, ..., P] float32 by cos, sin [T, ..., P / 2]."""
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = a * cos - b * sin
    torch.add(b * cos, a * sin, out=b)
    a.copy_(turned)
