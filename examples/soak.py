"""Mixed traffic against one `vllm serve` of the planted checkpoint: is every answer right, and does nothing grow?

    python examples/soak.py [--minutes 60] [--requests 20000]     exit status 0 if so; prints a JSON summary
    python examples/soak.py --streams 256 --drafts 3 --minutes 20 --requests 10000

A prompt has 100 to 1,500 tokens, mostly few. Half of the requests stream, a fifth want a long answer, a tenth hang up,
every third has a temperature and one of top_k, top_p and a seed beside it, and every fourth asks about a text that was
sent before (its blocks may be cached, or evicted since). The KV cache is small, so that requests wait for it, evict
each other's blocks and are preempted. Traffic comes in rounds; between two the server is idle, its KV cache must be
free, and its processes are measured. Memory is what is resident; a line is printed after each 1,000 requests.
"""

import argparse
import http.client
import json
import random
import re
import resource
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from planted_text import CODES, EOS, FILLERS, build_prompt
from tiny_checkpoint import write_planted

from vllm_dsa.testing.server import HOST, Server, ServerError, exit_on_sigterm, group_members, serve

MODEL = "planted"
TOP_K, STEP_TOKENS, BLOCK_SIZE, BLOCKS = 32, 64, 16, 160  # the last for 16 clients, and 4 times that for more
CHECKPOINT = {"index_topk": TOP_K, "draft": "hidden"}
SERVE_ARGS = (
    f"--served-model-name={MODEL}",
    "--dtype=float32",
    "--max-model-len=2048",
    f"--block-size={BLOCK_SIZE}",
    "--enable-prompt-tokens-details",
    "--disable-uvicorn-access-log",
    f"--max-num-batched-tokens={STEP_TOKENS}",
)
# One thread for the model, on any core: of two cores, the other is for the API server, the scheduler and the clients.
SERVE_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
CLIENTS = 16
ROUND = 50  # requests, or one for each client
WARM_UP = 0.4  # of the samples
MAX_SLOPE = 1.0  # MB of resident memory per 1,000 requests
IDLE_S = 10
TIMEOUT_S = 600  # of a request, which waits for its turn where there are many
LONG = 100  # tokens of a long answer
LONGEST = 1500  # tokens of a prompt
# Beside a temperature, so that the right answer is as good as certain: it leads by 4 nats or more.
HOT = (("top_k", 1), ("top_p", 0.5), ("seed", 7))
MIN_SAMPLES, MAX_PROBLEMS = 8, 20
LOG = Path(__file__).parents[1] / ".demo" / "soak.log"


class Ask(NamedTuple):
    """A request and the words of its right answer. With ``tokens``, so many are written, whatever they are. ``options``
    are more of the request; they leave the answer as it is."""

    text: str
    answer: str
    tokens: int = 0
    stream: bool = False
    hang_up: bool = False
    options: tuple[tuple[str, float], ...] = ()


class Reply(NamedTuple):
    """What came back: ``text`` up to end-of-sentence, None where the client hung up; and how many prompt tokens."""

    text: str | None
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Sample(NamedTuple):
    """The idle server after so many requests: memory (MB) and open files of all its processes. ``api`` and ``engine``
    are parts of the memory: of the API server, and of the engine's core and its workers."""

    requests: int
    memory: float
    files: int
    api: float = 0
    engine: float = 0


