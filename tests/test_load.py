"""More requests than the KV cache holds, clients that hang up, prefixes that come and go. One server for the module."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import soak
from leak import LEAK
from planted_text import build_prompt
from soak import BLOCK_SIZE, BLOCKS, TOP_K, Ask, Sample, is_right, metric, send
from tiny_checkpoint import write_planted

from vllm_dsa.testing.server import serve

STREAMS = 64
OPTIONS = (*soak.SERVE_ARGS, f"--num-gpu-blocks-override={BLOCKS}", "--enforce-eager")
MINUTES = 3
# MB of memory per 1,000 requests. An hour's soak allows 1; its first 1,000 requests took 10, for Python and the
# allocators, and the last 10,000 took 0.1 each. Where 20 kB of every request are kept it is 29.
MAX_SLOPE = 15.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    write_planted(path, check=False, **soak.CHECKPOINT)
    return path


@pytest.fixture(scope="module")
def server(checkpoint):
    with serve(checkpoint, *OPTIONS, env=soak.SERVE_ENV) as running:
        yield running


def long_question(seed: int, **options) -> Ask:
    prompt = build_prompt(300 + seed % 100, seed, copies=TOP_K)
    return Ask(prompt.text, prompt.answer, tokens=soak.LONG, **options)


def answers(server, ask: Ask) -> bool:
    return is_right(ask, send(server.port, ask).text)


@pytest.mark.serve
def test_many_streams_share_a_small_cache(server):
    """Preempted and recomputed, or cut off half-way: every answer that is read to its end is right all along."""
    before = metric(server, "num_preemptions_total")
    asked = [long_question(i, stream=True, hang_up=i % 4 == 0) for i in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as clients:
        replies = list(clients.map(lambda ask: send(server.port, ask), asked))
    assert soak.becomes_idle(server), "KV blocks are in use, 10 s after the last answer"
    assert metric(server, "num_preemptions_total") > before
    for ask, reply in zip(asked, replies, strict=True):
        assert ask.hang_up == (reply.text is None)
        assert ask.hang_up or is_right(ask, reply.text), reply.text
    assert answers(server, long_question(seed=STREAMS))


@pytest.mark.serve
def test_prefix_extended_past_topk_then_evicted(server):
    """Blocks that were written while every row saw all keys serve rows that select; and again after an eviction."""
    prompt = build_prompt(400, seed=1, copies=TOP_K, codes=4, placement="first")
    words = prompt.text.split(" ")
    question = words[-3:]
    short = Ask(" ".join(words[: TOP_K - 8] + question), prompt.answer)
    whole = Ask(prompt.text, prompt.answer)

    def cached_tokens(ask: Ask) -> int:
        reply = send(server.port, ask)
        assert is_right(ask, reply.text), reply.text
        return reply.cached_tokens

    assert send(server.port, short).prompt_tokens < TOP_K
    assert cached_tokens(short) == BLOCK_SIZE
    assert cached_tokens(whole) == BLOCK_SIZE
    assert cached_tokens(whole) == 399 // BLOCK_SIZE * BLOCK_SIZE
    for seed in range(BLOCK_SIZE * BLOCKS // 1000 + 1):
        other = build_prompt(1000, 100 + seed, copies=TOP_K)
        assert cached_tokens(Ask(other.text, other.answer)) == 0
    assert cached_tokens(short) == 0
    assert cached_tokens(whole) == BLOCK_SIZE
    assert cached_tokens(whole) == 399 // BLOCK_SIZE * BLOCK_SIZE


@pytest.mark.serve
def test_three_minutes_of_soak(server):
    """`make soak` in short. What Python and the allocators still take in so little time hides a smaller slope."""
    report = soak.soak(server, MINUTES, max_slope=MAX_SLOPE)
    print(report)
    assert report["problems"] == []
    assert report["preemptions"] and report["cached_tokens"] and report["hung_up"]


@pytest.mark.serve
@pytest.mark.slow
def test_a_leak_in_the_server_is_noticed(checkpoint):
    """The same three minutes of a server that keeps 20 kB of every request."""
    options = (*OPTIONS, "--middleware=leak.Leak")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with serve(checkpoint, *options, env=soak.SERVE_ENV | {"PYTHONPATH": os.pathsep.join(paths)}) as running:
        report = soak.soak(running, MINUTES, max_slope=MAX_SLOPE)
    print(report)
    assert [p.split(" by ")[0] for p in report["problems"]] == ["memory grows"]
    assert report["memory_mb_per_1000"] > 0.8 * LEAK / 1000


def test_a_leak_is_told_from_noise():
    """2 KB per request among allocator steps of megabytes is noticed, and these alone are not growth."""
    for leak, low, high in ((0.0, -0.5, 0.5), (0.002, 1.5, 2.5)):
        samples = [Sample(50 * i, 2000 + 50 * i * leak + 3 * (i % 7 == 0), 178) for i in range(1, 400)]
        assert low < soak.slope(samples, "memory") < high
        assert soak.slope(samples, "files") == 0
