"""Words hidden in long prompts, asked of an OpenAI server: a gate after its start. Standard library only.

DSA's faults leave short answers as they are and spoil those of prompts longer than index_topk tokens. So each prompt is
filler of a given length with one passcode hidden at a given depth, and the answer must name it. How many tokens a word
of filler takes is asked of the server first. With --prompts the prompts and their exact answers are the user's.
"""

import argparse
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_dsa.tools.output import Section, UserError, numbers, show
from vllm_dsa.tools.progress import progress

LENGTHS, DEPTHS, TIMEOUT_S = (3000, 8000, 32000), (0.1, 0.5, 0.9), 300.0
ANSWER_TOKENS = 2048  # a reasoning model thinks first
SHORT_ANSWER_TOKENS = 32  # of --prompts and /v1/completions
STATUS = {True: 0, False: 1, None: 2}  # of what judged() says
UNANSWERED = "no question was answered, so nothing could be judged"
KEYS = ("OPENAI_API_KEY", "VLLM_API_KEY")  # the server's key is the first that is set
LOCAL = ("localhost", "127.0.0.1", "::1")
REPLY_BYTES = 16 << 20
QUESTION = "What is the passcode of the archive? Answer with the passcode alone."
SENTENCES = (
    "The river rose a little in the night and fell again by noon.",
    "A cart went slowly up the hill with bread for the market.",
    "Rain was on the roofs, and the old clock struck a quarter late.",
    "Two boats lay in the harbour and nobody was in a hurry to sail.",
    "In the garden behind the mill the apples were nearly ripe.",
    "The teacher closed the window and opened another book.",
    "Snow had covered the field, and a fox had crossed it twice.",
    "At the end of the street a door stood open all summer.",
    "Somebody sang in the kitchen, not well, but for a long time.",
    "The letter took nine days and came on a windy morning.",
    "Under the bridge the water was green and almost still.",
    "He counted the stones of the wall and began again at one.",
)


class RequestFailed(Exception):
    """A request without a usable reply; the message says which and why."""


@dataclass(frozen=True)
class Needle:
    """One question: its prompt, the right answer, and what it is called in the report."""

    label: str
    prompt: str
    answer: str
    exact: bool


