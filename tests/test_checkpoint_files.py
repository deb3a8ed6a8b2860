"""What is checked is what is loaded: which files of a folder are read, in every load format."""

import json
import os
import shutil

import pytest
import torch
from engine import load, unloaded
from fp8_bytes import read
from safetensors.torch import save_file
from test_hostile_files import FIRST, INDEX, SECOND, damaged_index, engine_config
from tiny_checkpoint import write_random
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_dsa.checkpoint import check, refuse_indexer
from vllm_dsa.checkpoint_files import CheckpointError, paths
from vllm_dsa.tools.main import main

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good")
    write_random(path, num_hidden_layers=2)
    return path


def stale(path):
    """A complete model of the same config that is not this one: its norms are sevens."""

    def damage(folder):
        target = folder / path
        target.parent.mkdir(exist_ok=True)
        tensors = {name: torch.full_like(t, 7) if t.dim() == 1 else t for name, t in read(folder).items()}
        save_file(tensors, target)

    return damage


def foreign(path):
    """One tensor, of no DSA model."""

    def damage(folder):
        (folder / path).parent.mkdir(exist_ok=True)
        save_file({"tok_embeddings.weight": torch.ones(2, 2)}, folder / path)

    return damage


def merged(name):
    """The model in one file, with no index."""

    def damage(folder):
        tensors = read(folder)
        for path in (FIRST, SECOND, INDEX):
            (folder / path).unlink()
        save_file(tensors, folder / name)

    return damage


def both(*damages):
    def damage(folder):
        for each in damages:
            each(folder)

    return damage


def names_in_index(change):
    return damaged_index(lambda index: index | {"weight_map": {n: change(f) for n, f in index["weight_map"].items()}})


def moved(folder):
    names_in_index(lambda file: f"weights/{file}")(folder)
    (folder / "weights").mkdir()
    for file in (FIRST, SECOND):
        (folder / file).rename(folder / "weights" / file)


def absolute(folder):
    names_in_index(lambda file: str(folder / file))(folder)


def dangling(folder):
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("../../blobs/pruned")


def linked(folder):
    """As the Hugging Face cache has them."""
    (folder / "blobs").mkdir()
    (folder / SECOND).rename(folder / "blobs" / "1234")
    (folder / SECOND).symlink_to(folder / "blobs" / "1234")


def grown(folder):
    with open(folder / SECOND, "ab") as file:
        file.write(b"\0" * 8)


CONSOLIDATED = "consolidated.safetensors"
SERVED = {
    "as it is": lambda folder: None,
    "stale consolidated": stale(CONSOLIDATED),
    "stale, numbered": stale("consolidated-00001-of-00001.safetensors"),
    "foreign consolidated": foreign(CONSOLIDATED),
    "original/": foreign("original/consolidated.00.safetensors"),
    "stale shard": stale("model-00001-of-00001.safetensors"),
    "hidden": stale("._model-00001-of-00002.safetensors"),  # as macOS leaves them on foreign disks
    "pickle": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"not read"),
    "absolute names": absolute,
    "links": linked,
    "consolidated alone": merged(CONSOLIDATED),
    "merged": merged("model.safetensors"),
    "damaged, not listed": lambda folder: (folder / CONSOLIDATED).write_bytes(b"not read"),
}
REFUSED = {
    "./": (names_in_index(lambda file: f"./{file}"), rf"names '\./{FIRST}'.*plain names.*Write '{FIRST}' there \("),
    "subfolder": (moved, rf"names 'weights/{FIRST}'.*Write '{FIRST}' there, and move the file into"),
    "index of nothing": (damaged_index(lambda index: {"weight_map": {}}), rf"{INDEX} names no file"),
    "index of pairs": (
        damaged_index(lambda index: {"weight_map": list(index["weight_map"].items())}),
        rf"{INDEX} is damaged: its weight_map holds more",
    ),
    "two models": (
        both(merged("model.safetensors"), stale("old.safetensors")),
        r"is in \S+/model.safetensors and in \S+/old.safetensors, and vLLM would load both.*Move the file",
    ),
    "dangling link": (dangling, rf"{SECOND} cannot be read \(No such file or directory\).*download it again"),
    "bytes behind": (grown, rf"{SECOND} has \d+ bytes, 8 more than its header says\. Download it again"),
}


