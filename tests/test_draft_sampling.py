"""What clients ask of sampling beside drafts on a CPU, where vLLM has stand-ins for its Triton kernels: each of them
against the formula, then an engine that drafts: it answers as one that does not, and samples what the logits say."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from checkpoint_files import read_dequantised, write
from engine import engine
from planted_text import build_prompt
from test_mtp import EOS, TOP_K, speculative
from test_planted import ids
from test_platform import engine_config
from tiny_checkpoint import write_planted
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample import rejection_sampler as vllm_sampler
from vllm.v1.spec_decode import utils as vllm_drafts

from vllm_dsa import compat, cpu_worker

WORDS = 50  # vocabulary of the batches below


# The stand-ins.


@pytest.fixture
def stand_ins():
    """As a worker registers them: vLLM's first, then ours."""
    current_platform.register_triton_kernel_overrides()
    compat.register_draft_kernels(cpu_worker.expand, cpu_worker.reject)


class Batch:
    """Drafts of some requests, of which some have none; half of the requests are greedy."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.counts = [rng.choice((0, rng.randint(1, 5))) for _ in range(6)] + [2]
        self.ends = torch.tensor(self.counts).cumsum(0).to(torch.int32)
        self.starts = self.ends - torch.tensor(self.counts, dtype=torch.int32)
        self.tokens = int(self.ends[-1])
        self.longest = max(self.counts)
        self.owners = [i for i, count in enumerate(self.counts) for _ in range(count)]
        self.drafts = torch.randint(0, WORDS, (self.tokens,), dtype=torch.int32)
        self.drafts[torch.rand(self.tokens) < 0.3] = -1  # cut by a grammar
        self.bonus = torch.randint(0, WORDS, (len(self.counts), 1))
        self.temperature = torch.tensor([rng.choice((0.0, 0.7)) for _ in self.counts])


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("dtype, replaced", [(torch.float32, (0, 1)), (torch.float32, (0, 0)), (torch.int32, (0, 0))])
def test_expand(dtype, replaced, poisoned_empty):
    """Temperatures, top_p and top_k: fractions stay fractions, and only what is to be replaced is."""
    for seed in range(20):
        batch = Batch(seed)
        values = (torch.rand(len(batch.counts)) * 100 * (batch.temperature > 0)).to(dtype)
        expanded = vllm_sampler.expand_batch_to_tokens(values, batch.ends, batch.tokens, *replaced)
        wanted = [replaced[1] if values[i] == replaced[0] else values[i].item() for i in batch.owners]
        assert expanded.tolist() == wanted and expanded.dtype == dtype


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("drafted", [False, True], ids=["guessed", "with-probabilities"])
def test_rejection(drafted):
    """Greedy and sampled requests side by side, drafts that are accepted, rejected, cut off and none at all."""
    for seed in range(60):
        batch = Batch(seed)
        target = torch.randn(batch.tokens, WORDS) * 3
        target[torch.rand(batch.tokens, WORDS) < 0.5] = -torch.inf
        target[:, 0] = 0
        if seed % 2:
            target[:, -1] = 12  # what stands before the next row
        likely = torch.rand(batch.tokens) < 0.5
        target[likely, batch.drafts.long().clamp(min=0)[likely]] = 20
        draft = torch.randn(batch.tokens, WORDS).softmax(-1) if drafted else None
        metadata = SimpleNamespace(all_greedy=False, all_random=False, temperature=batch.temperature, generators={})
        # The random numbers that vLLM will draw: first the uniform ones, then the exponential ones.
        torch.manual_seed(seed)
        uniform = torch.rand(batch.tokens, dtype=torch.float64)
        noise = torch.empty(len(batch.counts), WORDS).exponential_()
        torch.manual_seed(seed)
        got = vllm_sampler.rejection_sample(
            batch.drafts, batch.counts, batch.longest, batch.ends, draft, target, batch.bonus, metadata
        )
        assert got.tolist() == [expected(batch, i, target, draft, uniform, noise) for i in range(len(batch.counts))]


def test_what_vllm_registers_is_wrong(poisoned_empty):
    """The faults that ours are for. Where this fails, vLLM has mended them: take ours out."""
    current_platform.register_triton_kernel_overrides()
    for check in (lambda: test_expand(torch.float32, (0, 1), None), lambda: test_rejection(False)):
        with pytest.raises(AssertionError):
            check()


def expected(batch, i, target, draft, uniform, noise) -> list[int]:
    """What is left of request i: accepted drafts, then a token in place of the first rejected one, or the bonus."""
    probs, row = target.softmax(-1), []
    for at in range(int(batch.starts[i]), int(batch.ends[i])):
        token = int(batch.drafts[at])
        if batch.temperature[i] == 0:
            row.append(int(target[at].argmax()))
            accepted = row[-1] == token
        else:
            ratio = 0.0 if token < 0 else float(probs[at, token] / (1 if draft is None else draft[at, token]))
            accepted = token >= 0 and ratio >= uniform[at]
            left = probs[at].clone() if draft is None else (probs[at] - draft[at]).clamp(min=0)
            if draft is None and token >= 0:
                left[token] = 0
            row.append(token if accepted else int((left / noise[i]).argmax()))
        if not accepted:
            return row + [-1] * (batch.longest + 1 - len(row))
    return row + [int(batch.bonus[i, 0])] + [-1] * (batch.longest - len(row))


@pytest.mark.usefixtures("stand_ins")
def test_what_the_next_draft_starts_from():
    """Of each request the last token that is valid, where it stands, and how many were rejected."""
    for seed in range(40):
        batch = Batch(seed)
        requests, width = len(batch.counts), batch.longest + 1
        sampled = torch.randint(0, WORDS, (requests, width), dtype=torch.int32)
        valid = torch.tensor([random.Random(seed + i).randint(1, n + 1) for i, n in enumerate(batch.counts)])
        sampled[torch.arange(width) >= valid[:, None]] = -1
        discarded = torch.rand(requests) < 0.3
        backup = torch.randint(0, WORDS, (requests,), dtype=torch.int32)
        tokens, counts, at, rejected = (torch.empty(requests, dtype=torch.int32) for _ in range(4))
        vllm_drafts.eagle_prepare_next_token_padded_kernel[(requests,)](
            sampled, discarded, backup, tokens, counts, WORDS, width, requests, width, BLOCK_SIZE_TOKENS=8
        )
        last = sampled[torch.arange(requests), valid - 1]
        assert torch.equal(tokens, torch.where(discarded, backup, last))
        assert torch.equal(counts, torch.where(discarded, 0, valid).int())
        queries = torch.tensor([0, *(n + 1 for n in batch.counts)]).cumsum(0).to(torch.int32)
        vllm_drafts.eagle_prepare_inputs_padded_kernel[(requests,)](
            batch.ends, valid.int(), queries, at, rejected, requests
        )
        wrong = torch.tensor(batch.counts) + 1 - valid
        assert torch.equal(rejected, wrong.int())
        assert torch.equal(at, (queries[1:] - 1 - wrong).int())


# An engine that drafts.

K = 3  # drafts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The planted checkpoint with smaller logits: at a temperature of 1 its answers are not certain."""
    path = tmp_path_factory.mktemp("planted")
    write_planted(path, check=False, index_topk=TOP_K, draft="hidden")
    tensors = read_dequantised(path)
    tensors["lm_head.weight"] *= 0.2
    write(path, json.loads((path / "config.json").read_text()), tensors)
    return path


