"""The launcher behind every test and demo that starts a server: it waits, it explains, it leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dsa.testing import server as server_module
from vllm_dsa.testing.server import ServerError, free_port, group_members, healthy, port_is_open, running, serve

# A server with a child that, like a hung engine, ignores the polite signal.
STUB = """
import http.server, signal, subprocess, sys
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('child', flush=True); time.sleep(99)"
subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE).stdout.readline()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print("\\x1b[32mstub is up\\x1b[0m", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    """The stub's child never ends by itself: do not wait long for it."""
    monkeypatch.setattr(server_module, "GRACE_S", 1)


def stub(port: int) -> list[str]:
    return [sys.executable, "-c", STUB, str(port)]


def test_waits_until_healthy_and_leaves_nothing_behind():
    port, waits = free_port(), []
    with running(stub(port), port, timeout=30, on_wait=waits.append) as server:
        assert healthy(server.base_url)
        assert "stub is up\n" in server.log()
        assert len(group_members(server.pid)) == 2
    assert waits
    assert group_members(server.pid) == []
    assert not port_is_open(port)


def test_shared_memory_of_a_killed_server_is_freed():
    port = free_port()
    share = "from multiprocessing import shared_memory\nblock = shared_memory.SharedMemory(create=True, size=9)\n"
    ignore = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(block.name, flush=True)\n"
    with running([sys.executable, "-c", share + ignore + STUB, str(port)], port, timeout=30) as server:
        block = Path("/dev/shm", server.log().split()[0])
        assert block.exists()
    assert not block.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_leaves_nothing_behind_when_the_block_fails(error):
    port = free_port()
    with pytest.raises(error), running(stub(port), port, timeout=30) as server:
        raise error
    assert group_members(server.pid) == []
    assert not port_is_open(port)


def test_early_death_is_reported_with_the_log():
    cause = "(Worker pid=7) ERROR 11-22 01:55:23 [a.py:953] KeyError: 'the cause'"
    lines = [cause, "RuntimeError: see above", "last words"]
    command = [sys.executable, "-c", f"print(*{lines}, sep=chr(10)); raise SystemExit(3)"]
    ended = pytest.raises(ServerError, match=r"(?s)ended with status 3 .*last words")
    with ended as caught, running(command, free_port()):
        pytest.fail("entered")
    assert caught.value.cause == "KeyError: 'the cause'"


def test_timeout_is_reported_and_the_process_ended():
    command = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(99)"]
    late = pytest.raises(ServerError, match="did not answer /health within 1 s")
    with late as caught, running(command, free_port(), timeout=1):
        pytest.fail("entered")
    assert group_members(int(str(caught.value).splitlines()[-1])) == []


def test_the_server_gets_env_but_not_what_an_engine_left_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_DIST_IDENT", "left by an engine")
    script = "import os; print(os.environ.get('VLLM_DIST_IDENT'), os.environ['GIVEN'], os.environ['PATH'])"
    command, env, log = [sys.executable, "-c", script], {"GIVEN": "a=b"}, tmp_path / "log"
    with pytest.raises(ServerError, match="status 0"), running(command, free_port(), env=env, log_path=log):
        pytest.fail("entered")
    assert log.read_text() == f"None a=b {os.environ['PATH']}\n"


def test_a_killed_demo_ends_its_server(tmp_path):
    """SIGTERM to the parent, as `timeout` sends it, must not orphan the server: the program turns it into an exit."""
    port = free_port()
    parent = f"""
import signal, sys, time
from vllm_dsa.testing import server
server.GRACE_S = 1
server.exit_on_sigterm()
with server.running({stub(port)!r}, {port}, timeout=30) as stub:
    print(stub.pid, flush=True)
    time.sleep(99)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    group = int(process.stdout.readline())
    assert group_members(group)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    process.stdout.close()
    assert group_members(group) == []


@pytest.mark.slow
@pytest.mark.serve
def test_vllm_serve_without_a_model_explains_itself(tmp_path):
    with pytest.raises(ServerError, match="vllm serve") as caught, serve(tmp_path, timeout=120):
        pytest.fail("entered")
    # The second line of a ValidationError.
    assert "Invalid repository ID or local directory specified" in caught.value.cause
