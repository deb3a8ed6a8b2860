"""vLLM's engine with this plugin on one GPU: graphs, synchronisation, memory, compilation, long contexts, and stock.

`python -m pytest -m gpu tests/test_gpu_engine.py` needs vLLM 0.33 and a Hopper GPU. Tests may run side by side: -n 6.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
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

V32 = Path(__file__).parents[1] / "benchmarks" / "v32"
CACHES = ("fp8_ds_mla", "auto")
TOP_K = 128
SPARE = 256 << 20
SECONDS = 180  # of a server's start, or of one engine's process


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> dict[int, Path]:
    """The planted checkpoint at the vendor's sizes, by attention heads."""
    from tiny_checkpoint import write_planted

    folders = {}
    for heads in (16, 128):
        folders[heads] = tmp_path_factory.mktemp(f"planted{heads}")
        sizes = dict(index_topk=TOP_K, num_attention_heads=heads, index_n_heads=64)
        write_planted(folders[heads], check=False, dtype="bfloat16", **sizes)
    return folders


@contextmanager
def running(path: Path, **options: Any) -> Iterator[Any]:
    from engine import engine

    defaults = dict(dtype="bfloat16", block_size=64, max_model_len=8192)
    defaults |= dict(gpu_memory_utilization=0.1, kv_cache_memory_bytes=2 << 30)  # others use this GPU as well
    with engine(path, **defaults | options) as found:
        yield found


