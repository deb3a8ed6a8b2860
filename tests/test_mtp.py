"""Speculative decoding with the MTP layer: the answers are those without it, its guesses are right where they were
planted, and what it computes is the formula over transformers' decoder layer."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import soak
import torch
from checkpoint_files import read_dequantised, write
from engine import Engine, engine
from faults import k_norm_bias_dropped, planted, rope_swapped
from oracle import Oracle
from planted_text import build_prompt
from test_glm import write_glm
from test_model import CHUNK, LIMITS, within
from test_planted import ids
from test_platform import engine_config
from tiny_checkpoint import write_planted, write_random
from vllm import SamplingParams

from vllm_dsa.testing.server import serve

TOP_K, EOS = 32, 1
FACTS = (400, 900)  # prompt lengths
# num_speculative_tokens -> what its checkpoint's draft reads, and how that is stored.
DRAFTS = {1: dict(draft="embedding", fp8=True), 3: dict(draft="hidden"), 5: dict(draft="embedding")}


def speculative(k: int, **options: Any) -> dict[str, Any]:
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": k, **options}}


def drafter(running: Engine) -> torch.nn.Module:
    return running.llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter.model


# Planted: the answers, and how many guesses are right.


class Question(NamedTuple):
    tokens: list[int]
    params: dict[str, Any]


def questions() -> list[Question]:
    """Facts that are repeated for ever; prompts whose length is around index_topk, which they pass while they are
    answered, and within one draft; and chains of facts, each word of which is fetched anew."""
    for_ever, once = dict(max_tokens=20, ignore_eos=True), dict(max_tokens=12, stop_token_ids=[EOS])
    facts = [build_prompt(n, n, copies=TOP_K) for n in FACTS]
    chains = [build_prompt(n, n, copies=TOP_K, hops=8, codes=8) for n in (500, 700)]
    short = [build_prompt(n, n, copies=n - 2, codes=1, question=" {code}") for n in range(TOP_K - 6, TOP_K + 3)]
    return [Question(ids(p, False), for_ever) for p in facts + short] + [Question(ids(p, False), once) for p in chains]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """num_speculative_tokens -> planted checkpoint; they differ in the MTP layer and in how they are stored."""
    found = {}
    for k, options in DRAFTS.items():
        found[k] = tmp_path_factory.mktemp(f"planted{k}")
        write_planted(found[k], check=False, index_topk=TOP_K, **options)
    return found


# Clients whose sampling must not reach the greedy answers beside them.
HOT = [dict(temperature=0.7), dict(temperature=1.5, top_k=5, seed=1), dict(temperature=1.0, top_p=0.9, min_tokens=4)]


def answers(running: Engine, asked: list[Question], beside: list[dict[str, Any]] | None = None) -> list[list[int]]:
    """Greedy answers; ``beside``: sampling parameters of further requests, which are served first."""
    params = [SamplingParams(max_tokens=40, ignore_eos=True, detokenize=False, **options) for options in beside or ()]
    params += [SamplingParams(temperature=0, detokenize=False, **question.params) for question in asked]
    prompts = [{"prompt_token_ids": question.tokens} for question in asked]
    prompts = prompts[: len(params) - len(asked)] + prompts
    outputs = running.llm.generate(prompts, params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs[-len(asked) :]]


@pytest.fixture(scope="module")
def plain(folders):
    """The answers of the same weights without a draft."""
    with engine(folders[3]) as running:
        return answers(running, questions())


def counted(running: Engine) -> list[int]:
    """Drafts so far, guessed tokens, accepted ones."""
    metrics = {metric.name: metric for metric in running.llm.get_metrics()}
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    return [metrics[f"vllm:spec_decode_{name}"].value for name in names]


def alone(running: Engine, question: Question) -> tuple[list[int], list[int]]:
    """The answer to one question, and what was drafted for it, as counted."""
    before = counted(running)
    (answer,) = answers(running, [question])
    return answer, [now - then for now, then in zip(counted(running), before, strict=True)]


def as_planted(answer: list[int], k: int, draft: str) -> list[int]:
    """What ``counted`` grows by for an answer that repeats for ever. A draft that reads embeddings alone is wrong after
    EOS, and only there."""
    tokens, drafts, accepted, at = 2 * answer, 0, 0, 0
    while at + 1 < len(answer):
        right = 0
        while right < k and (draft == "hidden" or tokens[at + right] != EOS):
            right += 1
        drafts, accepted, at = drafts + 1, accepted + right, at + right + 1
    return [drafts, drafts * k, accepted]


@pytest.mark.parametrize("k", [1, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_answers_are_those_without_and_acceptance_is_as_planted(folders, plain, k):
    asked = questions()
    # Too small a cache for all at once: some are preempted.
    options = dict(max_num_batched_tokens=256, max_model_len=1200, num_gpu_blocks_override=110)
    with engine(folders[k], disable_log_stats=False, **options, **speculative(k)) as running:
        assert answers(running, asked, HOT) == plain
        assert answers(running, asked, HOT) == plain, "with cached prefixes"
        draft = DRAFTS[k]["draft"]
        for question, expected in zip(asked, plain, strict=True):
            answer, drafted = alone(running, question)
            assert answer == expected
            if len(question.tokens) in FACTS:
                assert drafted == as_planted(answer, k, draft), (len(question.tokens), answer)
        # Chains: every word is a code, and the last one an animal, after which EOS is right.
        chain, right = asked[-1], plain[-1]
        assert len(right) > 4
        _, (drafts, _, accepted) = alone(running, chain)
        assert drafts == -(-(len(right) - 1) // (k + 1))
        assert accepted >= len(right) - 1 - drafts
        # With the other RoPE layout the draft finds no fact, and the answers stay as they are.
        assert running.llm.reset_prefix_cache()
        with planted(rope_swapped, [drafter(running).model.layer.self_attn]):
            answer, (_, _, swapped) = alone(running, chain)
        assert answer == right and swapped < accepted / 2


# Prompt lookup has no place in this process: vLLM 0.32 starts no further engine where it has loaded numba.
LOOKUP = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@pytest.mark.slow
@pytest.mark.serve
@pytest.mark.parametrize("drafts", [speculative(3)["speculative_config"], LOOKUP], ids=lambda drafts: drafts["method"])
def test_vllm_serve_drafts(drafts, folders):
    """In processes of their own and without --enforce-eager; 8 requests at once."""
    # Prompt lookup finds what repeats itself: an answer that is given again and again.
    hops, tokens = (1, 30) if drafts is LOOKUP else (8, 0)
    prompts = [build_prompt(n, n, copies=TOP_K, hops=hops, codes=8) for n in range(500, 900, 50)]
    hot = ((), (("temperature", 0.5), ("top_k", 1)), (("temperature", 0.5), ("top_p", 0.5), ("seed", 3)))
    asked = [soak.Ask(p.text, p.answer, tokens, options=hot[i % 3]) for i, p in enumerate(prompts)]
    args = ("--served-model-name", soak.MODEL, "--dtype", "float32", "--max-model-len", "1200")
    with serve(folders[3], *args, "--speculative-config", json.dumps(drafts), env=soak.SERVE_ENV) as server:
        with ThreadPoolExecutor(len(asked)) as clients:
            replies = list(clients.map(lambda ask: soak.send(server.port, ask), asked))
        assert all(soak.is_right(ask, reply.text) for ask, reply in zip(asked, replies, strict=True))
        drafted, accepted = (
            soak.metric(server, f"spec_decode_num_{name}_tokens_total") for name in ("draft", "accepted")
        )
        assert drafted >= accepted > 0
        assert accepted == drafted or drafts is LOOKUP


# The MTP layer itself, against the formula over transformers' decoder layer.

KEEP = ("enorm", "hnorm", "eh_proj", "shared_head.norm")


class DraftOracle:
    """The MTP layer of a checkpoint with transformers' decoder layer in it."""

    def __init__(self, folder, scratch) -> None:
        config = json.loads((folder / "config.json").read_text())
        layers = config["num_hidden_layers"]
        # transformers leaves an MTP layer out: of a model with one layer more, its decoder layer is the last.
        config |= {"num_hidden_layers": layers + 1, "num_nextn_predict_layers": 0}
        if "indexer_types" in config:
            config["indexer_types"] = [*config["indexer_types"], "full"]
        for file in folder.iterdir():
            (scratch / file.name).symlink_to(file)
        (scratch / "config.json").unlink()
        (scratch / "config.json").write_text(json.dumps(config))
        self.target, self.oracle = Oracle(folder).model.model, Oracle(scratch)
        self.model = self.oracle.model.model
        stored = read_dequantised(folder)
        self.weights = {name: stored[f"model.layers.{layers}.{name}.weight"] for name in KEEP}
        self.model.layers = self.model.layers[-1:]
        self.model.norm.weight.data = self.weights["shared_head.norm"]
        self.eps = config["rms_norm_eps"]
        self.indexer = self.model.layers[0].self_attn.indexer

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weights[name]

    @torch.inference_mode()
    def drafted(
        self, tokens: torch.Tensor, hidden: torch.Tensor, steps: int, shares_index: bool
    ) -> tuple[torch.Tensor, list[int]]:
        """Hidden states [L + steps - 1, hidden] and the ``steps`` tokens that are drafted from ``tokens`` [L], each the
        next one of its position, and the target's hidden states [L, hidden]."""
        length, drafts, select = len(tokens), [], self.indexer.forward

        def shared(*args, **kwargs):
            chosen = select(*args, **kwargs).clone()
            chosen[:, length:] = chosen[:, length - 1 : length]
            return chosen

        try:
            self.indexer.forward = shared if shares_index else select
            for _ in range(steps):
                embedded = self.model.embed_tokens(tokens.long())
                fused = torch.cat([self.norm(embedded, "enorm"), self.norm(hidden, "hnorm")], -1)
                fused = fused @ self.weights["eh_proj"].T
                out = self.model(inputs_embeds=fused.unsqueeze(0), use_cache=False).last_hidden_state[0]
                drafts.append(int(self.oracle.model.lm_head(out[-1]).argmax()))
                tokens = torch.cat([tokens, torch.tensor(drafts[-1:])])
                hidden = torch.cat([hidden, out[-1:]])
        finally:
            self.indexer.forward = select
        return out, drafts

    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.oracle.model.lm_head(hidden).log_softmax(-1)


