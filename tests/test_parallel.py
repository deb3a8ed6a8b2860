"""Several ranks: they answer as one does, select the same tokens, and agree before they start; what vLLM would compute
wrongly is refused."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine import Engine, engine
from planted_text import build_prompt
from selections import Selection, record, recorded, share_from
from test_glm import write_glm
from test_model import LIMITS, config_of, prompts, within
from test_mtp import speculative
from test_planted import folder, ids, questions, words
from test_platform import engine_config
from tiny_checkpoint import write_random

from vllm_dsa import attention
from vllm_dsa.kernels import cpu
from vllm_dsa.metadata import cut, shared_chunks
from vllm_dsa.models import ranks
from vllm_dsa.testing.cases import Case
from vllm_dsa.testing.check import written
from vllm_dsa.testing.server import HOST, free_port

__all__ = ["folder"]  # a fixture: the planted checkpoint
TWO = dict(tensor_parallel_size=2, distributed_executor_backend="mp")


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else vLLM wants a NUMA node for each rank
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # else ranks run no function of ours
        yield


def attentions(worker) -> list[torch.nn.Module]:
    """The DSA layers of a rank, its draft's last."""
    runner = worker.model_runner
    models = [runner.model, *([runner.drafter.model] if hasattr(runner, "drafter") else [])]
    return [module for model in models for name, module in model.named_modules() if name.endswith("self_attn")]


def draft_selection(worker) -> tuple[int, torch.Tensor]:
    """Heads of this rank, and what the draft selected last."""
    layer = attentions(worker)[-1]
    return layer.heads, layer.selection.clone()


def select_otherwise(worker) -> None:
    """A rank whose last indexer has another RoPE layout."""
    if worker.rank == 1:
        layer = attentions(worker)[-1]
        layer.rope = replace(layer.rope, index_interleaved=not layer.rope.index_interleaved)


def of_a_prompt(running: Engine, tokens: list[int], every: int = 8) -> list[tuple[list[Selection], int]]:
    """Of every rank: what its layers select for a prompt that is one step, and of how many parts a share consists."""
    assert running.llm.reset_prefix_cache()
    running.llm.collective_rpc(record, args=(every,))
    running.generate([tokens], max_tokens=1)
    return running.llm.collective_rpc(recorded)


def differing_layers(ranks: list[tuple[list[Selection], int]]) -> list[int]:
    """Layers whose selection is not that of rank 0 on every rank, bit for bit."""
    first = ranks[0][0]
    assert all(len(calls) == len(first) for calls, _ in ranks)
    return [i for i, one in enumerate(first) if not all(one.selected.equal(calls[i].selected) for calls, _ in ranks)]


def test_two_ranks_answer_as_planted_and_select_the_same(folder, monkeypatch):
    """With a draft, and with selections shared wherever they can be. Most scores of a planted row are equal, so that
    ties decide what is selected."""
    monkeypatch.setenv("VLLM_DSA_SHARD_SCORES", "1")
    asked = questions((300, 900))
    options = dict(max_num_batched_tokens=256, disable_log_stats=False)
    with engine(folder, **TWO, **options, **speculative(3)) as running:
        given = running.generate([tokens for tokens, _ in asked], max_tokens=6, stop_token_ids=[1])
        assert [words(tokens) for tokens in given] == [answer for _, answer in asked]
        prompt = ids(build_prompt(250, 1, chat=True), True)
        shared = of_a_prompt(running, prompt)
        running.llm.collective_rpc(share_from, args=(0,))
        alone = of_a_prompt(running, prompt)
        # Two parts of two layers and a draft; of the draft's later steps, which are a row each, the first rank has one.
        assert [cuts for _, cuts in shared + alone] == [8, 6, 0, 0]
        assert differing_layers(alone) == []
        assert differing_layers([alone[0], *shared]) == []
        assert all(heads * 2 == 4 for heads, _ in running.llm.collective_rpc(draft_selection))
        running.llm.collective_rpc(select_otherwise)
        assert differing_layers(of_a_prompt(running, prompt)) == [2]


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    """Random weights: the scores of what every layer selects, and the log-probabilities of every prompt token; with
    and without sharing, the same bits."""
    write_random(tmp_path, index_n_heads=8, index_topk=48, seed=2)
    asked = prompts(config_of(tmp_path), multiples=(2, 5))
    options = dict(max_num_batched_tokens=256, enable_prefix_caching=False)
    found = []
    for more in ({}, TWO):
        with engine(tmp_path, **options, **more) as running:
            logprobs = torch.cat(running.prompt_logprobs(asked))
            found.append((logprobs, of_a_prompt(running, asked[-1])[0][0]))
            if more:
                running.llm.collective_rpc(share_from, args=(1,))
                assert torch.cat(running.prompt_logprobs(asked)).equal(logprobs)
                shared = of_a_prompt(running, asked[-1])
                assert all(cuts for _, cuts in shared) and differing_layers([(found[1][1], 0), *shared]) == []
    (one, layers), (two, split) = found
    # Sums over ranks are in another order, so that a code of 3 bits may fall otherwise, which moves a score by up to
    # 2e-3 of the row's best one.
    moved = [
        ((a.scores - b.scores).abs() / a.scores[:, :1].abs()).nan_to_num(0).max().item()
        for a, b in zip(layers, split, strict=True)
    ]
    first = next((i for i, difference in enumerate(moved) if difference > 1e-2), None)
    assert first is None, f"the scores of layer {first} are others: {moved}"
    assert within((one - two).abs(), LIMITS["auto"])


