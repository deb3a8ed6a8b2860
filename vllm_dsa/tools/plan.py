"""Does a model fit on these GPUs, and with how much context? Asks no GPU and no vLLM.

It reads config.json, and the headers of the weights' files where they are there. Weights and the bytes of a token are
counted, not guessed; what a GPU needs beside them is an assumption, printed as such. Where vLLM has printed its
"Available KV cache memory", --kv-cache-memory takes that in its place, and the tokens are then vLLM's own.
"""

import argparse
import json
import math
from dataclasses import replace
from typing import Any

from vllm_dsa.config import DSAConfig
from vllm_dsa.tools import memory
from vllm_dsa.tools import model as models
from vllm_dsa.tools.fit import (
    DRIVER_GIB,
    GIB,
    GPUS,
    UTILIZATION,
    Asked,
    Fit,
    alternatives,
    default_kind,
    fitted,
    fixed_gib,
    serve_command,
)
from vllm_dsa.tools.memory import BLOCK, Layout
from vllm_dsa.tools.output import Section, UserError, show

EXAMPLE = """examples:
  vllm-dsa plan deepseek-ai/DeepSeek-V3.2 --gpu H200 --num-gpus 8 --concurrency 64
  vllm-dsa plan /models/GLM-5-FP8 --gpu H100 --num-gpus 8 --nodes 2 --max-model-len 65536
  vllm-dsa plan /models/DeepSeek-V3.2 --gpu H200 --num-gpus 8 --kv-cache-memory 41.37   as vLLM printed it

exit status: 0 it fits, 1 it does not, 2 bad usage or an unreadable model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json, or a Hugging Face id in the cache")
    parser.add_argument("--gpu", required=True, help=f"{', '.join(GPUS)}; or GiB a GPU as nvidia-smi lists it, e.g. 96")
    parser.add_argument("--num-gpus", type=int, required=True, metavar="N", help="GPUs a node")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--tp", type=int, metavar="N", help="tensor parallel size; default: the GPUs of a node")
    parser.add_argument("--dp", type=int, metavar="N", help="data parallel size; default: 1, or what is left over")
    parser.add_argument("--pp", type=int, metavar="N", help="pipeline parallel size; default: the nodes")
    parser.add_argument("--ep", action="store_true", help="expert parallel: experts go whole to the tp x dp ranks")
    parser.add_argument("--mtp", action="store_true", help="speculative decoding: with the MTP layer and its cache")
    parser.add_argument(
        "--kv-cache-dtype", metavar="D", help="auto, bfloat16 or fp8_ds_mla (fp8); default: the smaller"
    )
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens a request; default: as many as fit")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, metavar="N", help="tokens a step; default: as vLLM, 2048 to 16384"
    )
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
    for option in ("num_gpus", "nodes", "tp", "dp", "pp", "max_model_len", "max_num_batched_tokens", "concurrency"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(
                f"--{option.replace('_', '-')} {value}: it must be at least 1. Correct it, or leave it out."
            )
    if args.mtp and config.mtp_layers != 1:
        raise UserError(f"--mtp: drafts need one MTP layer, this config has {config.mtp_layers}. Leave --mtp out.")
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
        drafts=args.mtp,
        max_model_len=args.max_model_len,
        step=args.max_num_batched_tokens,
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
    if asked is None:
        return default_kind(config)
    if asked in ("auto", "bfloat16"):
        if asked == "bfloat16" and dtype != "bfloat16":
            raise UserError(f"--kv-cache-dtype bfloat16: the cache holds the model's dtype, {dtype}. Pass auto.")
        return "auto"
    if asked not in ("fp8", "fp8_e4m3", models.FP8_DS_MLA):
        raise UserError(f"--kv-cache-dtype {asked}: not one of auto, bfloat16, fp8_ds_mla, fp8. Pass one of them.")
    if default_kind(config) != models.FP8_DS_MLA:
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
    """Quantised weights are split over ranks by whole blocks or groups of a scale, or vLLM refuses to load them."""
    layout, quantisation = asked.layout, asked.hf_config.get("quantization_config") or {}
    block = memory.inputs_of_a_scale(quantisation)
    width = asked.hf_config.get("moe_intermediate_size")
    if block == 1 or not width:
        return
    shared = width * (asked.hf_config.get("n_shared_experts") or 0)
    for what, size, ranks in (
        ("moe_intermediate_size", width, 1 if layout.ep else layout.tp * layout.dp),
        ("the width of the shared experts", shared, layout.shared_expert_ranks),
    ):
        if ranks > 1 and size % (ranks * block):
            step = "Pass --ep, or use fewer ranks" if ranks == layout.tp * layout.dp and not layout.ep else "Lower --tp"
            raise UserError(
                f"{what}, {size}, over {ranks} ranks is no multiple of the {block} of "
                f"{'an FP8 block' if asked.weights.format == 'fp8' else 'a group that shares a scale'}. {step}."
            )


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
    if memory.is_packed(asked.hf_config.get("quantization_config")):
        text = "kv_b_proj and the indexer's wk and weights_proj are made plain while loading, and counted so"
        head.add("format", text)
    elif weights.format not in ("bfloat16", "float32", "fp8"):
        text = "this plan is of memory only: vllm-dsa is tested with bfloat16, FP8, AWQ, GPTQ, W4A16 and NVFP4"
        head.add("format", text, "note")
    sizes = f"tensor {layout.tp}, data {layout.dp}, pipeline {layout.pp}" + (", experts whole" if layout.ep else "")
    head.add("layout", f"{layout.gpus} x {asked.gpu} on {asked.nodes} node(s); parallel: {sizes}")

    parts = Section("Weights: whole, and on a GPU" + (" of the tightest pipeline stage" if layout.pp > 1 else ""))
    for part in memory.PARTS:
        total = weights.total(part)
        if total and part == "MTP" and not asked.drafts:
            parts.add(part, f"{_gib(total):>12}  not loaded without --mtp")
        elif total:
            made = "  made while loading: W_UK, W_UV, the indexer's projections in one" if part == "derived" else ""
            parts.add(part, f"{_gib(total):>12}  {_gib(tightest.weights[part]):>12}{made}")

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
            f"{_gib(fit.runtime):>12}  assumed: {fixed_gib(asked):.1f} for kernels, graphs and NCCL, the rest for a "
            f"step of {asked.batched_tokens:,} tokens",
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
