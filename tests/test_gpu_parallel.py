"""Several GPUs as one: tensor, expert, data and pipeline parallel ranks, and drafts, against one rank on one GPU.

`python -m pytest -v -s -m gpu tests/test_gpu_parallel.py` needs vLLM 0.33 and two Hopper GPUs. Every engine is a
process of its own (engine_job.py), started in the order of ENGINES, eight GPU processes at a time: those that the
chosen tests need. `-s` shows when each ends, and a line a test. SIGTERM, as `timeout` sends it, ends the engines too.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_dsa.testing.compare import BFLOAT16_LOGPROBS
from vllm_dsa.testing.server import NO_MULTICAST, free_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or not find_spec("vllm"), reason="needs two CUDA devices and vLLM's CUDA build"
    ),
]

HERE = Path(__file__).parent
TOP_K = 128
SECONDS, AT_ONCE = 180, 8  # of one engine; GPU processes
ENVIRONMENT = NO_MULTICAST | {
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # else ranks run no function of ours
    "VLLM_DSA_REQUIRED": "1",
    # The parent, too, loads the vendors' libraries to see what serves: a forked rank could not use CUDA after that.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "INFO",
    "PYTHONUNBUFFERED": "1",
}
SIZES: dict[str, Any] = dict(num_attention_heads=32, index_n_heads=64, index_topk=TOP_K, moe_intermediate_size=128)
RANDOM: dict[str, Any] = SIZES | dict(hidden_size=512, q_lora_rank=256, num_hidden_layers=4, num_nextn_predict_layers=0)
OPTIONS: dict[str, Any] = dict(
    dtype="bfloat16",
    kv_cache_dtype="fp8_ds_mla",
    max_model_len=8192,
    max_num_batched_tokens=2048,
    max_num_seqs=16,
    kv_cache_memory_bytes=1 << 30,  # and no profile of the memory, which several engines on one GPU would upset
    gpu_memory_utilization=0.2,
    enable_prefix_caching=False,
    disable_log_stats=False,
    compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
    kernel_config={"enable_flashinfer_autotune": False},
)
TWO = dict(tensor_parallel_size=2, distributed_executor_backend="mp")
STAGES = dict(pipeline_parallel_size=2, distributed_executor_backend="mp")
# |difference| of the selected scores as a share of a row's best one, 90th percentile of a layer: three times what was
# measured on CPUs (0, 1.1e-2, 6.4e-2, 5.8e-2 by layer), where other sums turn a bit of bfloat16, and that a selection.
SCORES = 0.2
PROVIDERS, RUNNER = "select: vendor, attend: vendor", "Using V2 Model Runner"  # in the log
FACTS, CHAINS, LENGTHS = (1200, 3000, 6000), (1500, 2500), (130, 700, 3000, 5000, 1900)  # lengths of prompts


def speculative(k: int) -> dict[str, Any]:
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": k}}


@dataclass(frozen=True)
class Asked:
    """One engine, or one data-parallel rank: its checkpoint, its options of vLLM, and what to ask (engine_job.py)."""

    checkpoint: str
    ask: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    gpus: str = "0,1"
    data_rank: int | None = None

    @property
    def processes(self) -> int:
        return len(self.gpus.split(",")) if self.data_rank is None else 1


ENGINES = {
    "planted": Asked("planted", ("answers",), gpus="0"),
    "random": Asked("random", ("scores", "select"), gpus="1"),
    "planted TP2": Asked("planted", ("answers",), TWO),
    "random TP2": Asked("random", ("share",), TWO),
    "TP2 + MTP 3": Asked("planted", ("answers",), TWO | speculative(3)),
    "MTP 1": Asked("planted", ("answers",), speculative(1), gpus="0"),
    "MTP 3": Asked("planted", ("answers",), speculative(3), gpus="1"),
    "random EP2": Asked("random", ("scores",), TWO | dict(enable_expert_parallel=True)),
    "random PP2": Asked("random", ("scores",), STAGES),
    "random DP2 + EP, 0": Asked("random", ("scores",), dict(enable_expert_parallel=True), data_rank=0),
    "random DP2 + EP, 1": Asked("random", ("scores",), dict(enable_expert_parallel=True), data_rank=1),
}


@cache
def questions() -> list[tuple[list[int], str]]:
    """(token ids, right answer): facts, chains of facts, and prompts that pass index_topk while they are answered."""
    from planted_text import build_prompt, build_tokenizer, chat_text

    encode = build_tokenizer().encode
    facts = [build_prompt(n, n, chat=True, copies=TOP_K) for n in FACTS]
    chains = [build_prompt(n, n, copies=TOP_K, hops=8, codes=8) for n in CHAINS]
    short = [build_prompt(n, n, copies=n - 2, codes=1, question=" {code}") for n in range(TOP_K - 4, TOP_K + 3)]
    found = [(encode(chat_text(prompt.text), add_special_tokens=False).ids, prompt.answer) for prompt in facts]
    return found + [(encode(prompt.text).ids, prompt.answer) for prompt in chains + short]


@cache
def random_prompts() -> list[list[int]]:
    """The last one is a step of its own."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(8, 400, (n,), generator=generator).tolist() for n in LENGTHS]


