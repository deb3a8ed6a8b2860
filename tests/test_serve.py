"""The real ``vllm serve`` with the planted checkpoint, through the openai client. One server for the whole module.

The checkpoint can think and call a tool (planted_tools.py). ``ask`` puts every question twice, at once and streamed.
"""

import json
import re
import urllib.request

import openai
import pytest
from planted_text import ANIMALS, CODES, build_prompt
from planted_tools import THOUGHT, add_tools
from replies import Reply, streamed, whole
from tiny_checkpoint import write_planted

from vllm_dsa.testing.server import serve

pytestmark = pytest.mark.serve

MODEL = "planted"
MAX_LEN = 4096


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    write_planted(path, check=False)
    add_tools(path)
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


def ask_all(client, messages: str | list[dict], *, thinking: bool = False, **options) -> list[Reply]:
    """The choices of a reply, which are the same whether it is streamed or not; a text is one user message."""
    messages = [user(messages)] if isinstance(messages, str) else messages
    options = {"model": MODEL, "temperature": 0, "max_tokens": 100, **options}
    if thinking:
        options["extra_body"] = {"chat_template_kwargs": {"thinking": True}}
    at_once = whole(client, messages, **options)
    for reply, same in zip(at_once, streamed(client, messages, **options), strict=True):
        assert reply.same_as(same), (reply, same)
        reply.deltas = same.deltas
    return at_once


def ask(client, messages: str | list[dict], **options) -> Reply:
    (reply,) = ask_all(client, messages, **options)
    return reply


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def tool(name: str, strict: bool = False, **properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    parameters["additionalProperties"] = False
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


LOOK_UP = tool("look_up", code={"type": "string"}, limit={"type": "integer"})  # what the model calls by itself
PICK = tool("pick", strict=True, animal={"type": "string", "enum": [*ANIMALS]})
REASONING = {True: "".join(THOUGHT), False: ""}  # by thinking
thinking_or_not = pytest.mark.parametrize("thinking", [False, True])


def facts(seed: int, asked: str = "") -> tuple[str, dict[str, str], str]:
    """A text of 400 tokens with facts about four codes (and a question), these, and a code it says nothing about."""
    text = build_prompt(400, seed, codes=4, question=f" What is {asked}?" if asked else "").text
    planted = dict(word.split("=") for word in text.split() if "=" in word)
    return text, planted, next(code for code in CODES if code not in planted)


def wanted(code: str) -> list[tuple[str, dict]]:
    return [("look_up", {"code": code, "limit": 16})]


def calls(reply: Reply) -> list[tuple[str, dict]]:
    return [(name, json.loads(arguments)) for name, arguments in reply.tool_calls]


def test_chat_answers_right(client):
    for length in (300, 1500, 3000):
        prompt = build_prompt(length, seed=length, chat=True)
        reply = chat(client, prompt)
        assert reply.choices[0].message.content.strip() == prompt.answer
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.prompt_tokens == length


def test_metrics_say_what_serves(server):
    with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=30) as reply:
        (line,) = re.findall(r"^vllm_dsa_info{.*} 1.0$", reply.read().decode(), re.MULTILINE)
    for label in (f'model_name="{MODEL}"', 'cache="float32"', 'index_topk="16"', 'select="cpu"', 'attend="cpu"'):
        assert label in line


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


@thinking_or_not
def test_model_calls_a_tool_for_what_it_is_not_told(client, thinking):
    text, planted, unplanted = facts(10)
    reply = ask(client, f"{text} What is {unplanted}?", tools=[LOOK_UP], thinking=thinking)
    assert calls(reply) == wanted(unplanted)
    assert (reply.content, reply.reasoning, reply.finish_reason) == ("", REASONING[thinking], "tool_calls")
    assert reply.deltas > 2
    for code, value in planted.items():
        reply = ask(client, f"{text} What is {code}?", tools=[LOOK_UP], thinking=thinking)
        assert (reply.content, reply.reasoning, reply.tool_calls) == (value, REASONING[thinking], [])


