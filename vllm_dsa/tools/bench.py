"""How fast are write, select and attend here, against dense attention, stock vLLM and the chip's limit?

The sizes are DeepSeek-V3.2's. Nothing is timed that was not held against reference.py first, on the very inputs. A step
brings --rows new tokens to each of --requests contexts of each of --lengths; one row each is a decode step. ``layer``
is the three operations one after another, without the projections around them.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_dsa.kernels import dispatch
from vllm_dsa.tools.output import Section, UserError, numbers, show
from vllm_dsa.tools.progress import progress

EXAMPLE = """examples:
  vllm-dsa bench                                               every operation, decode and prefill
  vllm-dsa bench --op layer --lengths 4096,16384,65536 --compare dense --png layer.png
  vllm-dsa bench --op layer --heads 16 --compare stock         on a GPU, with vLLM

exit status: 0 timed, 1 a kernel is wrong and nothing was timed, 2 bad input"""

OPS = ("write", "select", "attend", "layer")
NOPE, VALUE = 128, 128  # qk_nope_head_dim and v_head_dim of DeepSeek-V3.2
GATED_ROWS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", metavar="OP,OP", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--lengths", metavar="N,N", help="tokens of context; default: 4096,32768, on a CPU 4096,16384")
    parser.add_argument("--heads", metavar="N,N", default="16", help="attention heads of a rank; default: 16")
    parser.add_argument("--rows", metavar="N,N", help="new tokens a request; default: 1,4096, on a CPU 1,64")
    parser.add_argument("--requests", metavar="N", default="1", help="requests of the step; default: 1")
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "fp8_ds_mla"), default="fp8_ds_mla", help="default: fp8_ds_mla"
    )
    parser.add_argument("--provider", choices=dispatch.names(), help="default: the first that can serve")
    parser.add_argument(
        "--compare",
        choices=("dense", "stock"),
        help="also dense MLA by torch's scaled_dot_product_attention; or vLLM's engine without and with this package",
    )
    parser.add_argument("--seconds", metavar="S", default="1", help="how long to time each; default: 1")
    parser.add_argument(
        "--json", metavar="FILE", nargs="?", const="-", help="write JSON, to standard output without FILE"
    )
    parser.add_argument("--png", metavar="FILE", help="draw time against context; needs matplotlib")


def run(args: argparse.Namespace) -> int:
    import torch

    from vllm_dsa.testing.compare import Mismatch

    ops = _ops(args.op)
    seconds = numbers("--seconds", args.seconds, float, 0.01, 600)[0]
    if args.png and not find_spec("matplotlib"):
        raise UserError(f"--png {args.png}: matplotlib is not installed. pip install matplotlib, or leave --png out.")
    device = "cuda" if torch.cuda.is_available() and args.provider != "cpu" else "cpu"
    lengths = numbers("--lengths", args.lengths or ("4096,16384" if device == "cpu" else "4096,32768"), int, 1, 1 << 20)
    rows = numbers("--rows", args.rows or ("1,64" if device == "cpu" else "1,4096"), int, 1, 1 << 16)
    heads = numbers("--heads", args.heads, int, 1, 128)
    requests = numbers("--requests", args.requests, int, 1, 4096)[0]
    _check_comparison(args.compare, ops, device)
    cases = [_case(n, min(r, n), h, requests, args.kv_cache_dtype) for h in heads for r in rows for n in lengths]
    try:
        report = _timed(list(dict.fromkeys(cases)), ops, device, args, seconds)
    except Mismatch as mismatch:
        print(f"vllm-dsa bench: nothing was timed: {mismatch}. `vllm-dsa verify` says more.", file=sys.stderr)
        return 1
    if args.compare == "stock":
        from vllm_dsa.tools import stock

        torch.cuda.empty_cache()  # the engines ask for most of the GPU's memory
        report["results"] += stock.results(heads, lengths, requests, args.kv_cache_dtype)
    if args.png:
        from vllm_dsa.tools import plot

        plot.draw(report, Path(args.png))
    if args.json:
        text = json.dumps(report, indent=2)
        if args.json == "-":
            print(text)
        else:
            _write(Path(args.json), text + "\n")
    if args.json != "-":
        show(_sections(report))
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"--json {path}: {error}. Name a file in a folder that exists.") from error


def _ops(text: str | None) -> list[str]:
    ops = list(OPS) if text is None else [part.strip() for part in text.split(",")]
    if unknown := [op for op in ops if op not in OPS]:
        raise UserError(f"--op {unknown[0]}: name some of {', '.join(OPS)}.")
    return ops


def _check_comparison(compare: str | None, ops: list[str], device: str) -> None:
    if compare == "dense" and not {"attend", "layer"} & set(ops):
        raise UserError(f"--compare dense: dense attention has no {' or '.join(ops)}. Add --op layer.")
    if compare != "stock":
        return
    if ops != ["layer"]:
        raise UserError(
            "--compare stock times whole layers in vLLM's engine: its operations are not ours. Pass --op layer."
        )
    if device == "cpu":
        raise UserError(
            "--compare stock needs a GPU: stock vLLM has no sparse attention on a CPU. Try --compare dense."
        )
    if not find_spec("vllm"):
        raise UserError("--compare stock runs vLLM, which is not importable here. Install it beside this package.")


def _case(context: int, rows: int, heads: int, requests: int, kind: str) -> Any:
    """One step of DeepSeek-V3.2: ``requests`` contexts of ``context`` tokens, the last ``rows`` of each new."""
    from dataclasses import replace

    import torch

    from vllm_dsa.testing.cases import V32

    return replace(
        V32,
        name=f"{requests} x {context:,} tokens, {rows:,} new, {heads} heads",
        requests=((context - rows, rows),) * requests,
        dtype=torch.bfloat16,
        latent_kind=kind,
        heads=heads,
        page_padding=0,
        decode_rows=int(rows == 1),
    )


def _timed(cases: list[Any], ops: list[str], device: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    import torch

    from vllm_dsa.testing import clock

    limits = clock.limits(device)
    results = []
    with progress(f"on {device}", len(cases)) as advance:
        for case in cases:
            advance(case.name)
            results += _timed_case(case, ops, device, args, limits, seconds)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "kv_cache_dtype": args.kv_cache_dtype,
        "limits": vars(limits),
        "results": results,
    }


def _timed_case(
    case: Any, ops: list[str], device: str, args: argparse.Namespace, limits: Any, seconds: float
) -> list[dict[str, Any]]:
    """A result for each operation, and for dense attention if asked, all of one step."""
    import torch

    from vllm_dsa.testing import check, clock, work

    providers, kernels = _kernels(case, device, args.provider)
    inputs, codes, weights = check.written(case, device)
    selected = torch.empty(case.tokens, case.top_k, dtype=torch.int32, device=device)
    out = torch.empty(case.tokens, case.heads, case.rank, dtype=case.dtype, device=device)
    step = (codes, weights, inputs.index_cache, inputs.rows)
    names = [providers[op] for op in ("write", "select", "attend")]
    _gate(case, device, kernels, inputs, step, selected, out, names)

    def write() -> None:
        kernels.write_keys(*inputs.keys())
        kernels.write_queries(*inputs.queries())

    def select() -> None:
        kernels.select(*step, selected)

    def attend() -> None:
        kernels.attend(inputs.query, inputs.latent_cache, inputs.rows, selected, inputs.scale, out)

    def layer() -> None:
        write()
        select()
        attend()

    context, rows = sum(case.requests[0]), case.requests[0][1]
    facts = {"heads": case.heads, "context": context, "rows": rows, "requests": len(case.requests)}
    runs: dict[str, Callable[[], None]] = {"write": write, "select": select, "attend": attend, "layer": layer}
    results = []
    for op in ops:
        timing = clock.measure(runs[op], device, seconds, captured=rows == 1)
        needed = work.OPS[op](case)
        least = sum(limits.seconds(*vars(work.OPS[part](case)).values(), part == "select") for part in _parts(op))
        provider = providers.get(op, "+".join(dict.fromkeys(names)))
        results.append({"op": op, "series": provider, **facts, **_rates(timing, needed, least)})
    if args.compare == "dense":
        run, needed = _dense(case, device)
        timing = clock.measure(run, device, seconds, captured=rows == 1)
        least = limits.seconds(needed.bytes, needed.flops, False)
        results.append({"op": "attend", "series": "dense", **facts, **_rates(timing, needed, least)})
    return results


def _parts(op: str) -> tuple[str, ...]:
    return ("write", "select", "attend") if op == "layer" else (op,)


def _rates(timing: Any, needed: Any, least: float) -> dict[str, float]:
    return {
        "ms": timing.seconds * 1e3,
        "spread": timing.spread,
        "runs": timing.runs,
        "gb_s": needed.bytes / timing.seconds / 1e9,
        "tflop_s": needed.flops / timing.seconds / 1e12,
        "limit_share": least / timing.seconds,
    }


def _kernels(case: Any, device: str, asked: str | None) -> tuple[dict[str, str], Any]:
    """Who serves each operation of a case, and their functions."""
    from types import SimpleNamespace

    from vllm_dsa.testing.check import provider_functions, request_of

    forced = asked or dispatch.forced()
    request, functions, providers = request_of(case, device), {}, {}
    refused = []
    for op in dispatch.OPS:
        for provider in (p for p in dispatch.PROVIDERS if forced in (None, p.name)):
            reasons = dispatch.refusals(provider, op, request, forced)
            if not reasons:
                providers[op] = provider.name
                own = vars(provider_functions(provider))
                names = (*dispatch.FUNCTIONS[op], *(("scores",) if op == "select" else ()))
                functions |= {name: own[name] for name in names if name in own}
                break
            refused += [f"{provider.name}: {reason}" for reason in reasons]
        if op not in providers:
            raise UserError(f"no provider has {op} for {case.name}. Refused: {'; '.join(dict.fromkeys(refused))}.")
    return providers, SimpleNamespace(**functions)


def _gate(
    case: Any, device: str, kernels: Any, inputs: Any, step: tuple, selected: Any, out: Any, names: list[str]
) -> None:
    """Each operation on this case against reference.py: writes whole, a few rows of the others. Raises Mismatch."""
    from vllm_dsa.testing import check
    from vllm_dsa.testing.compare import allowance

    write, select, attend = (allowance(name) for name in names)
    check.check_write(kernels, case, device, tolerance=write.tolerance)
    at = sorted({i * (case.tokens - 1) // max(1, GATED_ROWS - 1) for i in range(GATED_ROWS)})
    kernels.select(*step, selected)
    check.assert_selection(kernels, step, selected, at, select.scores(device))
    lse = kernels.attend(inputs.query, inputs.latent_cache, inputs.rows, selected, inputs.scale, out)
    check.assert_attention(inputs, selected, out, lse, at, attend.tolerance)


def _dense(case: Any, device: str) -> tuple[Callable[[], Any], Any]:
    """Attention to all keys through torch, and its work: for a decode step absorbed, one key a token for all heads; for
    several rows plain heads of 192 and 128, whose keys and values are at hand (their projection is not timed)."""
    import torch
    import torch.nn.functional as F

    from vllm_dsa.testing import work

    (context, rows), count = case.requests[0], len(case.requests)
    total = context + rows

    def random(*shape: int) -> Any:
        return torch.randn(*shape, device=device, dtype=case.dtype)

    if rows == 1:
        latents = random(count, 1, total, case.rank + case.rope_dim)
        query = random(count, 1, case.heads, case.rank + case.rope_dim)  # heads as rows: they share the keys
        values = latents[..., : case.rank]
        needed = work.dense(case, case.rank + case.rope_dim, 0, 1)  # values are part of the keys
        flops = 2.0 * sum(work.lengths(case)) * case.heads * (2 * case.rank + case.rope_dim)
        return lambda: F.scaled_dot_product_attention(query, latents, values), work.Work(needed.bytes, flops)
    query, keys = (
        random(count, case.heads, rows, NOPE + case.rope_dim),
        random(count, case.heads, total, NOPE + case.rope_dim),
    )
    values = random(count, case.heads, total, VALUE)
    mask = None
    if context:
        mask = torch.ones(rows, total, dtype=torch.bool, device=device).tril(context)
    needed = work.dense(case, NOPE + case.rope_dim, VALUE, case.heads)
    return lambda: F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=mask is None), needed


def _sections(report: dict[str, Any]) -> list[Section]:
    limits = report["limits"]
    device = Section(f"{report['device']}, torch {report['torch']}, {report['kv_cache_dtype']} cache")
    rates = f"{limits['bandwidth'] / 1e9:,.0f} GB/s, {limits['flops'] / 1e12:,.2f} TFLOP/s"
    device.add("limit", f"{rates} ({limits['source']})")
    device.add("±", "half of the range that the middle 80 % of the runs take")
    times = Section("one step; share: the least time that the device could take, of the time taken")
    times.add("", f"{'heads':>5} {'context':>7} {'new':>5} {'ms':>8}  ±    {'GB/s':>5} TFLOP/s   share")
    for r in report["results"]:
        figures = f"{r['heads']:5} {r['context']:7,} {r['rows']:5,} {r['ms']:8.3f} {r['spread'] / 2:4.0%}"
        if "gb_s" in r:
            figures += f" {_short(r['gb_s'])} {_short(r['tflop_s']):>7} {r['limit_share']:7.1%}"
        times.add(f"{r['op']} {r['series']}", figures)
    return [device, times]


def _short(value: float) -> str:
    """Three or more digits of a figure, five characters wide."""
    return f"{value:5,.0f}" if value >= 100 else f"{value:5.2f}" if value >= 1 else f"{value:5.3f}"