def words(tokens: list[int]) -> str:
    from planted_text import build_tokenizer

    return " ".join(build_tokenizer().decode([t]).strip() for t in tokens if t != 1)


def job(asked: Asked, folders: dict[str, Path], beside: list[Path]) -> dict[str, Any]:
    """What engine_job.py is given; beside: where the other data-parallel ranks write."""
    prompts = random_prompts()
    if asked.data_rank is not None:  # other numbers of prompts: one rank idles while the other works
        prompts = prompts[:2] if asked.data_rank else prompts[2:]
    content = {
        "answers": {"prompts": [ids for ids, _ in questions()], "params": {"max_tokens": 12, "stop_token_ids": [1]}},
        "scores": prompts,
        "select": random_prompts()[-1],
        "share": True,
    }
    names = (*asked.ask, "scores", "select") if "share" in asked.ask else asked.ask
    return {
        "model": str(folders[asked.checkpoint]),
        "options": OPTIONS | asked.options,
        "beside": [str(path) for path in beside],
        **{name: content[name] for name in names},
    }


def file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


class Running:
    """The process of one engine."""

    def __init__(self, name: str, asked: Asked, folders: dict[str, Path], scratch: Path, port: int) -> None:
        self.name, self.asked, self.start = name, asked, time.monotonic()
        self.log, self.out, given = (scratch / f"{file_name(name)}.{suffix}" for suffix in ("log", "pt", "json"))
        beside = [n for n, a in ENGINES.items() if n != name and None not in (a.data_rank, asked.data_rank)]
        given.write_text(json.dumps(job(asked, folders, [scratch / f"{file_name(n)}.pt" for n in beside])))
        env = os.environ | ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": asked.gpus}
        paths = [str(HERE), str(HERE.parent / "examples"), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(paths)
        if asked.data_rank is not None:
            env |= {"VLLM_DP_RANK": str(asked.data_rank), "VLLM_DP_RANK_LOCAL": str(asked.data_rank)}
            env |= {"VLLM_DP_SIZE": "2", "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": str(port)}
        command = [sys.executable, str(HERE / "engine_job.py"), str(given), str(self.out)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def over(self) -> bool:
        late = time.monotonic() - self.start > SECONDS
        if self.process.poll() is None and not late:
            return False
        self.end()
        self.ended = f"took more than {SECONDS} s" if late else f"ended with {self.process.returncode}"
        print(f"{self.name}: {self.ended} after {time.monotonic() - self.start:.0f} s", flush=True)
        return True

    def end(self) -> None:
        """End what is left of its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def found(self) -> dict[str, Any]:
        """What it wrote, and its log."""
        log = self.log.read_text(errors="replace")
        if self.ended != "ended with 0":
            errors = re.findall(r"^.*\w+(?:Error|Exception): .*$", log, re.MULTILINE)
            cause = f"its first error: {errors[0]}\n" if errors else ""
            pytest.fail(f"the engine {self.name} {self.ended}\n{cause}the end of its log: {log[-4000:]}", pytrace=False)
        return {"log": log, **torch.load(self.out, weights_only=False)}


class Engines:
    """Starts those that are needed, as many at a time as may be, and waits for one."""

    def __init__(self, needed: set[str], folders: dict[str, Path], scratch: Path) -> None:
        self.waiting = [(name, asked) for name, asked in ENGINES.items() if name in needed]
        self.folders, self.scratch = folders, scratch
        self.running: list[Running] = []
        self.ended: dict[str, Running] = {}

    def found(self, name: str) -> dict[str, Any]:
        """What that engine found."""
        while name not in self.ended:
            self.turn()
        return self.ended[name].found()

    def turn(self) -> None:
        for one in [one for one in self.running if one.over()]:
            self.running.remove(one)
            self.ended[one.name] = one
        # Data-parallel ranks wait for each other: they start together.
        group = self.waiting[: 2 if self.waiting and self.waiting[0][1].data_rank == 0 else 1]
        processes = sum(a.processes for _, a in group) + sum(one.asked.processes for one in self.running)
        if not group or processes > AT_ONCE:
            time.sleep(0.2)
            return
        port = free_port()
        self.running += [Running(name, asked, self.folders, self.scratch, port) for name, asked in group]
        del self.waiting[: len(group)]

    def end(self) -> None:
        for one in self.running:
            one.end()


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt  # pytest then ends its fixtures, and shows what has failed so far


@pytest.fixture(scope="module")
def engines(request, tmp_path_factory) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Name -> what that engine found."""
    from tiny_checkpoint import write_planted, write_random

    folders = {name: tmp_path_factory.mktemp(name) for name in ("planted", "random")}
    write_planted(folders["planted"], check=False, dtype="bfloat16", draft="hidden", **SIZES)
    write_random(folders["random"], dtype="bfloat16", seed=4, **RANDOM)
    needed: set[str] = set()
    for item in request.session.items:
        if names := getattr(getattr(item, "function", None), "engines", ()):
            needed |= {*names, *(item.callspec.params.values() if hasattr(item, "callspec") else ())}
    running = Engines(needed, folders, tmp_path_factory.mktemp("engines"))
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield running.found
    finally:
        running.end()
        signal.signal(signal.SIGTERM, before)


def needs(*names: str) -> Callable[[Callable], Callable]:
    """The engines that a test compares, beside the one that its parameter names."""

    def keep(test: Callable) -> Callable:
        test.engines = names
        return test

    return keep


def compared(name: str, scores: list[torch.Tensor], alone: list[torch.Tensor]) -> None:
    """Log-probabilities of every prompt token are those of one rank."""
    difference = (torch.cat(scores) - torch.cat(alone)).abs()
    p50, p90 = difference.median(), difference.quantile(0.9)
    print(f"{name}: {len(difference)} log-probabilities, p50 {p50:.1e} p90 {p90:.1e} max {difference.max():.1e}")
    assert p50 <= BFLOAT16_LOGPROBS[0] and p90 <= BFLOAT16_LOGPROBS[1]


def answered(found: dict[str, Any], plain: dict[str, Any], name: str) -> None:
    """Right, and token for token those of one rank without drafts."""
    equal = [a == b for a, b in zip(found["answers"], plain["answers"], strict=True)]
    drafts, drafted, accepted = found["drafts"]
    print(
        f"{name}: {sum(equal)} of {len(equal)} answers as of one rank; {drafts} drafts, {accepted} of {drafted} taken"
    )
    assert all(equal)


@needs("planted")
def test_one_rank_answers_as_planted(engines):
    found = engines("planted")
    assert PROVIDERS in found["log"] and RUNNER in found["log"]
    given, right = [words(tokens) for tokens in found["answers"]], [answer for _, answer in questions()]
    print(f"one rank: {sum(a == b for a, b in zip(given, right, strict=True))} of {len(right)} answers right")
    assert given == right


@needs("planted", "planted TP2")
def test_two_ranks_answer_as_planted(engines):
    answered(engines("planted TP2"), engines("planted"), "TP2")


@needs("planted")
@pytest.mark.parametrize("name", ["TP2 + MTP 3", "MTP 1", "MTP 3"])
def test_drafts_leave_the_answers_as_they_are(name, engines):
    found = engines(name)
    answered(found, engines("planted"), name)
    assert RUNNER in found["log"]
    assert found["drafts"][2] > found["drafts"][1] / 2


@needs("random", "random TP2")
def test_two_ranks_select_as_one(engines):
    """The scores of what every layer selects: of every rank as of the other, and as of one rank alone."""
    alone, found = engines("random"), engines("random TP2")
    compared("TP2", found["scores"], alone["scores"])
    (one, _), (two, _) = found["select"]
    lonely = alone["select"][0][0]
    assert len(one) == len(two) == len(lonely) == RANDOM["num_hidden_layers"]
    apart = [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if not a.selected.equal(b.selected)]
    assert not apart, f"layer {apart[0]} is the first where the ranks select otherwise; all: {apart}"
    moved, others = [], []
    for a, b in zip(one, lonely, strict=True):
        full = b.scores[:, -1] > -torch.inf  # rows that had a choice
        difference = (a.scores - b.scores)[full].abs() / b.scores[full][:, :1].abs().clamp(min=1e-9)
        moved.append(difference.quantile(0.9).item())
        others.append(sum(len({*x} - {*y}) for x, y in zip(a.selected.tolist(), b.selected.tolist(), strict=True)))
    places = one[0].selected.numel()
    print(f"TP2: scores, p90 by layer {[f'{x:.1e}' for x in moved]}; of {places} places others {others}")
    first = next((i for i, difference in enumerate(moved) if not difference <= SCORES), None)
    assert first is None, f"layer {first} is the first whose scores are others"


@needs("random TP2")
def test_a_shared_selection_has_the_same_bits(engines):
    """As far as this machine computes the same bits twice; and a rank's share that begins a row late is seen."""
    found = engines("random TP2")
    shared, again = found["shared"], found["again"]
    assert all(cuts for _, cuts in shared["select"]) and not any(cuts for _, cuts in found["select"] + again["select"])

    def equal(calls: list[Any]) -> list[bool]:
        return [a.selected.equal(b.selected) for a, b in zip(found["select"][0][0], calls, strict=True)]

    repeat, late = equal(again["select"][0][0]), equal(found["late"][0][0])
    ranks = [equal(calls) for calls, _ in shared["select"]]
    same = torch.cat(found["scores"]).equal(torch.cat(shared["scores"]))
    print(f"sharing: equal layers of both ranks {ranks}, once more without {repeat}, a row late {late}; scores {same}")
    assert repeat[0] and not late[0]
    for rank in ranks:
        assert [a for a, twice in zip(rank, repeat, strict=True) if twice] == [True] * sum(repeat)
    if all(repeat):
        assert same


@needs("random", "random EP2")
def test_expert_parallel_ranks_are_one(engines):
    compared("EP2", engines("random EP2")["scores"], engines("random")["scores"])


@needs("random", "random DP2 + EP, 0", "random DP2 + EP, 1")
def test_data_parallel_ranks_with_shared_experts_are_one(engines):
    ranks = [engines(f"random DP2 + EP, {rank}")["scores"] for rank in (0, 1)]
    compared("DP2 + EP", ranks[1] + ranks[0], engines("random")["scores"])


@needs("random", "random PP2")
def test_pipeline_stages_are_one(engines):
    compared("PP2", engines("random PP2")["scores"], engines("random")["scores"])