@thinking_or_not
def test_tool_result_is_answered_from(client, thinking):
    text, _, unplanted = facts(11)
    asked = [user(f"{text} What is {unplanted}?")]
    call = client.chat.completions.create(model=MODEL, messages=asked, tools=[LOOK_UP], temperature=0)
    message = call.choices[0].message
    (made,) = message.tool_calls
    for animal in ("otter", "horse"):
        result = " ".join([f"{unplanted}={animal}"] * json.loads(made.function.arguments)["limit"])
        turns = [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": made.id, "content": result}]
        reply = ask(client, asked + turns, tools=[LOOK_UP], thinking=thinking)
        assert (reply.content, reply.reasoning, reply.tool_calls) == (animal, REASONING[thinking], [])
        assert reply.finish_reason == "stop"


@thinking_or_not
def test_forced_tool_call(client, thinking):
    """By itself the model would answer: only the grammar makes it call. What it then writes is still right."""
    text, planted, _ = facts(12)
    code, value = next(iter(planted.items()))
    named = {"type": "function", "function": {"name": "pick"}}
    cases = (
        ([PICK, LOOK_UP], "required", "tool_calls", wanted(code)),
        ([LOOK_UP, PICK], named, "stop", [("pick", {"animal": value})]),
    )
    for tools, choice, finish_reason, expected in cases:
        reply = ask(client, f"{text} What is {code}?", tools=tools, tool_choice=choice, thinking=thinking)
        assert (calls(reply), reply.finish_reason) == (expected, finish_reason)
        assert (reply.content, reply.reasoning) == ("", REASONING[thinking])


@thinking_or_not
def test_json_schema(client, thinking):
    text, planted, unplanted = facts(13)
    code, value = next(iter(planted.items()))
    properties = {"sure": {"const": True}, "animal": {"enum": [*ANIMALS]}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    options = dict(response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}})
    reply = ask(client, f"{text} What is {code}?", thinking=thinking, **options)
    assert json.loads(reply.content) == {"sure": True, "animal": value}
    assert (reply.reasoning, reply.finish_reason) == (REASONING[thinking], "stop")
    # Beside a strict tool it is one or the other.
    strict = tool("look_up", strict=True, code={"type": "string"}, limit={"type": "integer"})
    reply = ask(client, f"{text} What is {unplanted}?", tools=[strict], thinking=thinking, **options)
    assert (calls(reply), reply.content) == (wanted(unplanted), "")
    reply = ask(client, f"{text} What is {code}?", tools=[strict], thinking=thinking, **options)
    assert json.loads(reply.content) == {"sure": True, "animal": value}


@thinking_or_not
def test_system_message_and_turns(client, thinking):
    """Facts in the system message; each turn asks about another code, and finds the turns before it cached."""
    text, planted, unplanted = facts(14)
    messages = [{"role": "system", "content": text}]
    for turn, (code, value) in enumerate(planted.items()):
        messages.append(user(f"What is {code}?"))
        reply = ask(client, messages, thinking=thinking)
        assert (reply.content, reply.reasoning) == (value, REASONING[thinking])
        assert turn == 0 or reply.cached_tokens >= 256
        messages.append({"role": "assistant", "content": reply.content, "reasoning": reply.reasoning})
    messages.append(user(f"What is {unplanted}?"))
    assert calls(ask(client, messages, thinking=thinking, tools=[LOOK_UP])) == wanted(unplanted)


def test_reasoning_effort_switches_thinking(client):
    text, planted, _ = facts(15)
    code, value = next(iter(planted.items()))
    for effort, thinking in (("high", True), ("none", False)):
        reply = ask(client, f"{text} What is {code}?", reasoning_effort=effort)
        assert (reply.content, reply.reasoning) == (value, REASONING[thinking])


def test_several_choices(client):
    prompt = build_prompt(500, 16, chat=True, hops=3)
    replies = ask_all(client, prompt.text, n=3, temperature=0.5)
    assert [(r.content, r.finish_reason) for r in replies] == [(prompt.answer, "stop")] * 3


def test_stop_strings(client):
    prompt = build_prompt(500, 17, chat=True, hops=3)
    first, second, third = prompt.answer.split()
    for stop, content in ((f" {second}", first), (third[1:], f"{first} {second} {third[0]}"), ("none", prompt.answer)):
        reply = ask(client, prompt.text, stop=[stop, "never"])
        assert (reply.content, reply.finish_reason) == (content, "stop")
        assert reply.stop_reason == (None if stop == "none" else stop)
    across = f"{first[-1]} {second[:2]}"  # begins in one token, ends in the next
    assert ask(client, prompt.text, stop=across).content == first[:-1]
    assert ask(client, prompt.text, stop=" me", thinking=True).reasoning == "Let"


def test_chat_logprobs(client):
    prompt = build_prompt(500, 18, chat=True, hops=3)
    reply = ask(client, prompt.text, logprobs=True, top_logprobs=2, thinking=True)
    assert [token for token, _ in reply.tokens[:5]] == ["Let", " me", " see", "</think>", prompt.answer.split()[0]]
    assert len(reply.tokens) == reply.completion_tokens == 4 + 3 + 1
    answer = chat(client, prompt, logprobs=True, top_logprobs=2).choices[0]
    for token in answer.logprobs.content:
        best, second = token.top_logprobs
        assert (best.token, best.logprob) == (token.token, token.logprob) and best.logprob - second.logprob > 3


