"""Every `vllm serve` line that this repository shows: in documents, scripts and containers."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")))
SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))
COMPOSE = ROOT / "docker" / "compose.yaml"
MANIFESTS = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))
# What LeaderWorkerSet sets in the pods of a group.
GROUP = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0", "LWS_LEADER_ADDRESS": "leader.example"}


@dataclass(frozen=True)
class Block:
    """A fenced block of commands in a document, and the heading that it stands under."""

    file: Path
    heading: str
    text: str

    @property
    def parsed_only(self) -> bool:
        return self.text.startswith("# parsed only\n")

    @property
    def commands(self) -> list[list[str]]:
        """Words of each command, without comments and without VARIABLE=value before it."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"\w+=", words[0]):
                words = words[1:]
            found += [words] if words else []
        return found


@dataclass(frozen=True)
class Serve:
    """One `vllm serve` line: where it stands, and its words after `serve`."""

    where: str
    words: tuple[str, ...]

    @property
    def model(self) -> str:
        return self.words[0]


def blocks(file: Path) -> list[Block]:
    """Blocks of commands: ```bash, and in README plain ``` that begins with a command."""
    found, heading = [], ""
    text = file.read_text(encoding="utf-8")
    for part in re.finditer(r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if part[1]:
            heading = part[1]
        elif part[2] == "bash" or (part[2] == "" and re.match(r"(make|pip|vllm|vllm-dsa) ", part[3])):
            found.append(Block(file, heading, part[3]))
    return found


def in_documents() -> list[Serve]:
    return [
        Serve(f"{file.name}, {block.heading}", tuple(words[2:]))
        for file in DOCUMENTS
        for block in blocks(file)
        for words in block.commands
        if words[:2] == ["vllm", "serve"]
    ]


def in_scripts(folder: Path) -> list[Serve]:
    """What each script of examples/ starts, run with a `vllm` and a `ray` that only say how they were called."""
    for name in ("vllm", "ray"):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "{name}" "$@"\n')
        (folder / name).chmod(0o755)
    found = []
    for script in SCRIPTS:
        before = ["head", "10.0.0.1"] if "ray" in script.name else []
        model = "some/model" if "w4a16" in script.name else "deepseek-ai/DeepSeek-V3.2"
        command = ["bash", str(script), *before, model, "--port", "9999"]
        env = os.environ | {"PATH": f"{folder}:/usr/bin:/bin"}
        said = subprocess.run(command, env=env, check=True, timeout=20, capture_output=True, text=True).stdout
        found.append(Serve(script.name, tuple(said.rpartition("vllm\nserve\n")[2].splitlines())))
    return found


def in_containers() -> list[Serve]:
    """The images' entry command is `vllm serve`; what follows it stands in compose.yaml and in the pods."""
    service = yaml.safe_load(COMPOSE.read_text())["services"]["vllm"]
    found = [Serve(COMPOSE.name, tuple(service["command"]))]
    for manifest in MANIFESTS:
        for role, pod in pods(manifest).items():
            (container,) = pod["spec"]["containers"]
            words = (re.sub(r"\$\((\w+)\)", lambda name: GROUP[name[1]], word) for word in container["args"])
            found.append(Serve(f"{manifest.name}, {role}", tuple(words)))
    return found


def pods(manifest: Path) -> dict[str, dict[str, Any]]:
    """Role -> pod template."""
    found = {}
    for document in objects(manifest):
        if document["kind"] == "Deployment":
            found["server"] = document["spec"]["template"]
        elif document["kind"] == "LeaderWorkerSet":
            group = document["spec"]["leaderWorkerTemplate"]
            found |= {"leader": group["leaderTemplate"], "worker": group["workerTemplate"]}
    return found


def objects(manifest: Path) -> Iterator[dict[str, Any]]:
    """Kubernetes objects of a file."""
    return yaml.safe_load_all(manifest.read_text())
