"""4-bit checkpoints on a GPU, through vLLM's own kernels: on Hopper Machete and Marlin, NVFP4 as Marlin's weights only.

`python -m pytest -m gpu tests/test_gpu_w4.py` needs vLLM's CUDA build. Checkpoints are written on the spot, and each is
served by a process of its own, several at a time on one GPU; each has two minutes. Run it as one process: no -n.

    python tests/test_gpu_w4.py KIND FORMAT DIR OUT    what one such process does
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_dsa.testing.compare import BFLOAT16_LOGPROBS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and find_spec("vllm")), reason="needs a CUDA device and vLLM's CUDA build"
    ),
]

HERE = Path(__file__).parent
SECONDS, AT_ONCE = 120, 10  # of one process; processes
# What each checkpoint leaves out: nothing, what is only read, all attention, parts of fused modules.
LEFT_OUT = {
    "awq": [],
    "gptq": ["kv_b_proj", "indexer"],
    "w4a16": [],
    "w4a16-zeros": ["indexer.weights_proj", "shared_experts"],
    "nvfp4": ["q_a_proj", "kv_a_proj_with_mqa", "o_proj", "indexer"],
    "nvfp4a16": [],
    "w4a16-fp8": [],
}
# FP8 layers round activations: no log-probabilities to compare, and one checkpoint.
PLANTED_ONLY = ("w4a16-fp8",)
SIZES = dict(hidden_size=256, q_lora_rank=128, num_attention_heads=16, intermediate_size=256, moe_intermediate_size=128)
SIZES |= dict(index_n_heads=8, num_nextn_predict_layers=0)
OPTIONS: dict[str, Any] = dict(dtype="bfloat16", block_size=64, max_num_batched_tokens=256, max_model_len=4096)
OPTIONS |= dict(kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=0.05)
KINDS = ("random", "plain", "planted")  # plain: what the random one stands for


def kernels(model: torch.nn.Module) -> set[str]:
    """Classes that multiply quantised weights: linear layers' kernels, experts' methods."""
    found = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        for owner in (method, getattr(module, "scheme", None)):
            kernel = getattr(owner, "kernel", None) or getattr(owner, "experts_cls", None)
            if kernel is not None:
                found.add(kernel.__name__ if isinstance(kernel, type) else type(kernel).__name__)
    return found


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


def serve(kind: str, form: str, folder: Path) -> dict[str, Any]:
    """Start an engine on one checkpoint and ask it what ``kind`` is to show."""
    from engine import engine
    from test_model import config_of, prompts
    from test_planted import answers, questions, words

    options, start = dict(OPTIONS), time.time()
    if kind == "plain":
        # FlashInfer's and DeepGEMM's kernels would be compiled first. The cache is as the other's.
        options |= dict(moe_backend="triton", kv_cache_dtype="fp8" if form == "nvfp4" else "auto")
    with engine(folder, **options) as running:
        result = {"seconds": [time.time() - start], "cache": running.layers[0].latent_kind}
        if kind == "planted":
            asked = questions((300, 1500))
            result["answers"] = [words(tokens) for tokens in answers(running, asked)]
            result["right"] = [answer for _, answer in asked]
        else:
            result["logprobs"] = torch.cat(running.prompt_logprobs(prompts(config_of(folder))))
            result["kernels"] = kernels(running.model)
        if kind != "plain":
            result["wrong"] = wrong_weights(running, folder.parent / "plain")
        result["seconds"].append(time.time() - start)
    return result


@pytest.fixture(scope="module")
def processes(tmp_path_factory, request):
    """(kind, form) -> (future of a process's end, its log, file of its result), for the selected tests."""
    sys.path[:0] = [str(HERE)]
    from write_4bit import write

    path, folders = tmp_path_factory.mktemp("w4"), {}
    selected = {item.callspec.params["form"] for item in request.session.items if "processes" in item.fixturenames}
    for form, left_out in LEFT_OUT.items():
        if form not in selected:
            continue
        if form not in PLANTED_ONLY:
            folders["random", form] = write(path / form, form, left_out=left_out, group=64, index_topk=64, **SIZES)
            folders["plain", form] = path / form / "plain"
        planted = dict(planted=True, left_out=left_out, group=64)
        folders["planted", form] = write(path / f"{form}-planted", form, **planted, **SIZES)
    paths = os.pathsep.join([str(HERE), str(HERE.parent / "examples"), str(HERE.parent)])
    environment = os.environ | {"VLLM_DSA_PROVIDER": "triton", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [paths, os.environ.get("PYTHONPATH")]))
    running: list[subprocess.Popen] = []

    def run(command: list[str], log: Path) -> int:
        with open(log, "w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        running.append(process)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS)
        process.kill()
        return process.wait()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        started = {}
        for (kind, form), folder in folders.items():
            log, out = path / f"{kind}-{form}.log", path / f"{kind}-{form}.pt"
            command = [sys.executable, str(Path(__file__).resolve()), kind, form, str(folder), str(out)]
            started[kind, form] = pool.submit(run, command, log), log, out
        yield started
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.kill()


def result_of(processes: Any, kind: str, form: str) -> dict[str, Any]:
    ended, log, out = processes[kind, form]
    status = ended.result()
    if not out.exists():
        pytest.fail(f"{kind} {form}: status {status}\n{log.read_text()[-4000:]}")
    return torch.load(out)


@pytest.mark.parametrize("form", [form for form in LEFT_OUT if form not in PLANTED_ONLY])
def test_logprobs_are_those_of_the_dequantised_checkpoint(processes, form):
    """Through kernels that read packed weights; what derives from weights that are only read is exact."""
    ours, plain = (result_of(processes, kind, form) for kind in ("random", "plain"))
    difference = (ours["logprobs"] - plain["logprobs"]).abs()
    p50, p90, spread = difference.median().item(), difference.quantile(0.9).item(), ours["logprobs"].std().item()
    seconds = [[round(t) for t in result["seconds"]] for result in (ours, plain)]
    print(f"{form}: p50 {p50:.1e} p90 {p90:.1e} of {spread:.1e}; {ours['kernels']}, {ours['cache']}; {seconds} s")
    assert ours["wrong"] == []
    assert any("Marlin" in name or "Machete" in name for name in ours["kernels"]), ours["kernels"]
    assert not any("Marlin" in name or "Machete" in name for name in plain["kernels"]), plain["kernels"]
    # ModelOpt's checkpoint asks for an FP8 cache.
    assert ours["cache"] == plain["cache"] == ("fp8_ds_mla" if form == "nvfp4" else "auto")
    assert p50 <= BFLOAT16_LOGPROBS[0] and p90 <= BFLOAT16_LOGPROBS[1] < spread


@pytest.mark.parametrize("form", LEFT_OUT)
def test_planted_checkpoint_answers_right(processes, form):
    found = result_of(processes, "planted", form)
    assert found["answers"] == found["right"] and found["wrong"] == []


if __name__ == "__main__":
    done = serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    torch.save(done, f"{sys.argv[4]}.part")
    os.replace(f"{sys.argv[4]}.part", sys.argv[4])
