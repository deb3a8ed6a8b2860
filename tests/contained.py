"""Run inside test_docker.py's container: starts the entry command, looks around, asks, ends it in mid-answer.

python contained.py '{"command": [...], "key": "...", "text": "..."}'     prints one line of JSON
"""

import http.client
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from vllm_dsa.testing.server import HOST, Server, free_port, group_members, port_is_open, running  # noqa: E402

PLACES = ("/", "/usr", "/etc", "/srv", "/srv/model", "/srv/key", str(ROOT), sys.prefix, sys.base_prefix)
LONG = 300  # tokens


def main() -> None:
    asked = json.loads(sys.argv[1])
    seen: dict[str, Any] = {"user": [os.getuid(), os.getgid()], "tried to write": list(PLACES)}
    seen["refused to write"] = [place for place in PLACES if not may_write(Path(place))]
    seen["interfaces"] = sorted(name for _, name in socket.if_nameindex())
    seen["routes"] = len(Path("/proc/net/route").read_text().splitlines()) - 1
    try:
        socket.create_connection(("192.0.2.1", 443), timeout=5)
    except OSError as error:
        seen["outside"] = str(error)
    port = free_port()
    with running([*asked["command"], "--port", str(port)], port, dict(os.environ), timeout=240) as server:
        seen["health"] = status(port, "GET", "/health")
        ask(port, asked, seen)
        seen["drained"] = drain(server, asked)
        seen["log"] = server.log()
    print(json.dumps(seen))


def may_write(folder: Path) -> bool:
    try:
        (folder / "written").touch()
    except OSError:
        return False
    return True


def request(port: int, method: str, path: str, body: Any = None, key: str | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection.request(method, path, json.dumps(body) if body else None, headers)
    return connection.getresponse()


def status(*arguments: Any) -> int:
    return request(*arguments).status


def chat(asked: dict[str, Any], **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": asked["text"]}]
    return {"messages": messages, "temperature": 0, "max_tokens": 16, **options}


def ask(port: int, asked: dict[str, Any], seen: dict[str, Any]) -> None:
    """Questions with the key, without it and with another."""
    body, guarded = chat(asked), ("/v1/models", "/v1/chat/completions", "/inference/v1/generate")
    seen["without the key"] = {
        path: status(port, "GET" if "models" in path else "POST", path, body) for path in guarded
    }
    seen["with another key"] = status(port, "GET", "/v1/models", None, asked["key"] + "x")
    seen["with the key"] = status(port, "GET", "/v1/models", None, asked["key"])
    reply = json.loads(request(port, "POST", "/v1/chat/completions", body, asked["key"]).read())
    seen["answer"] = reply["choices"][0]["message"]["content"]
    seen["invocations without the key"] = status(port, "POST", "/invocations", body)
    seen["docs"] = status(port, "GET", "/docs")
    seen["metrics"] = request(port, "GET", "/metrics").read().decode()
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.parent.name != str(os.getpid())]
    seen["command lines"] = b" ".join(lines).replace(b"\0", b" ").decode()


def drain(server: Server, asked: dict[str, Any]) -> dict[str, Any]:
    """SIGTERM while an answer is being written: how much came before, how much in all, and what was left."""
    body = chat(asked, stream=True, max_tokens=LONG, ignore_eos=True, stream_options={"include_usage": True})
    response = request(server.port, "POST", "/v1/chat/completions", body, asked["key"])
    seen: dict[str, Any] = {"done": False, "finish": None, "tokens": None}
    pieces = 0
    for line in response:
        if line.startswith(b"data: [DONE]"):
            seen["done"] = True
        elif line.startswith(b"data: {"):
            chunk = json.loads(line.removeprefix(b"data: "))
            choices = chunk.get("choices", [])  # none in an error, which is how vLLM cuts an answer
            pieces += bool(choices)
            if pieces == 10 and "tokens at SIGTERM" not in seen:
                seen["tokens at SIGTERM"] = pieces
                os.kill(server.pid, signal.SIGTERM)
            for choice in choices:
                seen["finish"] = choice["finish_reason"] or seen["finish"]
            if chunk.get("usage"):
                seen["tokens"] = chunk["usage"]["completion_tokens"]
    deadline = time.monotonic() + 60
    while group_members(server.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    return seen | {"ended": not port_is_open(server.port), "left": group_members(server.pid)}


if __name__ == "__main__":
    main()