def test_loaded_is_what_was_checked(good, tmp_path, capsys):
    """By the config that vLLM makes for each folder, its loader reads the same tensors."""
    with unloaded(good) as (model, config):
        expected = {name: tensor.clone() for name, tensor in load(model, config).items()}
        for case, damage in SERVED.items():
            folder = shutil.copytree(good, tmp_path / case)
            damage(folder)
            for tensor in model.parameters():
                tensor.data.fill_(torch.nan)
            model.required = tuple(model.expected.model)
            found = load(model, engine_config(folder))
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), case
            assert main(["doctor", str(folder)]) == 0, (case, capsys.readouterr().out)


def test_a_stale_file_would_show(good, tmp_path):
    """What the test above would see if vLLM chose the files: it does where the user asks for Mistral's."""
    folder = shutil.copytree(good, tmp_path / "folder")
    stale(CONSOLIDATED)(folder)
    with unloaded(folder, load_format="mistral") as (model, config):
        assert (load(model, config)[NORM] == 7).all() and not (read(good)[NORM] == 7).any()


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_start_and_by_doctor(good, tmp_path, case, capsys):
    damage, message = REFUSED[case]
    folder = shutil.copytree(good, tmp_path / "folder")
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        engine_config(folder)
    assert main(["doctor", str(folder)]) == 1
    assert "refused" in capsys.readouterr().out


def test_a_folder_that_is_a_pattern(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "model [v2]")
    with pytest.raises(ValueError, match=r"model \[v2\] has one of \*, \? and \[ in its name.*Rename"):
        engine_config(folder)


def test_of_two_models_the_checked_one_is_the_one_in_the_format(good, tmp_path):
    """A format that reads other files has these checked."""
    folder = shutil.copytree(good, tmp_path / "folder")
    foreign(CONSOLIDATED)(folder)
    engine_config(folder)
    with pytest.raises(ValueError, match="lacks"):
        engine_config(folder, load_format="mistral")
    with pytest.raises(ValueError, match="lacks .*consolidated-00001-of-00002"):
        (folder / "consolidated.safetensors.index.json").write_text(
            json.dumps({"weight_map": {NORM: "consolidated-00001-of-00002.safetensors"}})
        )
        engine_config(folder, load_format="mistral")
    stale(CONSOLIDATED)(folder)
    with pytest.raises(CheckpointError, match=f"tensor .* is in .*{CONSOLIDATED} and in .*{FIRST}"):
        check(folder, json.loads((folder / "config.json").read_text()), load_format="runai_streamer")


@pytest.mark.parametrize("load_format", ["pt", "npcache"])
def test_formats_of_pickles_are_refused(good, load_format):
    with pytest.raises(ValueError, match=f"--load-format {load_format} is refused: it reads pickled weights"):
        engine_config(good, load_format=load_format)


@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral"])
def test_files_are_those_of_vllms_loader(good, tmp_path, load_format):
    """In every folder above: the same files, or none where vLLM finds none."""
    served = 0
    for i, damage in enumerate([*SERVED.values(), *(damage for damage, _ in REFUSED.values())]):
        folder = shutil.copytree(good, tmp_path / str(i))
        damage(folder)
        try:
            theirs = set(DefaultModelLoader(LoadConfig(load_format=load_format))._prepare_weights(
                str(folder), None, None, True, None
            )[1])  # fmt: skip
        except (RuntimeError, OSError, TypeError):
            theirs = set()
        try:
            ours = {str(path) for path in paths(folder, load_format)}
        except CheckpointError:
            ours = set()
        assert {os.path.realpath(file) for file in ours} == {os.path.realpath(file) for file in theirs}, i
        served += bool(ours)
    assert served >= (3 if load_format == "mistral" else 10)


def test_stock_v3_beside_mistrals_files(good, tmp_path):
    """Of a model that stock vLLM serves, the files that it will load are looked at, and no others."""
    folder = shutil.copytree(good, tmp_path / "folder")
    with pytest.raises(CheckpointError, match="names no indexer"):
        refuse_indexer(folder)
    foreign(CONSOLIDATED)(folder)
    refuse_indexer(folder)
    with pytest.raises(CheckpointError, match="names no indexer"):
        refuse_indexer(folder, "safetensors")
