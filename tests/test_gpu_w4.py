"""4-bit checkpoints on a GPU, through vLLM's own kernels: on Hopper Machete and Marlin, NVFP4 as Marlin's weights only.

`python -m pytest -m gpu tests/test_gpu_w4.py` needs vLLM's CUDA build. Each format is served by a process of its own,
all at once on one GPU, on checkpoints that are written on the spot; each has 90 seconds.

    python tests/test_gpu_w4.py FORMAT DIR    what one such process does
"""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and find_spec("vllm")), reason="needs a CUDA device and vLLM's CUDA build"
    ),
]

HERE = Path(__file__).parent
SECONDS = 90
# What each checkpoint leaves out: nothing, what is only read, all attention, parts of fused modules.
LEFT_OUT = {
    "awq": [],
    "gptq": ["kv_b_proj", "indexer"],
    "w4a16": [],
    "w4a16-zeros": ["indexer.weights_proj", "shared_experts"],
    "nvfp4": ["q_a_proj", "kv_a_proj_with_mqa", "o_proj", "indexer"],
    "nvfp4a16": [],
}
SIZES = dict(hidden_size=256, q_lora_rank=128, num_attention_heads=16, intermediate_size=256, moe_intermediate_size=128)
SIZES |= dict(index_n_heads=8, num_nextn_predict_layers=0)
OPTIONS: dict[str, Any] = dict(dtype="bfloat16", block_size=64, max_num_batched_tokens=256, max_model_len=4096)
OPTIONS |= dict(kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=0.1)
# In bfloat16, of log-probabilities of one model by two implementations: as in test_axk2.py.
LIMITS = (1.7e-2, 8.7e-2)


def kernels(model: torch.nn.Module) -> list[str]:
    """Classes that multiply quantised weights: linear layers' kernels, experts' methods."""
    found = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        for owner in (method, getattr(module, "scheme", None)):
            kernel = getattr(owner, "kernel", None) or getattr(owner, "experts_cls", None)
            if kernel is not None:
                found.add(kernel.__name__ if isinstance(kernel, type) else type(kernel).__name__)
    return sorted(found)


def wrong_weights(running: Any, plain: Path) -> list[str]:
    """Of W_UK, W_UV and the indexer's joined weight: those that are not the dequantised checkpoint's."""
    from fp8_bytes import read

    tensors, wrong = read(plain), []
    for i, layer in enumerate(running.layers):
        weights = {
            name: tensors[f"model.layers.{i}.self_attn.{name}.weight"]
            for name in ("kv_b_proj", "indexer.weights_proj", "indexer.wk")
        }
        w_uk, w_uv = weights.pop("kv_b_proj").unflatten(0, (layer.heads, -1)).split([128, 128], dim=1)
        expected = {"w_uk": w_uk, "w_uv": w_uv.transpose(1, 2), "fused": torch.cat(list(weights.values()))}
        for name, tensor in expected.items():
            ours = getattr(layer.indexer if name == "fused" else layer, name)
            if not torch.equal(ours.cpu(), tensor):
                wrong.append(f"layer {i} {name}")
    return wrong


def measure(form: str, folder: Path) -> dict[str, Any]:
    """Serve a random checkpoint and the one it stands for, then a planted one."""
    from engine import engine
    from test_model import config_of, prompts
    from test_planted import answers, questions, words
    from write_4bit import write

    random = write(folder / "random", form, left_out=LEFT_OUT[form], group=64, index_topk=64, **SIZES)
    planted = write(folder / "planted", form, planted=True, left_out=LEFT_OUT[form], group=64, **SIZES)
    asked, times = prompts(config_of(random)), [time.time()]
    with engine(random, **OPTIONS) as running:
        ours, used = torch.cat(running.prompt_logprobs(asked)), kernels(running.model)
        wrong, cache = wrong_weights(running, random.parent / "plain"), running.layers[0].latent_kind
    times.append(time.time())
    with engine(random.parent / "plain", moe_backend="triton", kv_cache_dtype=cache, **OPTIONS) as running:
        difference = (ours - torch.cat(running.prompt_logprobs(asked))).abs()
    times.append(time.time())
    questioned = questions((300, 1500))
    with engine(planted, **OPTIONS) as running:
        given = [words(tokens) for tokens in answers(running, questioned)]
    times.append(time.time())
    return {
        "kernels": used,
        "cache": cache,
        "wrong_weights": wrong,
        "p50": difference.median().item(),
        "p90": difference.quantile(0.9).item(),
        "spread": ours.std().item(),
        "answers": given,
        "right": [answer for _, answer in questioned],
        "seconds": [round(b - a, 1) for a, b in zip(times, times[1:], strict=False)],
    }


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """form -> (process, folder with its output, time of its start), all started at once."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "examples"), str(HERE.parent)])
    environment = os.environ | {"VLLM_DSA_PROVIDER": "triton", "VLLM_LOGGING_LEVEL": "INFO"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [paths, os.environ.get("PYTHONPATH")]))
    started = {}
    for form in LEFT_OUT:
        folder = tmp_path_factory.mktemp(form)
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).resolve()), form, str(folder)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started[form] = process, folder, time.time()
    yield started
    for process, _, _ in started.values():
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="module", params=list(LEFT_OUT))
def measured(processes, request) -> tuple[str, dict[str, Any]]:
    process, folder, start = processes[request.param]
    try:
        process.wait(max(1, start + SECONDS - time.time()))
    except subprocess.TimeoutExpired:
        process.kill()
    if process.wait() != 0:
        pytest.fail(f"{request.param}: status {process.returncode}\n{(folder / 'log').read_text()[-4000:]}")
    result = json.loads((folder / "result.json").read_text())
    print(request.param, json.dumps(result))
    return request.param, result


def test_vllm_multiplies_packed_weights(measured):
    form, result = measured
    assert any("Marlin" in name or "Machete" in name for name in result["kernels"]), result["kernels"]
    assert result["cache"] == ("fp8_ds_mla" if form == "nvfp4" else "auto"), "ModelOpt's checkpoint asks for FP8"


def test_derived_weights_are_those_of_the_dequantised_checkpoint(measured):
    assert measured[1]["wrong_weights"] == []


def test_logprobs_are_those_of_the_dequantised_checkpoint(measured):
    result = measured[1]
    assert result["p50"] <= LIMITS[0] and result["p90"] <= LIMITS[1] < result["spread"], result


def test_planted_checkpoint_answers_right(measured):
    assert measured[1]["answers"] == measured[1]["right"]


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.joinpath("result.json").write_text(json.dumps(measure(sys.argv[1], target)))
