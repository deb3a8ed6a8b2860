"""Serve a DeepSeek-V3.2 checkpoint with the real `vllm serve` and ask it a question whose answer is known.

    python examples/demo.py [--tokens 3000]     exit status 0 if the answer is right
    python examples/demo.py --stock             the same with the plugin switched off: what stock vLLM says

The checkpoint is the planted one of tiny_checkpoint.py, in bfloat16 and block-scaled FP8 as DeepSeek publishes it. It
answers from 16 facts among thousands of filler words, and only if the sparse attention finds exactly those. The server
uses a free port and is gone when this program ends.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import openai
from planted_text import build_prompt

from vllm_dsa.testing.server import Server, ServerError, exit_on_sigterm, port_is_open, serve

FOLDER = Path(__file__).parents[1] / ".demo"
CHECKPOINT = FOLDER / "planted"
MODEL = "planted-deepseek-v3.2"
MAX_LENGTH = 8192
SERVE_ARGS = (
    f"--served-model-name={MODEL}",
    f"--max-model-len={MAX_LENGTH}",
    "--tokenizer-mode=deepseek_v32",
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a planted DeepSeek-V3.2 checkpoint through vllm serve.")
    parser.add_argument("--tokens", type=int, default=3000, help="length of the prompt (300 to 8000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed asks another question")
    parser.add_argument("--stock", action="store_true", help="switch the plugin off and show what stock vLLM says")
    args = parser.parse_args()
    if not 300 <= args.tokens <= 8000:
        parser.error(f"--tokens: {args.tokens} is not in 300 to 8000")
    exit_on_sigterm()
    write_checkpoint()
    try:
        if args.stock:
            return stock()
        return ask(args.tokens, args.seed)
    except KeyboardInterrupt:
        show("stopped", "the server is gone")
        return 130
    except ServerError as error:
        show("FAILED", str(error))
        return 1


def show(label: str, text: str) -> None:
    print(f"{label:<11} {text}", flush=True)


def write_checkpoint() -> None:
    """Write the planted checkpoint, unless it stands there since the generator last changed."""
    generator, written = Path(__file__).with_name("tiny_checkpoint.py"), CHECKPOINT / "written.txt"
    sources = (generator, generator.with_name("checkpoint_files.py"), Path(__file__))
    if not written.exists() or written.stat().st_mtime < max(file.stat().st_mtime for file in sources):
        show("checkpoint", "writing it, and checking its answers with transformers ...")
        command = [sys.executable, str(generator), "planted", str(CHECKPOINT), "--fp8", "--dtype", "bfloat16"]
        env = {**os.environ, "TQDM_DISABLE": "1"}
        result = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
        written.write_text(result.stdout.splitlines()[-1])
    show("checkpoint", f"{os.path.relpath(CHECKPOINT)}: {written.read_text()}")


def wait(seconds: float) -> None:
    if int(seconds) % 10 == 0 and seconds >= 1:
        show("", f"... {seconds:.0f} s")


def ask(tokens: int, seed: int) -> int:
    """Serve, ask, compare. Returns the exit status."""
    index_topk = json.loads((CHECKPOINT / "config.json").read_text())["index_topk"]
    prompt = build_prompt(tokens, seed, chat=True, copies=index_topk)
    facts, _, question = prompt.text.rpartition(" What is ")
    asked = question.rstrip("?")
    show("server", f"vllm serve {os.path.relpath(CHECKPOINT)} {' '.join(SERVE_ARGS)}")
    start = time.monotonic()
    with serve(CHECKPOINT, *SERVE_ARGS, log_path=FOLDER / "server.log", on_wait=wait) as server:
        show("", f"ready after {time.monotonic() - start:.0f} s at {server.base_url}")
        show("providers", provider_line(server))
        show("prompt", f"{tokens:,} tokens, index_topk is {index_topk}: {facts[:230]} ...")
        show("", f"{index_topk} of its words are {asked}={prompt.answer}")
        show("question", f"What is {asked}?")
        try:
            answer = stream_answer(server, prompt.text)
        except openai.APIError as error:
            failure = f"the server failed to answer ({error}); its log: {server.log_path}"
            raise ServerError(failure, *server.errors()[:1]) from error
    show("expected", prompt.answer)
    right = answer == prompt.answer
    show("RIGHT" if right else "WRONG", "" if right else f"the server's log: {server.log_path}")
    if port_is_open(server.port):
        raise ServerError(f"port {server.port} is still open after the server was stopped")
    return 0 if right else 1


def stream_answer(server: Server, text: str) -> str:
    """Ask through the OpenAI API; print the answer as it comes."""
    # trust_env: a machine's proxy settings are not for its own loopback address.
    client = openai.OpenAI(
        base_url=f"{server.base_url}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False)
    )
    with client:
        chunks = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=16, stream=True
        )
        print(f"{'answer':<11} ", end="")
        answer = ""
        for chunk in chunks:
            piece = (chunk.choices[0].delta.content if chunk.choices else None) or ""
            print(piece, end="", flush=True)
            answer += piece
    print()
    return answer.strip()


def provider_line(server: Server) -> str:
    """What the plugin logged about who computes write, select and attend."""
    lines = [line for line in server.log().splitlines() if re.search(r"\bwrite\b.*\bselect\b.*\battend\b", line)]
    return lines[0].partition("] ")[2] if lines else f"not in the log ({server.log_path})"


def stock() -> int:
    """Serve with the plugin switched off. Returns 0 if stock vLLM refuses, as it does on a CPU."""
    show("server", f"VLLM_DSA_DISABLE=1 vllm serve {os.path.relpath(CHECKPOINT)} {' '.join(SERVE_ARGS)}")
    env = {"VLLM_DSA_DISABLE": "1"}
    try:
        with serve(CHECKPOINT, *SERVE_ARGS, env=env, log_path=FOLDER / "stock.log", on_wait=wait):
            show("stock vLLM", "serves this model on this machine")
            return 1
    except ServerError as error:
        show("stock vLLM", error.cause or str(error))
        return 0 if error.cause else 1


if __name__ == "__main__":
    sys.exit(main())
