"""The documents say what is so: links lead somewhere, commands run or say that they were only parsed, names exist."""

import argparse
import json
import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import recipes
from recipes import DOCUMENTS, ROOT
from test_plan import MODELS
from test_recipes import PARSER
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX

from vllm_dsa import envs
from vllm_dsa.tools.main import main

BLOCKS = [block for file in DOCUMENTS for block in recipes.blocks(file)]
# What a block may hold that does not begin with "# parsed only": it is run by a test of this file; by `make setup`; by
# test_verify.py and test_bench.py. Lines of `vllm serve` are parsed by test_recipes.py, whatever the block says.
RUN = ("vllm-dsa", "make", "pip install -e .")
README_SERVES = "vllm serve PATH_OF_A_DEEPSEEK_V3.2_CHECKPOINT"  # examples/demo.py and test_serve.py run it
# A document whose unmarked blocks another test runs as they stand.
OWN_TEST = {"multi-node.md": "test_multi_node.py"}
OURS = sorted({shlex.join(words) for block in BLOCKS for words in block.commands if words[0] in ("vllm-dsa", "make")})


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_lead_somewhere(file):
    text = text_of(file)
    labels = dict(re.findall(r"^\[(.+?)\]: (\S+)$", text, re.MULTILINE))
    for label in re.findall(r"\]\[(.+?)\]", text):
        assert label in labels, f"[{label}] has no address"
    for target in [*re.findall(r"\]\((\S+?)\)", text), *labels.values()]:
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", text_of(linked), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_files_variables_and_options_that_are_named_exist(file):
    text = text_of(file)
    for path in re.findall(r"`((?:examples|docs|docker|tests|benchmarks|scripts|vllm_dsa)/[\w./-]+)", text):
        assert (ROOT / path.rstrip("./")).exists(), path
    assert set(re.findall(r"\bVLLM_DSA_\w+", text)) <= set(envs.TABLE)


def test_vllm_has_every_option_in_the_table_for_those_who_come_from_sglang():
    rows = re.findall(r"^\| `--.*?\| (.*) \|$", text_of(ROOT / "docs" / "deploy.md"), re.MULTILINE)
    assert len(rows) > 15
    known = {option for action in PARSER._actions for option in action.option_strings}
    for option in re.findall(r"--[a-z][\w-]*", " ".join(rows)):
        assert option in known, option


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.file.name}, {block.heading}")
def test_commands_are_run_or_said_to_be_parsed_only(block):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    if block.parsed_only or block.file.name in OWN_TEST:
        return
    for words in block.commands:
        line = " ".join(words)
        assert line.startswith((*RUN, README_SERVES)), (
            f"no test runs this: {line}. Begin the block with '# parsed only'."
        )


def test_documents_with_a_test_of_their_own_have_it():
    for name in OWN_TEST:
        assert (ROOT / "docs" / name).exists() and (ROOT / "tests" / OWN_TEST[name]).exists()


@pytest.mark.parametrize("line", OURS)
def test_our_own_commands_do_what_the_documents_say(line, tmp_path):
    """Those that ask no model and no server are run, on V3.2's config; the others are parsed, and run elsewhere."""
    program, command, *options = shlex.split(re.sub(r"'?\[.*\]'?", "", line))  # without what may be left out
    if program == "make":
        assert command in re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
        return
    (tmp_path / "config.json").write_text(json.dumps(MODELS["v32"]))
    options = [str(tmp_path) if option == "MODEL" else option for option in options]
    if command in ("doctor", "plan"):
        assert main([command, *options]) == 0
    else:
        parser = argparse.ArgumentParser()
        import_module(f"vllm_dsa.tools.{command}").add_arguments(parser)
        parser.parse_args(options)


def test_a_line_that_nobody_runs_is_seen():
    block = recipes.Block(Path("planted.md"), "fault", "curl http://127.0.0.1:8000/health\n")
    with pytest.raises(AssertionError, match="no test runs this: curl"):
        test_commands_are_run_or_said_to_be_parsed_only(block)


# SECURITY.md


def test_the_routes_without_a_key_are_those_in_security_md():
    """Of the installed vLLM, as an API server for text has them."""
    routes = {route.path for route in build_app(PARSER.parse_args(["model"]), ("generate",)).routes}
    open_routes = {path for path in routes if not path.startswith(GUARDED_PREFIX)} - {"/docs/oauth2-redirect"}
    section = text_of(ROOT / "SECURITY.md").partition("## What the API key")[2].partition("\n## ")[0]
    told = set(re.findall(r"`(/\w+)`", "".join(line for line in section.splitlines(True) if line.startswith("|"))))
    assert open_routes <= told | {"/openapi.json"}
    assert told <= open_routes
    assert set(GUARDED_PREFIX) == set(re.findall(r"`(/\w+)`", section.partition("\n| route")[0])) - {"/v1/completions"}
    hidden = {r.path for r in build_app(PARSER.parse_args(["model", "--disable-fastapi-docs"]), ("generate",)).routes}
    assert routes - hidden == {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
