"""KV connectors: pages of both caches leave and come back bit for bit, answers depend on both, a shared store is named
after their bytes and the model, and what is not proven is refused by name."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Engine, engine
from planted_text import build_prompt
from safetensors.torch import load_file, save_file
from test_glm import PATTERN, write_glm
from test_model import config_of, prompts
from test_planted import ids, words
from test_platform import engine_config
from tiny_checkpoint import write_planted, write_random

from vllm_dsa import cache, platform

BOTH = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
CACHES = 2 * 2  # of a planted checkpoint: two layers
WHOLE_PROMPTS = dict(enable_chunked_prefill=False, max_num_batched_tokens=4096)


def through(store: Path, role: str = "kv_both") -> dict[str, Any]:
    """Engine options: pages go to and come from a folder."""
    transfer = BOTH | {"kv_role": role, "kv_connector_extra_config": {"shared_storage_path": str(store)}}
    return dict(kv_transfer_config=transfer, **WHOLE_PROMPTS)


def ask(running: Engine, tokens: list[int]) -> tuple[str, int, list[torch.Tensor]]:
    """The answer to one prompt, how many of its tokens were computed, and the pages of its full blocks in every cache:
    all layers' latents, then their index keys."""
    blocks: list[list[int]] = []
    schedule = running.scheduler.schedule

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        blocks.extend(request.block_ids[0] for request in output.scheduled_new_reqs)
        return output

    running.scheduler.schedule, before = recorded, len(running.steps)
    try:
        (given,) = running.generate([tokens], max_tokens=6, stop_token_ids=[1])
    finally:
        running.scheduler.schedule = schedule
    computed = sum(sum(step.values()) for step in running.steps[before:]) - len(given) + 1
    block_size = running.llm.llm_engine.vllm_config.cache_config.block_size
    full = blocks[0][: (len(tokens) - 1) // block_size]
    caches = [layer.kv_cache for layer in running.layers]
    caches += [layer.indexer.cache.kv_cache for layer in running.layers if layer.indexer is not None]
    return words(given), computed, [pages[full].cpu() for pages in caches]


def differing(pages: list[torch.Tensor], others: list[torch.Tensor]) -> list[int]:
    """Caches whose pages are not the same bits."""
    both = enumerate(zip(pages, others, strict=True))
    return [i for i, (page, other) in both if not page.view(torch.uint8).equal(other.view(torch.uint8))]


def store_of(folder: Path) -> Path:
    """Where an engine has put its pages: a folder of its own in the one that it was told."""
    (store,) = folder.iterdir()
    return store


@pytest.mark.slow
@pytest.mark.parametrize("block_size, kv_cache_dtype", [(16, "auto"), (64, "fp8_ds_mla")])
def test_restored_equals_recomputed(tmp_path, block_size, kv_cache_dtype):
    """One server computes and stores, another restores; then with zeros for stored pages of one cache or the other."""
    write_planted(tmp_path / "model", check=False)
    asked = [build_prompt(length, seed, chat=True) for seed, length in enumerate((300, 900, 1500))]
    options = dict(block_size=block_size, kv_cache_dtype=kv_cache_dtype)
    with engine(tmp_path / "model", **options, **through(tmp_path / "store", "kv_producer")) as running:
        computed = [ask(running, ids(prompt, True)) for prompt in asked]
    assert [answer for answer, *_ in computed] == [prompt.answer for prompt in asked]
    assert [count for _, count, _ in computed] == [len(ids(prompt, True)) for prompt in asked]

    with engine(tmp_path / "model", **options, **through(tmp_path / "store", "kv_consumer")) as running:
        restored = [ask(running, ids(prompt, True)) for prompt in asked]
    for (answer, _, pages), (again, count, theirs), prompt in zip(computed, restored, asked, strict=True):
        assert again == answer
        assert count <= block_size < len(ids(prompt, True)) - count, "not restored"
        assert len(pages) == CACHES and all(page.any() for page in pages)
        assert differing(pages, theirs) == []

    files = sorted(store_of(tmp_path / "store").glob("*/*.safetensors"))
    assert len(files) == CACHES * len(asked)
    for lost in ("indexer.k_cache", "attn"):
        kept = {file: load_file(file) for file in files if file.stem.endswith(lost)}
        assert len(kept) == CACHES // 2 * len(asked)
        for file, tensors in kept.items():
            save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, file)
        with engine(tmp_path / "model", **options, **through(tmp_path / "store", "kv_consumer")) as running:
            wrong = [ask(running, ids(prompt, True))[0] for prompt in asked]
        # A fact whose copies are in the last page, which is computed, is found all the same.
        assert wrong != [answer for answer, *_ in computed], f"{lost} is not read"
        for file, tensors in kept.items():
            save_file(tensors, file)