def in_a_process_each(calls: dict[str, tuple[str, dict, dict[str, str]]]) -> dict[str, Any]:
    """By name, what a function of this file returns: (function, its arguments, environment). All at once."""
    here = Path(__file__).parent
    paths = os.pathsep.join(
        [str(here), str(here.parent / "examples"), str(here.parent), os.environ.get("PYTHONPATH", "")]
    )
    processes, results = {}, {}
    with TemporaryDirectory() as folder:
        try:
            for name, (function, arguments, environment) in calls.items():
                with open(f"{folder}/{name}", "w") as log:
                    processes[name] = subprocess.Popen(
                        [sys.executable, __file__, function, json.dumps(arguments)],
                        env=os.environ | {"PYTHONPATH": paths} | environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
            for name, process in processes.items():
                status, printed = process.wait(timeout=SECONDS), Path(f"{folder}/{name}").read_text()
                assert status == 0, f"{name}: {printed[-3000:]}"
                results[name] = json.loads(next(x[7:] for x in printed.splitlines() if x.startswith("RESULT ")))
        finally:
            for process in processes.values():
                process.kill()
    return results


def chat(length: int, seed: int) -> tuple[list[int], str]:
    """Token ids of a chat prompt, and the right answer."""
    from planted_text import build_prompt, build_tokenizer, chat_text

    prompt = build_prompt(length, seed, chat=True, copies=TOP_K)
    return build_tokenizer().encode(chat_text(prompt.text), add_special_tokens=False).ids, prompt.answer


def mixed_schedule(path: str, **options: Any) -> dict[str, Any]:
    """Seven short prompts and a long one, in steps of 3 to 600 tokens: tokens, their log-probabilities and answers of
    each, (graph replays, tokens, requests) of each step, and on how many streams layers ran."""
    from vllm import SamplingParams

    from vllm_dsa.attention import DSAAttention

    streams, second_stream = set(), DSAAttention.second_stream

    def noted(layer: DSAAttention) -> torch.cuda.Stream | None:
        found = second_stream(layer)
        streams.add(1 if found is None else 2)
        return found

    DSAAttention.second_stream = noted

    count, replay = [0], torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        count[0] += 1
        replay(graph)

    torch.cuda.CUDAGraph.replay = counted
    with running(Path(path), max_num_batched_tokens=600, **options) as found:
        assert "select: vendor, attend: vendor" in found.layers[0].kernels.summary
        engine, steps, outputs = found.llm.llm_engine, [], {}
        for i, length in enumerate(LENGTHS):
            many = 40 + 5 * i
            params = SamplingParams(max_tokens=many, min_tokens=many, ignore_eos=True, logprobs=0, temperature=0)
            engine.add_request(str(i), {"prompt_token_ids": chat(length, length)[0]}, params)
        while engine.has_unfinished_requests():
            before, known = count[0], len(found.steps)
            for output in engine.step():
                outputs[output.request_id] = output.outputs[0]
            steps += [(count[0] - before, sum(step.values()), len(step)) for step in found.steps[known:] if step]
        found_outputs = [outputs[str(i)] for i in range(len(LENGTHS))]
        return {
            "steps": steps,
            "tokens": [list(o.token_ids) for o in found_outputs],
            "scores": [[s[t].logprob for s, t in zip(o.logprobs, o.token_ids, strict=True)] for o in found_outputs],
            "answers": [o.text.split()[0] for o in found_outputs],
            "streams": sorted(streams),
        }


LENGTHS = (1150, 1200, 1250, 1300, 1400, 1500, 1700, 6000)
# Nats. min_tokens forbids the end of the sequence, which is 16 nats likelier than the word that is given, and this 17
# likelier than any other: tokens must be equal. The score is a difference of two bfloat16 logits, in whose steps of 1/4
# and 1/8 padded products may differ, of each by two; every wrongly selected row of 128 costs 1/8.
SCORES = 0.75
GRAPHS = {"none": "NONE", "piecewise": "PIECEWISE", "full": "FULL_AND_PIECEWISE"}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("heads", [16, 128])
def test_graphs_change_nothing(heads, kind, planted):
    """One mixed schedule without CUDA graphs, with piecewise ones and with full ones of decode steps."""
    calls = {}
    for name, mode in GRAPHS.items():
        options = dict(path=str(planted[heads]), kv_cache_dtype=kind, enforce_eager=name == "none")
        if name != "none":
            sizes = [1, 2, 4, 8, 64, 256, 600]
            options["compilation_config"] = {"cudagraph_mode": mode, "cudagraph_capture_sizes": sizes}
        calls[name] = ("mixed_schedule", options, {})
    results = in_a_process_each(calls)
    for name, result in results.items():
        replays = {
            kind: sorted({n for n, tokens, requests in result["steps"] if (tokens == requests) == (kind == "decode")})
            for kind in ("decode", "mixed")
        }
        print(f"{heads} heads, {kind}, {name}: {len(result['steps'])} steps, graph replays a step {replays}")
        pieces = 3  # before, between and after the attention of two layers
        want = {"none": (0, 0), "piecewise": (pieces, pieces), "full": (1, pieces)}[name]
        assert replays == {"decode": [want[0]], "mixed": [want[1]]}
        assert result["streams"] == ([1, 2] if name == "full" else [1])
        assert result["answers"] == [chat(length, length)[1] for length in LENGTHS]
    for name in ("piecewise", "full"):
        assert [step[1:] for step in results[name]["steps"]] == [step[1:] for step in results["none"]["steps"]]
        assert results[name]["tokens"] == results["none"]["tokens"]
        got, want = (torch.tensor(sum(results[each]["scores"], [])) for each in (name, "none"))
        difference = (got - want).abs()
        print(
            f"{heads} heads, {kind}, {name}: log-probabilities differ by at most {difference.max():.3f}, "
            f"{(difference > 0).float().mean():.1%} of them"
        )
        assert difference.max() <= SCORES


@pytest.mark.own_process
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_no_synchronisation_in_decode(eager, planted, monkeypatch):
    """Neither building a step's metadata nor the model waits for the GPU, in 100 decode steps."""
    from vllm_dsa.backend import DSABuilder

    prompts = [chat(1200 + 100 * i, i)[0] for i in range(8)]
    with running(planted[16], kv_cache_dtype="fp8_ds_mla", enforce_eager=eager) as found:
        found.generate(prompts, 2)
        calls = {"build": 0, "forward": 0}

        def watched(name: str, function: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                calls[name] += 1
                torch.cuda.set_sync_debug_mode("error")
                try:
                    return function(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode("default")

            return run

        monkeypatch.setattr(DSABuilder, "build", watched("build", DSABuilder.build))
        found.model.forward = watched("forward", found.model.forward)
        found.generate(prompts, 120, ignore_eos=True)
    print(calls)
    assert calls["build"] >= 100
    assert not eager or calls["forward"] >= 100


@pytest.mark.own_process
def test_memory_and_compilation(tmp_path, monkeypatch):
    """64 requests of 128k tokens take no more memory than was profiled, and nothing is compiled after the start."""
    for name in ("TRITON_CACHE_DIR", "DG_JIT_CACHE_DIR", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    sizes = dict(num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=16, num_nextn_predict_layers=0)
    sizes |= dict(first_k_dense_replace=1, intermediate_size=2048, vocab_size=4096, quantization_config=None)
    options = dict(kv_cache_memory_bytes=8 << 30, load_format="dummy", skip_tokenizer_init=True)
    options |= dict(hf_overrides=sizes, max_model_len=133000, max_num_batched_tokens=16384, max_num_seqs=64)
    options |= dict(kv_cache_dtype="fp8_ds_mla", enforce_eager=False, enable_prefix_caching=False)
    options |= dict(compilation_config={"cudagraph_capture_sizes": [1, 8, 32, 64]})
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(10, 4000, (length,), generator=generator).tolist()

    def files() -> set[str]:
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}

    from vllm.v1.worker.gpu_worker import Worker

    profiled, determine = [], Worker.determine_available_memory

    def determine_and_note(worker: Worker) -> int:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = determine(worker)
        profiled.append(torch.cuda.max_memory_allocated() - before)
        return found

    monkeypatch.setattr(Worker, "determine_available_memory", determine_and_note)
    with running(V32, **options) as found:
        assert "select: vendor, attend: vendor" in found.layers[0].kernels.summary
        compiled = files()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        for lengths in ([4096], [32768], [131072], [1500] * 7 + [32768], [3, 200, 70, 2500]):
            found.generate([ids(length) for length in lengths], 8, ignore_eos=True)
        late = files() - compiled
        steps = 64 * 8
        found.generate([ids(128 << 10) for _ in range(64)], steps + 60, ignore_eos=True)
        most = max(len(step) for step in found.steps)
        taken = torch.cuda.max_memory_allocated() - base
    print(
        f"peak {taken >> 20} MiB above the caches, profiled {profiled[0] >> 20} MiB; {most} requests at once; "
        f"{len(compiled)} files in the caches, later {len(late)}"
    )
    assert most == 64
    assert taken <= profiled[0] + SPARE
    assert not late


def prompt_scores(path: str, prompts: list[list[int]], **options: Any) -> dict[str, Any]:
    """Log-probabilities of the prompts' tokens, and whose model it is."""
    with running(Path(path), max_num_batched_tokens=4096, enforce_eager=True, **options) as found:
        scores = [score.tolist() for score in found.prompt_logprobs(prompts)]
        return {"module": type(found.model).__module__, "scores": sum(scores, [])}


def assert_close(name: str, got: list[float], want: list[float]) -> None:
    difference = (torch.tensor(got) - torch.tensor(want)).abs()
    p50, p90 = difference.median(), difference.quantile(0.9)
    print(f"{name}, {len(difference)} tokens: p50 {p50:.1e} p90 {p90:.1e} max {difference.max():.1e}")
    assert p50 <= BFLOAT16_LOGPROBS[0] and p90 <= BFLOAT16_LOGPROBS[1]


GLM = dict(index_n_heads=32, qk_nope_head_dim=192, v_head_dim=256, q_lora_rank=2048, rope_scaling=None)
PATTERN = "FSFF"
GLM_KEYS = {"model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"], "index_topk_pattern": PATTERN}


@pytest.mark.parametrize("family, heads", [("deepseek_v32", 16), ("deepseek_v32", 128), ("glm_moe_dsa", 64)])
def test_as_stock(family, heads, tmp_path):
    """Log-probabilities of one random model of four layers, past index_topk, by stock vLLM and by this plugin."""
    from fp8_bytes import rewrite
    from tiny_checkpoint import write_random

    sizes = dict(num_hidden_layers=4, first_k_dense_replace=4, num_attention_heads=heads, index_n_heads=64)
    sizes |= dict(hidden_size=1024, q_lora_rank=1536, index_topk=2048, num_nextn_predict_layers=0)
    if family == "glm_moe_dsa":
        sizes |= GLM
    config = write_random(tmp_path / "model", dtype="bfloat16", **sizes)
    if family == "glm_moe_dsa":
        config |= GLM_KEYS | {"rope_parameters": {"rope_type": "default", "rope_theta": config.pop("rope_theta")}}
        del config["rope_scaling"]
        # Stock vLLM has no place for the indexers of layers that share a selection.
        shared = tuple(f"model.layers.{i}.self_attn.indexer." for i, kind in enumerate(PATTERN) if kind == "S")
        (tmp_path / "model").rename(tmp_path / "whole")
        kept = lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(shared)}  # noqa: E731
        rewrite(tmp_path / "whole", tmp_path / "model", kept, config)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, config["vocab_size"], (n,), generator=generator).tolist() for n in (600, 3000, 6000)]
    arguments = dict(path=str(tmp_path / "model"), prompts=prompts, kv_cache_dtype="fp8_ds_mla")
    calls = {
        name: ("prompt_scores", arguments, {"VLLM_DSA_DISABLE": disable})
        for name, disable in (("stock", "1"), ("plugin", "0"))
    }
    results = in_a_process_each(calls)
    modules = {name: result["module"].split(".")[0] for name, result in results.items()}
    assert modules == {"stock": "vllm", "plugin": "vllm_dsa"}
    assert_close(f"{family}, {heads} heads", results["plugin"]["scores"], results["stock"]["scores"])


