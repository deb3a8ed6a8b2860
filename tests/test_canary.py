"""`vllm-dsa verify --endpoint` as a subprocess: against servers whose behaviour is known, and (slow) a real one."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from planted_text import build_prompt
from tiny_checkpoint import write_planted

from vllm_dsa.testing.server import free_port, serve

Reply = Callable[[str, int], str]  # prompt, max_tokens -> answer


def verify(endpoint: str, *options: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vllm_dsa.tools.main", "verify", "--endpoint", endpoint, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


def reads_all(prompt: str, max_tokens: int) -> str:
    codes = re.findall(r"passcode of the archive is (\d+)\.", prompt)
    return f"The passcode is {codes[0]}." if codes else "I saw no passcode."


def reads_a_window(prompt: str, max_tokens: int) -> str:
    return reads_all(" ".join(prompt.split()[-1500:]), max_tokens)


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves with a handler, on a free port of this machine; yields the address."""
    web = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    web.daemon_threads = True
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{web.server_port}"
    finally:
        web.shutdown()
        web.server_close()
        thread.join()


@contextmanager
def server(reply: Reply = reads_all, **facts: Any) -> Iterator[tuple[str, list[dict]]]:
    """An OpenAI server; facts: max_model_len, key, raw (bytes in place of JSON), pause (seconds), usage. Yields its
    address and the requests it got."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for part in range(0, len(content), 20) if facts.get("pause") else [0]:
                self.wfile.write(content[part : part + 20] if facts.get("pause") else content)
                time.sleep(facts.get("pause", 0))

        def do_GET(self) -> None:
            if facts.get("key") and self.headers["Authorization"] != f"Bearer {facts['key']}":
                return self.send(401, b"no key")
            model = {"id": "fake", "max_model_len": facts.get("max_model_len")}
            self.send(200, facts.get("raw") or json.dumps({"data": [model]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"path": self.path})
            prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
            text = reply(prompt, body["max_tokens"])
            choice = {"text": text} if "prompt" in body else {"message": {"content": text}}
            usage = {"prompt_tokens": round(1.3 * len(prompt.split()))} if facts.get("usage", True) else None
            self.send(200, json.dumps({"choices": [choice], "usage": usage}).encode())

    with listening(Handler) as url:
        yield url, asked


def test_a_server_that_reads_all_passes_at_every_length_and_depth():
    with server() as (url, asked):
        done = verify(url, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["right"], report["model"]) == (0, True, "fake")
    assert len(report["asked"]) == 9
    for result, wanted in zip(report["asked"], [3000] * 3 + [8000] * 3 + [32000] * 3, strict=True):
        assert abs(result["prompt_tokens"] - wanted) < 0.03 * wanted
    depths = []
    for body in asked[1:]:
        prompt = body["messages"][0]["content"]
        depths.append(prompt.index("passcode of") / len(prompt))
    assert depths == pytest.approx([0.1, 0.5, 0.9] * 3, abs=0.03)
    assert len({result["expected"] for result in report["asked"]}) == 9
    assert all(body["temperature"] == 0 and body["path"] == "/v1/chat/completions" for body in asked)


def test_a_server_that_reads_a_window_fails():
    with server(reads_a_window) as (url, _):
        done = verify(url + "/v1/", "--lengths", "1000,8000", "--json")
    assert done.returncode == 1
    right = [result["right"] for result in json.loads(done.stdout)["asked"]]
    assert right == [True, True, True, False, False, True]


def test_plain_text_names_what_is_wrong():
    with server(reads_a_window) as (url, _):
        done = verify(url, "--lengths", "8000", "--depths", "0,1", "--completions", "--model", "mine")
    assert done.returncode == 1
    assert re.search(r"fault +8,000 tokens, depth 0 +'I saw no passcode.', expected '\d{7}'", done.stdout)
    assert re.search(r"ok +8,000 tokens, depth 1 ", done.stdout)
    assert done.stdout.startswith("mine at http://127.0.0.1:")


def test_lengths_that_the_server_does_not_take():
    with server(max_model_len=16384) as (url, asked):
        done = verify(url, "--json")
        report = json.loads(done.stdout)
        assert (done.returncode, len(report["asked"])) == (0, 6)
        assert "32,000 tokens" in report["left_out"]
        done = verify(url, "--lengths", "3000,32000")
        assert done.returncode == 2
        assert "max_model_len is 16384" in done.stderr
        assert len(asked) == 7


def test_own_prompts_are_compared_exactly(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "What is red?", "answer": "lion"}, {"prompt": "What is blue?", "answer": "a"}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with server(lambda prompt, _: " lion\n") as (url, asked):
        done = verify(url, "--prompts", str(file), "--completions", "--json")
    assert done.returncode == 1
    assert [result["right"] for result in json.loads(done.stdout)["asked"]] == [True, False]
    assert [body["path"] for body in asked] == ["/v1/completions"] * 2


def test_the_key_comes_from_the_environment():
    with server(key="secret") as (url, _):
        refused = verify(url, "--lengths", "300", env={})
        assert refused.returncode == 2
        assert "HTTP 401" in refused.stdout and "Set OPENAI_API_KEY or VLLM_API_KEY." in refused.stdout
        assert verify(url, "--lengths", "300", env={"VLLM_API_KEY": "secret"}).returncode == 0
        both = {"OPENAI_API_KEY": "secret", "VLLM_API_KEY": "other"}
        assert verify(url, "--lengths", "300", env=both).returncode == 0
        refused = verify(url, "--lengths", "300", env={"OPENAI_API_KEY": "other", "VLLM_API_KEY": "secret"})
        assert (refused.returncode, "The key sent is OPENAI_API_KEY's." in refused.stdout) == (2, True)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (dict(raw=b"<html>"), "not JSON"),
        (dict(raw=b"[]"), "no JSON object"),
        (dict(raw=b'{"data": []}'), "lists no model"),
        (dict(pause=0.5), "no reply within 1 s"),
        (dict(usage=False), "usage.prompt_tokens"),
    ],
)
def test_a_server_without_usable_replies_is_not_judged_in_time(facts, says):
    with server(**facts) as (url, _):
        start = time.monotonic()
        done = verify(url, "--lengths", "300", "--timeout", "1" if "pause" in facts else "20")
    assert (done.returncode, says in done.stdout) == (2, True), done.stdout + done.stderr
    assert time.monotonic() - start < 30


def test_no_server_is_not_judged():
    nobody = f"http://127.0.0.1:{free_port()}"
    done = verify(nobody)
    assert done.returncode == 2
    assert "refused" in done.stdout and "nothing could be judged" in done.stdout
    done = verify(nobody, "--json")
    assert (done.returncode, json.loads(done.stdout)["right"]) == (2, None)


@pytest.mark.parametrize(("broken", "status", "right"), [("all", 2, None), ("some", 1, False)])
def test_a_server_that_answers_some_questions_only_is_wrong_and_one_that_answers_none_is_not_judged(
    broken, status, right, tmp_path
):
    def breaks(prompt: str, max_tokens: int) -> str:
        return "lion" if broken == "some" and "red" in prompt else 1 / 0

    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"What is {color}?", "answer": "lion"} for color in ("red", "blue")]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with server(breaks) as (url, _):
        done = verify(url, "--prompts", str(file), "--json", "--timeout", "5")
    report = json.loads(done.stdout)
    assert (done.returncode, report["right"]) == (status, right)
    assert ["error" in result for result in report["asked"]] == [broken == "all", True]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("127.0.0.1:8000",), "not an address"),
        (("http://127.0.0.1:9", "--lengths", "many"), "--lengths many"),
        (("http://127.0.0.1:9", "--depths", "0.5,2"), "--depths 0.5,2"),
        (("http://127.0.0.1:9", "--timeout", "0"), "--timeout"),
        (("http://127.0.0.1:9", "--prompts", "/nowhere"), "/nowhere"),
        (("http://127.0.0.1:9", "--prompts", "/dev/null", "--lengths", "300"), "leave --lengths"),
        (("http://127.0.0.1:9", "--provider", "cpu"), "VLLM_DSA_PROVIDER"),
        (("http://127.0.0.1:9", "--tokens", "5"), "--tokens is an option of a MODEL"),
    ],
)
def test_bad_options_are_named(options, says):
    done = verify(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


WINDOW = """
import torch
from vllm_dsa.kernels import cpu
def select(codes, weights, index_cache, rows, out):
    last = rows.lengths.unsqueeze(1) - out.shape[1]
    positions = last.clamp(min=0) + torch.arange(out.shape[1])
    out.copy_(positions.masked_fill(positions >= rows.lengths.unsqueeze(1), -1))
cpu.select = select
"""


@pytest.mark.slow
@pytest.mark.serve
def test_a_served_planted_checkpoint_passes_and_with_a_window_fails(tmp_path):
    write_planted(tmp_path / "planted", check=False)
    prompts = [build_prompt(n, n, chat=True, placement=p) for n in (1000, 3000, 6000) for p in ("first", "scattered")]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt.text, "answer": prompt.answer}) for prompt in prompts))
    faulty = tmp_path / "faulty"
    faulty.mkdir()
    (faulty / "sitecustomize.py").write_text(WINDOW)
    options = ("--max-model-len=8192", "--tokenizer-mode=deepseek_v32", "--dtype=float32")
    for env, right in (({}, [True] * 6), ({"PYTHONPATH": str(faulty)}, [False] * 6)):
        with serve(tmp_path / "planted", *options, env=env) as running:
            done = verify(running.base_url, "--prompts", str(file), "--json")
        assert [result["right"] for result in json.loads(done.stdout)["asked"]] == right
        assert done.returncode == int(not right[0])
