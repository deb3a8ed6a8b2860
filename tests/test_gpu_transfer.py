"""OffloadingConnector on a GPU: pages of both caches that were evicted come back from the host's memory bit for bit.

`python -m pytest -m gpu tests/test_gpu_transfer.py` needs a vLLM for the GPU, with this package installed beside it.
"""

from typing import Any

import pytest
import torch
from engine import Engine, engine
from planted_text import build_prompt
from test_planted import ids
from test_transfer import CACHES, ask, differing
from tiny_checkpoint import write_planted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS: dict[str, Any] = dict(
    dtype="bfloat16",
    block_size=64,
    max_model_len=8192,
    max_num_batched_tokens=8192,
    gpu_memory_utilization=0.1,
    kv_cache_memory_bytes=4 << 30,
    # One prompt of 6,000 tokens and not half of another.
    num_gpu_blocks_override=8192 // 64 + 2,
)
HOST_BYTES = 64 << 20  # in /dev/shm, which may be small: pages of the three prompts take 24 to 40 MB
TO_HOST = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": HOST_BYTES},
}
WAYS: dict[str, dict[str, Any]] = {
    "--kv-transfer-config": dict(kv_transfer_config=TO_HOST),
    "--kv-offloading-size, CUDA graphs": dict(
        kv_offloading_size=HOST_BYTES / 2**30,
        enforce_eager=False,
        compilation_config={"cudagraph_capture_sizes": [1, 8]},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    sizes = dict(index_topk=128, num_attention_heads=16, index_n_heads=64)
    write_planted(path, check=False, dtype="bfloat16", **sizes)
    return path


def ask_in_turn(running: Engine) -> tuple[Any, Any]:
    """Ask a question, two that take its pages, and the first once more; what test_transfer.ask found each time.

    Before the second time every page of both caches is overwritten, so that what is right then has come from elsewhere.
    """
    first, *others = (build_prompt(n, seed, chat=True, copies=128) for seed, n in enumerate((3000, 6000, 6000)))
    before = ask(running, ids(first, True))
    assert before[0] == first.answer
    for other in others:
        assert ask(running, ids(other, True))[0] == other.answer
    for layer in running.layers:
        layer.kv_cache.fill_(255 if layer.kv_cache.dtype == torch.uint8 else torch.nan)
        layer.indexer.cache.kv_cache.fill_(255)
    again = ask(running, ids(first, True))
    assert again[0] == first.answer
    return before, again


def test_without_a_connector_all_is_computed_again(folder):
    """That the test below sees pages that the GPU does not have any more."""
    with engine(folder, **OPTIONS) as running:
        (_, computed, _), (_, again, _) = ask_in_turn(running)
    assert min(computed, again) >= 3000


@pytest.mark.own_process
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_ds_mla"])
@pytest.mark.parametrize("way", WAYS)
def test_evicted_pages_come_back(folder, kv_cache_dtype, way):
    with engine(folder, kv_cache_dtype=kv_cache_dtype, **OPTIONS, **WAYS[way]) as running:
        (_, computed, pages), (_, again, restored) = ask_in_turn(running)
    assert computed >= 3000 and again < 128  # what is left of the last page, and tokens scheduled ahead
    assert len(pages) == CACHES and all(page.any() for page in pages)
    assert differing(pages, restored) == []