@pytest.mark.slow
def test_layers_that_share_a_selection_have_one_cache_to_store(tmp_path):
    write_glm(tmp_path / "model", index_topk_pattern=PATTERN)
    tokens = prompts(config_of(tmp_path / "model"), multiples=(9,))[0]
    with engine(tmp_path / "model", **through(tmp_path / "store")) as running:
        _, computed, pages = ask(running, tokens)
    with engine(tmp_path / "model", **through(tmp_path / "store")) as running:
        _, restored, theirs = ask(running, tokens)
    assert len(pages) == len(PATTERN) + PATTERN.count("F")
    assert (computed, restored) == (len(tokens), len(tokens) - len(pages[0]) * 16)
    assert differing(pages, theirs) == []


# The name of a store.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("v32")
    write_random(path, num_hidden_layers=1)
    return path


def named(folder: Path, **options: Any) -> Path:
    """Where the pages would go if the user said /store."""
    config = engine_config(folder, **(through(Path("/store")) | options))
    return Path(config.kv_transfer_config.kv_connector_extra_config["shared_storage_path"])


def test_a_store_is_named_by_layout_and_model(folder, tmp_path, monkeypatch):
    """Stock vLLM's pages of the same prompt would be in /store itself."""
    plain = named(folder, block_size=64)
    assert plain.parent == Path("/store")
    assert plain.name.startswith(f"vllm-dsa-{cache.LAYOUT_VERSION}-float32-576-128-64-")
    write_random(tmp_path, num_hidden_layers=1)
    monkeypatch.setattr(cache, "LAYOUT_VERSION", cache.LAYOUT_VERSION + 1)
    newer = named(folder, block_size=64)
    monkeypatch.undo()
    names = {
        plain,
        newer,
        named(folder, block_size=32),
        named(folder, block_size=64, kv_cache_dtype="fp8_ds_mla"),
        named(folder, block_size=64, dtype="bfloat16"),
        named(folder, block_size=64, hf_overrides={"index_topk": 32}),
        named(tmp_path, block_size=64),
    }
    assert len(names) == 7
    assert named(folder) == plain, "the block size was settled after the name"


def test_a_named_store_is_not_named_again(folder):
    config = engine_config(folder, **through(Path("/store")))
    once = dict(config.kv_transfer_config.kv_connector_extra_config)
    platform.check(config)
    assert config.kv_transfer_config.kv_connector_extra_config == once


def test_the_layout_version_stands_for_these_bytes():
    """Whoever changes what the caches hold must raise cache.LAYOUT_VERSION, and only then the digest here."""
    latent, rope, index = (torch.arange(40 * n).view(40, n) * 37 % 101 / 16 - 3 for n in (512, 64, 128))
    slots = torch.arange(40) * 37 % 64
    digest = hashlib.sha256()
    for shape, dtype in (((4, 16, 656), torch.uint8), ((4, 16, 576), torch.bfloat16)):
        pages = torch.zeros(shape, dtype=dtype)
        cache.store_latent(latent, rope, slots, pages)
        digest.update(pages.view(torch.uint8).numpy().tobytes())
    pages = torch.zeros(4, cache.index_page_bytes(16, 128), dtype=torch.uint8)
    cache.store_index_keys(index, slots, pages)
    digest.update(pages.numpy().tobytes())
    assert (cache.LAYOUT_VERSION, digest.hexdigest()[:16]) == (1, "5a48715bb17c3f74")


