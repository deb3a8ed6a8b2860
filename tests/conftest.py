"""Fixtures that test files ask for by name, and the marker own_process."""

import os
import subprocess
import sys

# Before torch starts its threads: waiting ones sleep. Spinning, as is GNU OpenMP's way, they take the time that they
# wait for as soon as anything else runs on the machine's cores, and tests of small tensors take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

OWN_PROCESS = "DSA_TEST_IN_A_PROCESS_OF_ITS_OWN"


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked own_process in a pytest of its own."""
    if pyfuncitem.get_closest_marker("own_process") is None or OWN_PROCESS in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-rA", "-m", "", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    env = os.environ | {OWN_PROCESS: "1"}
    done = subprocess.run(command, cwd=pyfuncitem.config.rootpath, env=env, capture_output=True, text=True)
    print(done.stdout)
    if done.returncode:
        pytest.fail(f"in a process of its own:\n{done.stdout[-4000:]}\n{done.stderr[-1000:]}", pytrace=False)
    return True


@pytest.fixture
def one_thread():
    """Small tensors on one thread: on a busy machine a second one costs more in waiting than it computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Tensors made by torch.empty and its relatives start as NaN (integers: -1), so that reading them shows."""

    def poisoned(make):
        def poison(*args, **kwargs):
            made = make(*args, **kwargs)
            if made.numel() and made.is_contiguous():
                made.view(-1).view(torch.uint8).fill_(0xFF)
            return made

        return poison

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
