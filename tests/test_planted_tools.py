"""The planted checkpoint with tools, in transformers: what it answers, what it calls, and that DSA decides."""

import json

import planted_tools
import pytest
import tiny_checkpoint as tiny
from planted_text import ASSISTANT, CODES, DSML, END_THINK, EOS, THINK, USER, build_prompt, build_tokenizer, chat_text
from test_tiny_checkpoint import alter

THOUGHT = "".join(planted_tools.THOUGHT) + END_THINK
TAILS = {False: ASSISTANT + END_THINK, True: ASSISTANT + THINK}  # by thinking
thinking_or_not = pytest.mark.parametrize("thinking", [False, True])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    tiny.write_planted(path, check=False)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return planted_tools.add_tools(folder)


@pytest.fixture(scope="module")
def model(folder, tokenizer):
    return tiny.load_model(folder)


@pytest.fixture
def ask(model, tokenizer, monkeypatch):
    """(answer, margin) to the text of a prompt without BOS."""
    monkeypatch.setattr(tiny, "build_tokenizer", lambda: tokenizer)
    return lambda text: tiny.ask(model, text, max_tokens=24)


def facts(seed: int, codes: int = 4) -> tuple[str, dict[str, str]]:
    text = build_prompt(300, seed, codes=codes, question="").text
    return text, dict(word.split("=") for word in text.split() if "=" in word)


def expected(code: str, planted: dict[str, str], thinking: bool) -> str:
    answer = planted[code] if code in planted else planted_tools.call_text(code)
    return THOUGHT + answer if thinking else answer.strip()


@thinking_or_not
def test_planted_codes_are_answered_and_others_looked_up(ask, thinking):
    text, planted = facts(1)
    for code in CODES:
        answer, margin = ask(f"{USER}{text} What is {code}?{TAILS[thinking]}")
        assert answer == expected(code, planted, thinking)
        assert margin > 8


@thinking_or_not
def test_second_turn(ask, thinking):
    """The code asked for just before is not looked up, though the argument comes many tokens after the question."""
    text, planted = facts(2)
    first, value = next(iter(planted.items()))
    turn = f"{USER}{text} What is {first}?{TAILS[False]}{value}{EOS}"
    for code in CODES:
        answer, margin = ask(f"{turn}{USER}What is {code}?{TAILS[thinking]}")
        assert answer == expected(code, planted, thinking)
        assert margin > 8


def test_tool_result_is_answered_from(ask):
    text, planted = facts(3)
    code = next(code for code in CODES if code not in planted)
    for animal in ("otter", "horse"):
        result = f"<function_results><result>{' '.join([f'{code}={animal}'] * 16)}</result></function_results>"
        turns = f"{USER}{text} What is {code}?{TAILS[False]}{planted_tools.call_text(code)}{EOS}{result}"
        answer, margin = ask(turns + END_THINK)
        assert (answer, margin > 8) == (animal, True)


@pytest.mark.parametrize("fault", ["RoPE swapped", "dense", "sliding window", "k_norm bias dropped", "relu dropped"])
def test_it_calls_where_it_should_answer_when_dsa_is_wrong(ask, model, monkeypatch, fault):
    text, planted = facts(4, codes=8)
    code = next(iter(planted))
    alter(monkeypatch, model, fault)
    assert ask(f"{USER}{text} What is {code}?{TAILS[False]}")[0] == planted_tools.call_text(code).strip()


def test_hops_and_completions_are_as_before(ask):
    for chat in (False, True):
        prompt = build_prompt(700, 5, hops=3, chat=chat)
        answer, margin = ask(f"{USER}{prompt.text}{TAILS[False]}" if chat else prompt.text)
        assert (answer, margin > 10) == (prompt.answer, True)


def test_bfloat16_and_other_sizes(tmp_path, monkeypatch):
    sizes = {"index_topk": 64, "num_attention_heads": 6, "hidden_size": 96, "kv_lora_rank": 128}
    for dtype, options in (("bfloat16", {}), ("float32", sizes)):
        tiny.write_planted(tmp_path / dtype, dtype=dtype, check=False, **options)
        tokenizer = planted_tools.add_tools(tmp_path / dtype)
        model, copies = tiny.load_model(tmp_path / dtype, dtype), options.get("index_topk", 16)
        monkeypatch.setattr(tiny, "build_tokenizer", lambda tokenizer=tokenizer: tokenizer)
        prompt = build_prompt(400, 6, copies=copies, codes=4, asked=None)
        answer, margin = tiny.ask(model, f"{USER}{prompt.text}{TAILS[True]}", max_tokens=24)
        assert (answer, margin > 8) == (THOUGHT + prompt.answer, True)
        planted = {word.split("=")[0] for word in prompt.text.split() if "=" in word}
        code = next(code for code in CODES if code not in planted)
        text = prompt.text[: prompt.text.rindex("What")]
        answer, margin = tiny.ask(model, f"{USER}{text}What is {code}?{TAILS[True]}", max_tokens=24)
        assert (answer, margin > 5) == (THOUGHT + planted_tools.call_text(code), True)


def test_call_is_the_markup_of_the_chat_encoding():
    encoding = pytest.importorskip("vllm.tokenizers.deepseek_v32_encoding")
    function = {"name": "look_up", "arguments": json.dumps({"code": "red", "limit": 16})}
    message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    rendered = encoding.render_message(0, [message], thinking_mode="chat")
    assert rendered == planted_tools.call_text("red") + EOS


def test_prompts_keep_their_tokens(tokenizer):
    """But for the words of the thought, no new token is found in a text; all come back as text."""
    base = build_tokenizer()
    texts = [planted_tools.call_text(code) for code in CODES]
    texts.append(chat_text(build_prompt(300, 7).text))
    for text in texts:
        assert tokenizer.encode(text).ids == base.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, False) == text
    added = range(base.get_vocab_size(), tokenizer.get_vocab_size())
    pieces = {piece for piece in planted_tools.CALL if piece not in ("<", DSML, EOS)}
    words = {planted_tools.ARGUMENT.format(code=code) for code in CODES} | {*planted_tools.THOUGHT}
    assert {tokenizer.decode([token]) for token in added} == pieces - {planted_tools.ARGUMENT} | words


def test_pieces_have_one_successor_each():
    pieces = [piece for chain in planted_tools.CHAINS for piece in chain[:-1]]
    assert len(pieces) == len(set(pieces)) == planted_tools.LINKS


def test_vocabulary_without_spare_rows_is_refused(tmp_path):
    rows = build_tokenizer().get_vocab_size() + 3
    tiny.write_planted(tmp_path, check=False, vocab_size=rows)
    with pytest.raises(ValueError, match=rf"vocab_size: {rows}; allowed with tools: at least \d+"):
        planted_tools.add_tools(tmp_path)
