"""Serve a DeepSeek-V3.2 checkpoint with the real `vllm serve` and ask it a question whose answer is known.

    python examples/demo.py [--tokens 3000]     exit status 0 if the answer is right
    python examples/demo.py --stock             the same with the plugin switched off: what stock vLLM says

The checkpoint is the planted one of tiny_checkpoint.py: it answers from 16 facts among thousands of filler words, and
only if the sparse attention finds exactly those. The server uses a free port and is gone when this program ends.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import openai
from tiny_checkpoint import Prompt, build_prompt, write_planted

from vllm_dsa.testing.server import Server, ServerError, exit_on_sigterm, port_is_open, serve

FOLDER = Path(__file__).parents[1] / ".demo"
CHECKPOINT = FOLDER / "planted"
MODEL = "planted-deepseek-v3.2"
INDEX_TOPK = 16
MAX_LENGTH = 8192
SERVE_ARGS = (
    f"--served-model-name={MODEL}",
    "--dtype=float32",  # vLLM would round a float32 checkpoint to bfloat16
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
        return stock() if args.stock else ask(build_prompt(args.tokens, args.seed, chat=True, copies=INDEX_TOPK), args.tokens)
    except KeyboardInterrupt:
        show("stopped", "the server is gone")
        return 130


def show(label: str, text: str) -> None:
    print(f"{label:<11} {text}", flush=True)


def write_checkpoint() -> None:
    """Write the planted checkpoint, unless the generator has not changed since the last time."""
    generator, written = Path(__file__).with_name("tiny_checkpoint.py"), CHECKPOINT / ".complete"
    if not written.exists() or written.stat().st_mtime < generator.stat().st_mtime:
        show("checkpoint", "writing it, and checking its answers with transformers ...")
        margin = write_planted(CHECKPOINT, index_topk=INDEX_TOPK)
        written.write_text(f"{margin}\n")
    show("checkpoint", f"{CHECKPOINT.relative_to(Path.cwd(), walk_up=True) if sys.version_info >= (3, 12) else CHECKPOINT}")


def wait(seconds: float) -> None:
    if int(seconds) % 10 == 0 and seconds >= 1:
        show("", f"... {seconds:.0f} s")


def ask(prompt: Prompt, tokens: int) -> int:
    """Serve, ask, compare. Returns the exit status."""
    facts, _, question = prompt.text.rpartition(" What ")
    show("server", f"vllm serve {CHECKPOINT.name} {' '.join(SERVE_ARGS)}")
    start = time.monotonic()
    with serve(CHECKPOINT, *SERVE_ARGS, log_path=FOLDER / "server.log", on_wait=wait) as server:
        show("", f"ready after {time.monotonic() - start:.0f} s at {server.base_url}")
        show("providers", provider_line(server))
        show("prompt", f"{tokens:,} tokens, {tokens // INDEX_TOPK} times index_topk: {facts[:230]} ...")
        show("question", f"What {question}")
        answer = stream_answer(server, prompt.text)
    show("expected", prompt.answer)
    right = answer == prompt.answer
    show("RIGHT" if right else "WRONG", "" if right else f"the server's log is {FOLDER / 'server.log'}")
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
    show("server", "VLLM_DSA_DISABLE=1 vllm serve ...")
    env = {"VLLM_DSA_DISABLE": "1"}
    try:
        with serve(CHECKPOINT, *SERVE_ARGS, env=env, log_path=FOLDER / "stock.log", on_wait=wait) as server:
            show("stock vLLM", f"serves this model here, at {server.base_url}")
            return 1
    except ServerError:
        log = (FOLDER / "stock.log").read_text(errors="replace")
        reasons = re.findall(r"\b(\w*(?:Error|Exception): .*)", log)
        show("stock vLLM", reasons[0] if reasons else f"did not start, see {FOLDER / 'stock.log'}")
        return 0 if reasons else 1


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