def environment(**values: str) -> dict[str, str]:
    """What a server starts with, whatever engine.py has set in this process."""
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", "VLLM_DSA_REQUIRED": "1"}
    return dict(os.environ) | ours | values


SERVE = ["--dtype=bfloat16", "--block-size=64", "--served-model-name=served", "--max-num-seqs=8"]
SERVE += ["--gpu-memory-utilization=0.1", f"--kv-cache-memory-bytes={2 << 30}"]
SERVE += ["--compilation-config", json.dumps({"cudagraph_capture_sizes": [1, 8]})]
SERVE += ["--kernel-config", json.dumps({"enable_flashinfer_autotune": False})]


def test_serve_through_triton(planted):
    """The planted checkpoint of DeepSeek-V3.2's attention sizes, without the vendor's kernels, over HTTP."""
    import openai
    from planted_text import build_prompt

    from vllm_dsa.testing.server import serve

    with serve(planted[128], *SERVE, env=environment(VLLM_DSA_PROVIDER="triton"), timeout=SECONDS) as server:
        assert "select: triton, attend: triton" in server.log()
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120)
        for length in (1200, 3000, 6000):
            prompt = build_prompt(length, length, chat=True, copies=TOP_K)
            messages = [{"role": "user", "content": prompt.text}]
            reply = client.chat.completions.create(model="served", messages=messages, temperature=0, max_tokens=4)
            assert reply.choices[0].message.content.strip() == prompt.answer


