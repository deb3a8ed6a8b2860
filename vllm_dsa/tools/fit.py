"""What fits on a GPU: the weights and caches that memory.py counts, against what vLLM leaves. Standard library only.

Beside weights and caches a GPU needs what is assumed here: fixed sums, and the temporaries of the largest step.
"""

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from vllm_dsa.config import ConfigError, DSAConfig
from vllm_dsa.tools import memory
from vllm_dsa.tools import model as models
from vllm_dsa.tools.memory import BLOCK, Layout, Weights

GIB = 2**30
# MiB that nvidia-smi lists as total. Another GPU is given by its GiB.
GPUS = {
    "RTX4090": 24564,
    "RTX5090": 32607,
    "A100-40": 40960,
    "L40S": 46068,
    "H100": 81559,
    "A100-80": 81920,
    "H20": 97871,
    "RTXPRO6000": 97887,
    "H200": 143771,
    "B200": 183359,
}
# GiB that nvidia-smi lists and CUDA does not offer: 0.47 on an H100 (measured), 0.59 on an H200 (as vLLM logs it).
DRIVER_GIB = 0.6
# GiB a GPU that are assumed. Measured on an H200, one GPU, 6 layers: 0.1 of kernels' code, 0.1 of CUDA graphs. CUDA's
# own context is in what --gpu-memory-utilization leaves.
KERNELS_GIB, NCCL_GIB, LAYER_GRAPHS_GIB = 0.2, 1.5, 1 / 60
WORKSPACE_GIB = 0.5  # of select and attend, beside what grows with the step
UTILIZATION = 0.92  # vLLM's default in 0.32 and 0.33
SHORTEST = 4096  # tokens that a plan must leave room for where no --max-model-len is asked
MOST_REQUESTS = 1024  # vLLM's --max-num-seqs on GPUs with 70 GiB or more


@dataclass(frozen=True)
class Asked:
    """What is to be fitted: the model, the GPU in bytes as nvidia-smi lists it, the layout, and the options."""

    config: DSAConfig
    hf_config: dict[str, Any]
    weights: Weights
    gpu: str
    gpu_bytes: int
    layout: Layout
    nodes: int
    kind: str  # of the latent cache: "auto", "fp8_ds_mla"
    utilization: float
    drafts: bool  # is the MTP layer loaded?
    max_model_len: int | None
    step: int | None  # --max-num-batched-tokens, if asked
    cache_memory: int | None  # bytes a GPU, if vLLM has said
    rounded: bool  # cache_memory, to hundredths of a GiB

    @property
    def dtype(self) -> str:
        return models.dtype_of(self.hf_config)

    @property
    def batched_tokens(self) -> int:
        """Tokens of the largest step: as asked, or vLLM's default on this GPU."""
        if self.step or self.gpu_bytes >= 160 * GIB:
            return self.step or 16384
        return 8192 if self.gpu_bytes >= 70 * GIB and not self.gpu.startswith("A100") else 2048

    @property
    def most_requests(self) -> int:
        """vLLM's default --max-num-seqs on this GPU, which no step of fewer tokens can reach."""
        large = self.gpu_bytes >= 70 * GIB and not self.gpu.startswith("A100")
        return min(self.batched_tokens, MOST_REQUESTS if large else 256)


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: bytes on each of its GPUs."""

    layers: range
    weights: dict[str, int]  # by part
    latent: int  # of one token
    index: int  # of one token
    available: int  # for the caches; may be negative

    @property
    def token(self) -> int:
        return self.latent + self.index

    @property
    def blocks(self) -> int:
        return memory.blocks(self.available, self.token)


@dataclass(frozen=True)
class Fit:
    """What fits. Of each data parallel rank, since each has caches of its own: ``blocks``, ``tokens``."""

    stages: list[Stage]
    budget: int  # bytes that vLLM may use of a GPU
    runtime: int  # bytes of it that are neither weights nor caches: assumed
    blocks: int
    max_model_len: int
    tokens: int  # as vLLM logs it
    requests: int  # of max_model_len tokens, on all ranks

    @property
    def fits(self) -> bool:
        return self.requests > 0

    @property
    def tightest(self) -> Stage:
        """The stage whose GPUs have the least room for caches."""
        return min(self.stages, key=lambda stage: stage.blocks if stage.available > 0 else stage.available)


def default_kind(config: DSAConfig) -> str:
    """The latent cache that takes the least: fp8_ds_mla where its rows hold this model's latents."""
    return models.FP8_DS_MLA if (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64) else "auto"


