"""Run a server so that nothing of it outlives it, and its exit status says whether it failed."""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

from vllm_dsa.testing.server import group_members, stop
from vllm_dsa.tools.output import UserError

EXAMPLE = """example: vllm-dsa supervise -- vllm serve MODEL --tensor-parallel-size 8

exit status: the server's, or 128 + N where signal N ended it. Where it was not asked to end (by SIGTERM, SIGINT or
SIGHUP, which are passed on) it has failed: then 1 stands for 0. 2 bad usage, or the server could not be started"""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("command", nargs="+", help="the server's command line, after --")


def run(args: argparse.Namespace) -> int:
    """The server's status if it was asked to end (SIGTERM, SIGINT and SIGHUP are passed on). If not, it has failed:
    never 0, and every process that it leaves is ended.

    vLLM's API server ends with status 0 when its engine has died, and an engine goes on when its API server has.
    """
    server: subprocess.Popen | None = None
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if server is not None:
            server.send_signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    try:
        server = subprocess.Popen(args.command, start_new_session=True, preexec_fn=_end_with_parent)
    except OSError as error:
        raise UserError(f"{args.command[0]}: {error.strerror}. Give a server's command line after --.") from error
    if asked:  # while it was started
        server.send_signal(asked[-1])
    try:
        status = server.wait()
    finally:
        left = group_members(server.pid)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        stop(server)
    ended = f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
    status = status if status >= 0 else 128 - status
    if asked:
        return status
    print(
        f"vllm-dsa supervise: the server {ended} and was not asked to. Processes that it left, ended now: {len(left)}. "
        f"The cause is in its log above.",
        file=sys.stderr,
    )
    return status or 1


def _end_with_parent() -> None:
    """Should the supervisor be killed, the kernel asks the server to end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
