"""The MTP draft's weights: a reload of the model reaches them, and what does not reach them is named in the log."""

import logging

import pytest
import torch
import vllm.logger
from checkpoint_files import read_dequantised, write
from engine import engine, load, unloaded
from test_mtp import drafter, speculative
from tiny_checkpoint import write_random

SIZES = dict(num_hidden_layers=2, num_attention_heads=2, index_n_heads=8, index_topk=16)
COPY, HEAD_COPY = "model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"


@pytest.fixture
def warnings():
    """Messages of the package's own logger; a message that is to be given once can be given again."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return True

    logger = logging.getLogger("vllm.vllm_dsa.drafts")
    logger.addFilter(keep)  # a handler would be gone after vLLM has set its loggers up again
    vllm.logger._print_warning_once.cache_clear()
    yield messages
    logger.removeFilter(keep)


def guessed(running) -> list[torch.Tensor]:
    """Hidden states of the draft after a prompt."""
    prompt = torch.randint(8, 300, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    found: list[torch.Tensor] = []
    handle = drafter(running).register_forward_hook(lambda module, args, out: found.append(out[0].clone()))
    assert running.llm.reset_prefix_cache()
    running.generate([prompt], max_tokens=3)
    handle.remove()
    return found


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "fp8"])
def test_a_reload_reaches_the_draft(tmp_path, fp8, warnings):
    """To another checkpoint and back; then weights without the MTP layer, which leave it, with a word."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        write_random(folder, seed=seed, fp8=fp8, **SIZES)
    with engine(folders[1], **speculative(2)) as running:
        fresh = guessed(running)
    with engine(folders[0], **speculative(2)) as running:
        first = guessed(running)
        assert not equal(first, fresh)
        for folder, expected in zip(reversed(folders), (fresh, first), strict=True):
            running.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            assert equal(guessed(running), expected)
        assert drafter(running).model.embed_tokens is running.model.model.embed_tokens
        assert warnings == []
        if not fp8:
            weights = read_dequantised(folders[1])
            without = [(n, t) for n, t in weights.items() if not n.startswith("model.layers.2.")]
            running.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": without})
            assert not equal(guessed(running), fresh)
            (warning,) = warnings
            assert "tensors of the MTP layer" in warning and "or restart" in warning


@pytest.mark.parametrize(
    "dtype, changed, named",
    [
        ("float32", {}, []),
        ("float32", {COPY: "model.embed_tokens.weight"}, [COPY]),
        ("float32", {HEAD_COPY: "lm_head.weight"}, [HEAD_COPY]),
        ("bfloat16", {COPY: "model.embed_tokens.weight", HEAD_COPY: "lm_head.weight"}, [COPY, HEAD_COPY]),
    ],
    ids=["equal", "embedding", "head", "both"],
)
def test_copies_that_differ_are_named(tmp_path, dtype, changed, named, warnings):
    config = write_random(tmp_path, **SIZES)
    tensors = read_dequantised(tmp_path)
    assert torch.equal(tensors[COPY], tensors["model.embed_tokens.weight"])
    tensors |= {name: tensors[original] * 1.01 for name, original in changed.items()}
    write(tmp_path, config, tensors)
    for options, wanted in (({}, []), (speculative(1), named)):
        with unloaded(tmp_path, dtype=dtype, **options) as (model, vllm_config):
            load(model, vllm_config)
        assert [warning.split()[0] for warning in warnings] == wanted
