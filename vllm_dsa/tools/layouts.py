"""A model on real text, in vLLM: is each layer's selection the reference's, and is the indexer's RoPE layout right?

The layout is judged by what a selection is for: how much of the layer's dense attention it holds. A trained indexer
selects the tokens that attention weighs most, in the layout that it was trained in; in the other one it selects worse.
So it shows in the weights which layout is right. An indexer that was not trained selects no better in one than in the
other, and nothing can be said.

Judged are layers where the best selection holds at least SPREAD more than a random one; there a layout's worth is the
share of that lead which it keeps. The verdict asks for a worth of at least WORTH, and a gap between the two layouts of
at least GAP and of four standard errors over the rows; worth and gap are means over the judged layers.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vllm_dsa import compat
from vllm_dsa.config import DSAConfig
from vllm_dsa.tools import model as models
from vllm_dsa.tools.output import Section, UserError, show

SPREAD, WORTH, GAP = 0.02, 0.3, 0.05
ROWS = 64  # measured, spread over the text's second half, past index_topk
LEAST_TOKENS = 256  # and ROWS past index_topk
CHARACTERS = 16  # read for each token wanted: few are longer
# Selections from the projections on may differ where e4m3 rounds to either side; no more than this.
LEAST_AGREEMENT = 0.95
# Quiet, in this process, and nothing on standard output, which is the report's.
ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


def run(args: argparse.Namespace) -> int:
    folder = models.find(args.checkpoint)
    config = DSAConfig.from_hf(models.read_config(folder))
    if find_spec("vllm") is None:
        raise UserError("verify MODEL runs the model in vLLM, which is not importable here. Install vLLM beside this.")
    if args.provider:
        os.environ["VLLM_DSA_PROVIDER"] = args.provider
    text, source = _text(args.text)
    tokens = max(2048, 4 * config.index_topk) if args.tokens is None else args.tokens
    least = max(LEAST_TOKENS, config.index_topk + ROWS)
    if not least <= tokens < config.max_position_embeddings:
        raise UserError(f"--tokens {tokens}: give {least} to {config.max_position_embeddings - 1} for this model.")
    layers, tokens = _measured(args, folder, text, tokens, least)
    report = {"model": args.checkpoint, "text": source, "tokens": tokens, **judge(layers)}
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(_sections(report))
    return {"right": 0, "wrong": 1}.get(report["verdict"], 2)


def _text(path: str | None) -> tuple[str, str]:
    """A text and where it is from."""
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise UserError("This Python came without its language reference. Name a text: --text FILE.") from error
        return "\n".join(topics[name] for name in sorted(topics)), "Python's language reference (pydoc_data.topics)"
    try:
        return Path(path).read_text(encoding="utf-8"), path
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: {error}. Name a file of UTF-8 text.") from error


def _measured(
    args: argparse.Namespace, folder: Path, text: str, tokens: int, least: int
) -> tuple[list[dict[str, Any]], int]:
    """Every probed layer's report, ranks averaged, and the tokens read."""
    given = _engine_options(args.engine)
    for name, value in ENGINE_ENV.items():
        os.environ.setdefault(name, value)
    options = dict(
        model=str(folder),
        max_model_len=tokens + 1,
        max_num_batched_tokens=min(tokens, 2048),
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    options |= given | {"worker_extension_cls": "vllm_dsa.tools.probe.Probe"}
    with stdout_to_stderr():
        print(f"loading {folder} into vLLM ...", file=sys.stderr, flush=True)
        try:
            llm = compat.LLM(**options)
        except (RuntimeError, ValueError, TypeError, OSError, AssertionError) as error:
            raise UserError(f"vLLM did not load {folder}: {error}") from error
        try:
            ids = llm.get_tokenizer().encode(text[: CHARACTERS * tokens])[:tokens]
            if len(ids) < (wanted := args.tokens or least):
                raise UserError(f"the text has {len(ids)} tokens, wanted: {wanted}. Give a longer --text.")
            first = max(len(ids) // 2, least - ROWS)
            lengths = sorted({first + (len(ids) - first) * (i + 1) // ROWS for i in range(ROWS)})
            if not all(llm.collective_rpc("dsa_probe", args=(lengths,))):
                raise UserError("vLLM serves this model without vllm-dsa. Unset VLLM_DSA_DISABLE and VLLM_PLUGINS.")
            sampling = compat.SamplingParams(max_tokens=1, temperature=0, detokenize=False)
            llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
            workers = llm.collective_rpc("dsa_probed_layers")
        finally:
            llm.llm_engine.engine_core.shutdown()
            compat.cleanup_dist_env_and_memory()
    by_name: dict[str, list[dict[str, Any]]] = {}
    for layer in (layer for worker in workers for layer in worker):
        by_name.setdefault(layer["layer"], []).append(layer)
    return [_mean_of_ranks(ranks) for ranks in by_name.values()], len(ids)


def _engine_options(given: str | None) -> dict[str, Any]:
    try:
        options = json.loads(given or "{}")
    except json.JSONDecodeError as error:
        raise UserError(f"--engine {given}: {error}. Give a JSON object of vllm.LLM's arguments.") from error
    if not isinstance(options, dict):
        raise UserError(f"--engine {given}: give a JSON object of vllm.LLM's arguments.")
    return options


def _mean_of_ranks(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One layer's reports, each of some heads, as one."""
    rows = [
        {key: fmean(row[key] for row in same) for key in same[0]}
        for same in zip(*(r["rows"] for r in ranks), strict=True)
    ]
    return ranks[0] | {"rows": rows, "faults": [fault for rank in ranks for fault in rank["faults"]]}


def judge(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict and what it rests on; a layer is as ``probe.ProbedKernels.report`` gives it."""
    shares = ("best", "chance", "configured", "other", "served", "agreement")
    means = [
        {"layer": layer["layer"], **{key: fmean(row[key] for row in layer["rows"]) for key in shares}}
        for layer in layers
    ]
    faults = [f"{layer['layer']}: {fault}" for layer in layers for fault in layer["faults"]]
    faults += [
        f"{mean['layer']}: {mean['agreement']:.1%} of reference.py's selection, at least {LEAST_AGREEMENT:.0%} expected"
        for mean in means
        if mean["agreement"] < LEAST_AGREEMENT
    ]
    judged = [i for i, mean in enumerate(means) if mean["best"] - mean["chance"] >= SPREAD]
    worth, error = {"configured": 0.0, "other": 0.0}, 0.0
    if judged:
        lead = {i: means[i]["best"] - means[i]["chance"] for i in judged}
        worth = {key: fmean((means[i][key] - means[i]["chance"]) / lead[i] for i in judged) for key in worth}
        gaps = [
            fmean((row["configured"] - row["other"]) / lead[i] for i, row in zip(judged, same, strict=True))
            for same in zip(*(layers[i]["rows"] for i in judged), strict=True)
        ]
        error = stdev(gaps) / len(gaps) ** 0.5
    gap = worth["configured"] - worth["other"]
    if not judged:
        layout, why = "cannot judge", f"in no layer does the best selection hold {SPREAD:.0%} more than a random one"
    elif max(worth.values()) < WORTH:
        layout, why = "cannot judge", "neither layout selects much better than chance: this indexer is not trained"
    elif abs(gap) < max(GAP, 4 * error):
        layout, why = "cannot judge", f"both layouts select about as well, within {max(GAP, 4 * error):.1%}"
    else:
        layout = "right" if gap > 0 else "wrong"
        why = f"the {'configured' if gap > 0 else 'other'} layout selects clearly better"
    return {
        "verdict": "wrong" if faults else layout,
        "layout": layout,
        "why": why,
        "interleaved": layers[0]["interleaved"],
        "providers": layers[0]["providers"],
        "judged_layers": len(judged),
        "worth": worth,
        "standard_error": error,
        "faults": faults,
        "layers": means,
    }


def _sections(report: dict[str, Any]) -> list[Section]:
    names = {True: "interleaved", False: "half-split"}
    table = Section(
        "dense softmax mass held, mean of rows: best possible, configured layout, other layout, chance; all served"
    )
    for layer in report["layers"]:
        values = "  ".join(f"{layer[key]:6.1%}" for key in ("best", "configured", "other", "chance"))
        table.add(layer["layer"], f"{values};  {layer['served']:6.1%}")
    agreement = Section("selection against reference.py")
    providers = report["providers"]
    if not report["faults"]:
        least = min(layer["agreement"] for layer in report["layers"])
        agreement.add(
            providers["select"], f"the same within the provider's rounding; at least {least:.1%} of a layer", "ok"
        )
    for fault in report["faults"]:
        agreement.add(providers["select"], fault, "fault")
    layout = Section(f"indexer's RoPE layout, on {report['tokens']:,} tokens of {report['text']}")
    worth = report["worth"]
    layout.add(
        "configured", f"{names[report['interleaved']]}: keeps {worth['configured']:.0%} of the best selection's lead"
    )
    layout.add(
        "other",
        f"{names[not report['interleaved']]}: keeps {worth['other']:.0%} of it, of {report['judged_layers']} layers",
    )
    mark = {"right": "ok", "wrong": "fault"}.get(report["layout"], "note")
    step = " Compare config.json's model_type with the published one." if report["layout"] == "wrong" else ""
    layout.add(report["layout"], report["why"] + "." + step, mark)
    return [table, agreement, layout]


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What libraries print, in C too, goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
