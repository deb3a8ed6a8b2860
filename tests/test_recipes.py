"""Recipes: every `vllm serve` line is parsed by vLLM's own parser, fits the machines it names, and does what it says.

No published model is at hand. The slow tests give the recipes' flags to servers of the planted checkpoint.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import recipes
from planted_text import build_prompt
from planted_tools import add_tools
from recipes import Serve
from test_plan import MODELS
from tiny_checkpoint import write_planted
from vllm.config.load import LoadConfig
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_dsa.checkpoint import check
from vllm_dsa.checkpoint_files import CheckpointError
from vllm_dsa.testing.server import initial_environment, serve
from vllm_dsa.tools.main import main

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "recipes.md"
# Heading of docs/recipes.md -> the model of its first line.
PUBLISHED = {
    "DeepSeek-V3.2": "deepseek-ai/DeepSeek-V3.2",
    "DeepSeek-V3.2-Speciale": "deepseek-ai/DeepSeek-V3.2-Speciale",
    "DeepSeek-V3.2-Exp": "deepseek-ai/DeepSeek-V3.2-Exp",
    "DeepSeek-V3.2-Exp-Base": "deepseek-ai/DeepSeek-V3.2-Exp-Base",
    "DeepSeek-Math-V2": "deepseek-ai/DeepSeek-Math-V2",
    "GLM-5, 5.1, 5.2": "zai-org/GLM-5-FP8",
    "A.X-K2": "skt/A.X-K2",
}
# Where a line says on what it runs -> checkpoint of test_plan.MODELS, and options of `vllm-dsa plan`.
MACHINES = {
    "serve_h200_tp8.sh": ("v32", "--gpu H200 --num-gpus 8 --tp 8"),
    "serve_h200_dp8_ep.sh": ("v32", "--gpu H200 --num-gpus 8 --dp 8 --ep"),
    "serve_multi_node_ray.sh": ("v32", "--gpu A100-80 --num-gpus 8 --nodes 2 --tp 8 --pp 2"),
    "serve_a100_w4a16.sh": ("v32-w4a16", "--gpu A100-80 --num-gpus 8 --tp 8"),
    "compose.yaml": ("v32", "--gpu H200 --num-gpus 8 --tp 8"),
    "single-node.yaml, server": ("v32", "--gpu H200 --num-gpus 8 --tp 8"),
    "multi-node.yaml, leader": ("v32", "--gpu H100 --num-gpus 8 --nodes 2 --tp 8 --pp 2"),
    "multi-node.yaml, worker": ("v32", "--gpu H100 --num-gpus 8 --nodes 2 --tp 8 --pp 2"),
    "recipes.md, DeepSeek-V3.2": ("v32", "--gpu H200 --num-gpus 8 --tp 8"),
    "recipes.md, GLM-5, 5.1, 5.2": ("glm-fp8", "--gpu H200 --num-gpus 8 --tp 8"),
}
PARSER = make_arg_parser(FlexibleArgumentParser())


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[Serve]:
    return recipes.in_documents() + recipes.in_scripts(tmp_path_factory.mktemp("fake")) + recipes.in_containers()


def parsed(line: Serve):
    """vLLM's namespace of a line; pytest fails with the parser's message."""
    try:
        return PARSER.parse_args(list(line.words))
    except SystemExit:
        pytest.fail(f"{line.where}: vLLM's parser refuses {' '.join(line.words)}")


def test_vllms_parser_takes_every_line(lines):
    assert len(lines) >= len(PUBLISHED) + len(recipes.SCRIPTS) + 4
    for line in lines:
        args = parsed(line)
        assert args.model_tag == line.model, line
        if args.reasoning_parser:
            assert ReasoningParserManager.get_reasoning_parser(args.reasoning_parser), line
        if args.tool_call_parser:
            assert ToolParserManager.get_tool_parser(args.tool_call_parser), line
        assert bool(args.tool_call_parser) == args.enable_auto_tool_choice, line


def test_no_line_trusts_remote_code(lines):
    for line in lines:
        assert not parsed(line).trust_remote_code, line
    for file in [*recipes.SCRIPTS, recipes.COMPOSE, *recipes.MANIFESTS, *(ROOT / "docker").glob("Dockerfile*")]:
        assert "trust-remote-code" not in file.read_text(), file
    for script in (ROOT / "examples").glob("*.py"):
        assert "trust_remote_code" not in script.read_text(), script


def test_recipes_read_safetensors_only_and_ask_for_nothing_that_is_refused(lines):
    ours = [line for line in lines if line.where.startswith("recipes.md") or ".md" not in line.where]
    assert len(ours) > len(MACHINES)
    for line in ours:
        args = parsed(line)
        if line.model != "MODEL":
            assert args.load_format == "safetensors", line
        assert args.kv_cache_dtype in ("auto", "fp8_ds_mla"), line
        assert not args.enable_lora and args.kv_transfer_config is None and args.hf_overrides in ({}, None), line
        assert args.decode_context_parallel_size == 1 and args.api_key is None, line


def test_pickled_weights_are_not_read(tmp_path):
    """A folder without safetensors is refused; in a download, which is not checked before, nobody looks for them."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS["v32"]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin and no safetensors file: pickled"):
        check(tmp_path, MODELS["v32"])
    assert main(["doctor", str(tmp_path)]) == 1

    def files(load_format):
        loader = DefaultModelLoader(LoadConfig(load_format=load_format))
        return loader._prepare_weights(str(tmp_path), None, None, True, None)[1]

    assert [Path(file).name for file in files("auto")] == ["pytorch_model.bin"], "vLLM itself would read it"
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        files("safetensors")