@pytest.mark.slow
def test_two_stages_answer_as_planted(folder, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    asked = questions((300, 900))
    stages = dict(pipeline_parallel_size=2, distributed_executor_backend="mp", enforce_eager=False)
    with engine(folder, max_num_batched_tokens=256, **stages) as running:
        given = running.generate([tokens for tokens, _ in asked], max_tokens=6, stop_token_ids=[1])
        assert [words(tokens) for tokens in given] == [answer for _, answer in asked]


# Sharing a selection, without an engine.

SHARED = (
    Case("a share of one prompt", ((0, 100),)),
    Case("chunks and decodes", ((99, 1), (700, 1), (37, 64), (5, 1), (0, 150)), decode_rows=1, padding_rows=3),
    Case("more ranks than a few rows", ((200, 5),), block_size=32),
    Case("equal scores", ((90, 20), (300, 31)), ties="all"),
)


def a_row_late(*args: Any) -> tuple[slice, ...]:
    """The fault of a rank, the second, whose first chunk begins a row late."""
    first, second, *others = shared_chunks(*args)
    return first, slice(second.start + 1, second.stop + 1), *others


def select_shared(size: int, fault: Callable | None, monkeypatch) -> dict[int, list[str]]:
    """Of each of ``size`` ranks, a thread each: cases in which its rows are not, bit for bit, those of a select by
    itself."""
    barrier, gathered, me = threading.Barrier(size, timeout=60), [torch.empty(0)] * size, threading.local()
    monkeypatch.setenv("VLLM_DSA_SHARD_SCORES", "1")
    monkeypatch.setattr(attention, "get_tp_group", lambda: me.group)
    monkeypatch.setattr(attention, "cut", lambda rows, mine: me.parts.append(mine) or cut(rows, mine))
    if fault:
        chunks = lambda *args: (fault if me.group.rank_in_group == 1 else shared_chunks)(*args)  # noqa: E731
        monkeypatch.setattr(attention, "shared_chunks", chunks)

    def all_gather(own: torch.Tensor, dim: int) -> torch.Tensor:
        gathered[me.group.rank_in_group] = own
        barrier.wait()
        whole = torch.cat(gathered, dim)
        barrier.wait()
        return whole

    def run(rank: int) -> list[str]:
        me.group = SimpleNamespace(world_size=size, rank_in_group=rank, all_gather=all_gather)
        differing = []
        for case in SHARED:
            inputs, codes, weights = written(case)
            step = (codes, weights, inputs.index_cache, inputs.rows)
            alone, shared = torch.full((2, case.tokens, case.top_k), -7, dtype=torch.int32)
            cpu.select(*step, alone)
            me.parts = []
            attention._select(cpu, *step, shared)
            assert sum(mine.stop - mine.start for mine in me.parts) < case.tokens, "not shared"
            if not shared.equal(alone):
                differing.append(case.name)
        return differing

    with ThreadPoolExecutor(size) as pool:
        return dict(enumerate(pool.map(run, range(size))))


@pytest.mark.parametrize("size", [2, 3])
def test_a_shared_selection_has_the_same_bits(size, monkeypatch):
    assert select_shared(size, None, monkeypatch) == dict.fromkeys(range(size), [])


def test_a_share_that_is_a_row_off_is_seen(monkeypatch):
    seen = select_shared(2, a_row_late, monkeypatch)
    assert all(case.name in names for names in seen.values() for case in SHARED[:3]), seen


# Agreement before the start.


def ask(rank: int, size: int, port: int, facts: list[dict | None], answers) -> None:
    """One of two ranks; None as facts: one that serves without this package."""
    torch.distributed.init_process_group("gloo", f"tcp://{HOST}:{port}", rank=rank, world_size=size)
    ranks.get_world_group = lambda: SimpleNamespace(world_size=size, cpu_group=torch.distributed.group.WORLD)
    try:
        if facts[rank] is None:
            time.sleep(6)  # it lives, and does not come
            answers.put((rank, "absent"))
        else:
            ranks.require_agreement(facts[rank], seconds=3)
            answers.put((rank, "agreed"))
    except (ValueError, RuntimeError) as error:
        answers.put((rank, f"{type(error).__name__}: {error}"))
    answers.close()
    answers.join_thread()
    os._exit(0)


def in_processes(function: Callable, size: int, *args: Any) -> dict[int, Any]:
    """What each of ``size`` ranks, forked from this process, puts into its queue: (rank, answer). They compute nothing:
    torch may hang in a fork."""
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), free_port()
    processes = [context.Process(target=function, args=(rank, size, port, *args, answers)) for rank in range(size)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(10)
    return found


def verdicts(facts: list[dict | None]) -> dict[int, str]:
    return in_processes(ask, 2, facts)


FACTS = {"vllm-dsa": "0.1.0", "providers": "write: cpu"}


def test_equal_ranks_agree():
    assert verdicts([FACTS, dict(FACTS)]) == {0: "agreed", 1: "agreed"}


def test_ranks_that_differ_do_not_start():
    found = verdicts([FACTS, FACTS | {"vllm-dsa": "0.0.9"}])
    for message in found.values():
        assert message.startswith("ConfigError: rank 1 has vllm-dsa 0.0.9, rank 0 has 0.1.0. Install the same")


def test_a_rank_without_the_package_stops_the_start():
    found = verdicts([FACTS, None])
    assert found[1] == "absent"
    assert "RuntimeError: not every rank of this model has come" in found[0] and "on every node" in found[0]


# Refusals.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small")
    write_random(path, num_hidden_layers=2)
    return path


def test_stages_that_would_die_on_a_cpu_are_refused(small, monkeypatch):
    refused = "--pipeline-parallel-size 2 is refused on a CPU as it is.*VLLM_USE_BREAKABLE_CUDAGRAPH=0"
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    engine_config(small, pipeline_parallel_size=2)
    with pytest.raises(ValueError, match=refused):
        engine_config(small, pipeline_parallel_size=2, enforce_eager=True)
    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH")
    with pytest.raises(ValueError, match=refused):
        engine_config(small, pipeline_parallel_size=2)


def test_a_stage_that_starts_at_a_layer_without_indexer_is_refused(tmp_path, monkeypatch):
    write_glm(tmp_path, index_topk_pattern="FSFFSFS")
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    with pytest.raises(ValueError, match="size 2 is refused: stage 1 would start at layer 4, which shares"):
        engine_config(tmp_path, pipeline_parallel_size=2)
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,4")
    engine_config(tmp_path, pipeline_parallel_size=2)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(enable_expert_parallel=True, tensor_parallel_size=2), "--enable-expert-parallel is refused on a CPU"),
        (dict(data_parallel_size=2), "--data-parallel-size 2 is refused on a CPU"),
        (dict(decode_context_parallel_size=2, tensor_parallel_size=2), "--decode-context-parallel-size 2 is refused"),
        (dict(prefill_context_parallel_size=2), "--prefill-context-parallel-size 2 is refused"),
    ],
)
def test_what_is_refused_by_name(small, options, message):
    with pytest.raises(ValueError, match=message):
        engine_config(small, **options)
