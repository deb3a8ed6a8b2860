"""One vLLM engine in a process of its own: `python engine_job.py JOB OUT` reads what to ask from JOB (JSON), and writes
the answers to OUT (torch.save).

    model    folder of a checkpoint
    options  of vllm.LLM
    answers  {"prompts": token ids, "params": of Engine.generate} -> "answers": greedy tokens of all prompts at once
    scores   token ids of prompts -> "scores": log-probabilities of each prompt's tokens, all prompts at once
    select   token ids of a prompt that is one step -> "select": what each layer of each rank selects
    share    scores and select thrice: without sharing selections, with, and without -> "shared", "again": scores and
             select; and select once more with a rank whose share begins a row late -> "late"
    beside   files of the other data-parallel ranks, which need this one until they have written them

Beside them "drafts": how many were drafted, tokens of them, and how many of these were accepted.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine import Engine
from selections import Selection, record, recorded, share_from
from vllm import LLM


class Job(Engine):
    """An engine that may have its core in another process."""

    def __init__(self, path: str, **options: Any) -> None:
        self.llm = LLM(model=path, **options)

    def select(self, prompt: list[int], every: int = 64) -> list[tuple[list[Selection], int]]:
        self.llm.collective_rpc(record, args=(every,))
        self.generate([prompt], max_tokens=1)
        return self.llm.collective_rpc(recorded)

    def drafts(self) -> list[int]:
        found = {metric.name: getattr(metric, "value", 0) for metric in self.llm.get_metrics()}
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        return [found.get(f"vllm:spec_decode_{name}", 0) for name in names]


def begin_a_row_late(worker: Any) -> None:
    """The fault of the last rank, whose first chunk of a share begins a row late."""
    from vllm_dsa import attention

    right: Callable = attention.shared_chunks

    def late(*args: Any) -> tuple[slice, ...]:
        chunks = list(right(*args))
        if chunks and worker.rank:
            chunks[worker.rank] = slice(chunks[worker.rank].start + 1, chunks[worker.rank].stop + 1)
        return tuple(chunks)

    attention.shared_chunks = late


def done(job: dict[str, Any]) -> dict[str, Any]:
    """What the job asks for."""
    running, found = Job(job["model"], **job["options"]), {}
    if "answers" in job:
        found["answers"] = running.generate(job["answers"]["prompts"], **job["answers"]["params"])
        found["drafts"] = running.drafts()

    def ask() -> dict[str, Any]:
        return {"scores": running.prompt_logprobs(job["scores"]), "select": running.select(job["select"])}

    if "share" in job:
        for name, scores in (("", 0), ("shared", 1), ("again", 0)):
            running.llm.collective_rpc(share_from, args=(scores,))
            found |= {name: ask()} if name else ask()
        running.llm.collective_rpc(share_from, args=(1,))
        running.llm.collective_rpc(begin_a_row_late)
        found["late"] = running.select(job["select"])
    elif "select" in job:
        found |= ask()
    elif "scores" in job:
        found["scores"] = running.prompt_logprobs(job["scores"])
    return found


if __name__ == "__main__":
    # engine.py puts the core into this process; data-parallel ranks need it in one of its own.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if "VLLM_DP_SIZE" in os.environ else "0"
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.save(done(job), sys.argv[2])
    while not all(Path(path).exists() for path in job["beside"]):
        time.sleep(0.1)
    os._exit(0)  # the engine's processes end with this one, and an orderly end takes seconds