def test_serve_latents_of_128_and_32(tmp_path):
    """A.X-K2-Light's latents through `vllm serve`: log-probabilities by Triton and by the reference."""
    import openai
    from tiny_checkpoint import write_random

    from vllm_dsa.testing.server import serve

    sizes = dict(num_hidden_layers=2, first_k_dense_replace=2, num_attention_heads=32, index_n_heads=16)
    sizes |= dict(kv_lora_rank=128, qk_rope_head_dim=32, index_topk=256, hidden_size=512)
    config = write_random(tmp_path, dtype="bfloat16", family="axk2", rope_scaling=None, **sizes)
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(10, config["vocab_size"], (1500,), generator=generator).tolist()
    scores = {}
    for provider in ("triton", "reference"):
        options = [*SERVE, "--max-model-len=4096"] + ["--enforce-eager"] * (provider == "reference")
        with serve(tmp_path, *options, env=environment(VLLM_DSA_PROVIDER=provider), timeout=SECONDS) as server:
            assert f"select: {provider}, attend: {provider}" in server.log()
            client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120)
            reply = client.completions.create(model="served", prompt=prompt, max_tokens=1, echo=True, logprobs=0)
            scores[provider] = reply.choices[0].logprobs.token_logprobs[1:1500]
    assert_close("128 + 32", scores["triton"], scores["reference"])


def test_a_chat_of_138000_tokens(tmp_path):
    """Through `vllm serve` and HTTP, at a context length of 163,840; a token more is refused."""
    import openai
    from planted_text import build_prompt
    from tiny_checkpoint import write_planted

    from vllm_dsa.testing.server import serve

    longest = 163840
    sizes = dict(index_topk=TOP_K, num_attention_heads=16, index_n_heads=64)
    write_planted(tmp_path, check=False, dtype="bfloat16", **sizes)
    options = [*SERVE, f"--max-model-len={longest}", "--kv-cache-dtype=fp8_ds_mla"]
    with serve(tmp_path, *options, env=environment(), timeout=SECONDS) as server:
        assert "select: vendor, attend: vendor" in server.log()
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120)
        # The planted patterns' slow frequencies have turned too far between facts at the start and the question.
        prompt = build_prompt(138000, 138, chat=True, copies=TOP_K, placement="last")
        messages = [{"role": "user", "content": prompt.text}]
        reply = client.chat.completions.create(model="served", messages=messages, temperature=0, max_tokens=4)
        assert (reply.usage.prompt_tokens, reply.choices[0].message.content.strip()) == (138000, prompt.answer)
        client.completions.create(model="served", prompt=[11] * (longest - 1), max_tokens=1)
        with pytest.raises(openai.BadRequestError, match=str(longest)):
            client.completions.create(model="served", prompt=[11] * (longest + 1), max_tokens=1)


if __name__ == "__main__":
    function, arguments = sys.argv[1:]
    print("RESULT", json.dumps(globals()[function](**json.loads(arguments))))
