"""What a release hands out: wheel and source archive, built from this tree, and the wheel in a fresh environment."""

import json
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import vllm_dsa
from vllm_dsa.testing.server import initial_environment

ROOT = Path(__file__).parents[1]
NAME = f"vllm_dsa-{vllm_dsa.__version__}"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, as `python -m build` makes them, from a copy of what git tracks and of nothing else."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    # Both hooks that `python -m build` calls, without its fresh environment: that would ask a package index.
    hooks = (
        "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_sdist(out); b.build_wheel(out)"
    )
    subprocess.run([sys.executable, "-c", hooks, str(out)], cwd=source, check=True, capture_output=True, timeout=300)
    return out


def test_the_wheel_holds_the_package_and_nothing_else(built):
    names = zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl").namelist()
    assert {name.split("/")[0] for name in names} == {"vllm_dsa", f"{NAME}.dist-info"}
    packed = {name for name in names if name.startswith("vllm_dsa/")}
    assert packed == {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_dsa").rglob("*.py") if tracked(path)}
    assert f"{NAME}.dist-info/licenses/LICENSE" in names


def tracked(path: Path) -> bool:
    return subprocess.run(["git", "ls-files", "--error-unmatch", path], cwd=ROOT, capture_output=True).returncode == 0


def test_the_source_archive_can_be_built_from(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = set(archive.getnames())
    for name in ("pyproject.toml", "README.md", "LICENSE", "vllm_dsa/__init__.py", "vllm_dsa/tools/main.py"):
        assert f"{NAME}/{name}" in names


def test_the_wheel_passes_doctor_in_a_fresh_environment(built, tmp_path):
    """Installed by pip where vLLM is. Nothing of this tree is in reach, its editable install neither."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, built / f"{NAME}-py3-none-any.whl"], check=True, timeout=120)
    # vLLM and torch, 2 GB, are borrowed: a path in a .pth file is searched last, and no .pth file there is read.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {name: value for name, value in initial_environment().items() if not name.startswith(("VLLM_", "PYTHON"))}
    doctor = [tmp_path / "venv" / "bin" / "vllm-dsa", "doctor", "--json"]
    done = subprocess.run(doctor, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {check["label"]: check["text"] for check in json.loads(done.stdout)["checks"]}
    assert rows["vllm-dsa"] == f"{vllm_dsa.__version__}, {site}/vllm_dsa"
    assert rows["plugin"] == "active: vLLM loads it in every process"
    plugins = "from importlib.metadata import *; (p,) = entry_points(group='vllm.general_plugins', name='dsa')"
    code = f"{plugins}; print(p.load())"
    loaded = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert loaded.stdout.startswith("<function register "), loaded.stdout + loaded.stderr
