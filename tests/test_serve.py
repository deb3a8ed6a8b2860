"""The real ``vllm serve`` with the planted checkpoint, through the openai client. One server for the whole module."""

import openai
import pytest
from tiny_checkpoint import build_prompt, write_planted

from vllm_dsa.testing.server import serve

pytestmark = pytest.mark.serve

MODEL = "planted"
MAX_LEN = 4096


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    write_planted(path, check=False)
    options = ["--dtype", "float32", "--max-model-len", str(MAX_LEN), "--max-num-batched-tokens", "512"]
    options += ["--served-model-name", MODEL, "--tokenizer-mode", "deepseek_v32", "--enforce-eager"]
    options += ["--enable-prompt-tokens-details", "--fail-on-environ-validation"]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "deepseek_v32"]
    options += ["--reasoning-parser", "deepseek_v3"]
    with serve(path, *options, env={"VLLM_DSA_SCORE_BUDGET_MB": "64"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120)


def chat(client, prompt, **options):
    messages = [{"role": "user", "content": prompt.text}]
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=16, **options)


def test_chat_answers_right(client):
    for length in (300, 1500, 3000):
        prompt = build_prompt(length, seed=length, chat=True)
        reply = chat(client, prompt)
        assert reply.choices[0].message.content.strip() == prompt.answer
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.prompt_tokens == length


def test_streaming_is_the_same(client):
    prompt = build_prompt(900, seed=1, chat=True, hops=3)
    whole = chat(client, prompt).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in chat(client, prompt, stream=True) if chunk.choices]
    assert "".join(parts) == whole
    assert whole.split() == prompt.answer.split() and len(whole.split()) > 1


def test_completion_with_logprobs(client):
    prompt = build_prompt(700, seed=2)
    reply = client.completions.create(model=MODEL, prompt=prompt.text, temperature=0, max_tokens=4, logprobs=3)
    choice = reply.choices[0]
    assert choice.text.strip() == prompt.answer
    first = choice.logprobs.top_logprobs[0]
    best, second = sorted(first.values(), reverse=True)[:2]
    assert choice.logprobs.token_logprobs[0] == best and best - second > 3.0
    echoed = client.completions.create(
        model=MODEL, prompt=prompt.text, temperature=0, max_tokens=1, logprobs=1, echo=True
    ).choices[0]
    assert len(echoed.logprobs.token_logprobs) == 700 + 1 and echoed.logprobs.token_logprobs[0] is None


def test_overlong_prompt_is_http_400(client):
    prompt = build_prompt(MAX_LEN + 100, seed=3)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt=prompt.text, max_tokens=1)
    assert refused.value.status_code == 400 and str(MAX_LEN) in str(refused.value)
    # and the server goes on
    test_completion_with_logprobs(client)


def test_cached_tokens_are_reported(client):
    prompt = build_prompt(1000, seed=4, chat=True)
    first, second = chat(client, prompt), chat(client, prompt)
    assert first.choices[0].message.content == second.choices[0].message.content
    details = second.usage.prompt_tokens_details
    assert details is not None and 512 <= details.cached_tokens < 1000


def test_many_at_once(client):
    from concurrent.futures import ThreadPoolExecutor

    prompts = [build_prompt(300 + 90 * i, seed=50 + i, chat=True) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda p: chat(client, p).choices[0].message.content.strip(), prompts))
    assert replies == [p.answer for p in prompts]


def test_each_worker_names_its_providers_once(server):
    lines = [line for line in server.log().splitlines() if "write: cpu, select: cpu, attend: cpu" in line]
    assert len(lines) == 1 and "INFO" in lines[0] and "refused: reference: " in lines[0]
