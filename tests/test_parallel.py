"""Several ranks: they answer as one does, select the same tokens, and agree before they start; what vLLM would compute
wrongly is refused."""

import multiprocessing
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine import Engine, engine
from test_glm import write_glm
from test_model import LIMITS, config_of, prompts, within
from test_mtp import speculative
from test_planted import folder, ids, questions, words
from test_platform import engine_config
from tiny_checkpoint import build_prompt, write_random

from vllm_dsa.models import ranks
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


def heads_and_selections(worker) -> list[tuple[int, torch.Tensor]]:
    """Of every layer: heads of this rank, and the selection of the last step."""
    return [(layer.heads, layer.selection.clone()) for layer in attentions(worker)]


def select_otherwise(worker) -> None:
    """A rank whose last indexer has another RoPE layout."""
    if worker.rank == 1:
        layer = attentions(worker)[-1]
        layer.rope = replace(layer.rope, index_interleaved=not layer.rope.index_interleaved)


def differing_layers(running: Engine, rows: int) -> list[int]:
    """Layers whose last selection is not that of rank 0 on every rank, bit for bit."""
    found = running.llm.collective_rpc(heads_and_selections)
    assert len(found) == 2 and all(heads * 2 == 4 for rank in found for heads, _ in rank)
    return [i for i, (one, other) in enumerate(zip(*found, strict=True)) if not one[1][:rows].equal(other[1][:rows])]


def test_two_ranks_answer_as_planted_and_select_the_same(folder):
    """With a draft. Most scores of a planted row are equal, so that ties decide what is selected."""
    asked = questions((300, 900))
    options = dict(max_num_batched_tokens=256, disable_log_stats=False)
    with engine(folder, **TWO, **options, **speculative(3)) as running:
        given = running.generate([tokens for tokens, _ in asked], max_tokens=6, stop_token_ids=[1])
        assert [words(tokens) for tokens in given] == [answer for _, answer in asked]
        prompt = build_prompt(250, 1, chat=True)
        running.generate([ids(prompt, True)], max_tokens=1)
        assert differing_layers(running, rows=250) == []
        running.llm.collective_rpc(select_otherwise)
        assert running.llm.reset_prefix_cache()
        running.generate([ids(prompt, True)], max_tokens=1)
        assert differing_layers(running, rows=250) == [2]


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    """Random weights: the selections of every layer, and the log-probabilities of every prompt token."""
    write_random(tmp_path, index_n_heads=8, index_topk=48, seed=2)
    asked = prompts(config_of(tmp_path), multiples=(2, 5))
    options = dict(max_num_batched_tokens=256, enable_prefix_caching=False)
    found = []
    for more in ({}, TWO):
        with engine(tmp_path, **options, **more) as running:
            logprobs = torch.cat(running.prompt_logprobs(asked))
            running.generate([asked[-1]], max_tokens=1)
            found.append((logprobs, running.llm.collective_rpc(heads_and_selections)[0]))
    (one, layers), (two, split) = found
    rows = len(asked[-1])
    # Sums over ranks are in another order: a tie within 1e-6 may fall otherwise, in a token of hundreds.
    moved = [(a[:rows] != b[:rows]).float().mean().item() for (_, a), (_, b) in zip(layers, split, strict=True)]
    first = next((i for i, part in enumerate(moved) if part > 0.01), None)
    assert first is None, f"layer {first} selects other tokens: {moved}"
    assert within((one - two).abs(), LIMITS["auto"])


@pytest.mark.slow
def test_two_stages_answer_as_planted(folder, monkeypatch):
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    asked = questions((300, 900))
    stages = dict(pipeline_parallel_size=2, distributed_executor_backend="mp", enforce_eager=False)
    with engine(folder, max_num_batched_tokens=256, **stages) as running:
        given = running.generate([tokens for tokens, _ in asked], max_tokens=6, stop_token_ids=[1])
        assert [words(tokens) for tokens in given] == [answer for _, answer in asked]


# Agreement before the start.


def ask(rank: int, port: int, facts: list[dict | None], answers) -> None:
    """One of two ranks; None as facts: one that serves without this package."""
    torch.distributed.init_process_group("gloo", f"tcp://{HOST}:{port}", rank=rank, world_size=2)
    ranks.get_world_group = lambda: SimpleNamespace(world_size=2, cpu_group=torch.distributed.group.WORLD)
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


def verdicts(facts: list[dict | None]) -> dict[int, str]:
    context = multiprocessing.get_context("fork")
    answers, port = context.Queue(), free_port()
    processes = [context.Process(target=ask, args=(rank, port, facts, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(10)
    return found


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
