"""Talk to a served model: the answer as it streams, what it thinks first, and a tool that it may call.

    python examples/chat.py --notes NOTES.txt "What is red?"
    python examples/chat.py --url http://127.0.0.1:8000/v1 --thinking "Is 2027 a prime?"

With --notes the model is given one tool: it looks up a word in that file. The loop goes on until an answer comes
without a call. The key, if the server asks for one, is read from OPENAI_API_KEY, or else from VLLM_API_KEY. Exit
status 0: answered, 1: not, 2: bad usage.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai

LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Words of the user's notes that contain a code, in the order of the notes.",
        "parameters": {
            "type": "object",
            "properties": {
                "code": {"type": "string", "description": "what to look for"},
                "limit": {"type": "integer", "description": "how many words to return at most"},
            },
            "required": ["code", "limit"],
        },
    },
}
MOST_CALLS = 8  # rounds of calls before it gives up
NO_PARSER = (
    "the server has no tool parser, which --notes needs. Start it with --enable-auto-tool-choice --tool-call-parser "
    "NAME (deepseek_v32 for DeepSeek-V3.2, glm47 for GLM-5, see docs/recipes.md), or leave --notes out."
)


def look_up(notes: str, code: str, limit: int) -> str:
    found = [word for word in notes.split() if code.lower() in word.lower()]
    return " ".join(found[:limit]) or f"{code}: not in the notes"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Talk to a served model.")
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="default: http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="name it is served under; default: the first that the server lists")
    parser.add_argument("--notes", type=Path, help="text file that the model may search")
    parser.add_argument("--thinking", action="store_true", help="let the model think first")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a turn; default: 1024")
    args = parser.parse_args(argv)
    try:
        notes = args.notes.read_text(encoding="utf-8") if args.notes else None
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--notes {args.notes}: {error}")
    try:
        return talk(args, notes)
    except openai.OpenAIError as error:
        without_parser = notes is not None and "--tool-call-parser" in str(error)
        step = (
            ". Set OPENAI_API_KEY, or VLLM_API_KEY, to its key" if isinstance(error, openai.AuthenticationError) else ""
        )
        print(f"chat.py: {args.url}: {NO_PARSER if without_parser else error}{step}", file=sys.stderr)
        return 1


def talk(args: argparse.Namespace, notes: str | None) -> int:
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY") or "none"
    with openai.OpenAI(base_url=args.url, api_key=key) as client:
        options: dict[str, Any] = {
            "model": args.model or client.models.list().data[0].id,
            "max_tokens": args.max_tokens,
            "temperature": 0,
            # DeepSeek's templates read `thinking`, GLM's `enable_thinking`; each ignores the other's.
            "extra_body": {"chat_template_kwargs": {"thinking": args.thinking, "enable_thinking": args.thinking}},
        }
        if notes is not None:
            options["tools"] = [LOOK_UP]
        messages: list[dict[str, Any]] = [{"role": "user", "content": args.question}]
        for _ in range(MOST_CALLS):
            message = turn(client, messages, options)
            messages.append(message)
            if not message.get("tool_calls"):
                return 0
            messages += [answered(call, notes or "") for call in message["tool_calls"]]
    print(f"gave up after {MOST_CALLS} rounds of tool calls", file=sys.stderr)
    return 1


def turn(client: openai.OpenAI, messages: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    """One reply, printed as it comes; returns it as the message that the next request sends back."""
    text: dict[str, str] = {"reasoning": "", "content": ""}
    calls: dict[int, dict[str, Any]] = {}
    for chunk in client.chat.completions.create(messages=messages, stream=True, **options):
        if not chunk.choices:
            continue
        delta = chunk.choices[0].delta
        for kind in text:
            piece = getattr(delta, kind, None) or ""
            if piece and not text[kind]:
                print("thinks: " if kind == "reasoning" else "answer: ", end="")
            text[kind] += piece
            print(piece, end="", flush=True)
        for part in delta.tool_calls or []:
            call = calls.setdefault(
                part.index, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            )
            call["id"] = part.id or call["id"]
            call["function"]["name"] += part.function.name or ""
            call["function"]["arguments"] += part.function.arguments or ""
    print()
    message = {"role": "assistant", **{kind: said for kind, said in text.items() if said}}
    return message | ({"tool_calls": [*calls.values()]} if calls else {})


def answered(call: dict[str, Any], notes: str) -> dict[str, Any]:
    """The message with a call's result; what a model gets wrong is told to it, not to the user."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    print(f"calls:  {name}({arguments})", flush=True)
    try:
        asked = json.loads(arguments)
        result = look_up(notes, str(asked["code"]), int(asked["limit"])) if name == "look_up" else f"no tool {name!r}"
    except (ValueError, KeyError, TypeError) as error:
        result = f"the arguments of {name} cannot be read: {error!r}"
    return {"role": "tool", "tool_call_id": call["id"], "content": result}


if __name__ == "__main__":
    sys.exit(main())
