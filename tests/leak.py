"""A planted fault: ASGI middleware that keeps some memory of every request. For `vllm serve --middleware`."""

from typing import Any

LEAK = 20_000  # bytes a request
kept: list[bytes] = []


class Leak:
    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            kept.append(bytes([len(kept) % 255 + 1]) * LEAK)
        await self.app(scope, receive, send)
