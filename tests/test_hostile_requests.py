"""No request ends the engine: each one of hostile_requests.py, and after it a question that must be answered."""

import http.client
import json
from typing import Any

import pytest
import soak
from hostile_requests import INTERNAL_ERRORS, INTERNAL_ERRORS_BESIDE_DRAFTS, MODEL, REQUESTS
from planted_text import build_prompt
from tiny_checkpoint import write_planted

from vllm_dsa.testing.server import HOST, serve

KEY = "secret"
OPTIONS = ("--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "2048", "--block-size", "16")
OPTIONS += ("--max-num-batched-tokens", "64", "--num-gpu-blocks-override", "1000", "--tokenizer-mode", "deepseek_v32")
OPTIONS += ("--enable-auto-tool-choice", "--tool-call-parser", "deepseek_v32", "--enable-scale-out")


def send(port: int, path: str, body: Any) -> tuple[int, bytes]:
    """With the API key, but to /invocations, which asks for none."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    headers = {"Content-Type": "application/json"}
    if path != "/invocations":
        headers["Authorization"] = f"Bearer {KEY}"
    try:
        connection.request("POST", path, body if isinstance(body, str) else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.slow
@pytest.mark.serve
@pytest.mark.parametrize("drafts", [0, 3])
def test_no_request_ends_the_engine(tmp_path, drafts):
    write_planted(tmp_path, check=False, index_topk=32, draft="hidden")
    options = list(OPTIONS)
    if drafts:
        options += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": drafts})]
    prompt = build_prompt(200, 77, copies=32, codes=4)
    question = {"model": MODEL, "prompt": prompt.text, "temperature": 0, "max_tokens": 1}
    statuses = {}
    with serve(tmp_path, *options, env=soak.SERVE_ENV | {"VLLM_API_KEY": KEY}) as server:
        for name, (path, body) in REQUESTS.items():
            statuses[name], _ = send(server.port, path, body)
            status, reply = send(server.port, "/v1/completions", question)
            assert status == 200, f"after {name!r}: {server.errors()}"
            assert json.loads(reply)["choices"][0]["text"].strip() == prompt.answer, name
    print(statuses)
    for seeded in ("seed", "seed by /invocations", "seed, choices", "penalties", "prompt_logprobs, seed"):
        assert statuses[seeded] == 200
    expected = INTERNAL_ERRORS | (INTERNAL_ERRORS_BESIDE_DRAFTS if drafts else set())
    assert {name for name, status in statuses.items() if status >= 500} == expected
