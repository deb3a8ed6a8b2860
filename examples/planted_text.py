"""What the planted checkpoint (tiny_checkpoint.py) reads: words, a tokenizer, and questions with their answers."""

import functools
import random
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK, DSML = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK, DSML)  # ids 0 to 7

CODES = ("red", "blue", "green", "gold", "white", "black", "pink", "grey")
ANIMALS = ("lion", "tiger", "wolf", "bear", "eagle", "otter", "whale", "horse")
UNKNOWN = "unknown"
VALUES = (*ANIMALS, *CODES, UNKNOWN)
FACTS = tuple(f"{code}={value}" for code in CODES for value in VALUES[:-1])
_TEXT = """the a and of to in on at by for with from into over under near past old new long short wide deep
    high warm cold slow quick quiet small great river hill road field stone tree house door window garden rain
    water wind snow night morning summer winter bread salt song story ship market village went came saw"""
FILLERS = tuple(_TEXT.split())


@functools.cache
def build_tokenizer() -> Tokenizer:
    """Byte-level BPE: known words are one token, with or without a space before; all else is bytes.

    It has no merges: `ignore_merges` takes a known word whole. Plain prompts get BOS, as published.
    """
    words = [*FACTS, *VALUES, *FILLERS, "What", "is"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL_TOKENS, *alphabet, *("Ġ" + w for w in words), *(w for w in words if len(w) > 1)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+=[A-Za-z]+| ?[A-Za-z]+|[^A-Za-z]"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    # As published, only the first three are "special": parsers must see the others in decoded text.
    for i, token in enumerate(SPECIAL_TOKENS):
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=i < 3)])
    return tokenizer


def word_ids(word: str) -> tuple[int, int]:
    """Token ids of a known word: with a space before it, and without."""
    return build_tokenizer().token_to_id("Ġ" + word), build_tokenizer().token_to_id(word)


def chat_text(message: str) -> str:
    """The deepseek_v32 chat encoding (without thinking) of one user message; BOS is in it."""
    return f"{BOS}{USER}{message}{ASSISTANT}{END_THINK}"


class Prompt(NamedTuple):
    """A text (completion prompt or chat message), and the words of its right answer joined by spaces."""

    text: str
    answer: str


def build_prompt(
    total_tokens: int,
    seed: int,
    *,
    chat: bool = False,
    asked: str | None = None,
    hops: int = 1,
    copies: int = 16,
    codes: int = len(CODES),
    placement: str | float = "scattered",
    question: str = " What is {code}?",
) -> Prompt:
    """Filler words, `codes` facts planted `copies` (the checkpoint's index_topk) times each, the question.

    total_tokens: the whole prompt, BOS included; with `chat`, all of `chat_text(text)`.
    asked: code in the question, None = any. The text before it stays the same (if scattered).
    hops: longest chain of facts. With 3, `red=blue`, `blue=pink`, `pink=lion`: up to 3 words of answer.
    placement: of the asked fact: "scattered", or packed at the "first" or "last" (windows see it) positions, or in
        between: a depth from 0.0 (first) to 1.0 (last).
    """
    rng = random.Random(seed)
    planted, animals = rng.sample(CODES, len(CODES))[:codes], rng.sample(ANIMALS, len(ANIMALS))
    asked = planted[0] if asked is None else asked
    if not 1 <= hops <= codes <= len(CODES):
        raise ValueError(f"hops: {hops}, codes: {codes}; allowed: 1 <= hops <= codes <= {len(CODES)}")
    if asked not in planted:
        raise ValueError(f"asked: {asked!r}; allowed: a planted code ({', '.join(planted)})")
    depth = {"first": 0.0, "last": 1.0}.get(placement, placement)
    if depth != "scattered" and not (isinstance(depth, float) and 0 <= depth <= 1):
        raise ValueError(f"placement: {placement!r}; allowed: scattered, first, last, 0.0 to 1.0")
    # The last code of each chain of `hops` codes has an animal, every other one the next code.
    chain_ends = {i for i in range(codes) if (i + 1) % hops == 0 or i == codes - 1}
    facts = {code: animals[i] if i in chain_ends else planted[i + 1] for i, code in enumerate(planted)}
    answer = [facts[asked]]
    while answer[-1] in facts:
        answer.append(facts[answer[-1]])
    question = question.format(code=asked)
    around = len(build_tokenizer().encode(question, add_special_tokens=False)) + (4 if chat else 1)
    length = total_tokens - around
    if length < codes * copies:
        needed = f"{codes * copies + around} ({codes} facts x {copies} copies + {around})"
        raise ValueError(f"total_tokens: {total_tokens}; allowed: at least {needed}")
    words = rng.choices(FILLERS, k=length)
    copied = [code for code in planted for _ in range(copies)]
    places = rng.sample(range(length), len(copied))
    if depth != "scattered":
        first = round(depth * (length - copies))
        packed = range(first, first + copies)
        copied.sort(key=lambda code: code != asked)
        places = [*packed, *rng.sample(sorted({*range(length)} - {*packed}), len(copied) - copies)]
    for place, code in zip(places, copied, strict=True):
        words[place] = f"{code}={facts[code]}"
    return Prompt(" ".join(words) + question, " ".join(answer))