def test_every_model_has_a_recipe():
    found = {block.heading: words for block in reversed(recipes.blocks(GUIDE)) for words in block.commands}
    for heading, model in PUBLISHED.items():
        assert found[heading][:3] == ["vllm", "serve", model]
    listed = (ROOT / "README.md").read_text()
    for name in re.findall(r"DeepSeek-V3\.2 \| (.*?) \|", listed)[0].split(", "):
        assert any(name in heading for heading in PUBLISHED), name


def test_lines_fit_the_machines_that_they_name(lines, tmp_path, capsys):
    found = {line.where: line for line in reversed(lines)}
    for where, (model, machine) in MACHINES.items():
        args = parsed(found[where])
        (tmp_path / "config.json").write_text(json.dumps(MODELS[model]))
        asked = ["plan", str(tmp_path), *machine.split(), "--max-model-len", str(args.max_model_len), "--json"]
        assert main(asked) == 0, where
        report = json.loads(capsys.readouterr().out)
        layout = {"tp": args.tensor_parallel_size, "dp": args.data_parallel_size, "pp": args.pipeline_parallel_size}
        assert report["layout"] == layout | {"ep": args.enable_expert_parallel}, where
        assert report["cache"]["dtype"] == args.kv_cache_dtype, where
        planned = PARSER.parse_args(re.split(r"vllm serve ", report["serve"][0])[1].split())
        for option in ("tokenizer_mode", "max_model_len", "kv_cache_dtype"):
            assert getattr(args, option) == getattr(planned, option), (where, option)
    assert parsed(found["multi-node.yaml, worker"]).headless


