"""What careless and hostile clients send: name -> (path, JSON body). For test_hostile_requests.py."""

from typing import Any

from planted_text import build_prompt

MODEL = "planted"
LONG = build_prompt(300, 5, copies=32).text  # in chunks, at 64 tokens a step
HOT: dict[str, Any] = {"temperature": 1.0}
Request = tuple[str, Any]


def completion(**options: Any) -> Request:
    return "/v1/completions", {"model": MODEL, "prompt": LONG, "max_tokens": 8} | options


def chat(**options: Any) -> Request:
    messages = [{"role": "user", "content": LONG}]
    return "/v1/chat/completions", {"model": MODEL, "messages": messages, "max_tokens": 8} | options


def grammar(options: Any = None, **constraint: Any) -> Request:
    return completion(structured_outputs=constraint, **(options or {}))


def generate(tokens: Any = (5,) * 300, **params: Any) -> Request:
    return "/inference/v1/generate", {
        "model": MODEL,
        "token_ids": list(tokens),
        "sampling_params": {"max_tokens": 4} | params,
    }


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


NAN, INF = float("nan"), float("inf")
ITSELF = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
WORDS = ["lion", "eagle"]

SAMPLING = {
    "seed": completion(**HOT, seed=5),
    "seed below 0": completion(**HOT, seed=-5),
    "largest seed": completion(**HOT, seed=2**63 - 1),
    "too large a seed": completion(**HOT, seed=2**64),
    "seed, choices": completion(**HOT, seed=5, n=3),
    "seed, logprobs": completion(**HOT, seed=5, logprobs=5, echo=True),
    "seed by /invocations": ("/invocations", completion(**HOT, seed=5)[1]),
    "seed in a chat": chat(**HOT, seed=5),
    "seed by /v1/responses": ("/v1/responses", {"model": MODEL, "input": LONG, "max_output_tokens": 8} | HOT),
    "seed by tokens": generate(**HOT, seed=5),
    "temperature 1e-38": completion(temperature=1e-38),
    "temperature NaN": completion(temperature=NAN),
    "temperature infinite": completion(temperature=INF),
    "top_p 0": completion(**HOT, top_p=0.0),
    "top_p tiny": completion(**HOT, top_p=1e-12),
    "top_p NaN": completion(**HOT, top_p=NAN),
    "top_k 1": completion(**HOT, top_k=1),
    "top_k 0": completion(**HOT, top_k=0),
    "top_k -5": completion(**HOT, top_k=-5),
    "top_k 2**31": completion(**HOT, top_k=2**31),
    "top_k 2**40": completion(**HOT, top_k=2**40),
    "min_p 1": completion(**HOT, min_p=1.0),
    "min_p NaN": completion(**HOT, min_p=NAN),
    "penalties": completion(**HOT, presence_penalty=2, frequency_penalty=-2, repetition_penalty=1.2, seed=1, n=2),
    "repetition_penalty tiny": completion(**HOT, repetition_penalty=1e-30),
    "repetition_penalty huge": completion(**HOT, repetition_penalty=1e38),
    "repetition_penalty NaN": completion(repetition_penalty=NAN),
    "logit_bias": completion(logit_bias={"5": 100}),
    "logit_bias of no token": completion(logit_bias={"99999999": 1}),
    "logit_bias infinite": completion(logit_bias={"5": INF}),
    "logit_bias against all": completion(**HOT, logit_bias={str(token): -100 for token in range(700)}),
    "allowed_token_ids none": completion(allowed_token_ids=[]),
    "allowed_token_ids one": completion(**HOT, allowed_token_ids=[300], top_k=5),
    "allowed_token_ids of no token": completion(allowed_token_ids=[-1, 10**6]),
    "bad_words": completion(**HOT, bad_words=["lion", "eagle", "whale"], seed=3),
    "bad_words empty": completion(bad_words=[""]),
    "bad_words long": completion(bad_words=[LONG]),
    "min_tokens": completion(min_tokens=8, stop=["a"], stop_token_ids=[1, 2, 3]),
    "min_tokens above max_tokens": completion(min_tokens=9),
    "stop_token_ids of no token": completion(stop_token_ids=[-7, 10**9], min_tokens=3),
    "stop empty": completion(stop=[""]),
    "stop many": completion(stop=["x"] * 100),
    "max_tokens 0": completion(max_tokens=0),
    "max_tokens 1": completion(**HOT, max_tokens=1, top_k=3),
    "max_tokens huge": completion(max_tokens=10**9),
    "many choices": completion(**HOT, n=64, max_tokens=1),
    "too many choices": completion(**HOT, n=100_000),
    "beam search": completion(use_beam_search=True, n=3, max_tokens=3),
    "beam search, NaN": completion(use_beam_search=True, length_penalty=NAN, max_tokens=3),
    "repetition_detection": completion(repetition_detection={"max_pattern_size": -1, "min_count": 0}),
    "thinking_token_budget": chat(thinking_token_budget=1),
}
LOGPROBS = {
    "logprobs 0": completion(logprobs=0),
    "logprobs at the limit": completion(**HOT, logprobs=20, n=2),
    "logprobs above the limit": completion(logprobs=21),
    "logprobs -1": completion(logprobs=-1),
    "logprob_token_ids": completion(logprob_token_ids=[5, 6], logprobs=2),
    "logprob_token_ids of no token": completion(logprob_token_ids=[10**7, -1], logprobs=2),
    "prompt_logprobs": completion(prompt_logprobs=5),
    "prompt_logprobs, cached": completion(prompt_logprobs=20),
    "prompt_logprobs, seed": completion(**HOT, prompt_logprobs=0, seed=4),
    "prompt_logprobs -1": completion(prompt_logprobs=-1),
    "prompt_logprobs in a stream": completion(prompt_logprobs=1, stream=True),
    "echo": completion(**HOT, echo=True, logprobs=3, seed=3, n=2),
    "echo of the prompt alone": completion(echo=True, max_tokens=0, logprobs=1),
    "top_logprobs at the limit": chat(logprobs=True, top_logprobs=20),
    "logprobs by tokens": generate(logprobs=-1, prompt_logprobs=-1),
    "flat_logprobs by tokens": generate(flat_logprobs=True, logprobs=3),
}
GRAMMARS = {
    "regex": grammar(HOT | {"seed": 3}, regex="(a|b)*c"),
    "regex no good": grammar(regex="(((("),
    "regex huge": grammar(regex="(a{1,1000}){1,1000}"),
    "regex empty": grammar(regex=""),
    "choice": grammar(HOT | {"top_k": 2, "n": 2, "logprobs": 2, "seed": 4}, choice=WORDS),
    "choice none": grammar(choice=[]),
    "choice empty": grammar(choice=[""]),
    "choice that is too short": grammar({"min_tokens": 8}, choice=["lion"]),
    "choice of a bad word": grammar({"bad_words": ["lion"]}, choice=["lion"]),
    "choice that is not allowed": grammar({"allowed_token_ids": [300]}, choice=["lion"]),
    "grammar of itself": grammar(grammar="root ::= root"),
    "grammar of itself twice": grammar(grammar="root ::= root root | root"),
    "grammar undefined": grammar(grammar="root ::= foo"),
    "grammar empty": grammar(grammar=""),
    "schema": grammar(HOT, json={"type": "object"}),
    "schema no good": grammar(json="{"),
    "schema of itself": grammar(json=ITSELF),
    "schema nested": grammar(json=nested(60)),
    "schema of many": grammar(json={"type": "object", "properties": {str(i): {"type": "string"} for i in range(2000)}}),
    "schema of nonsense": grammar(json={"type": "nonsense"}),
    "schema false": grammar(json="false"),
    "schema of no value": grammar(json={"enum": []}),
    "schema of no number": grammar(json={"type": "number", "minimum": 5, "maximum": 1}),
    "schema with a back reference": grammar(json={"type": "string", "pattern": "(?=a)b\\1"}),
    "structural tag": grammar(structural_tag="{}"),
    "two constraints": grammar(regex="a", choice=["b"]),
    "no constraint": grammar(),
    "response_format": chat(**HOT, response_format={"type": "json_object"}, seed=4),
    "response_format without": chat(response_format={"type": "json_schema"}),
}
PROMPTS = {
    "prompt empty": completion(prompt=""),
    "prompt none": completion(prompt=[]),
    "prompt of nothing": completion(prompt=[[]]),
    "prompt of no token": completion(prompt=[10**6, 2**40]),
    "prompt below 0": completion(prompt=[-1, 5]),
    "prompt of the last token": completion(prompt=[703]),
    "prompts many": completion(**HOT, prompt=["a"] * 50, seed=3),
    "prompt too long": completion(prompt=LONG * 20),
    "prompt with a surrogate": completion(prompt="\ud800"),
    "stop with a surrogate": completion(stop=["\ud800"]),
    "prompt_embeds": completion(prompt=None, prompt_embeds="AAAA"),
    "truncated": completion(truncate_prompt_tokens=5),
    "truncated to nothing": completion(truncate_prompt_tokens=0),
    "kv_transfer_params": completion(kv_transfer_params={"do_remote_prefill": True, "remote_block_ids": [1, 2]}),
    "kv_transfer_params by tokens": generate(extra_args={"kv_transfer_params": {"do_remote_decode": True}}),
    "priority": completion(priority=5),
    "priority huge": completion(priority=2**70),
    "cache_salt": completion(cache_salt="x"),
    "vllm_xargs": completion(vllm_xargs={"a": 1}),
    "request_id long": completion(request_id="a" * 10_000),
    "logits_processors": completion(logits_processors=["os.system"]),
    "trace_decode_token_ids": completion(trace_decode_token_ids=[5, 6]),
    "tokens of no token": generate([-5, 10**9]),
    "tokens none": generate([]),
    "tokens, odd parameters": generate(temperature=-1.0, top_k=2**33, seed=2**65),
    "tokens, none allowed": generate(allowed_token_ids=[]),
    "not JSON": ("/v1/completions", "x"),
    "messages none": chat(messages=[]),
    "messages null": chat(messages=None),
    "message of nobody": chat(messages=[{"content": "a"}]),
    "message of null": chat(messages=[{"role": "user", "content": None}]),
    "message with an image": chat(
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a"}}]}]
    ),
    "chat_template": chat(chat_template="{{ 1/0 }}"),
    "chat_template_kwargs": chat(chat_template_kwargs={"tokenize": True, "messages": 1}),
    "tools none": chat(tools=[]),
    "tool_choice": chat(tool_choice="x"),
    "/tokenize": ("/tokenize", {"model": MODEL, "prompt": LONG}),
    "/tokenize of no messages": ("/tokenize", {"model": MODEL, "messages": []}),
    "/detokenize of no token": ("/detokenize", {"model": MODEL, "tokens": [-5, 10**9]}),
    "/v1/embeddings": ("/v1/embeddings", {"model": MODEL, "input": "a"}),
    "/pooling": ("/pooling", {"model": MODEL, "input": "a"}),
    "/score": ("/score", {"model": MODEL, "text_1": "a", "text_2": "b"}),
    "/rerank": ("/rerank", {"model": MODEL, "query": "a", "documents": ["b"]}),
    "/v1/messages": ("/v1/messages", {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}),
}
REQUESTS: dict[str, Request] = SAMPLING | LOGPROBS | GRAMMARS | PROMPTS
# HTTP 500 from vLLM's own code, where 400 would be right; the server goes on. docs/operations.md says so.
INTERNAL_ERRORS = {
    "choice that is not allowed",
    "grammar of itself",
    "grammar of itself twice",
    "schema of itself",
    "messages none",
    "/tokenize of no messages",
    "stop with a surrogate",
}
INTERNAL_ERRORS_BESIDE_DRAFTS = {"logprob_token_ids"}
