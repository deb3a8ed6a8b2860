"""Answer questions without a server, through vLLM's LLM class.

    python examples/offline.py MODEL "What is sparse attention?" "What is an indexer?"
    python examples/offline.py MODEL --tensor-parallel-size 8 --max-model-len 32768 --thinking "Is 2027 a prime?"
    python examples/offline.py BASE_MODEL --completion "A base model goes on from here:"

MODEL is a folder or a Hugging Face id. Nothing of this package is imported: vLLM finds the plugin by itself.
"""

import argparse
import sys

from vllm import LLM, SamplingParams


def main() -> int:
    parser = argparse.ArgumentParser(description="Answer questions through vLLM's LLM class.")
    parser.add_argument("model", metavar="MODEL", help="folder or Hugging Face id")
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="one question each, answered together")
    parser.add_argument("--completion", action="store_true", help="go on from the texts as they are: for base models")
    parser.add_argument("--thinking", action="store_true", help="let the model think first")
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer; default: 256")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs; default: 1")
    parser.add_argument("--max-model-len", type=int, help="tokens of a prompt and its answer; default: the model's")
    parser.add_argument("--kv-cache-dtype", default="auto", help="auto, bfloat16 or fp8_ds_mla; default: auto")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32; default: auto")
    args = parser.parse_args()
    llm = LLM(
        model=args.model,
        load_format="safetensors",
        tensor_parallel_size=args.tensor_parallel_size,
        max_model_len=args.max_model_len,
        kv_cache_dtype=args.kv_cache_dtype,
        dtype=args.dtype,
    )
    sampling = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    if args.completion:
        outputs = llm.generate(args.prompts, sampling)
    else:
        conversations = [[{"role": "user", "content": prompt}] for prompt in args.prompts]
        outputs = llm.chat(conversations, sampling, chat_template_kwargs={"thinking": args.thinking})
    for prompt, output in zip(args.prompts, outputs, strict=True):
        print(f"{prompt[-60:]} -> {output.outputs[0].text.strip()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