def asked(seed: int = 0) -> list[int]:
    """A question whose answer is four words, each a new retrieval, and EOS; its prompt is split into chunks."""
    return ids(build_prompt(400, seed, copies=TOP_K, hops=4, codes=6), False)


GRAMMAR = StructuredOutputsParams(regex="( ?[a-z]+){2,6}")
# What a client may send, so that the answer is still certain, or that of the model without drafts.
CLIENTS = {
    "greedy": {},
    "top_k": dict(temperature=1.0, top_k=1),
    "top_p": dict(temperature=1.0, top_p=1e-6),
    "both": dict(temperature=1.0, top_k=5, top_p=1e-6),
    "cold": dict(temperature=0.01),
    "seed": dict(temperature=0.01, seed=5, top_k=2),
    "presence": dict(presence_penalty=2.0),
    "frequency": dict(frequency_penalty=2.0),
    "repetition": dict(repetition_penalty=1.5),
    "penalties": dict(temperature=0.01, presence_penalty=-1.0, frequency_penalty=0.5, repetition_penalty=1.1),
    "logprobs": dict(logprobs=3),
    "hot logprobs": dict(temperature=0.01, logprobs=3),
    "bad words": dict(bad_words=["lion", "eagle", "whale"]),
    "allowed": dict(allowed_token_ids=list(range(300, 420))),
    "stop": dict(temperature=0.01, stop_token_ids=[EOS]),
    "min_tokens": dict(min_tokens=9, stop_token_ids=[EOS]),
    "grammar": dict(structured_outputs=GRAMMAR, stop_token_ids=[EOS]),
    "hot grammar": dict(temperature=0.01, structured_outputs=GRAMMAR, stop_token_ids=[EOS]),
    "hot": dict(temperature=1.5, max_tokens=30),
    "hot top_k": dict(temperature=1.5, top_k=7, max_tokens=30),
    "hot seed": dict(temperature=1.5, seed=3, n=2, max_tokens=30),
}
UNCERTAIN = ("hot", "hot top_k", "hot seed")  # they keep the others company


def answers(running) -> dict[str, tuple]:
    """Tokens and the log-probabilities of what each client got, all of them served at once."""
    params = [
        SamplingParams(**{"temperature": 0, "max_tokens": 14, "ignore_eos": True} | options)
        for options in CLIENTS.values()
    ]
    prompts = [{"prompt_token_ids": asked(i % 3)} for i in range(len(params))]
    outputs = [output.outputs[0] for output in running.llm.generate(prompts, params, use_tqdm=False)]
    return dict(zip(CLIENTS, outputs, strict=True))


