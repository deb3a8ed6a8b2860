"""A model named on the command line: its folder, its config.json, and what its caches take. Standard library only."""

import json
import os
import re
from pathlib import Path
from typing import Any

from vllm_dsa.config import DSAConfig
from vllm_dsa.tools.output import UserError

FP8_DS_MLA = "fp8_ds_mla"
# As vllm_dsa.cache has them, which needs torch; a test holds the two equal.
FP8_DS_MLA_BYTES, INDEX_SCALE_BYTES = 656, 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def find(model: str) -> Path:
    """A local folder, or the newest snapshot of a Hugging Face id in the local cache. Raises UserError."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{model} is a file. Pass the folder that holds config.json, or a Hugging Face id.")
    hub = _hub()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        repository = hub / f"models--{model.replace('/', '--')}"
        main = repository / "refs" / "main"
        snapshots = list(repository.glob("snapshots/*/"))
        if main.is_file():
            snapshots = [repository / "snapshots" / main.read_text().strip()]
        if snapshots := [path for path in snapshots if path.is_dir()]:
            return max(snapshots, key=lambda path: path.stat().st_mtime)
    raise UserError(
        f"{model!r} is no folder here and no Hugging Face id in the cache {hub}. Correct it, or fetch its config "
        f"first: hf download {model} config.json"
    )


def _hub() -> Path:
    """Where huggingface_hub keeps what it has downloaded, by its own variables."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(name):
            return Path(value).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(home).expanduser() / "hub"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a mapping, with what vLLM adds to it while it reads it. Raises UserError."""
    path, quantisation = folder / "config.json", folder / "hf_quant_config.json"
    try:
        config = _read_object(path)
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json. Pass the folder of a published checkpoint.") from None
    if config.get("model_type") == "deepseek_v32":
        config.setdefault("num_nextn_predict_layers", 1)  # by the class that it is read with
    if not config.get("quantization_config"):
        if "compression_config" in config:
            config["quantization_config"] = config["compression_config"]
        elif quantisation.is_file():  # of ModelOpt up to 0.29
            config["quantization_config"] = _read_object(quantisation)
    return config


def _read_object(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(read, dict):
        raise UserError(f"{path} holds no JSON object. Download it again.")
    return read


def dtype_of(config: dict[str, Any]) -> str:
    """The model's dtype by its config.json, as torch names it; bfloat16, as published, where it names none."""
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")


def latent_bytes(config: DSAConfig, kind: str, dtype: str) -> int:
    """Bytes of one token in one layer's latent cache; kind "auto" or "fp8_ds_mla"."""
    return FP8_DS_MLA_BYTES if kind == FP8_DS_MLA else config.latent_dim * DTYPE_BYTES[dtype]


def index_bytes(config: DSAConfig) -> int:
    """Bytes of one token in one layer's index-key cache."""
    return config.index_head_dim + INDEX_SCALE_BYTES