def traffic(seed: int = 0, longest: int = LONGEST) -> Iterator[Ask]:
    """Requests without end; the same ones for the same seed. ``longest``: tokens of a prompt."""
    rng = random.Random(seed)
    for i in count():
        long, stream, hang_up = (rng.random() < share for share in (0.2, 0.5, 0.1))
        if i % 4 == 3:  # one of 16 texts, which change after 400 requests
            text = rng.randrange(16)
            shape = {"total_tokens": 300 + (longest - 300) // 16 * text, "seed": i // 400 * 16 + text, "copies": TOP_K}
            prompt = build_prompt(**shape, asked=rng.choice(CODES))
        else:
            length = int(100 * (longest / 100) ** rng.random() ** 3)
            codes = min(len(CODES), length // TOP_K - 1)
            hops = 1 if long else rng.choice((1, min(3, codes)))  # of one hop we know how a long answer goes on
            prompt = build_prompt(length, rng.randrange(10**9), copies=TOP_K, codes=codes, hops=hops)
        options = (("temperature", 0.5), rng.choice(HOT)) if i % 3 == 2 else ()
        yield Ask(prompt.text, prompt.answer, LONG if long or hang_up else 0, stream, hang_up, options)


def send(port: int, ask: Ask) -> Reply:
    """Ask, and read the answer or hang up."""
    body: dict[str, Any] = {"model": MODEL, "prompt": ask.text, "temperature": 0, "stream": ask.stream}
    body |= {"max_tokens": ask.tokens or 16, "ignore_eos": bool(ask.tokens), "skip_special_tokens": False}
    body |= dict(ask.options)
    if ask.stream:
        body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection(HOST, port, timeout=TIMEOUT_S)
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


def is_right(ask: Ask, text: str) -> bool:
    """Is this the answer or, if more tokens were asked for, the answer again and again?"""
    wanted = [ask.answer, EOS] * ask.tokens
    return text.replace(EOS, f" {EOS} ").split() == (wanted[: ask.tokens] or ask.answer.split())


def metric(server: Server, name: str) -> float:
    """One of vLLM's Prometheus metrics, summed over its labels."""
    with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as response:
        text = response.read().decode()
    values = re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    if not values:
        raise ServerError(f"no metric vllm:{name} at {server.base_url}/metrics")
    return sum(float(value) for value in values)


def becomes_idle(server: Server, seconds: float = IDLE_S) -> bool:
    """Does the server, which nobody asks anything, have nothing to do and all KV blocks free in time?"""
    deadline = time.monotonic() + seconds
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while any(metric(server, name) for name in names):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def measure(server: Server, requests: int) -> Sample:
    """Memory and open files of the server's processes."""
    files, memory = 0, {"api": 0.0, "engine": 0.0, "rest": 0.0}
    for pid in group_members(server.pid):
        process = Path("/proc", str(pid))
        line = (process / "cmdline").read_bytes()
        part = "engine" if line.startswith(b"VLLM::") else "api" if pid == server.pid else "rest"
        memory[part] += int((process / "statm").read_text().split()[1]) * resource.getpagesize() / 1e6
        files += len(list((process / "fd").iterdir()))
    return Sample(requests, sum(memory.values()), files, memory["api"], memory["engine"])


def slope(samples: Sequence[Sample], field: str) -> float:
    """Growth of a field per 1,000 requests: the median over all pairs of samples (Theil and Sen)."""
    pairs = combinations(samples, 2)
    return 1000 * statistics.median(
        (getattr(b, field) - getattr(a, field)) / (b.requests - a.requests) for a, b in pairs
    )


def warm_up(server: Server) -> None:
    """A step of every size: vLLM's CPU linears keep code (0.3 MB) for each number of tokens they have met."""
    rng = random.Random(0)
    for tokens in range(1, STEP_TOKENS):
        send(server.port, Ask(" ".join(rng.choices(FILLERS, k=tokens)), "", tokens=1))  # and BOS


def soak(
    server: Server,
    minutes: float,
    requests: int = 0,
    max_slope: float = MAX_SLOPE,
    streams: int = CLIENTS,
    longest: int = LONGEST,
) -> dict[str, Any]:
    """Rounds of traffic for so many minutes and requests. Returns what was measured; ``problems`` is empty if all is
    well. Where ``requests`` take more than twice the time, that is a problem."""
    samples: list[Sample] = []
    problems: list[str] = []
    hung_up = prompt_tokens = cached_tokens = 0
    asks, in_a_round = traffic(longest=longest), max(ROUND, streams)
    warm_up(server)
    start = time.monotonic()

    def goes_on() -> bool:
        minute, done = (time.monotonic() - start) / 60, in_a_round * len(samples)
        enough = minute >= minutes and done >= requests or minute >= 2 * minutes
        return len(samples) < MIN_SAMPLES or not enough and len(problems) < MAX_PROBLEMS

    with ThreadPoolExecutor(streams) as clients:
        while goes_on():
            asked = list(islice(asks, in_a_round))
            replies = list(clients.map(lambda ask: send(server.port, ask), asked))
            for ask, reply in zip(asked, replies, strict=True):
                hung_up += reply.text is None
                prompt_tokens += reply.prompt_tokens
                cached_tokens += reply.cached_tokens
                if reply.text is not None and not is_right(ask, reply.text):
                    problems.append(f"{ask.text[-200:]!r} was answered {reply.text[:100]!r}, not {ask.answer!r}")
            if not becomes_idle(server):
                problems.append(
                    f"{metric(server, 'kv_cache_usage_perc'):.0%} of the KV cache is not free {IDLE_S} s later"
                )
            before = samples[-1].requests if samples else 0
            samples.append(measure(server, before + in_a_round))
            if samples[-1].requests // 1000 > before // 1000:
                print(f"{time.monotonic() - start:.0f} s: {samples[-1]}, {len(problems)} problems", file=sys.stderr)
    seconds, done = time.monotonic() - start, samples[-1].requests
    settled = samples[int(WARM_UP * len(samples)) :]
    slopes = {part: slope(settled, part) for part in ("memory", "api", "engine", "files")}
    if slopes["memory"] >= max_slope:
        problems.append(f"memory grows by {slopes['memory']:.2f} MB per 1,000 requests; allowed: below {max_slope}")
    if slopes["files"] >= 1:
        problems.append(f"open files grow by {slopes['files']:.1f} per 1,000 requests; allowed: below 1")
    if done < requests:
        problems.append(f"{done} requests in {seconds:.0f} s; wanted: {requests}")
    return {
        "seconds": round(seconds),
        "requests": done,
        "requests_per_s": round(done / seconds, 2),
        "checked": done - hung_up,
        "hung_up": hung_up,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached_tokens,
        "preemptions": int(metric(server, "num_preemptions_total")),
        "memory_mb": [round(sample.memory, 1) for sample in (samples[0], settled[0], settled[-1])],
        "memory_mb_per_1000": round(slopes["memory"], 3),
        "api_mb_per_1000": round(slopes["api"], 3),
        "engine_mb_per_1000": round(slopes["engine"], 3),
        "files": [sample.files for sample in (samples[0], settled[0], settled[-1])],
        "files_per_1000": round(slopes["files"], 3),
        "problems": problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--requests", type=int, default=20_000, help="go on until so many, for at most twice the time")
    parser.add_argument("--streams", type=int, default=CLIENTS, help="clients that ask at once")
    parser.add_argument("--drafts", type=int, default=0, help="tokens that the MTP layer guesses at once")
    parser.add_argument("--longest", type=int, default=LONGEST, help="tokens of the longest prompts, from 300 on")
    parser.add_argument("serve", nargs="*", help="more options for vllm serve, after --")
    args = parser.parse_args()
    exit_on_sigterm()
    blocks = BLOCKS if args.streams <= CLIENTS else 4 * BLOCKS
    options = [*SERVE_ARGS, f"--num-gpu-blocks-override={blocks}", *args.serve]
    if args.drafts:
        speculation = {"method": "mtp", "num_speculative_tokens": args.drafts}
        options += ["--speculative-config", json.dumps(speculation)]
    with TemporaryDirectory() as folder:
        write_planted(folder, **CHECKPOINT)
        LOG.parent.mkdir(exist_ok=True)
        with serve(folder, *options, env=SERVE_ENV, log_path=LOG) as server:
            report = soak(server, args.minutes, args.requests, streams=args.streams, longest=args.longest)
    print(json.dumps({"streams": args.streams, "drafts": args.drafts} | report, indent=2))
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
