"""examples/chat.py against a server with and without a tool parser; test_recipes.py asks a real one (slow)."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import chat
import pytest
from test_canary import listening

from vllm_dsa.testing.server import free_port

NO_PARSER = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'


@pytest.fixture(autouse=True)
def no_key_and_no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("OPENAI_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def server(tool_parser: bool = True, key: str | None = None, longest: int = 1000) -> Iterator[str]:
    """What vLLM replies: a tool call for what is in the notes, 400 where it has no parser or a prompt is too long."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def send(self, status: int, body: Any) -> None:
            stream = isinstance(body, list)
            content = "".join(f"data: {json.dumps(part)}\n\n" for part in body) if stream else json.dumps(body)
            self.send_response(status)
            self.send_header("Content-Type", "text/event-stream" if stream else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())

        def refuse(self, status: int, message: str) -> None:
            self.send(status, {"error": {"message": message, "code": status}})

        def do_GET(self) -> None:
            if key and self.headers["Authorization"] != f"Bearer {key}":
                return self.refuse(401, "Unauthorized")
            self.send(200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            last = body["messages"][-1]
            if body.get("tools") and not tool_parser:
                return self.refuse(400, NO_PARSER)
            if len(last["content"]) > longest:
                return self.refuse(400, "This model's maximum context length is exceeded")
            if body.get("tools") and last["role"] == "user":
                function = {"name": "look_up", "arguments": json.dumps({"code": "red", "limit": 1})}
                delta = {"tool_calls": [{"index": 0, "id": "1", "type": "function", "function": function}]}
            else:
                delta = {"content": f"It is {last['content']}"}
            self.send(200, [{"id": "x", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta}]}])

    with listening(Handler) as url:
        yield f"--url={url}/v1"


@pytest.fixture
def notes(tmp_path) -> Path:
    path = tmp_path / "NOTES.txt"
    path.write_text("red=lion blue=whale")
    return path


def test_it_calls_its_tool_and_answers(notes, capsys):
    with server() as url:
        assert chat.main([url, "--notes", str(notes), "What is red?"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "answer: It is red=lion"


def test_a_server_without_a_tool_parser_is_told_how_to_start(notes, capsys):
    with server(tool_parser=False) as url:
        assert chat.main([url, "--notes", str(notes), "What is red?"]) == 1
        err = capsys.readouterr().err
        assert "Start it with --enable-auto-tool-choice --tool-call-parser NAME (deepseek_v32 for" in err
        assert "Traceback" not in err and len(err.splitlines()) == 1
        assert chat.main([url, "red"]) == 0
        assert capsys.readouterr().out == "answer: It is red\n"
    recipes = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    names = re.findall(r"(\w+) for", err)
    assert len(names) == 2
    for name in names:
        assert f"--tool-call-parser {name}" in recipes


def test_vllm_refuses_tools_in_these_words():
    (folder,) = find_spec("vllm").submodule_search_locations
    text = (Path(folder) / "renderers" / "online_renderer.py").read_text()
    assert NO_PARSER in re.sub(r"['\"]\s*\n\s*['\"]", "", text)


def test_other_errors_are_named(notes, capsys):
    with server(longest=10) as url:
        assert chat.main([url, "--notes", str(notes), "What is red in the notes?"]) == 1
    err = capsys.readouterr().err
    assert "maximum context length" in err and "tool parser" not in err
    assert chat.main([f"--url=http://127.0.0.1:{free_port()}/v1", "red"]) == 1
    assert re.match(r"chat.py: http://127.0.0.1:\d+/v1: Connection error", capsys.readouterr().err)
    with pytest.raises(SystemExit, match="2"):
        chat.main(["--notes", "/nowhere", "red"])
    assert "--notes /nowhere: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "status"),
    [
        ({}, 1),
        ({"OPENAI_API_KEY": "secret"}, 0),
        ({"VLLM_API_KEY": "secret"}, 0),
        ({"OPENAI_API_KEY": "secret", "VLLM_API_KEY": "other"}, 0),
        ({"OPENAI_API_KEY": "other", "VLLM_API_KEY": "secret"}, 1),
    ],
)
def test_the_key_comes_from_the_environment(keys, status, monkeypatch, capsys):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    with server(key="secret") as url:
        assert chat.main([url, "red"]) == status
    err = capsys.readouterr().err
    assert ("Error code: 401" in err and "Set OPENAI_API_KEY, or VLLM_API_KEY" in err) == bool(status)