# Refusals.


@pytest.mark.parametrize(
    "connector", ["OffloadingConnector", "NixlConnector", "MultiConnector", "LMCacheConnectorV1", "MooncakeConnector"]
)
def test_other_connectors_are_refused(folder, connector):
    only = "only ExampleConnector of vLLM's own is proven"
    with pytest.raises(ValueError, match=f"'{connector}' is refused: .*{only}.*Remove --kv-transfer-config"):
        engine_config(folder, kv_transfer_config=BOTH | {"kv_connector": connector}, **WHOLE_PROMPTS)


def test_another_connector_of_the_same_name_is_refused(folder):
    with pytest.raises(ValueError, match="'ExampleConnector' is refused: .*of vLLM's own"):
        engine_config(folder, kv_transfer_config=BOTH | {"kv_connector_module_path": "elsewhere"}, **WHOLE_PROMPTS)


def test_no_connector_is_proven_on_another_platform(folder, monkeypatch):
    monkeypatch.delitem(platform.CONNECTORS, "cpu")
    with pytest.raises(ValueError, match="'ExampleConnector' is refused: .*no connector is proven"):
        engine_config(folder, kv_transfer_config=BOTH, **WHOLE_PROMPTS)


@pytest.mark.parametrize(
    "backend, simple, connector",
    [
        ("native", "0", "OffloadingConnector"),
        ("native", "1", "SimpleCPUOffloadConnector"),
        ("lmcache", "0", "LMCacheMPConnector"),
    ],
)
def test_offloading_is_refused(folder, backend, simple, connector, monkeypatch):
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", simple)
    with pytest.raises(ValueError, match=rf"--kv-offloading-size 2 .*'{connector}' is refused.*Remove --kv-offloading"):
        engine_config(folder, kv_offloading_size=2.0, kv_offloading_backend=backend)


def test_offloading_as_on_gpus(folder, monkeypatch):
    """What is allowed there: OffloadingConnector into this process's memory, nothing else."""
    monkeypatch.setitem(platform.CONNECTORS, "cpu", platform.CONNECTORS["cuda"])
    offloading = BOTH | {"kv_connector": "OffloadingConnector"}
    extra = {"cpu_bytes_to_use": 1 << 30}
    config = engine_config(folder, kv_transfer_config=offloading | {"kv_connector_extra_config": extra})
    assert config.kv_transfer_config.kv_connector_extra_config == extra
    engine_config(folder, kv_offloading_size=2.0)
    extra = extra | {"spec_name": "TieringOffloadingSpec"}
    with pytest.raises(ValueError, match="with spec_name 'TieringOffloadingSpec': not proven. Remove spec_name"):
        engine_config(folder, kv_transfer_config=offloading | {"kv_connector_extra_config": extra})
    with pytest.raises(ValueError, match="SimpleCPUOffloadConnector' is refused"):
        monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
        engine_config(folder, kv_offloading_size=2.0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tensor_parallel_size=2), "with 2 ranks: .*Serve on one rank"),
        (dict(enable_chunked_prefill=True), "with chunked prefill: .*Pass --no-enable-chunked-prefill"),
        (dict(long_prefill_token_threshold=64), "Remove --long-prefill-token-threshold"),
        (dict(enable_prompt_embeds=True), "Remove --enable-prompt-embeds"),
        (dict(speculative_config={"method": "ngram", "num_speculative_tokens": 1}), "Remove --speculative-config"),
    ],
)
def test_uses_of_the_example_connector_that_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=f"'ExampleConnector' is refused .*{message}, or remove --kv-transfer-config"):
        engine_config(folder, **(through(Path("/store")) | options))
