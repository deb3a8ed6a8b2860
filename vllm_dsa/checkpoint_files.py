"""Which safetensors files of a folder vLLM loads, and what they hold by their headers.

Standard library only. Nothing but headers is read, so that a damaged or foreign checkpoint is refused before anything
is loaded, and a right one costs next to no time.
"""

import glob
import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_FILE = "model.safetensors.index.json"
AGAIN = "Download the checkpoint again."
Shape = tuple[int, ...]
# --load-format values that read published files -> the files, by pattern, and the index that leaves some of them out.
FORMATS: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys(("hf", "safetensors", "fastsafetensors", "instanttensor"), ("*.safetensors", INDEX_FILE)),
    "mistral": ("consolidated*.safetensors", "consolidated.safetensors.index.json"),
    "runai_streamer": ("*.safetensors", None),
}
PICKLED_FORMATS = ("pt", "npcache")
_CONVERTED = re.compile(r"model\d+-mp\d+\.safetensors")
_NAMED = 5  # names that a message lists


class CheckpointError(ValueError):
    """Files that this package will not serve; the message names file or tensor and the next step."""


@dataclass(frozen=True)
class Stored:
    """One tensor as a file's header has it; dtype as safetensors spells it (BF16, F32, F8_E4M3)."""

    file: Path
    dtype: str
    shape: Shape


def resolved(folder: Path, load_format: str) -> str:
    """What vLLM makes of ``auto``: ``mistral`` where one such file is anywhere in the folder, else ``hf``."""
    if load_format != "auto":
        return load_format
    return "mistral" if any(path.is_file() for path in folder.rglob(FORMATS["mistral"][0])) else "hf"


def paths(folder: Path, load_format: str = "hf") -> list[Path]:
    """The files that vLLM loads from a folder in this format, empty if there are none. Raises CheckpointError."""
    pattern, index_file = FORMATS[resolved(folder, load_format)]
    found = set(glob.glob(os.path.join(folder, pattern)))  # as vLLM asks: no hidden files
    if not found and glob.glob(os.path.join(glob.escape(str(folder)), pattern)):
        raise CheckpointError(
            f"{folder} has one of *, ? and [ in its name: vLLM takes that for a pattern and finds no file. Rename the "
            f"folder."
        )
    converted = sorted(path for path in found if _CONVERTED.fullmatch(os.path.basename(path)))
    if converted:
        raise CheckpointError(
            f"{folder} holds {os.path.basename(converted[0])}: DeepSeek's convert.py wrote it for DeepSeek's own demo, "
            f"with other names and shapes. Serve the published folder that convert.py read (its --hf-ckpt-path)."
        )
    named = _files_of_index(folder / index_file) if index_file else None
    if named is None:
        return [Path(path) for path in sorted(found)]
    absent = sorted(name for name in named if os.path.join(folder, name) not in found)
    elsewhere = [name for name in absent if (folder / name).is_file()]
    if elsewhere:
        plain = os.path.basename(elsewhere[0])
        step = "" if (folder / plain).is_file() else f", and move the file into {folder}"
        raise CheckpointError(
            f"{folder / str(index_file)} names {elsewhere[0]!r}, which vLLM does not find: it looks for plain "
            f"names of files in the folder itself. Write {plain!r} there{step} ({len(elsewhere)} such names)."
        )
    if absent:
        raise CheckpointError(
            f"{folder} lacks {some(absent)}, which {index_file} names. Download what is missing, or the whole "
            f"checkpoint again."
        )
    if not named and found:
        raise CheckpointError(f"{folder / str(index_file)} names no file, so vLLM would load none. {AGAIN}")
    return [Path(folder, name) for name in sorted(named)]


def read(folder: Path, load_format: str = "hf") -> dict[str, Stored]:
    """Every tensor of the files that vLLM loads from a folder. Raises CheckpointError."""
    stored: dict[str, Stored] = {}
    for path in paths(folder, load_format):
        for name, tensor in header(path).items():
            if name in stored:
                raise CheckpointError(
                    f"tensor {name} is in {stored[name].file} and in {path}, and vLLM would load both: which of them "
                    f"is served is left to chance. Move the file that is not of this model away, or restore "
                    f"{INDEX_FILE}, which names those that are."
                )
            stored[name] = tensor
    return stored


def names(folder: Path, load_format: str) -> Iterator[str]:
    """Names of the tensors in those files."""
    for path in paths(folder, load_format):
        yield from header(path)


def left_out(folder: Path, loaded: Collection[Path]) -> dict[str, str]:
    """Tensor -> file, of the readable safetensors files of a folder that are not ``loaded``."""
    found: dict[str, str] = {}
    for path in sorted(set(folder.glob("*.safetensors")) - set(loaded)):
        try:
            found |= dict.fromkeys(header(path), path.name)
        except CheckpointError:
            continue
    return found


def _files_of_index(path: Path) -> set[str] | None:
    """Files by the index, None if there is none."""
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: it has no readable weight_map. {AGAIN}") from error
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise CheckpointError(f"{path} is damaged: its weight_map holds more than names of files. {AGAIN}")
    return set(index.values())


def header(path: Path) -> dict[str, Stored]:
    """The safetensors format: 8 bytes with the header's length, the header (JSON), then the tensors' bytes."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if length <= size - 8 else b""
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}). If it is a link, what it points to is gone: download "
            f"it again; else give the user that serves leave to read it."
        ) from error
    if start == b"version ":
        raise CheckpointError(f"{path} is a git-lfs pointer and not the file. Run `git lfs pull` in its folder.")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        stored = {name: Stored(path, entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or no safetensors file: its header cannot be read. Download it again."
        ) from error
    if size < end:
        raise CheckpointError(f"{path} is truncated: {size} of {end} bytes are there. Download it again.")
    if size > end:
        raise CheckpointError(f"{path} has {size} bytes, {size - end} more than its header says. Download it again.")
    return stored


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose only weights are pickles, which vLLM would read."""
    found = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    if found:
        raise CheckpointError(
            f"{folder} holds {some(found)} and no safetensors file: pickled weights are refused, reading a pickle may "
            f"run code that is in it. Serve the published safetensors files."
        )


def some(listed: Collection[Any]) -> str:
    """The first few, and how many more there are."""
    text = ", ".join(str(each) for each in list(listed)[:_NAMED])
    return text if len(listed) <= _NAMED else f"{text} and {len(listed) - _NAMED} more"
