"""Every fault of faults.py turns the test that it names red, and that test is green without the fault.

The named test itself is called, with an engine that is started once and kept for all faults that name the test.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from engine import Engine, engine
from faults import FAULTS, SELECTION_FAULTS, Fault, planted
from oracle import Oracle


def named(check: str) -> tuple[ModuleType, Callable, dict[str, str]]:
    """Module, function and arguments of a parametrised test, from the name that pytest gives it."""
    file, _, rest = check.partition("::")
    name, _, case = rest.removesuffix("]").partition("[")
    module = import_module(Path(file).stem)
    assert Path(module.__file__).match(file)
    test = getattr(module, name)
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    arguments, cases = mark.args
    for values in cases:
        values = getattr(values, "values", values)  # of a pytest.param
        values = values if isinstance(values, tuple) else (values,)
        if "-".join(values) == case:
            return module, test, dict(zip(arguments.split(", "), values, strict=True))
    raise AssertionError(f"{check}: {name} has no such case")


def remembering(path: Path, kv_cache_dtype: str = "auto") -> Oracle:
    """An oracle that computes each prompt once."""
    oracle = Oracle(path, kv_cache_dtype)
    remembered = functools.cache(lambda tokens: Oracle.prompt_logprobs(oracle, list(tokens)))
    oracle.prompt_logprobs = lambda tokens: remembered(tuple(tokens))
    return oracle


class Stage:
    """A named test and its engine, which starts on the first run."""

    def __init__(self, check: str, folder: Path) -> None:
        self.module, self.test, self.arguments = named(check)
        if "name" in self.arguments:  # of a checkpoint that a fixture has written
            name = self.arguments["name"]
            self.module.write_random(folder, **self.module.CHECKPOINTS[name])
            self.arguments["checkpoints"] = {name: folder}
        else:
            self.arguments["tmp_path"] = folder
        self.oracle = functools.cache(remembering)
        self.running: Engine | None = None
        self.closing = ExitStack()

    def run(self, fault: Fault | None = None) -> None:
        """Call the test, with a fault in every layer of its engine or without."""

        @contextmanager
        def kept(*args, **options):
            if self.running is None:
                self.running = self.closing.enter_context(engine(*args, **options))
            self.running.steps.clear()
            with planted(fault.plant if fault else lambda layer: {}, self.running.layers):
                yield self.running

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(self.module, "engine", kept)
            monkeypatch.setattr(self.module, "Oracle", self.oracle)
            self.test(**self.arguments)


@pytest.fixture(scope="module")
def stage_of(tmp_path_factory):
    """The stage of a check; the one before is closed, for a process holds one engine at a time."""
    stages: dict[str, Stage] = {}

    def stage_of(check: str) -> Stage:
        if check not in stages:
            close()
            stages[check] = Stage(check, tmp_path_factory.mktemp("checkpoint"))
        return stages[check]

    def close() -> None:
        for stage in stages.values():
            stage.closing.close()
        stages.clear()

    yield stage_of
    close()


def test_the_table():
    assert len(FAULTS) >= 15
    assert len({fault.plant for fault in FAULTS}) == len(FAULTS)
    assert set(SELECTION_FAULTS) <= {fault.plant for fault in FAULTS}
    for check in {fault.check for fault in FAULTS}:
        assert named(check)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.plant.__name__, marks=() if fault.quick else pytest.mark.slow)
        for fault in sorted(FAULTS, key=lambda fault: fault.check)
    ],
)
def test_a_fault_turns_the_test_that_it_names_red(stage_of, fault):
    stage = stage_of(fault.check)
    with pytest.raises(AssertionError, match=r"where False = within\("):
        stage.run(fault)
    stage.run()
