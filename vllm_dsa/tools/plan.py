"""Does a model fit on these GPUs, and with how much context? Asks no GPU and no vLLM.

It reads config.json, and the headers of the weights' files where they are there. Weights and the bytes of a token are counted, not guessed; what a GPU needs beside them is
an assumption, printed as such. Where vLLM has printed its "Available KV cache memory", --kv-cache-memory takes that in
place of the assumption, and the tokens are then vLLM's own.
"""

import argparse
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
from vllm_dsa.tools.output import Section, UserError, show

EXAMPLE = """examples:
  vllm-dsa plan deepseek-ai/DeepSeek-V3.2 --gpu H200 --num-gpus 8 --concurrency 64
  vllm-dsa plan /models/GLM-5-FP8 --gpu H100 --num-gpus 8 --nodes 2 --max-model-len 65536
  vllm-dsa plan /models/DeepSeek-V3.2 --gpu H200 --num-gpus 8 --kv-cache-memory 41.37   as vLLM printed it

exit status: 0 it fits, 1 it does not, 2 bad usage or an unreadable model"""

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
# GiB, measured on an H100 and an H200: what nvidia-smi lists and CUDA does not offer.
DRIVER_GIB = 0.6
# GiB a GPU that are assumed: CUDA's context with the kernels' code, NCCL's buffers, CUDA graphs.
CONTEXT_GIB, NCCL_GIB, GRAPHS_GIB = 1.0, 1.5, 1.0
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
    max_model_len: int | None
    cache_memory: int | None  # bytes a GPU, if vLLM has said
    rounded: bool  # cache_memory, to hundredths of a GiB

    @property
    def dtype(self) -> str:
        return models.dtype_of(self.hf_config)

    @property
    def batched_tokens(self) -> int:
        """vLLM's default --max-num-batched-tokens on this GPU."""
        if self.gpu_bytes >= 160 * GIB:
            return 16384
        return 8192 if self.gpu_bytes >= 70 * GIB and not self.gpu.startswith("A100") else 2048

    @property
    def most_requests(self) -> int:
        """vLLM's default --max-num-seqs on this GPU."""
        return 256 if self.batched_tokens == 2048 else MOST_REQUESTS


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json, or a Hugging Face id in the cache")
    parser.add_argument("--gpu", required=True, help=f"{', '.join(GPUS)}; or GiB a GPU as nvidia-smi lists it, e.g. 96")
    parser.add_argument("--num-gpus", type=int, required=True, metavar="N", help="GPUs a node")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor parallel size; default: the GPUs of a node")
    parser.add_argument("--dp", type=int, metavar="N", help="data parallel size; default: 1, or what is left over")
    parser.add_argument("--pp", type=int, metavar="N", help="pipeline parallel size; default: the nodes")
    parser.add_argument("--ep", action="store_true", help="expert parallel: experts go whole to the tp x dp ranks")
    parser.add_argument(
        "--kv-cache-dtype", metavar="D", help="auto, bfloat16 or fp8_ds_mla (fp8); default: the smaller"
    )
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens a request; default: as many as fit")
    parser.add_argument("--concurrency", type=int, metavar="N", help="requests at once, each that long")
    parser.add_argument("--gpu-memory-utilization", type=float, default=UTILIZATION, metavar="X", help="default: 0.92")
    parser.add_argument(
        "--kv-cache-memory", metavar="GIB", help="what vLLM printed as available, in GiB; or exact, as 44417613824B"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    folder = models.find(args.model)
    hf_config = models.read_config(folder)
    config = DSAConfig.from_hf(hf_config)
    name, size = _gpu(args.gpu)
    for option in ("num_gpus", "nodes", "tp", "dp", "pp", "max_model_len", "concurrency"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(
                f"--{option.replace('_', '-')} {value}: it must be at least 1. Correct it, or leave it out."
            )
    if not 0 < args.gpu_memory_utilization <= 1:
        raise UserError(f"--gpu-memory-utilization {args.gpu_memory_utilization}: it must be above 0 and at most 1.")
    if args.max_model_len and args.max_model_len > config.max_position_embeddings:
        raise UserError(
            f"--max-model-len {args.max_model_len}: the model has {config.max_position_embeddings} positions "
            f"(max_position_embeddings). Ask for no more."
        )
    asked = Asked(
        config=config,
        hf_config=hf_config,
        weights=memory.weights(folder, hf_config, config),
        gpu=name,
        gpu_bytes=size,
        layout=_layout(args, config),
        nodes=args.nodes,
        kind=_cache_kind(args.kv_cache_dtype, config, models.dtype_of(hf_config)),
        utilization=args.gpu_memory_utilization,
        max_model_len=args.max_model_len,
        cache_memory=_cache_memory(args.kv_cache_memory),
        rounded=not (args.kv_cache_memory or "").endswith("B"),
    )
    _refuse_split_blocks(asked)
    fit = fitted(asked)
    wanted = args.concurrency or 0
    fits = fit.fits and fit.requests >= wanted
    concurrency = wanted or min(fit.requests, asked.most_requests * asked.layout.dp)
    command = serve_command(args.model, asked, fit, concurrency) if fits else []
    instead = [] if fits else list(alternatives(asked, wanted))
    if args.json:
        print(json.dumps(_facts(asked, fit, fits, concurrency, command, instead), indent=2))
        return 0 if fits else 1
    show(_report(args, asked, fit, fits, concurrency, instead))
    if command:
        print("\n" + "\n".join(command))
    return 0 if fits else 1


def _gpu(text: str) -> tuple[str, int]:
    """Name and bytes of a GPU of the table, or of one of so many GiB."""
    names = {_plain(name): name for name in GPUS}
    if (plain := _plain(text)) in names:
        return names[plain], GPUS[names[plain]] << 20
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if not 1 <= gib <= 4096:
        raise UserError(f"--gpu {text}: not one of {', '.join(GPUS)}. Pass one of them, or the GiB that a GPU has.")
    return f"{gib:g} GiB", int(gib * GIB)


def _plain(name: str) -> str:
    return "".join(c for c in name.upper() if c.isalnum())


def _cache_kind(asked: str | None, config: DSAConfig, dtype: str) -> str:
    holds_fp8 = (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)
    if asked is None:
        return models.FP8_DS_MLA if holds_fp8 else "auto"
    if asked in ("auto", "bfloat16"):
        if asked == "bfloat16" and dtype != "bfloat16":
            raise UserError(f"--kv-cache-dtype bfloat16: the cache holds the model's dtype, {dtype}. Pass auto.")
        return "auto"
    if asked not in ("fp8", "fp8_e4m3", models.FP8_DS_MLA):
        raise UserError(f"--kv-cache-dtype {asked}: not one of auto, bfloat16, fp8_ds_mla, fp8. Pass one of them.")
    if not holds_fp8:
        raise UserError(
            f"--kv-cache-dtype {asked}: its rows hold kv_lora_rank 512 and qk_rope_head_dim 64, this model has "
            f"{config.kv_lora_rank} and {config.qk_rope_head_dim}. Pass auto."
        )
    return models.FP8_DS_MLA


def _cache_memory(text: str | None) -> int | None:
    if text is None:
        return None
    number, unit = (text[:-1], 1) if text.endswith("B") else (text, GIB)
    try:
        size = int(number) if unit == 1 else round(float(number) * GIB)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"--kv-cache-memory {text}: pass GiB above 0, as 41.37, or exact bytes, as 44417613824B.")
    return size


def _layout(args: argparse.Namespace, config: DSAConfig) -> Layout:
    """Sizes as asked; those that are not, so that every GPU is used: tensor parallel in a node, pipeline across."""
    gpus = args.num_gpus * args.nodes
    given = math.prod(size for size in (args.tp, args.dp, args.pp) if size)
    if gpus % given:
        raise UserError(f"--tp, --dp and --pp ask for multiples of {given} GPUs, there are {gpus}. Change one of them.")
    tp, dp, pp, left = args.tp, args.dp, args.pp, gpus // given
    if tp is None:
        if pp is None:
            pp = args.nodes if left % args.nodes == 0 else 1
            left //= pp
        tp, left = left, 1
    if pp is None and (dp is not None or args.nodes > 1):
        pp, left = left, 1
    if dp is None:
        dp, left = left, 1
    layout = Layout(tp, dp, pp or 1, args.ep)
    if layout.gpus != gpus:
        raise UserError(
            f"--tp {tp} x --dp {dp} x --pp {layout.pp} is {layout.gpus} GPUs, there are {gpus}. Change one."
        )
    if config.num_attention_heads % tp:
        raise UserError(
            f"--tp {tp} does not divide the model's {config.num_attention_heads} heads. Choose a size that does, and "
            f"--dp or --pp for the rest of the GPUs."
        )
    if layout.pp > config.num_hidden_layers:
        raise UserError(f"--pp {layout.pp}: the model has {config.num_hidden_layers} layers. Choose no more stages.")
    return layout


def _refuse_split_blocks(asked: Asked) -> None:
    """FP8 weights are split over ranks by whole blocks of scales, or vLLM refuses to load them."""
    layout, quantisation = asked.layout, asked.hf_config.get("quantization_config") or {}
    block = (quantisation.get("weight_block_size") or [1])[0]
    width = asked.hf_config.get("moe_intermediate_size")
    if asked.weights.format != "fp8" or not width:
        return
    shared = width * (asked.hf_config.get("n_shared_experts") or 0)
    for what, size, ranks in (
        ("moe_intermediate_size", width, 1 if layout.ep else layout.tp * layout.dp),
        ("the width of the shared experts", shared, layout.shared_expert_ranks),
    ):
        if size % (ranks * block):
            step = "Pass --ep, or use fewer ranks" if ranks == layout.tp * layout.dp and not layout.ep else "Lower --tp"
            raise UserError(
                f"{what}, {size}, over {ranks} ranks is no multiple of the {block} of an FP8 block. {step}."
            )


def fitted(asked: Asked) -> Fit:
    """Count what lies on each stage's GPUs, and what is left for the caches."""
    budget = int((asked.gpu_bytes - DRIVER_GIB * GIB) * asked.utilization)
    runtime, last = runtime_bytes(asked), asked.config.num_hidden_layers - 1
    stages = []
    for layers in memory.stages(asked.config, asked.layout.pp):
        parts = {part: asked.weights.on_gpu(part, asked.layout, layers, last) for part in memory.PARTS if part != "MTP"}
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
    step = tokens * (width * (4 * config.hidden_size + max(attention, experts)) + 4 * config.index_topk)
    # Logits in float32, sorted and as probabilities, for as many requests as vLLM tries at start.
    sampling = asked.most_requests * int(asked.hf_config.get("vocab_size") or 0) * 12
    fixed = CONTEXT_GIB + GRAPHS_GIB + (NCCL_GIB if layout.gpus > 1 else 0)
    return max(step, sampling) + int(fixed * GIB)


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
    if asked.kind == "auto" and _cache_kind(None, asked.config, asked.dtype) != "auto":
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
    if concurrency > asked.most_requests * layout.dp:
        parts += ["--max-num-seqs", str(math.ceil(concurrency / layout.dp))]
    if asked.cache_memory is None and asked.utilization != UTILIZATION:
        parts += ["--gpu-memory-utilization", f"{asked.utilization:g}"]
    sizes = [len(stage.layers) for stage in fit.stages]
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


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB"


def _report(
    args: argparse.Namespace, asked: Asked, fit: Fit, fits: bool, concurrency: int, instead: list[str]
) -> list[Section]:
    layout, tightest, weights = asked.layout, fit.tightest, asked.weights
    head = Section("Model")
    sharing = asked.config.index_shared.count(True)
    layers = f"{asked.config.num_hidden_layers} layers" + (f", {sharing} of them without an indexer" if sharing else "")
    head.add("model", f"{args.model}: {asked.config.model_type}, {layers}")
    counted = "counted from" if weights.exact else "estimated from"
    head.add("weights", f"{weights.format}, {counted} {weights.source}", "" if weights.exact else "note")
    if weights.format not in ("bfloat16", "float32", "fp8"):
        head.add("format", "this plan is of memory only: vllm-dsa is tested with bfloat16, float32 and FP8", "note")
    sizes = f"tensor {layout.tp}, data {layout.dp}, pipeline {layout.pp}" + (", experts whole" if layout.ep else "")
    head.add("layout", f"{layout.gpus} x {asked.gpu} on {asked.nodes} node(s); parallel: {sizes}")

    parts = Section("Weights: whole, and on a GPU" + (" of the tightest pipeline stage" if layout.pp > 1 else ""))
    for part in memory.PARTS:
        total = weights.total(part)
        if total and part == "MTP":
            parts.add(part, f"{_gib(total)}, loaded with --speculative-config only, not counted here")
        elif total:
            parts.add(part, f"{_gib(total):>12}  {_gib(tightest.weights[part]):>12}")

    cache = Section("Cache, bytes a token on every GPU" + (" of that stage" if layout.pp > 1 else ""))
    held = asked.dtype if asked.kind == "auto" else asked.kind
    cache.add("latents", f"{tightest.latent:,} as {held}; dense MLA would have this part only")
    cache.add("index keys", f"{tightest.index:,}")
    cache.add("together", f"{tightest.token:,}; every tensor parallel rank holds all of it")

    gpu = Section("One GPU")
    if asked.cache_memory is None:
        usable = asked.gpu_bytes - DRIVER_GIB * GIB
        gpu.add("CUDA offers", f"{_gib(usable):>12}  assumed: {DRIVER_GIB} GiB less than nvidia-smi lists")
        gpu.add("vLLM's share", f"{_gib(fit.budget):>12}  --gpu-memory-utilization {asked.utilization:g}")
        gpu.add("weights", f"{_gib(sum(tightest.weights.values())):>12}")
        gpu.add(
            "runtime",
            f"{_gib(fit.runtime):>12}  assumed: context {CONTEXT_GIB:g}, graphs {GRAPHS_GIB:g}"
            f"{f', NCCL {NCCL_GIB:g}' if layout.gpus > 1 else ''}, a step of {asked.batched_tokens:,} tokens the rest",
        )
    gpu.add("caches", f"{_gib(tightest.available):>12}  {'as vLLM printed' if asked.cache_memory else 'what is left'}")

    room = Section("What fits")
    ranks = f" on each of {layout.dp} data parallel ranks" if layout.dp > 1 else ""
    room.add("blocks", f"{fit.blocks:,} of {BLOCK} tokens{ranks}; vLLM keeps one of them empty")
    if fit.blocks:
        room.add("tokens", f"{fit.tokens:,}{ranks}, as vLLM logs it{_rounding(asked, fit)}")
    each = f"of {fit.max_model_len:,} tokens"
    if fits:
        room.add("requests", f"{fit.requests:,} {each} at once", "ok")
    elif fit.fits:
        room.add("requests", f"{fit.requests:,} {each} at once, {args.concurrency:,} were asked for", "fault")
    else:
        short = memory.blocks_of(fit.max_model_len) + 1
        lacking = max(stage.token * BLOCK * short - stage.available for stage in fit.stages)
        room.add("requests", f"not one {each}: {_gib(lacking)} a GPU are lacking", "fault")
    experts, chosen = asked.hf_config.get("n_routed_experts"), asked.hf_config.get("num_experts_per_tok")
    if fits and experts and chosen:
        mean = concurrency * chosen / experts
        room.add("experts", f"{mean:.2f} tokens an expert in a decode step of {concurrency:,} requests, on average")
    for text in instead:
        room.add("would fit", text, "note")
    if not fits and not instead:
        room.add("would fit", "nothing near it: neither 8 nodes of these GPUs nor as many larger ones", "note")
    return [head, parts, cache, gpu, room]


def _rounding(asked: Asked, fit: Fit) -> str:
    """How far the tokens may be off because vLLM prints GiB with two decimals."""
    if asked.cache_memory is None or not asked.rounded:
        return ""
    low, high = (fitted(replace(asked, cache_memory=asked.cache_memory + d)).tokens for d in (-GIB // 200, GIB // 200))
    return "" if low == high else f"; {low:,} to {high:,} if the GiB were rounded to two decimals"


def _facts(
    asked: Asked, fit: Fit, fits: bool, concurrency: int, command: list[str], instead: list[str]
) -> dict[str, Any]:
    tightest = fit.tightest
    experts, chosen = asked.hf_config.get("n_routed_experts"), asked.hf_config.get("num_experts_per_tok")
    return {
        "fits": fits,
        "gpu": {"name": asked.gpu, "bytes": asked.gpu_bytes, "count": asked.layout.gpus, "nodes": asked.nodes},
        "layout": {"tp": asked.layout.tp, "dp": asked.layout.dp, "pp": asked.layout.pp, "ep": asked.layout.ep},
        "weights": {
            "format": asked.weights.format,
            "source": asked.weights.source,
            "exact": asked.weights.exact,
            "bytes": {part: asked.weights.total(part) for part in memory.PARTS},
            "bytes_per_gpu": tightest.weights,
        },
        "cache": {
            "dtype": asked.kind,
            "bytes_per_token": {"latent": tightest.latent, "index": tightest.index, "total": tightest.token},
            "available_bytes": tightest.available,
            "block_size": BLOCK,
            "blocks": fit.blocks,
            "tokens": fit.tokens,
        },
        "assumed_runtime_bytes": fit.runtime,
        "max_model_len": fit.max_model_len,
        "requests": fit.requests,
        "concurrency": concurrency,
        "tokens_per_expert": concurrency * chosen / experts if experts and chosen else None,
        "serve": command,
        "would_fit": instead,
    }
