"""One chat reply of a server, whole or put together from its stream, in the same few fields."""

from dataclasses import dataclass, field
from typing import Any

import openai


@dataclass
class Reply:
    """`tool_calls`: (name, arguments as JSON text); `tokens`: (token, log-probability); `deltas`: 0 if not streamed."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[tuple[str, str]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: Any = None
    tokens: list[tuple[str, float]] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    deltas: int = 0

    def same_as(self, other: "Reply") -> bool:
        """Equal but for log-probabilities' last digits, and for how it came: streamed, cached."""
        words = [token for token, _ in self.tokens] == [token for token, _ in other.tokens]
        close = all(abs(a - b) < 1e-3 for (_, a), (_, b) in zip(self.tokens, other.tokens, strict=words))
        how = {"tokens", "cached_tokens", "deltas"}
        return words and close and all(getattr(other, k) == v for k, v in vars(self).items() if k not in how)


def whole(client: openai.OpenAI, messages: list[dict], **options: Any) -> list[Reply]:
    """The choices of a reply that comes at once."""
    answer = client.chat.completions.create(messages=messages, **options)
    replies = []
    for choice in answer.choices:
        message = choice.message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        reply = Reply(message.content or "", message.reasoning or "", calls, choice.finish_reason, choice.stop_reason)
        reply.tokens = [(token.token, token.logprob) for token in choice.logprobs.content] if choice.logprobs else []
        _count(reply, answer.usage)
        replies.append(reply)
    return replies


def streamed(client: openai.OpenAI, messages: list[dict], **options: Any) -> list[Reply]:
    """The same from a stream."""
    replies = [Reply() for _ in range(options.get("n", 1))]
    usage = {"include_usage": True}
    for chunk in client.chat.completions.create(messages=messages, stream=True, stream_options=usage, **options):
        for choice in chunk.choices:
            _add(replies[choice.index], choice)
        if chunk.usage:
            for reply in replies:
                _count(reply, chunk.usage)
    return replies


def _add(reply: Reply, choice: Any) -> None:
    delta = choice.delta
    reply.content += delta.content or ""
    reply.reasoning += getattr(delta, "reasoning", None) or ""
    reply.deltas += bool(delta.content or getattr(delta, "reasoning", None) or delta.tool_calls)
    for call in delta.tool_calls or []:
        assert call.index in (len(reply.tool_calls), len(reply.tool_calls) - 1), "calls come one after the other"
        if call.index == len(reply.tool_calls):
            reply.tool_calls.append(("", ""))
        name, arguments = reply.tool_calls[-1]
        reply.tool_calls[-1] = name + (call.function.name or ""), arguments + (call.function.arguments or "")
    reply.finish_reason = choice.finish_reason or reply.finish_reason
    reply.stop_reason = getattr(choice, "stop_reason", None) or reply.stop_reason
    if choice.logprobs:
        reply.tokens += [(token.token, token.logprob) for token in choice.logprobs.content]


def _count(reply: Reply, usage: Any) -> None:
    reply.prompt_tokens, reply.completion_tokens = usage.prompt_tokens, usage.completion_tokens
    reply.cached_tokens = usage.prompt_tokens_details.cached_tokens