class Call(NamedTuple):
    tokens: torch.Tensor
    positions: torch.Tensor
    hidden: torch.Tensor
    out: torch.Tensor


@contextmanager
def recorded(running: Engine) -> Iterator[list[Call]]:
    """Every call of the draft model in the block."""
    calls: list[Call] = []

    def keep(module, args, given, out):
        kept = (given["input_ids"], given["positions"], given["hidden_states"], out[0])
        calls.append(Call(*(tensor.clone() for tensor in kept)))

    handle = drafter(running).register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def problems(running: Engine, folder, oracle: DraftOracle, k: int, shares_index: bool = False) -> list[str]:
    """What is wrong with the drafts after one prompt, whose last chunk passes index_topk several times over."""
    config = json.loads((folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(8, config["vocab_size"], (5 * config["index_topk"] + 7,), generator=generator).tolist()
    assert running.llm.reset_prefix_cache()
    with recorded(running) as calls:
        (sampled,) = running.generate([prompt], max_tokens=1)
    chunks = -(-len(prompt) // CHUNK)
    assert len(calls) == chunks * k
    first, later = [calls[i] for i in range(0, len(calls), k)], calls[-k:][1:]
    handed = Call(*(torch.cat(parts) for parts in zip(*first, strict=True)))
    found = []
    # What vLLM hands over: of each position the next token, and the target's hidden state.
    wrong = [
        i for i, pair in enumerate(zip(handed.tokens.tolist(), prompt[1:] + sampled, strict=True)) if len({*pair}) > 1
    ]
    # At the end of a chunk vLLM 0.32 hands over the prompt's last token, which costs a little acceptance.
    if set(wrong) - set(range(CHUNK - 1, len(prompt) - 1, CHUNK)):
        found.append("tokens")
    if torch.cat([handed.positions, *(call.positions for call in later)]).tolist() != list(range(len(prompt) + k - 1)):
        found.append("positions")
    with torch.inference_mode():
        target = oracle.target(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
    if (handed.hidden - target).abs().median() > LIMITS["auto"][0]:
        found.append("hidden states of the target")
    # What the layer makes of it.
    out, drafts = oracle.drafted(handed.tokens, handed.hidden, k, shares_index)
    expected = oracle.logprobs(out)
    for name, rows, given in (
        ("first guesses", slice(0, len(prompt)), handed.out),
        ("later guesses", slice(len(prompt), None), torch.cat([call.out for call in later])),
    ):
        difference = (oracle.logprobs(given) - expected[rows]).abs()
        print(f"{name}: p50 {difference.median():.1e} p90 {difference.quantile(0.9):.1e}")
        if not within(difference, LIMITS["auto"]):
            found.append(name)
    if [int(call.tokens) for call in later] != drafts[:-1]:
        found.append("drafted tokens")
    return found


def all_best(running: Engine, prompts: list[list[int]], max_tokens: int) -> bool:
    """Is every token that is generated the best one by a prefill of all of them, where nothing is drafted?"""
    generated = running.generate(prompts, max_tokens=max_tokens, ignore_eos=True)
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    whole = [{"prompt_token_ids": p + g} for p, g in zip(prompts, generated, strict=True)]
    ranks = [
        [step[token].rank for step, token in zip(o.prompt_logprobs[-max_tokens:], g, strict=True)]
        for o, g in zip(running.llm.generate(whole, params, use_tqdm=False), generated, strict=True)
    ]
    return ranks == [[1] * max_tokens] * len(prompts)


@contextmanager
def changed(weight: torch.Tensor, to: torch.Tensor) -> Iterator[None]:
    before = weight.clone()
    weight.copy_(to)
    try:
        yield
    finally:
        weight.copy_(before)


@contextmanager
def handed_on(model: torch.nn.Module, name: str, change) -> Iterator[None]:
    """The model's input of this name changed."""
    handle = model.register_forward_pre_hook(
        lambda module, args, given: (args, given | {name: change(given[name])}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def halves_swapped(linear: torch.nn.Module) -> Iterator[None]:
    """Its input's. (Its weight is not to be had: vLLM packs it on a CPU.)"""
    handle = linear.register_forward_pre_hook(lambda module, args: torch.cat(args[0].chunk(2, dim=-1)[::-1], dim=-1))
    try:
        yield
    finally:
        handle.remove()


def faults(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, context in which the running draft has that fault)."""
    layer = model.model.layer
    enorm, hnorm = layer.enorm.weight.data, layer.hnorm.weight.data
    yield "hidden states before embeddings", halves_swapped(layer.eh_proj)
    yield "enorm in place of hnorm", changed(hnorm, enorm.clone())
    yield "hnorm in place of enorm", changed(enorm, hnorm.clone())
    yield "no norm before the head", changed(layer.shared_head.norm.weight.data, torch.ones_like(enorm))
    yield "hidden states of the position before", handed_on(model, "hidden_states", lambda x: x.roll(1, 0))
    yield "later positions off by one", handed_on(model, "positions", lambda x: x + (len(x) == 1))
    yield "RoPE layout", planted(rope_swapped, [layer.self_attn])
    yield "k_norm without bias", planted(k_norm_bias_dropped, [layer.self_attn])


def random_prompts(top_k: int) -> list[list[int]]:
    """Prompts that pass index_topk within their first drafts, and one that is far past it."""
    generator = torch.Generator().manual_seed(6)
    lengths = (*range(top_k - 3, top_k + 2), 3 * top_k)
    return [torch.randint(8, 400, (n,), generator=generator).tolist() for n in lengths]


def test_layer_equals_the_formula(tmp_path):
    folder, scratch = tmp_path / "model", tmp_path / "oracle"
    scratch.mkdir()
    write_random(folder, num_attention_heads=2, index_n_heads=16, index_topk=32, seed=3)
    oracle, k = DraftOracle(folder, scratch), 3
    with engine(folder, **speculative(k)) as running:
        assert problems(running, folder, oracle, k) == []
        assert all_best(running, random_prompts(32), 12)
        for name, fault in faults(drafter(running)):
            with fault:
                assert problems(running, folder, oracle, k), f"{name} was not noticed"
        assert problems(running, folder, oracle, k) == []


def test_glm_layer_which_shares_its_selection(tmp_path):
    """GLM's indexer layout from the target's config; an index of its own though the last decoder layer shares one; and
    index_share_for_mtp_iteration: the later steps take the first one's selection."""
    folder, scratch = tmp_path / "model", tmp_path / "oracle"
    scratch.mkdir()
    write_glm(folder, indexer_types=["full"] * 6 + ["shared"])
    oracle, k = DraftOracle(folder, scratch), 3
    with engine(folder, **speculative(k, index_share_for_mtp_iteration=True)) as running:
        attention = drafter(running).model.layer.self_attn
        assert attention.rope.index_interleaved and attention.indexer is not None
        assert problems(running, folder, oracle, k, shares_index=True) == []
        assert problems(running, folder, oracle, k, shares_index=False) == ["later guesses"]
        assert all_best(running, random_prompts(32), 12)
        with planted(rope_swapped, [attention]):
            assert "first guesses" in problems(running, folder, oracle, k, shares_index=True)


# Refusals.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("random")
    write_random(path, num_hidden_layers=1)
    return path


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kv_cache_dtype="bfloat16"), "kv_cache_dtype 'bfloat16' is refused.*Remove the key"),
        (dict(method="ngram_gpu"), "method 'ngram_gpu' is refused: only mtp.*Pass"),
    ],
)
def test_speculation_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        engine_config(folder, **speculative(2, **options))


def test_pipeline_stages_are_refused(folder):
    with pytest.raises(ValueError, match="refused with --pipeline-parallel-size 2.*Remove one"):
        engine_config(folder, pipeline_parallel_size=2, **speculative(2))


def test_another_model_as_draft_is_refused(folder, tmp_path):
    write_random(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match=f"model '{tmp_path}' is refused.*Remove the key model"):
        engine_config(folder, **speculative(2, model=str(tmp_path)))


def test_two_mtp_layers_are_refused(tmp_path):
    write_random(tmp_path, num_hidden_layers=1, num_nextn_predict_layers=2)
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 2, and only one.*Remove"):
        engine_config(tmp_path, **speculative(2))


@pytest.mark.parametrize("lost", ["layers.1.", "layers.1.eh_proj"])
def test_a_checkpoint_without_the_layer_is_refused_where_it_is_to_draft(tmp_path, lost):
    config = write_random(tmp_path, num_hidden_layers=1)
    write(tmp_path, config, {name: t for name, t in read_dequantised(tmp_path).items() if lost not in name})
    engine_config(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ of \d+ tensors of its MTP layer: model.layers.1.*Serve"):
        engine_config(tmp_path, **speculative(1))


def test_copies_of_embedding_and_head_may_be_left_out(tmp_path):
    config = write_random(tmp_path, num_hidden_layers=1)
    copies = ("layers.1.embed_tokens", "layers.1.shared_head.head")
    write(tmp_path, config, {n: t for n, t in read_dequantised(tmp_path).items() if not any(c in n for c in copies)})
    engine_config(tmp_path, **speculative(1))
