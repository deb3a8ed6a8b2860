"""Needles in long prompts: a sweep of length x depth on any OpenAI endpoint. A table, a heat map (PNG), JSON.

    python examples/needle.py --endpoint http://127.0.0.1:8000 --png needle.png     any model
    python examples/needle.py --endpoint URL --planted 16 --lengths 500,2000,8000   tiny_checkpoint.py's planted one

Each prompt is filler of a given length, with what is asked for at a given depth (0: where it begins, 1: where it ends).
--keys 1,4 sweeps twice: with that one needle, and with three more like it anywhere in the prompt, whose answers are
wrong. --planted COPIES makes prompts in the planted model's words, with each fact COPIES (its index_topk) times. Exit
status 0: every answer is right, 1: not all are, 2: none came, or an option is bad.

What sparsity costs a model shows in two sweeps of the same weights: as they are, and served densely
(VLLM_DSA_DENSE=1) or with another selection (--hf-overrides '{"index_topk": 512}').
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from vllm_dsa.tools.canary import (
    ANSWER_TOKENS,
    KEYS,
    SHORT_ANSWER_TOKENS,
    STATUS,
    TIMEOUT_S,
    UNANSWERED,
    Client,
    RequestFailed,
    filler,
    judged,
    served,
    words_a_token,
)
from vllm_dsa.tools.output import UserError, numbers
from vllm_dsa.tools.progress import progress

PLACES = ("archive", "bakery", "castle", "depot", "embassy", "foundry", "garage", "hospital")


class Question(NamedTuple):
    """One prompt and its right answer; ``others`` are the answers of the keys that were not asked for."""

    keys: int
    length: int
    depth: float
    prompt: str
    answer: str
    others: tuple[str, ...] = ()
    exact: bool = False

    def is_right(self, text: str) -> bool:
        if self.exact:
            return text == self.answer
        return self.answer in text and not any(other in text for other in self.others)


def written(keys: int, length: int, depth: float, seed: int, words: float) -> Question:
    """About ``length`` tokens of English, ``words`` a token, with a passcode of so many places."""
    rng = random.Random(seed)
    places, codes = rng.sample(PLACES, keys), rng.sample(range(1_000_000, 10_000_000), keys)
    sentences = filler(int(length * words) - 20 - 10 * keys, seed)
    needles = [f"The passcode of the {place} is {code}." for place, code in zip(places, codes, strict=True)]
    for needle in needles[1:]:
        sentences.insert(rng.randint(0, len(sentences)), needle)
    sentences.insert(round(depth * len(sentences)), needles[0])
    question = f"What is the passcode of the {places[0]}? Answer with the passcode alone."
    answer, *others = map(str, codes)
    return Question(keys, length, depth, f"{' '.join(sentences)}\n\n{question}", answer, tuple(others))


def planted(keys: int, length: int, depth: float, seed: int, copies: int) -> Question:
    """``length`` tokens in the planted model's words, with so many facts."""
    from planted_text import build_prompt

    try:
        prompt = build_prompt(length, seed, copies=copies, codes=keys, placement=depth)
    except ValueError as error:
        raise UserError(f"--lengths with {length}, --planted {copies} and --keys with {keys}: {error}.") from error
    return Question(keys, length, depth, prompt.text, prompt.answer, exact=True)


def sweep(client: Client, model: str, questions: Sequence[Question], max_tokens: int, clients: int) -> list[dict]:
    """Ask everything, so many at a time; one result a question, in their order."""

    def ask(question: Question) -> dict[str, Any]:
        result = {"keys": question.keys, "length": question.length, "depth": question.depth}
        result |= {"expected": question.answer}
        try:
            text, tokens = client.ask(model, question.prompt, max_tokens)
        except RequestFailed as error:
            return result | {"right": False, "error": str(error)}
        return result | {"right": question.is_right(text), "answer": text, "prompt_tokens": tokens}

    results = []
    with ThreadPoolExecutor(clients) as pool, progress("asking", len(questions)) as advance:
        answers = pool.map(ask, questions)
        for question in questions:
            advance(f"{question.length:,} tokens, depth {question.depth:g}")
            results.append(next(answers))
    return results


def by_cell(results: Sequence[dict]) -> list[dict]:
    """Results of the same keys, length and depth as one: how many were asked, how many are right."""
    found: dict[tuple, dict] = {}
    for result in results:
        place = {name: result[name] for name in ("keys", "length", "depth")}
        cell = found.setdefault(tuple(place.values()), {**place, "asked": 0, "right": 0})
        cell["asked"] += 1
        cell["right"] += result["right"]
    return list(found.values())


def grids(found: Sequence[dict]) -> dict[int, tuple[list[int], list[float], list[list[float]]]]:
    """Keys -> lengths, depths and the share that is right, a row a depth."""
    made = {}
    for keys in sorted({cell["keys"] for cell in found}):
        cells = [cell for cell in found if cell["keys"] == keys]
        mine = {(cell["length"], cell["depth"]): cell["right"] / cell["asked"] for cell in cells}
        lengths, depths = sorted({length for length, _ in mine}), sorted({depth for _, depth in mine})
        made[keys] = lengths, depths, [[mine[length, depth] for length in lengths] for depth in depths]
    return made


