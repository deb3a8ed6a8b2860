"""README's table of what fits is what `vllm-dsa plan` says today, of the published sizes."""

import functools
import json
import re
from itertools import product
from pathlib import Path

import pytest
from test_plan import GLM5, SHARED, V32, W4A16

from vllm_dsa.config import DSAConfig
from vllm_dsa.tools import memory
from vllm_dsa.tools.main import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TABLE = re.search(r"\n\n(\| \| 8x A100-80 .*?)\n\n", README, re.DOTALL)[1]
MODELS = {"V3.2": V32, "GLM-5": GLM5, "GLM-5.2": GLM5 | SHARED}
# As README says of the 4-bit ones: attention, shared experts and head are bfloat16.
LEFT_OUT = ["lm_head", "model.layers.*.self_attn*", "model.layers.*.mlp.shared_experts*"]
FORMATS = {
    "FP8": {},
    "W4A16": {"quantization_config": W4A16},
    "NVFP4": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": LEFT_OUT}},
}


_weights = memory.weights


@functools.cache
def _counted(hf_config: str) -> memory.Weights:
    config = json.loads(hf_config)
    return _weights(Path("/nonexistent"), config, DSAConfig.from_hf(config))


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    """Weights do not depend on the GPU: each model's are counted for the first one."""
    monkeypatch.setattr(memory, "weights", lambda folder, hf_config, config: _counted(json.dumps(hf_config)))


def rows() -> list[tuple[list[tuple[str, str]], list[str]]]:
    """((model, format) pairs, their cells) of each row."""
    found = []
    for line in TABLE.splitlines()[2:]:
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        pairs, model = [], ""
        for part in re.sub(r", \d+ GiB", "", first).split("; "):
            model, weights = part.split() if " " in part else (model, part)
            pairs.append((model, weights))
        found.append((pairs, cells))
    return found


def planned(model: str, weights: str, machine: str, folder: Path, capsys) -> dict:
    count, gpu = re.fullmatch(r"(\d+)x (.+)", machine).groups()
    (folder / "config.json").write_text(json.dumps(MODELS[model] | FORMATS[weights]))
    asked = ["--gpu", gpu.replace(" ", ""), "--num-gpus", count, "--kv-cache-dtype", "fp8_ds_mla", "--json"]
    main(["plan", str(folder), *asked])
    return json.loads(capsys.readouterr().out)


def thousands(report: dict) -> str:
    return f"{report['cache']['tokens'] / 1000:,.0f}k" if report["fits"] else "no"


MACHINES = [cell.strip() for cell in TABLE.splitlines()[0].strip("|").split("|")[1:]]


@pytest.mark.parametrize("pairs, cells", rows(), ids=lambda value: value[0][0] if isinstance(value[0], tuple) else None)
def test_what_fits(pairs, cells, tmp_path, capsys):
    for machine, cell in zip(MACHINES, cells, strict=True):
        fits = [thousands(planned(*pair, machine, tmp_path, capsys)) for pair in pairs]
        told = cell.split("; ")
        assert fits == (told if len(told) > 1 else told * len(fits)), (machine, pairs)


def test_every_model_and_format_is_in_the_table(tmp_path, capsys):
    told = {pair for pairs, _ in rows() for pair in pairs}
    assert told == set(product(MODELS, FORMATS)) - {("GLM-5.2", "FP8")}
    for model, size in re.findall(r"(\S+) FP8, (\d+) GiB", TABLE):
        report = planned(model, "FP8", "8x H200", tmp_path, capsys)
        without_drafts = sum(size for part, size in report["weights"]["bytes"].items() if part != "MTP")
        assert round(without_drafts / 2**30) == int(size)
