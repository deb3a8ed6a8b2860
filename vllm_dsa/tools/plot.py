"""The figure of `vllm-dsa bench --png`: time against context, a panel a kind of step. Needs matplotlib."""

from pathlib import Path
from typing import Any

from vllm_dsa.tools.output import UserError


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the figure of a bench's report; the file's ending sets its format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for r in report["results"]:
        new = "decode" if r["rows"] == 1 else f"prefill, {r['rows']:,} new tokens"
        new = "prefill, whole prompts" if r["op"] == "engine" and r["rows"] > 1 else new
        panel = panels.setdefault(f"{r['heads']} heads, requests: {r['requests']}, {new}", {})
        name = f"{r['op']}, {r['series']}"
        panel.setdefault(name, []).append((r["context"], r["ms"], r["ms"] * min(r["spread"] / 2, 0.9)))
    size = (5 * len(panels), 4.5)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            contexts, times, errors = zip(*sorted(points), strict=True)
            style = "--" if name.endswith(("dense", "stock")) else "-"
            axis.errorbar(contexts, times, yerr=errors, fmt=f"o{style}", capsize=3, label=name)
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axis.set(title=title, xlabel="tokens of context", ylabel="ms", xscale="log", yscale="log")
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.suptitle(f"{report['device']}, {report['kv_cache_dtype']} cache")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--png {path}: {error}. Name a .png file in a folder that exists.") from error
    pyplot.close(figure)