def table(found: Sequence[dict]) -> str:
    """A line a depth, a column a length, percent."""
    lines = []
    for keys, (lengths, depths, shares) in grids(found).items():
        mine = [cell for cell in found if cell["keys"] == keys]
        right, asked = (sum(cell[name] for cell in mine) for name in ("right", "asked"))
        lines.append(f"{_keys(keys)}: {right} of {asked} right")
        lines.append(f"{'depth':>7} " + "".join(f"{length:>9,}" for length in lengths) + "  tokens")
        for depth, row in zip(depths, shares, strict=True):
            lines.append(f"{depth:>7g} " + "".join(f"{share:>9.0%}" for share in row))
    return "\n".join(lines)


def draw(found: Sequence[dict], title: str, path: Path) -> None:
    """A heat map, a panel for each number of keys; the file's ending sets its format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = grids(found)
    size = (1 + 5 * len(panels), 4.5)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (keys, (lengths, depths, shares)) in zip(axes[0], panels.items(), strict=True):
        image = axis.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for row, column in ((i, j) for i in range(len(depths)) for j in range(len(lengths))):
            share = shares[row][column]
            color = "white" if abs(share - 0.5) > 0.35 else "black"
            axis.text(column, row, f"{share:.0%}", ha="center", va="center", color=color)
        axis.set(title=_keys(keys), xlabel="tokens of prompt", ylabel="depth of the needle")
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    figure.colorbar(image, ax=axes[0].tolist(), label="share of right answers")
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--png {path}: {error}. Name a .png file in a folder that exists.") from error


def _keys(keys: int) -> str:
    return "1 key" if keys == 1 else f"{keys} keys"


def run(args: argparse.Namespace) -> int:
    lengths = numbers("--lengths", args.lengths, int, 100, 10_000_000)
    depths, keys = numbers("--depths", args.depths, float, 0, 1), numbers("--keys", args.keys, int, 1, len(PLACES))
    for option, least in (("repeats", 1), ("clients", 1), ("planted", 1), ("timeout", 0.001)):
        if getattr(args, option) is not None and getattr(args, option) < least:
            raise UserError(f"--{option} {getattr(args, option)}: give a number of at least {least:g}.")
    if args.png and not find_spec("matplotlib"):
        raise UserError(f"--png {args.png}: matplotlib is not installed. pip install matplotlib, or leave --png out.")
    client = Client(args.endpoint, args.timeout, args.completions or args.planted is not None)
    model, limit = served(client, args.model)
    max_tokens = SHORT_ANSWER_TOKENS if client.completions else ANSWER_TOKENS
    if limit is not None and lengths[-1] + max_tokens > limit:
        raise UserError(
            f"--lengths {args.lengths}: the server's max_model_len is {limit}, which leaves {limit - max_tokens} "
            f"beside the answer's {max_tokens}. Give shorter ones."
        )
    make, measure = (written, words_a_token(client, model)) if args.planted is None else (planted, args.planted)
    places = [(n, length, depth) for n in keys for length in lengths for depth in depths for _ in range(args.repeats)]
    questions = [make(*place, seed, measure) for seed, place in enumerate(places)]

    results = sweep(client, model, questions, max_tokens, args.clients)
    found, wrong = by_cell(results), [result for result in results if not result["right"]]
    right = judged(results)
    print(f"{model} at {client.base}\n{table(found)}")
    for result in wrong[:3]:
        said = result.get("error") or f"answered {result['answer'][:80]!r}, expected {result['expected']!r}"
        print(f"{_keys(result['keys'])}, {result['length']:,} tokens, depth {result['depth']:g}: {said}")
    if args.json:
        report = {"endpoint": client.base, "model": model, "right": right, "cells": found, "wrong": wrong}
        try:
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {args.json}: {error}. Name a file in a folder that exists.") from error
    if args.png:
        draw(found, f"{model}: {len(results) - len(wrong)} of {len(results)} right", Path(args.png))
    if right is None:
        print(f"needle.py: {UNANSWERED}", file=sys.stderr)
    return STATUS[right]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--endpoint", required=True, metavar="URL", help=f"an OpenAI server; its key: {' or '.join(KEYS)}"
    )
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--lengths", default="1000,2000,4000,8000", help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--depths", default="0,0.25,0.5,0.75,1", help="default: %(default)s")
    parser.add_argument("--keys", default="1,4", help=f"1 to {len(PLACES)} needles a prompt (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="prompts a cell (default: %(default)s)")
    parser.add_argument(
        "--planted", type=int, metavar="COPIES", help="the model is the planted one, of this index_topk"
    )
    parser.add_argument("--completions", action="store_true", help="ask /v1/completions, not the chat")
    parser.add_argument("--clients", type=int, default=4, help="requests at a time (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds a request (default: %(default)g)")
    parser.add_argument("--png", metavar="FILE", help="draw the heat map; needs matplotlib")
    parser.add_argument("--json", metavar="FILE", help="write every cell and every wrong answer")
    try:
        return run(parser.parse_args(argv))
    except (UserError, RequestFailed) as error:
        print(f"needle.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