def leading(output) -> list[list[tuple[int, float]]]:
    """(token, log-probability) of the best ones of each step."""
    return [sorted((t, round(e.logprob, 3)) for t, e in step.items()) for step in output.logprobs]


def seeded(running, seeds: tuple[int, ...], cached: bool = False) -> list[list[int]]:
    """Answers to one prompt with these seeds, all at once; ``cached``: its prefix, so that it comes in one chunk."""
    params = [SamplingParams(temperature=1.0, max_tokens=20, detokenize=False, seed=seed) for seed in seeds]
    assert cached or running.llm.reset_prefix_cache()
    prompts = [{"prompt_token_ids": asked()}] * len(params)
    return [list(o.outputs[0].token_ids) for o in running.llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def plain(folder):
    """What an engine without drafts answers."""
    with engine(folder, skip_tokenizer_init=False) as running:
        found = [seeded(running, (1,)), seeded(running, (2,)), seeded(running, (1,), True), seeded(running, (1, 2))]
        return SimpleNamespace(answers=answers(running), seeded=found)


def test_a_seed_on_a_prompt_in_chunks(plain):
    """Of a model without drafts: the same seed gives the same answer, be the prompt in chunks, in one, or shared out
    with that of another request."""
    one, two, cached, both = plain.seeded
    assert one != two
    assert cached == one and both == one + two


@pytest.fixture(scope="module")
def drafting(folder):
    with engine(folder, disable_log_stats=False, max_logprobs=-1, max_num_seqs=32, **speculative(K)) as running:
        yield running


def test_every_client_is_answered_as_without_drafts(plain, drafting):
    """The greedy and the certain ones get the very tokens; log-probabilities are those of these tokens."""
    for _ in range(2):  # the second time with cached prefixes
        found = answers(drafting)
        wrong = {n for n in CLIENTS if n not in UNCERTAIN and found[n].token_ids != plain.answers[n].token_ids}
        assert not wrong
        for name in ("logprobs", "hot logprobs"):
            assert leading(found[name]) == leading(plain.answers[name])


@pytest.mark.slow
def test_sampling_follows_the_logits(drafting):
    """At two temperatures side by side: how often the best token comes, second of all and so first of the drafted ones,
    is its probability at that temperature."""
    prompt = {"prompt_token_ids": asked()}
    greedy = SamplingParams(temperature=0, max_tokens=3, logprobs=-1, detokenize=False)
    (output,) = drafting.llm.generate([prompt], greedy, use_tqdm=False)
    first, second = output.outputs[0].token_ids[:2]
    steps = [torch.tensor([e.logprob for _, e in sorted(s.items())]) for s in output.outputs[0].logprobs[:2]]

    def probability(temperature: float) -> float:
        return float((steps[1] / temperature).softmax(-1)[second])

    temperatures = [max(t / 10 for t in range(1, 20) if probability(t / 10) > wanted) for wanted in (0.85, 0.5)]
    params = [SamplingParams(temperature=t, max_tokens=3, detokenize=False) for t in temperatures for _ in range(120)]
    outputs = drafting.llm.generate([prompt] * len(params), params, use_tqdm=False)
    for temperature in temperatures:
        answered = [
            o.outputs[0].token_ids for p, o in zip(params, outputs, strict=True) if p.temperature == temperature
        ]
        hits = [tokens[1] == second for tokens in answered if tokens[0] == first]
        wanted = probability(temperature)
        print(f"{temperature}: {sum(hits)} of {len(hits)}, wanted {wanted:.2f}")
        assert len(hits) > 40
        assert abs(sum(hits) / len(hits) - wanted) < 4 * (wanted * (1 - wanted) / len(hits)) ** 0.5


def test_a_seed_is_kept_beside_drafts(drafting):
    """Asked alone. (How many drafts fit into a step beside others decides how many random numbers it takes.)"""
    one, again, two = (seeded(drafting, seeds) for seeds in ((1,), (1,), (2,)))
    assert one == again != two


@pytest.mark.parametrize("options", [dict(min_p=0.1), dict(logit_bias={300: 5.0})], ids=["min_p", "bias"])
def test_what_vllm_refuses_beside_drafts(drafting, options):
    with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
        drafting.llm.generate({"prompt_token_ids": asked()}, SamplingParams(**options), use_tqdm=False)


def test_the_worker_on_a_cpu(folder):
    """Another one than vLLM's, which would have its faults, is refused by name."""
    for given in ("auto", "vllm.v1.worker.cpu_worker.CPUWorker"):
        config = engine_config(folder, worker_cls=given)
        assert config.parallel_config.worker_cls == "vllm_dsa.cpu_worker.DSACPUWorker"
    with pytest.raises(ValueError, match="--worker-cls mine.Worker is refused on a CPU.*Remove it"):
        engine_config(folder, worker_cls="mine.Worker")