def fitted(asked: Asked) -> Fit:
    """Count what lies on each stage's GPUs, and what is left for the caches."""
    budget = int((asked.gpu_bytes - DRIVER_GIB * GIB) * asked.utilization)
    runtime, last = runtime_bytes(asked), asked.config.num_hidden_layers - 1
    stages = []
    for layers in memory.stages(asked.config, asked.layout.pp, asked.drafts):
        parts = {part: asked.weights.on_gpu(part, asked.layout, layers, last) for part in memory.PARTS}
        latent, index = memory.cache_bytes(asked.config, asked.kind, asked.dtype, layers)
        available = budget - runtime - sum(parts.values()) if asked.cache_memory is None else asked.cache_memory
        stages.append(Stage(layers, parts, latent, index, available))
    blocks = min(stage.blocks for stage in stages)
    usable = max(0, blocks - 1) * BLOCK
    longest = asked.config.max_position_embeddings
    if asked.max_model_len is None:
        # Whole KiB of tokens, unless all fit.
        length = longest if usable >= longest else usable // 1024 * 1024
        length = length if length >= min(SHORTEST, longest) else min(SHORTEST, longest)
    else:
        length = asked.max_model_len
    each = memory.blocks_of(length)
    requests = (max(0, blocks - 1) // each) * asked.layout.dp
    return Fit(stages, budget, runtime, blocks, length, int(blocks / each * length), requests)


def runtime_bytes(asked: Asked) -> int:
    """Bytes a GPU that are assumed to be neither weights nor caches: what a step needs, and the fixed sums above."""
    config, layout = asked.config, asked.layout
    width = models.DTYPE_BYTES[asked.dtype]
    heads, tokens = config.num_attention_heads // layout.tp, asked.batched_tokens
    # FlashMLA's decode kernel takes 64 or 128 heads, and the query is made that large.
    query_heads = max(64, heads) if asked.kind == models.FP8_DS_MLA else heads
    attention = query_heads * config.latent_dim + heads * (config.kv_lora_rank + config.qk_head_dim + config.v_head_dim)
    chosen = asked.hf_config.get("num_experts_per_tok") or 0
    experts = chosen * (config.hidden_size + int(asked.hf_config.get("moe_intermediate_size") or 0))
    # The selection, in positions and in slots.
    top_k = config.top_k(asked.max_model_len or config.max_position_embeddings)
    step = tokens * (width * (4 * config.hidden_size + max(attention, experts)) + 8 * top_k)
    step += int(WORKSPACE_GIB * GIB)
    # Logits in float32, sorted and as probabilities, for as many requests as vLLM tries at start.
    sampling = asked.most_requests * int(asked.hf_config.get("vocab_size") or 0) * 12
    return max(step, sampling) + int(fixed_gib(asked) * GIB)


def fixed_gib(asked: Asked) -> float:
    """GiB of a GPU that no step changes: kernels' code, CUDA graphs, NCCL's buffers."""
    graphs = LAYER_GRAPHS_GIB * asked.config.num_hidden_layers / asked.layout.pp
    return KERNELS_GIB + graphs + (NCCL_GIB if asked.layout.gpus > 1 else 0)


def alternatives(asked: Asked, concurrency: int) -> Iterator[str]:
    """What would fit in place of what does not, the smallest change first."""

    def works(change: Asked) -> bool:
        try:
            fit = fitted(change)
        except ConfigError:  # no such pipeline
            return False
        return fit.fits and fit.requests >= concurrency

    fit = fitted(asked)
    if fit.fits and concurrency > fit.requests:
        yield f"--concurrency {fit.requests} at --max-model-len {fit.max_model_len}"
        each = (fit.blocks - 1) // math.ceil(concurrency / asked.layout.dp) * BLOCK
        if each >= 1:
            yield f"--max-model-len {each} at --concurrency {concurrency}"
    elif asked.max_model_len and works(replace(asked, max_model_len=None)):
        yield f"--max-model-len {fitted(replace(asked, max_model_len=None)).max_model_len}"
    if asked.kind == "auto" and default_kind(asked.config) != "auto":
        change = replace(asked, kind=models.FP8_DS_MLA)
        if works(change):
            yield "--kv-cache-dtype fp8_ds_mla"
    if asked.cache_memory is not None:
        return  # one engine's number says nothing about other machines
    for utilization in (0.95, 0.97):
        if utilization > asked.utilization and works(replace(asked, utilization=utilization)):
            yield f"--gpu-memory-utilization {utilization}"
            break
    smaller = memory.four_bit_experts(asked.weights)
    if smaller and works(replace(asked, weights=smaller)):
        size = sum(fitted(replace(asked, weights=smaller)).tightest.weights.values()) / GIB
        yield f"a checkpoint with 4-bit experts: about {size:.1f} GiB of weights a GPU"
    layout, per_node = asked.layout, asked.layout.gpus // asked.nodes
    for nodes in range(asked.nodes + 1, 9):
        change = replace(asked, nodes=nodes, layout=replace(layout, tp=per_node, dp=1, pp=nodes))
        if asked.config.num_attention_heads % per_node == 0 and works(change):
            yield f"{nodes * per_node} x {asked.gpu}: --nodes {nodes} --tp {per_node} --pp {nodes}"
            break
    others = [
        name
        for name, mib in GPUS.items()
        if mib << 20 > asked.gpu_bytes and works(replace(asked, gpu=name, gpu_bytes=mib << 20))
    ]
    if others:
        yield f"{layout.gpus} x {' or '.join(others)}"


def serve_command(model: str, asked: Asked, fit: Fit, concurrency: int) -> list[str]:
    """Lines to paste, one a node."""
    layout, parts = asked.layout, ["vllm", "serve", model]
    if asked.config.model_type == "deepseek_v32":
        parts += ["--tokenizer-mode", "deepseek_v32"]
    for option, size in (
        ("--tensor-parallel-size", layout.tp),
        ("--data-parallel-size", layout.dp),
        ("--pipeline-parallel-size", layout.pp),
    ):
        if size > 1:
            parts += [option, str(size)]
    if layout.ep:
        parts.append("--enable-expert-parallel")
    parts += ["--kv-cache-dtype", asked.kind, "--max-model-len", str(fit.max_model_len)]
    if asked.step:
        parts += ["--max-num-batched-tokens", str(asked.step)]
    if concurrency > asked.most_requests * layout.dp:
        parts += ["--max-num-seqs", str(math.ceil(concurrency / layout.dp))]
    if asked.cache_memory is None and asked.utilization != UTILIZATION:
        parts += ["--gpu-memory-utilization", f"{asked.utilization:g}"]
    if asked.drafts:
        parts += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 1})]
    sizes = [len(stage) for stage in memory.stages(asked.config, layout.pp)]
    prefix = ""
    if sizes != memory.vllm_stages(asked.config.num_hidden_layers, layout.pp):
        prefix = f"VLLM_PP_LAYER_PARTITION={','.join(map(str, sizes))} "
    line = prefix + shlex.join(parts)
    if asked.nodes == 1:
        return [line]
    ranks, rest = divmod(layout.dp, asked.nodes)
    if layout.dp > 1 and not rest:  # whole data parallel ranks on each node
        line += f" --data-parallel-size-local {ranks} --data-parallel-address FIRST_NODE"
        others = [f"{line} --headless --data-parallel-start-rank {node * ranks}" for node in range(1, asked.nodes)]
        return [line, *others]
    line += f" --nnodes {asked.nodes} --master-addr FIRST_NODE --node-rank"
    return [f"{line} {node}{' --headless' if node else ''}" for node in range(asked.nodes)]