def test_max_tokens_cuts(client):
    prompt = build_prompt(500, 19, chat=True, hops=3)
    reply = ask(client, prompt.text, max_tokens=2)
    assert (reply.content.split(), reply.finish_reason) == (prompt.answer.split()[:2], "length")
    assert reply.completion_tokens == 2
    reply = ask(client, prompt.text, max_tokens=2, thinking=True)
    assert (reply.content, reply.reasoning, reply.finish_reason) == ("", "Let me", "length")
    text, _, unplanted = facts(19)
    # Not "auto": there vLLM says "length" in a stream, but "tool_calls" of a call that was cut when not streaming.
    reply = ask(client, f"{text} What is {unplanted}?", tools=[LOOK_UP], tool_choice="required", max_tokens=8)
    assert (calls(reply), reply.finish_reason) == ([("look_up", {"code": unplanted})], "length")


MALFORMED = {"type": "function", "function": {"description": "it has no name"}}
BAD_REQUESTS = {
    "unknown model": (openai.NotFoundError, "another", {"model": "another"}),
    "tool without a name": (openai.BadRequestError, "tools.0.function.name", {"tools": [MALFORMED]}),
    "tools are no list": (openai.BadRequestError, "tools", {"tools": "look_up"}),
    "unknown response format": (openai.BadRequestError, "response_format", {"response_format": {"type": "xml"}}),
    "unknown named tool": (
        openai.BadRequestError,
        "tool_choice",
        {"tools": [LOOK_UP], "tool_choice": {"type": "function", "function": {"name": "pick"}}},
    ),
    "required without tools": (openai.BadRequestError, "tools", {"tool_choice": "required"}),
    "result without a call": (
        openai.BadRequestError,
        "Invalid messages at 1",
        {"messages": [user("a"), {"role": "tool", "tool_call_id": "1", "content": "b"}]},
    ),
    "temperature below 0": (openai.BadRequestError, "temperature", {"temperature": -0.1}),
    "temperature above 2": (openai.BadRequestError, "temperature", {"temperature": 2.1}),
    "several greedy choices": (openai.BadRequestError, "greedy", {"n": 2, "temperature": 0}),
    "no tokens": (openai.BadRequestError, "max_tokens", {"max_tokens": 0}),
    "unknown role": (openai.BadRequestError, "role", {"messages": [{"role": "nobody", "content": "a"}]}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error, named, request_", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_bad_request_is_refused_and_the_server_goes_on(client, error, named, request_, stream):
    good = {"model": MODEL, "messages": [user("What is red?")], "stream": stream}
    with pytest.raises(error, match=named):
        client.chat.completions.create(**good | request_)
    prompt = build_prompt(300, 20, chat=True)
    assert chat(client, prompt).choices[0].message.content == prompt.answer


def test_schema_that_no_grammar_can_follow(client):
    """Refused by the grammar's compiler: HTTP 400, but in a stream an error event, as its status is sent by then."""
    schema = {"name": "answer", "schema": {"type": "nonsense"}}
    request = {"model": MODEL, "messages": [user("What is red?")]}
    request["response_format"] = {"type": "json_schema", "json_schema": schema}
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        client.chat.completions.create(**request)
    with pytest.raises(openai.APIError, match="nonsense"):
        list(client.chat.completions.create(**request, stream=True))
    test_several_choices(client)


def test_what_vllms_encoding_of_chats_does_not_look_at(server):
    """docs/recipes.md says so: the same tokens with and without, be the last message a user's or the assistant's."""
    keys = ("add_generation_prompt", "continue_final_message")
    for messages in ([user("What is red?")], [user("What is red?"), {"role": "assistant", "content": "li"}]):
        found = []
        for values in ((True, False), (False, False), (False, True)):
            asked = {"model": MODEL, "messages": messages} | dict(zip(keys, values, strict=True))
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{server.base_url}/tokenize", json.dumps(asked).encode(), headers)
            with urllib.request.urlopen(request, timeout=30) as response:
                found.append(json.loads(response.read())["tokens"])
        assert found[0] == found[1] == found[2]


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
    assert len(lines) == 1 and "INFO" in lines[0]
    assert "(refused: " in lines[0] and "reference: it serves only under VLLM_DSA_PROVIDER" in lines[0]
