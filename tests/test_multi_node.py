"""Two nodes on one machine, started with the commands of docs/multi-node.md, answer right."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import STDOUT, Popen

import openai
import pytest
import recipes
from planted_text import build_prompt
from recipes import Block
from tiny_checkpoint import write_planted

from vllm_dsa.testing.server import free_port, initial_environment, running, stop

GUIDE = recipes.ROOT / "docs" / "multi-node.md"
BLOCKS = [block for block in recipes.blocks(GUIDE) if block.heading == "Try it on one machine"]
LOOPBACK = ("127.0.0.1", "lo")
NAMESPACE = "node1"

pytestmark = [pytest.mark.slow, pytest.mark.serve]


def block_with(*words: str) -> Block:
    """The one block of the section whose text has all of these."""
    (found,) = (block for block in BLOCKS if all(word in block.text for word in words))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    write_planted(path, check=False)
    return path


@pytest.fixture
def nodes(request) -> Iterator[list[tuple[list[str], str, str]]]:
    """Of each node: what its command starts with, its address, its interface."""
    if request.param == "loopback":
        yield [([], *LOOPBACK), ([], *LOOPBACK)]
        return
    if os.geteuid() or not shutil.which("ip") or subprocess.run(["unshare", "--net", "true"], check=False).returncode:
        pytest.skip("needs root, iproute2 and the right to make network namespaces")
    try:
        subprocess.run(["bash", "-ec", block_with("netns add").text], check=True)
        first, second = ([], "198.18.0.1", "dsa0"), (["ip", "netns", "exec", NAMESPACE], "198.18.0.2", "dsa1")
        yield [first, second]
    finally:
        subprocess.run(["ip", "netns", "delete", NAMESPACE], check=False)  # takes the pair of interfaces along


def settings(folder: Path, head: str, address: str, interface: str) -> dict[str, str]:
    """The environment that the page's exports make, for other addresses."""
    block = block_with("export MODEL")
    script = block.text.partition("\n")[2] + "env -0"
    said = subprocess.run(["bash", "-ec", script], capture_output=True, check=True, env=initial_environment()).stdout
    exported = dict(os.fsdecode(entry).split("=", 1) for entry in said.split(b"\0") if entry)
    wanted = {"MODEL": str(folder), "HEAD": head, "VLLM_HOST_IP": address, "GLOO_SOCKET_IFNAME": interface}
    assert wanted.keys() <= exported.keys()
    path = os.pathsep.join((str(Path(sys.executable).parent), exported["PATH"]))
    return exported | wanted | {"PATH": path, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.mark.parametrize("split", ["--tensor-parallel-size 2", "--pipeline-parallel-size 2"])
@pytest.mark.parametrize("nodes", ["loopback", "namespaces"], indirect=True)
def test_two_nodes_answer_right(folder, nodes, split, tmp_path):
    port, meeting = free_port(), free_port()
    head = nodes[0][1]
    with ExitStack() as stack:
        for rank in (1, 0):
            before, address, interface = nodes[rank]
            line = block_with(f"--node-rank {rank}", split).text.rstrip()
            options = f"--master-port {meeting}" + (f" --port {port}" if rank == 0 else "")
            command = [*before, "bash", "-c", f"{line} {options}"]
            env = settings(folder, head, address, interface)
            if rank == 1:
                log = stack.enter_context(open(tmp_path / "node1.log", "wb"))
                stack.callback(stop, Popen(command, env=env, stdout=log, stderr=STDOUT, start_new_session=True))
            else:
                server = stack.enter_context(running(command, port, env, log_path=tmp_path / "node0.log"))
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120)
        for length in (300, 1500):
            prompt = build_prompt(length, seed=length)
            reply = client.completions.create(model=str(folder), prompt=prompt.text, temperature=0, max_tokens=4)
            assert reply.choices[0].text.strip() == prompt.answer