class Client:
    """One server's API; every request ends within ``timeout`` seconds."""

    def __init__(self, endpoint: str, timeout: float, completions: bool) -> None:
        url = urllib.parse.urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(f"--endpoint {endpoint}: not an address. Give one such as http://127.0.0.1:8000.")
        path = url.path.rstrip("/")
        self.base = f"{url.scheme}://{url.netloc}{path if path.endswith('/v1') else path + '/v1'}"
        # A machine's proxy settings are not for its own loopback address.
        handlers = [urllib.request.ProxyHandler({})] if url.hostname in LOCAL else []
        self.opener = urllib.request.build_opener(*handlers)
        self.timeout, self.completions = timeout, completions
        self.key_name = next((name for name in KEYS if os.environ.get(name)), None)
        self.key = os.environ[self.key_name] if self.key_name else None

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server replies to GET, or to POST of a body. Raises RequestFailed."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, headers)
        deadline = time.monotonic() + self.timeout
        try:
            with self.opener.open(request, timeout=self.timeout) as reply:
                content = b""
                while part := reply.read1(1 << 16):
                    content += part
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    if len(content) > REPLY_BYTES:
                        raise RequestFailed(f"{path}: the reply is longer than {REPLY_BYTES >> 20} MiB")
            answer = json.loads(content)
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode(errors="replace")
            step = f"The key sent is {self.key_name}'s." if self.key_name else f"Set {' or '.join(KEYS)}."
            hint = f" {step}" if error.code in (401, 403) else ""
            raise RequestFailed(f"{path}: HTTP {error.code}: {text[:300]}{hint}") from error
        except TimeoutError as error:
            raise RequestFailed(f"{path}: no reply within {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise RequestFailed(f"{path}: no reply within {self.timeout:g} s") from error
            raise RequestFailed(f"{path}: {getattr(error, 'reason', error)}") from error
        except ValueError as error:
            raise RequestFailed(f"{path}: the reply is not JSON: {content[:100]!r}") from error
        if not isinstance(answer, dict):
            raise RequestFailed(f"{path}: the reply is no JSON object: {content[:100]!r}")
        return answer

    def ask(self, model: str, prompt: str, max_tokens: int) -> tuple[str, int | None]:
        """The greedy answer to a prompt, and the tokens that the server counted in it."""
        body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        body |= {"prompt": prompt} if self.completions else {"messages": [{"role": "user", "content": prompt}]}
        path = "/completions" if self.completions else "/chat/completions"
        reply = self.call(path, body)
        try:
            choice = reply["choices"][0]
            text = choice["text"] if self.completions else choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise RequestFailed(f"{path}: the reply has no answer: {json.dumps(reply)[:300]}") from error
        count = (reply.get("usage") or {}).get("prompt_tokens")
        return (text or "").strip(), count if isinstance(count, int) else None


def run(args: argparse.Namespace) -> int:
    timeout = TIMEOUT_S if args.timeout is None else args.timeout
    if not timeout > 0:
        raise UserError(f"--timeout {args.timeout}: give seconds above 0.")
    if args.prompts and (args.lengths or args.depths):
        raise UserError("--prompts brings its own prompts: leave --lengths and --depths out.")
    lengths, depths = _lengths(args.lengths), _depths(args.depths)
    client = Client(args.endpoint, timeout, bool(args.completions))
    own = _read_prompts(args.prompts) if args.prompts else None
    results: list[dict[str, Any]] = []
    model, note = args.model, ""
    try:
        model, limit = served(client, args.model)
        if own:
            needles = own
        else:
            fitting = [n for n in lengths if limit is None or n + ANSWER_TOKENS <= limit]
            if args.lengths and fitting != lengths or not fitting:
                raise UserError(
                    f"--lengths {','.join(map(str, lengths))}: the server's max_model_len is {limit}, which leaves "
                    f"{limit - ANSWER_TOKENS} beside the answer's {ANSWER_TOKENS}. Give shorter ones."
                )
            if fitting != lengths:
                note = f"{lengths[len(fitting)]:,} tokens and more: the server's max_model_len is {limit:,}"
            needles = _needles(client, model, fitting, depths)
        results = _ask_all(client, model, needles, bool(own) or client.completions)
    except RequestFailed as error:
        results.append({"label": client.base, "right": False, "error": str(error)})
    right = judged(results)
    if args.json:
        print(json.dumps({"right": right, "endpoint": client.base, "model": model, "left_out": note, "asked": results}))
    else:
        show([_section(client.base, model, results, note)])
        if right is None:
            print(UNANSWERED)
    return STATUS[right]


def judged(results: list[dict[str, Any]]) -> bool | None:
    """Is every answer right? None: there is none, only errors."""
    if all("error" in result for result in results):
        return None
    return all(result["right"] for result in results)


def _lengths(text: str | None) -> list[int]:
    return list(LENGTHS) if text is None else numbers("--lengths", text, int, 200, 10_000_000)


def _depths(text: str | None) -> list[float]:
    return list(DEPTHS) if text is None else numbers("--depths", text, float, 0, 1)


def served(client: Client, name: str | None) -> tuple[str, int | None]:
    """The model to ask, and its max_model_len where the server says it."""
    models = client.call("/models").get("data")
    known = {m["id"]: m for m in models if isinstance(m, dict) and "id" in m} if isinstance(models, list) else {}
    if name is None:
        if not known:
            raise RequestFailed("/models: the server lists no model; name one with --model")
        name = next(iter(known))
    limit = known.get(name, {}).get("max_model_len")
    return name, limit if isinstance(limit, int) else None


def filler(count: int, seed: int) -> list[str]:
    """Sentences of at least ``count`` words in all."""
    rng, sentences, words = random.Random(seed), [], 0
    while words < count:
        sentences.append(rng.choice(SENTENCES))
        words += len(sentences[-1].split())
    return sentences


def words_a_token(client: Client, model: str) -> float:
    """Words of filler that make one of the model's tokens, as the server counts them."""
    sample = " ".join(filler(1000, seed=0))
    counted = client.ask(model, sample, 1)[1]
    if not counted:
        raise RequestFailed("the server does not say usage.prompt_tokens, so prompts of a given length cannot be made")
    return len(sample.split()) / counted


def _needles(client: Client, model: str, lengths: list[int], depths: list[float]) -> list[Needle]:
    """Prompts of about so many tokens, their passcodes at so deep."""
    words = words_a_token(client, model)
    needles = []
    for length in lengths:
        for depth in depths:
            seed = round(1000 * depth) * 10_000_019 + length
            code = str(random.Random(seed).randint(1_000_000, 9_999_999))
            sentences = filler(int(length * words) - 40, seed)
            sentences.insert(round(depth * len(sentences)), f"The passcode of the archive is {code}.")
            label = f"{length:,} tokens, depth {depth:g}"
            needles.append(Needle(label, f"{' '.join(sentences)}\n\n{QUESTION}", code, exact=False))
    return needles


def _read_prompts(path: str) -> list[Needle]:
    try:
        with open(path, encoding="utf-8") as file:
            needles = list(_parsed(file.read().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: {error}. Name a file of JSON lines.") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f'--prompts {path}: {error!r}. Each line must be {{"prompt": "...", "answer": "..."}}.'
        ) from error
    if not needles:
        raise UserError(f'--prompts {path}: no prompts in it. Each line must be {{"prompt": "...", "answer": "..."}}.')
    return needles


def _parsed(lines: list[str]) -> Iterator[Needle]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            given = json.loads(line)
            if not isinstance(given["prompt"], str) or not isinstance(given["answer"], str):
                raise TypeError(f"line {number}: prompt and answer must be texts")
            yield Needle(f"line {number}", given["prompt"], given["answer"].strip(), exact=True)


def _ask_all(client: Client, model: str, needles: list[Needle], short: bool) -> list[dict[str, Any]]:
    results = []
    with progress("asking", len(needles)) as advance:
        for needle in needles:
            advance(needle.label)
            result: dict[str, Any] = {"label": needle.label, "expected": needle.answer}
            start = time.monotonic()
            try:
                max_tokens = SHORT_ANSWER_TOKENS if short else ANSWER_TOKENS
                answer, result["prompt_tokens"] = client.ask(model, needle.prompt, max_tokens)
                result["answer"] = answer
                result["right"] = answer == needle.answer if needle.exact else needle.answer in answer
            except RequestFailed as error:
                result |= {"right": False, "error": str(error)}
            results.append(result | {"seconds": round(time.monotonic() - start, 2)})
    return results


def _section(base: str, model: str | None, results: list[dict[str, Any]], note: str) -> Section:
    section = Section(f"{model or 'models'} at {base}")
    for result in results:
        if "error" in result:
            section.add(result["label"], result["error"], "fault")
            continue
        sent = "" if result["prompt_tokens"] is None else f" of {result['prompt_tokens']:,} tokens"
        took = f"prompt{sent}, {result['seconds']:g} s"
        if result["right"]:
            section.add(result["label"], f"{result['expected']}, {took}", "ok")
        else:
            section.add(result["label"], f"{result['answer'][:80]!r}, expected {result['expected']!r}, {took}", "fault")
    if note:
        section.add("left out", note, "note")
    return section
