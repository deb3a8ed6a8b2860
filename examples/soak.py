"""Mixed traffic against one `vllm serve` of the planted checkpoint: is every answer right, and does nothing grow?

    python examples/soak.py [--minutes 60] [--requests 20000]     exit status 0 if so; prints a JSON summary

A prompt has 100 to 1,500 tokens, mostly few. Every second request streams, every fourth asks about a text that was
sent before (its blocks may be cached, or evicted since), every tenth hangs up while it is answered. The KV cache is
small, so that requests wait for it, evict each other's blocks and are preempted. Traffic comes in rounds; between two
the server is idle, its KV cache must be free, and its processes are measured, all together.
"""

import argparse
import http.client
import json
import random
import re
import statistics
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tiny_checkpoint import CODES, EOS, build_prompt, write_planted

from vllm_dsa.testing.server import HOST, Server, ServerError, exit_on_sigterm, group_members, serve

MODEL = "planted"
MAX_MODEL_LEN, BLOCK_SIZE, BLOCKS = 2048, 16, 256
SERVE_ARGS = (
    f"--served-model-name={MODEL}",
    "--dtype=float32",
    f"--max-model-len={MAX_MODEL_LEN}",
    f"--block-size={BLOCK_SIZE}",
    f"--num-gpu-blocks-override={BLOCKS}",
    "--max-num-batched-tokens=64",
    "--enforce-eager",
    "--enable-prompt-tokens-details",
    "--disable-uvicorn-access-log",
)
# One thread for the model, on any core: of two cores, the other is for the API server, the scheduler and the clients.
SERVE_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
CLIENTS = 16
ROUND = 100  # requests
WARM_UP = 0.25  # of the samples: caches fill, and allocators find their size
MAX_SLOPE = 1.0  # MB of resident memory per 1,000 requests
IDLE_S = 10
LONG = 100  # tokens of a long answer


class Ask(NamedTuple):
    """A request and the words of its right answer. With ``tokens``, so many are written, whatever they are."""

    text: str
    answer: str
    tokens: int = 0
    stream: bool = False
    hang_up: bool = False


class Reply(NamedTuple):
    """What came back: ``text`` up to end-of-sentence, None where the client hung up; and how many prompt tokens."""

    text: str | None
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Sample(NamedTuple):
    """The idle server after so many requests: memory (MB) and open files of all its processes."""

    requests: int
    memory: float
    files: int


def traffic(seed: int = 0) -> Iterator[Ask]:
    """Requests without end; the same ones for the same seed."""
    rng = random.Random(seed)
    for i in count():
        if i % 4 == 3:  # one of 16 texts, which change after 400 requests
            text = rng.randrange(16)
            prompt = build_prompt(200 + 80 * text, seed=i // 400 * 16 + text, asked=rng.choice(CODES))
        else:
            length = int(100 * 15 ** rng.random() ** 3)
            codes = min(len(CODES), length // 16 - 1)
            prompt = build_prompt(length, rng.randrange(10**9), codes=codes, hops=rng.choice((1, min(3, codes))))
        long, stream, hang_up = (rng.random() < share for share in (0.2, 0.5, 0.1))
        yield Ask(prompt.text, prompt.answer, LONG if long or hang_up else 0, stream, hang_up)


def send(port: int, ask: Ask) -> Reply:
    """Ask, and read the answer or hang up."""
    body: dict[str, Any] = {"model": MODEL, "prompt": ask.text, "temperature": 0, "stream": ask.stream}
    body |= {"max_tokens": ask.tokens or 16, "ignore_eos": bool(ask.tokens), "skip_special_tokens": False}
    if ask.stream:
        body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        if ask.hang_up and not ask.stream:
            time.sleep(0.5)
            return Reply(None)
        response = connection.getresponse()
        if response.status != 200:
            raise ServerError(f"HTTP {response.status}: {response.read(2000)!r}")
        if not ask.stream:
            return _reply([json.loads(response.read())])
        chunks = _events(response)
        if ask.hang_up:
            for _ in islice(chunks, 10):
                pass
            return Reply(None)
        return _reply(list(chunks))
    finally:
        connection.close()


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def _reply(chunks: list[dict[str, Any]]) -> Reply:
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
    usage = chunks[-1]["usage"]
    return Reply(text.strip(), usage["prompt_tokens"], (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def metric(server: Server, name: str) -> float:
    """Value of one of vLLM's Prometheus metrics, summed over its labels."""
    with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as response:
        text = response.read().decode()
    return sum(float(value) for value in re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE))


def wait_until_idle(server: Server) -> bool:
    """Do the KV blocks of a server that nobody asks anything become free in time?"""
    deadline = time.monotonic() + IDLE_S
    while metric(server, "kv_cache_usage_perc") or metric(server, "num_requests_running"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def measure(server: Server, requests: int) -> Sample:
    """Memory and open files of the server's processes."""
    processes = [Path("/proc", str(pid)) for pid in group_members(server.pid)]
    pages = sum(int((process / "statm").read_text().split()[1]) for process in processes)
    return Sample(requests, pages * 4096 / 1e6, sum(len(list((process / "fd").iterdir())) for process in processes))
