"""What the benchmarks that go through `vllm serve` share: a model folder, a server of either side, and its times.

Stock vLLM and this plugin are the same command here: VLLM_DSA_DISABLE tells them apart.
"""

import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "examples")]

from planted_text import build_prompt, build_tokenizer  # noqa: E402
from tiny_checkpoint import write_planted  # noqa: E402

from vllm_dsa.testing.server import DIRECT, NO_MULTICAST, Server, ServerError, serve  # noqa: E402

NAME = "served"
TOP_K = 128  # of the planted checkpoint
STEPS = 48  # decode steps that are timed, at least
WORDS = range(300, 600)  # token ids that every tokenizer here has


def ints(text: str) -> list[int]:
    """Numbers that a command line separates by commas."""
    return [int(each) for each in text.split(",") if each]


def draft_flags(drafts: int) -> list[str]:
    return ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": drafts})] if drafts else []


def published_config(path: Path = HERE / "v32" / "config.json") -> dict[str, Any]:
    return json.loads(path.read_text())


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A folder of this config and a tokenizer with as many words as the config's vocab_size, which is made at least
    large enough for the tokenizer of the tests."""
    tokenizer = build_tokenizer()
    words = tokenizer.get_vocab_size()
    size = max(config["vocab_size"], 64 * -(-words // 64))
    tokenizer.add_tokens([f" w{i}" for i in range(words, size)])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": size}))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@contextmanager
def served(
    model: Path,
    who: str,
    log: Path,
    *flags: str,
    cache: str = "fp8_ds_mla",
    env: dict[str, str] | None = None,
    seconds: float = 1800,
) -> Iterator[Server]:
    """A server of stock vLLM or of the plugin; its log is kept."""
    environment = NO_MULTICAST | {"VLLM_DSA_DISABLE": "1" if who == "stock" else "0"} | (env or {})
    options = ["--served-model-name", NAME, "--kv-cache-dtype", cache, *flags]
    with serve(model, *options, env=environment, timeout=seconds, log_path=log) as server:
        yield server


def planted_model(folder: Path, heads: int, ranks: int = 1) -> Path:
    """The planted checkpoint at so many heads, with an MLP that ``ranks`` can share."""
    planted = folder / f"planted-{heads}-{ranks}"
    sizes = dict(index_topk=TOP_K, num_attention_heads=heads, index_n_heads=64)
    sizes |= dict(intermediate_size=64 * ranks, moe_intermediate_size=64 * ranks)
    write_planted(planted, check=False, dtype="bfloat16", **sizes)
    return planted


def gate(planted: Path, name: str, log: Path, flags: Sequence[str], **options: Any) -> bool:
    """Does the planted checkpoint answer right under the plugin? Prints the verdict; ``options`` are ``served``'s."""
    right = []
    try:
        with served(planted, "plugin", log, *flags, "--max-model-len", "8192", **options) as server:
            for length in (1200, 3000, 6000):
                prompt = build_prompt(length, length, chat=True, copies=TOP_K)
                body = {"messages": [{"role": "user", "content": prompt.text}], "max_tokens": 4, "temperature": 0}
                reply = json.load(post(server, "/v1/chat/completions", body))
                right.append(reply["choices"][0]["message"]["content"].split() == prompt.answer.split())
    except (ServerError, OSError) as error:
        print(f"gate, {name}: {error}", flush=True)
        return False
    print(f"gate, {name}: {'right' if all(right) else f'WRONG: {right}'}", flush=True)
    return all(right)


def post(server: Server, path: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps({"model": NAME} | (body or {})).encode()
    request = urllib.request.Request(server.base_url + path, data, {"Content-Type": "application/json"})
    return DIRECT.open(request, timeout=1800)


def words(count: int) -> list[int]:
    """A prompt that no cache knows."""
    return random.choices(WORDS, k=count)


def asked(prompt: list[int], tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "temperature": 0}


def prefill(server: Server, length: int, repeats: int) -> list[float]:
    """ms from request to answer of one token, of ``repeats`` new prompts after one that is not counted; sorted."""
    times = []
    for _ in range(repeats + 1):
        body = asked(words(length), 1)
        start = time.perf_counter()
        post(server, "/v1/completions", body).read()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(round(each, 1) for each in times[1:])


def fill(server: Server, prompts: Sequence[list[int]]) -> None:
    """Have the prefix cache know these prompts, so that whoever asks them again decodes at once."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda prompt: post(server, "/v1/completions", asked(prompt, 1)).read(), prompts))


def decode(server: Server, prompts: Sequence[list[int]], tokens: int = STEPS) -> float:
    """Median ms between two parts of an answer, while all of these requests decode; NaN if they never do at once."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        streams = list(pool.map(lambda prompt: stream(server, prompt, tokens), prompts))
    begin, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    gaps = [
        after - before
        for times in streams
        for before, after in zip(times, times[1:], strict=False)
        if begin <= before and after <= end
    ]
    return round(1e3 * statistics.median(gaps), 3) if gaps else math.nan


def stream(server: Server, prompt: list[int], tokens: int) -> list[float]:
    """When each part of an answer came."""
    times = []
    with post(server, "/v1/completions", asked(prompt, tokens) | {"stream": True}) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    return times


def bench(server: Server, model: Path, out: Path, before: int, after: int, requests: int) -> dict[str, float]:
    """`vllm bench serve` with random prompts of ``before`` tokens and answers of ``after``."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"]
    command += ["--base-url", server.base_url, "--model", NAME, "--tokenizer", str(model), "--dataset-name", "random"]
    command += ["--random-input-len", str(before), "--random-output-len", str(after), "--ignore-eos"]
    command += ["--num-prompts", str(requests), "--save-result", "--result-dir", str(out.parent)]
    done = subprocess.run([*command, "--result-filename", out.name], capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"vllm bench serve ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads(out.read_text())
    keys = ("output_throughput", "total_token_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms")
    return {key: round(found[key], 2) for key in keys}


def cache_tokens(server: Server) -> int:
    """Tokens that the caches of all data-parallel ranks have room for, by the log."""
    sizes = re.findall(r"KV cache size: ([\d,]+) tokens", server.log())
    return sum(int(size.replace(",", "")) for size in sizes)


class Memory:
    """The most memory that any GPU holds while the block runs, as nvidia-smi says; 0 without it.

    gpus: those to look at, as CUDA_VISIBLE_DEVICES names them; all by default.
    """

    def __init__(self, gpus: str = "") -> None:
        self.query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        self.query += ["-i", gpus] if gpus else []

    def __enter__(self) -> "Memory":
        self.peak_gib, self.ended = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while shutil.which("nvidia-smi"):
            used = subprocess.run(self.query, capture_output=True, text=True, check=True).stdout.split()
            self.peak_gib = max([self.peak_gib, *(round(int(mib) / 1024, 1) for mib in used)])
            if self.ended.wait(1):
                return

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
