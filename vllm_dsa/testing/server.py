"""Start a server, wait until it answers, and leave no process behind: ``vllm serve`` for tests and the demo."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
# Nothing is fetched and nothing reported; CPU servers need the size of their cache (GiB), GPU servers ignore it.
SERVE_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
# NVLink multicast stays off, in every library that would use it: where a host's GPUs are shared between virtual
# machines, a program that uses it may take all of them out of service. For servers and engines on several GPUs.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",  # vLLM's custom all-reduce asks torch for it in every TP group
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_USE_NCCL_SYMM_MEM": "0",
    # Stock DSA layers fuse their all-reduce with a norm through FlashInfer whatever is set above, and with its default
    # "auto" FlashInfer makes multicast objects itself. "trtllm" makes none.
    "VLLM_FLASHINFER_ALLREDUCE_BACKEND": "trtllm",
}
GRACE_S = 10
# "KeyError: ..." at the start of a line, or after vLLM's "(Worker pid=1) ERROR 01-31 12:00:00 [file.py:1] "; pydantic's
# ValidationError says what is wrong in the next line.
_ERROR = re.compile(
    r"^(?:\(.*?\) ERROR .*?\] )?((?:\w+\.)*\w+(?:Error|Exception): .*(?:\n +Value error, .*)?)$", re.MULTILINE
)
# A machine's proxy settings are not for its own loopback address.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server died or did not answer in time.

    The message has the last lines of its log, and last of all ``cause``: the first error in the log, if there is one.
    """

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(f"{message}\nfirst error in its log: {cause}" if cause else message)
        self.cause = cause


@dataclass(frozen=True)
class Server:
    """A running server: where it answers, and where it writes."""

    base_url: str
    port: int
    pid: int
    log_path: Path

    def log(self) -> str:
        """Everything it has printed so far, both streams, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log_path.read_text(errors="replace"))

    def errors(self) -> list[str]:
        """The last line of every traceback in the log, vLLM's prefix cut off; the first is most often the cause."""
        return _ERROR.findall(self.log())


@contextmanager
def serve(
    model: str | Path,
    *args: str,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
    log_path: Path | None = None,
    on_wait: Callable[[float], None] | None = None,
) -> Iterator[Server]:
    """``vllm serve model args...`` on a free port of the loopback address, with the package's own Python."""
    port = free_port()
    command = [*vllm_command(), "serve", str(model), "--host", HOST, "--port", str(port), *args]
    with running(command, port, {**SERVE_ENV, **(env or {})}, timeout, log_path, on_wait) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
    log_path: Path | None = None,
    on_wait: Callable[[float], None] | None = None,
) -> Iterator[Server]:
    """Run ``command`` until the block ends, entering it once GET /health on ``port`` is answered with 200.

    ``env`` comes on top of the environment that this process was started with. ``on_wait`` is called with the seconds
    waited, about once a second. Raises ServerError if the command ends or ``timeout`` seconds pass first. Whatever
    happens, every process of its group is gone afterwards.
    """
    with tempfile.TemporaryDirectory() as folder:
        log_path = log_path or Path(folder) / "server.log"
        with open(log_path, "wb") as log:
            process = subprocess.Popen(
                command,
                env={**initial_environment(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Server(f"http://{HOST}:{port}", port, process.pid, log_path)
        try:
            _wait_until_healthy(server, process, timeout, on_wait)
            yield server
        finally:
            stop(process)


def _wait_until_healthy(
    server: Server, process: subprocess.Popen, timeout: float, on_wait: Callable[[float], None] | None
) -> None:
    start = time.monotonic()
    while not healthy(server.base_url):
        waited = time.monotonic() - start
        if process.poll() is not None:
            raise _explained(server, process, f"ended with status {process.returncode} after {waited:.0f} s")
        if waited > timeout:
            raise _explained(server, process, f"did not answer /health within {timeout:.0f} s")
        if on_wait:
            on_wait(waited)
        time.sleep(1)


def _explained(server: Server, process: subprocess.Popen, what: str) -> ServerError:
    tail = "\n".join(server.log().splitlines()[-40:])
    return ServerError(f"server {what}: {' '.join(map(str, process.args))}\n{tail}", next(iter(server.errors()), ""))


def stop(process: subprocess.Popen) -> None:
    """End a process that leads its own group, and the whole group: politely, then by force."""
    try:
        process.terminate()
        _wait_until_gone(process)
    finally:  # also where a second Ctrl-C ends the wait
        # Python's resource trackers end after the processes they serve, and free the shared memory these leave.
        _kill(pid for pid in group_members(process.pid) if not _is_resource_tracker(pid))
        _wait_until_gone(process)
        _kill(group_members(process.pid))
        process.wait()


def _wait_until_gone(leader: subprocess.Popen) -> None:
    deadline = time.monotonic() + GRACE_S
    while (leader.poll() is None or group_members(leader.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
        return True


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind this program like Ctrl-C does, so that the servers it runs are stopped."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def group_members(group: int) -> list[int]:
    """Living processes (no zombies) of a process group, from /proc."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        if int(its_group) == group and state != "Z":
            members.append(int(stat.parent.name))
    return members


def initial_environment() -> dict[str, str]:
    """What this process was started with: an engine that runs in it leaves its own settings in os.environ."""
    entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    found = dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)
    return found or dict(os.environ)  # setproctitle, which pytest-xdist calls, overwrites the file


def healthy(base_url: str) -> bool:
    """Does GET /health answer 200?"""
    try:
        with DIRECT.open(f"{base_url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def port_is_open(port: int) -> bool:
    """Does anybody listen on this port of the loopback address?"""
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((HOST, port)) == 0


def vllm_command() -> list[str]:
    """The ``vllm`` command of this Python's environment."""
    script = Path(sys.executable).with_name("vllm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
