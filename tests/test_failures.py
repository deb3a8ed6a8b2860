"""A process of a server is killed: under `vllm-dsa supervise` the server ends with a status that says so, leaves no
process and no port behind, and starts again."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from planted_text import build_prompt
from test_server import stub
from tiny_checkpoint import write_planted

from vllm_dsa.testing.server import HOST, Server, free_port, port_is_open, running, vllm_command

SUPERVISE = [sys.executable, "-m", "vllm_dsa.tools.main", "supervise", "--"]
STREAMS = 8
SECONDS = 60  # from the kill until all is gone


def descendants(pid: int) -> dict[int, str]:
    """Living processes below one: pid -> command line."""
    parents, found = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
    below = {pid}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    for child in below - {pid}:
        with suppress(FileNotFoundError, ProcessLookupError):
            found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return found


def alive(pids: Any) -> list[int]:
    """Those that still run; a killed child of this process is a zombie until it is waited for, and does not."""
    states = {}
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return [pid for pid, state in states.items() if state != "Z"]


def status_of(pid: int, seconds: float) -> int:
    """Exit status of a child that ends within this time; left for its Popen to collect."""
    deadline = time.monotonic() + seconds
    while not (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)):
        assert time.monotonic() < deadline, f"still there after {seconds:g} s"
        time.sleep(0.1)
    assert ended.si_code == os.CLD_EXITED
    return ended.si_status


# Servers without an engine.


@pytest.mark.parametrize(
    "script, status, message",
    [
        ("sleep 99 & kill -9 $$", 128 + signal.SIGKILL, "ended by SIGKILL and was not asked to.*ended now: 1"),
        ("sleep 99 & exit 0", 1, "ended with status 0 and was not asked to.*ended now: 1"),
        ("exit 7", 7, "ended with status 7 and was not asked to.*ended now: 0"),
    ],
)
def test_a_server_that_ends_by_itself_has_failed(script, status, message):
    done = subprocess.run([*SUPERVISE, "bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert re.search(message, done.stderr)


def test_a_command_that_is_none():
    done = subprocess.run([*SUPERVISE, "no-such-server"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no-such-server: No such file or directory" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_asked_to_end_has_not_failed(number):
    script = "trap 'exit 0' TERM INT; echo up; while :; do sleep 0.1; done"
    process = subprocess.Popen([*SUPERVISE, "bash", "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.wait(30) == 0
    process.stdout.close()


def test_a_killed_supervisor_takes_its_server_along():
    port = free_port()
    with running([*SUPERVISE, *stub(port)], port, timeout=30) as supervisor:
        processes = descendants(supervisor.pid)
        os.kill(supervisor.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while port_is_open(port) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not port_is_open(port)
    for pid in alive(processes):  # the stub's child ignores SIGTERM: that one is beyond us
        os.kill(pid, signal.SIGKILL)


# A real server.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    write_planted(path, check=False)
    return path


OPTIONS = ["--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "512", "--enforce-eager"]
OPTIONS += ["--tokenizer-mode", "deepseek_v32", "--tensor-parallel-size", "2", "--served-model-name", "planted"]
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
ENV |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120)


def answers(server: Server) -> bool:
    prompt = build_prompt(700, seed=2)
    reply = client(server).completions.create(model="planted", prompt=prompt.text, temperature=0, max_tokens=4)
    return reply.choices[0].text.strip() == prompt.answer


@contextmanager
def streaming(server: Server) -> Iterator[list[Future]]:
    """Clients that read one long answer each, and have all begun to; each future is the error that ended its stream."""
    begun = [0] * STREAMS

    def read(i: int) -> Exception | None:
        prompt = build_prompt(300, seed=i).text
        try:
            for _ in client(server).completions.create(
                model="planted", prompt=prompt, max_tokens=3500, stream=True, extra_body={"ignore_eos": True}
            ):
                begun[i] += 1
        except (openai.APIError, OSError) as error:
            return error
        return None

    with ThreadPoolExecutor(STREAMS) as clients:
        futures = [clients.submit(read, i) for i in range(STREAMS)]
        deadline = time.monotonic() + 120
        while min(begun) < 3:
            assert time.monotonic() < deadline, f"streams have not begun: {begun}"
            time.sleep(0.1)
        yield futures


# What is killed, as its command line shows it, and what the log says then.
VICTIMS = {
    "VLLM::Worker_TP1": "Worker proc VllmWorker-1 died unexpectedly",
    "VLLM::EngineCore": "engine core exited unexpectedly",
    "vllm serve": "the server was ended by SIGKILL and was not asked to",
}


@pytest.mark.slow
@pytest.mark.serve
def test_a_killed_process_ends_the_server(folder):
    """One after the other, on one port: that the next server starts and answers is the restart."""
    port = free_port()
    command = [*SUPERVISE, *vllm_command(), "serve", str(folder), "--host", HOST, "--port", str(port), *OPTIONS]
    for victim, cause in VICTIMS.items():
        with running(command, port, ENV) as server:
            assert answers(server)
            processes = descendants(server.pid)
            (pid,) = (pid for pid, line in processes.items() if victim in line)
            with streaming(server) as streams:
                os.kill(pid, signal.SIGKILL)
                killed = time.monotonic()
                status = status_of(server.pid, SECONDS)
                ended = time.monotonic() - killed
                assert all(stream.result(timeout=SECONDS - ended) for stream in streams), "a stream ended well"
            print(f"{victim}: status {status} after {ended:.1f} s, {len(processes)} processes gone")
            assert status != 0
            assert alive(processes) == []
            assert not port_is_open(port)
            assert cause in server.log()
    with running(command, port, ENV) as server:
        assert answers(server)
