"""What the layers of every rank select, recorded while an engine runs; asked through LLM.collective_rpc."""

import os
from typing import Any, NamedTuple

import torch

from vllm_dsa.kernels import reference


class Selection(NamedTuple):
    """One call of select: what it selected [T, K], and the scores of that, best first, of some rows [rows, K].

    Scores are reference.py's, of what this rank was given; -inf past a row's keys.
    """

    selected: torch.Tensor
    scores: torch.Tensor


class Recorder:
    """In the place of attention._select."""

    def __init__(self, every: int) -> None:
        from vllm_dsa import attention  # here, since a process that starts workers need not load it

        self.every, self.attention = every, attention
        self.select, self.cut = attention._select, attention.cut
        self.calls: list[Selection] = []
        self.cuts = 0
        attention._select, attention.cut = self.record, self.count

    def stop(self) -> None:
        self.attention._select, self.attention.cut = self.select, self.cut

    def count(self, *args: Any) -> Any:
        self.cuts += 1
        return self.cut(*args)

    def record(self, kernels: Any, codes: Any, weights: Any, pages: Any, rows: Any, selected: torch.Tensor) -> None:
        self.select(kernels, codes, weights, pages, rows, selected)
        scores = torch.full((len(range(0, len(selected), self.every)), selected.shape[1]), -torch.inf)
        for i, row in enumerate(range(0, len(selected), self.every)):
            found = reference.scores(codes, weights, pages, rows, row)
            chosen = selected[row].long()
            chosen = chosen[(chosen >= 0) & (chosen < len(found))]  # a wrong selection is to be recorded too
            scores[i, : len(chosen)] = found[chosen].sort(descending=True).values.cpu()
        self.calls.append(Selection(selected.cpu().clone(), scores))


def record(worker: Any, every: int) -> None:
    """From now on record every selection, and the scores of every so manieth row."""
    worker.recorder = Recorder(every)


def recorded(worker: Any) -> tuple[list[Selection], int]:
    """The calls, layer by layer within a step, and how many parts of steps were selected for: none where the ranks do
    not share. Records no more."""
    worker.recorder.stop()
    return worker.recorder.calls, worker.recorder.cuts


def share_from(worker: Any, scores: int) -> None:
    """The ranks share a select of so many scores; 0: none."""
    os.environ["VLLM_DSA_SHARD_SCORES"] = str(scores)