def test_scripts_pass_their_options_on_and_explain_themselves(lines):
    for script in recipes.SCRIPTS:
        (line,) = (line for line in lines if line.where == script.name)
        assert line.words[-2:] == ("--port", "9999")
    for script, arguments in (("serve_multi_node_ray.sh", []), ("serve_a100_w4a16.sh", [])):
        command = ["bash", str(ROOT / "examples" / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode == 2 and done.stderr.startswith(f"examples/{script}"), done.stderr


def test_the_parser_refuses_a_flag_that_vllm_does_not_have():
    with pytest.raises(pytest.fail.Exception, match="refuses"):
        parsed(Serve("planted fault", ("model", "--tensor-parallel-sizes", "8x")))


def test_the_batch_is_one_that_vllm_reads():
    from vllm.entrypoints.launchers.run_batch import BatchRequestInput

    asked = [BatchRequestInput.model_validate_json(line) for line in BATCH.read_text().splitlines()]
    assert {request.url for request in asked} == {"/v1/chat/completions"}
    assert len({request.custom_id for request in asked}) == len(asked)


# What the flags do, on the planted checkpoint

BATCH = ROOT / "examples" / "batch.jsonl"
SMALL = ("--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "512", "--enforce-eager")
ON_CPU = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
OF_SIZE = ("--tensor-parallel-size", "--max-model-len")
TOOL = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"code": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    write_planted(folder, check=False)
    add_tools(folder)
    return folder


def flags(heading: str) -> list[str]:
    """The options of a recipe, but for those that say how large the machine is."""
    words = next(words for block in recipes.blocks(GUIDE) if block.heading == heading for words in block.commands)[3:]
    for option in OF_SIZE:
        at = words.index(option)
        del words[at : at + 2]
    return words


def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.slow
@pytest.mark.serve
def test_speciale_thinks_and_answers_tools_with_400(planted):
    with serve(planted, *flags("DeepSeek-V3.2-Speciale"), *SMALL) as server, client(server) as api:
        prompt = build_prompt(400, 1, chat=True)
        asked = dict(model=str(planted), messages=[{"role": "user", "content": prompt.text}], temperature=0)
        message = api.chat.completions.create(**asked, max_tokens=32).choices[0].message
        assert message.content.strip() == prompt.answer and message.reasoning.strip() == "Let me see"
        named = {"type": "function", "function": {"name": "look_up"}}
        for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "required"}, {"tool_choice": named}):
            with pytest.raises(openai.BadRequestError, match="tool-call-parser") as refused:
                api.chat.completions.create(**asked, tools=[TOOL], **choice)
            assert refused.value.status_code == 400
        # And the server goes on.
        assert api.chat.completions.create(**asked, max_tokens=32).choices[0].message.content.strip() == prompt.answer


@pytest.mark.slow
@pytest.mark.serve
def test_a_base_model_completes_and_answers_chats_with_400(planted):
    with serve(planted, *flags("DeepSeek-V3.2-Exp-Base"), *SMALL) as server, client(server) as api:
        prompt = build_prompt(400, 2)
        with pytest.raises(openai.BadRequestError, match="This is a base model without a chat format: use /v1/comp"):
            api.chat.completions.create(model=str(planted), messages=[{"role": "user", "content": prompt.text}])
        reply = api.completions.create(model=str(planted), prompt=prompt.text, temperature=0, max_tokens=4)
        assert reply.choices[0].text.strip() == prompt.answer


def run_example(script: str, *arguments, **environment) -> str:
    """What examples/SCRIPT prints."""
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    env = {**initial_environment(), **ON_CPU, **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.serve
def test_chat_streams_thinks_and_calls_its_tool(planted, tmp_path):
    """Over HTTP with the flags of DeepSeek-V3.2 and an API key; the facts are in the notes, and nowhere else."""
    notes = tmp_path / "notes.txt"
    prompt = build_prompt(400, 3)
    notes.write_text(prompt.text)
    asked = re.search(r"What is (\w+)\?", prompt.text)[1]
    key = {"VLLM_API_KEY": "not a secret"}
    with serve(planted, *flags("DeepSeek-V3.2"), *SMALL, env=key) as server:
        url = f"--url={server.base_url}/v1"
        for thinking in ([], ["--thinking"]):
            said = run_example("chat.py", url, f"--notes={notes}", *thinking, f"What is {asked}?", **key).splitlines()
            calls = [line for line in said if line.startswith("calls:")]
            assert len(calls) == 1 and json.loads(calls[0].partition("(")[2][:-1]) == {"code": asked, "limit": 16}
            assert said[-1].endswith(f"answer: {prompt.answer}")
            assert any("thinks: Let me see" in line for line in said) == bool(thinking)
        said = run_example("chat.py", url, prompt.text, **key)
        assert said.strip() == f"answer: {prompt.answer}"


@pytest.mark.slow
def test_offline_answers(planted):
    prompts = [build_prompt(400, seed) for seed in (5, 6)]
    small = ["--dtype=float32", "--max-model-len=4096"]
    for kind in (["--thinking"], ["--completion"]):
        said = run_example("offline.py", planted, *(p.text for p in prompts), *kind, *small)
        found = [line for line in said.splitlines() if re.search(r" What is \w+\? -> ", line)]
        for line, prompt in zip(found, prompts, strict=True):
            assert line.rpartition(" -> ")[0].endswith(prompt.text[-50:])
            assert re.split(r" |</think>", line)[-1] == prompt.answer
            assert ("</think>" in line) == ("--thinking" in kind)


@pytest.mark.slow
def test_a_batch_is_answered_line_by_line(planted, tmp_path):
    out = tmp_path / "out.jsonl"
    script = Path(sys.executable).with_name("vllm")
    command = [script, "run-batch", "-i", BATCH, "-o", out, "--model", planted, "--load-format", "safetensors"]
    command += ["--served-model-name", "deepseek-ai/DeepSeek-V3.2", *SMALL]
    subprocess.run(list(map(str, command)), env={**initial_environment(), **ON_CPU}, check=True, timeout=300)
    replies = {reply["custom_id"]: reply for reply in map(json.loads, out.read_text().splitlines())}
    assert {reply["response"]["status_code"] for reply in replies.values()} == {200}
    assert list(replies) == ["one", "two"]
    assert replies["two"]["response"]["body"]["choices"][0]["message"]["content"].strip() == "whale"
