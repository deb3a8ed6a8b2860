"""The planted checkpoint in vLLM: the right answer at every block size, chunk and length; and one answer whatever the
company. Its greedy margin is above 3 nats, far over batch noise, so tokens must be equal and not merely close."""

import pytest
from engine import engine
from faults import dense, planted, rope_swapped, sliding_window
from planted_text import build_prompt, build_tokenizer, chat_text
from tiny_checkpoint import write_planted

LENGTHS = (300, 700, 1500, 3000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    write_planted(path, check=False)  # test_tiny_checkpoint.py checks it against transformers
    return path


def ids(prompt, chat: bool) -> list[int]:
    text = chat_text(prompt.text) if chat else prompt.text
    return build_tokenizer().encode(text, add_special_tokens=not chat).ids


def questions(lengths=LENGTHS, seed: int = 0) -> list[tuple[list[int], str]]:
    """(token ids, right answer) of a chat prompt and of a completion prompt of three hops at each length."""
    asked = []
    for i, length in enumerate(lengths):
        for chat, hops in ((True, 1), (False, 3)):
            prompt = build_prompt(length, seed + i, chat=chat, hops=hops)
            asked.append((ids(prompt, chat), prompt.answer))
    return asked


def words(tokens: list[int]) -> str:
    tokenizer = build_tokenizer()
    return " ".join(tokenizer.decode([t]).strip() for t in tokens if t != 1)


def answers(running, asked, **params) -> list[list[int]]:
    return running.generate([tokens for tokens, _ in asked], max_tokens=6, stop_token_ids=[1], **params)


@pytest.mark.parametrize(
    "block_size, chunk, kv_cache_dtype",
    [
        (16, 64, "auto"),
        pytest.param(64, 256, "auto", marks=pytest.mark.slow),
        (128, 64, "fp8_ds_mla"),
        pytest.param(16, 256, "fp8_ds_mla", marks=pytest.mark.slow),
    ],
)
def test_right_and_the_same_in_any_company(folder, block_size, chunk, kv_cache_dtype):
    asked = questions()
    options = dict(block_size=block_size, max_num_batched_tokens=chunk, kv_cache_dtype=kv_cache_dtype)
    with engine(folder, **options) as running:
        batched = answers(running, asked)
        assert [words(tokens) for tokens in batched] == [answer for _, answer in asked]
        assert max(n for step in running.steps for n in step.values()) <= chunk, "not chunked"
        assert any(len(step) > 1 for step in running.steps), "not batched"
        # Once more: the prefix cache now holds every full block of every prompt.
        running.steps.clear()
        again = answers(running, asked)
        assert again == batched
        assert sum(sum(step.values()) for step in running.steps) < sum(len(t) for t, _ in asked) / 2, "not cached"
        # Alone, nothing cached.
        for question, expected in zip(asked, batched, strict=True):
            assert running.llm.reset_prefix_cache()
            assert answers(running, [question]) == [expected]


def test_whole_prompt_in_one_step(folder):
    asked = questions()
    with engine(folder, max_num_batched_tokens=4096) as running:
        assert [words(tokens) for tokens in answers(running, asked)] == [answer for _, answer in asked]
        assert max(n for step in running.steps for n in step.values()) == 3000


def test_placement_and_shared_prefix(folder):
    """The asked fact first, last or scattered; two questions about one text share its cached blocks."""
    with engine(folder, block_size=32, max_num_batched_tokens=512) as running:
        for placement in ("first", "last"):
            prompt = build_prompt(1200, 5, chat=True, placement=placement)
            assert words(answers(running, [(ids(prompt, True), "")])[0]) == prompt.answer
        for code in ("red", "pink", "gold"):
            prompt = build_prompt(1200, 6, chat=True, asked=code)
            assert words(answers(running, [(ids(prompt, True), "")])[0]) == prompt.answer


@pytest.mark.slow  # make test has them, and more, in test_faults.py
@pytest.mark.parametrize("fault", [rope_swapped, dense, sliding_window])
def test_a_planted_fault_answers_wrongly(folder, fault):
    asked = questions((700, 1500))
    with engine(folder, max_num_batched_tokens=512, enable_prefix_caching=False) as running:
        with planted(fault, running.layers):
            wrong = [words(tokens) for tokens in answers(running, asked)]
        assert not any(given == right for given, (_, right) in zip(wrong, asked, strict=True)), wrong
        assert [words(tokens) for tokens in answers(running, asked)] == [answer for _, answer in asked]


def test_preempted_request_is_right(folder):
    """Cache for about two requests, six at once: some are preempted and recomputed, all are right."""
    asked = questions((700, 900, 1100), seed=20)
    with engine(folder, num_gpu_blocks_override=160, max_model_len=1200, max_num_batched_tokens=256) as running:
        given = running.generate([t for t, _ in asked], max_tokens=160, ignore_eos=True)
        stopped = [words(tokens[: tokens.index(1)]) for tokens in given]
        assert stopped == [answer for _, answer in asked]
        computed = sum(sum(step.values()) for step in running.steps)
        assert computed > sum(len(t) for t, _ in asked) + 6 * 160, "nothing was recomputed"
