"""Every byte of both paged caches after a real run, read back by a decoder of its own, against the oracle's values.

The pages are 0xFF before the run: NaN in every format, so a byte that is read before it is written spoils the answer.
"""

import numpy as np
import oracle
import pytest
import torch
from engine import engine
from fp8_bytes import E4M3
from test_model import LIMITS, config_of, prompts
from tiny_checkpoint import write_random

BLOCK_SIZE = 16
LATENTS, ROPE, INDEX_DIM, GROUP = 512, 64, 128, 128
ROW_BYTES = 656
FILL = 0xFF


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("random")
    write_random(path, num_attention_heads=6, index_n_heads=8, num_hidden_layers=3, rope_scaling=None, seed=2)
    return path


class Wanted:
    """What the oracle writes: index keys [T, 128], latents [T, 512] and rotated keys [T, 64] of each layer, float32,
    before their rounding."""

    def __init__(self, path, monkeypatch, top_k):
        self.keys, self.latents = [], []
        round_index, round_latent = oracle.round_index, oracle.round_latent

        def recorded_index(x):
            if x.ndim == 3:  # [1, T, D]: queries have a dim for heads
                self.keys.append(x[0].numpy())
            return round_index(x)

        def recorded_latent(latent, rope_key):
            # transformers puts the two values of each pair half a row apart; the cache has them side by side.
            pairs = rope_key.reshape(-1, 2, ROPE // 2).mT
            self.latents.append((latent.reshape(-1, LATENTS).numpy(), pairs.reshape(-1, ROPE).numpy()))
            return round_latent(latent, rope_key)

        monkeypatch.setattr(oracle, "round_index", recorded_index)
        monkeypatch.setattr(oracle, "round_latent", recorded_latent)
        self.oracle = oracle.Oracle(path, "fp8_ds_mla")
        for layer in self.oracle.model.model.layers:
            layer.self_attn.indexer.index_topk = top_k

    def __call__(self, tokens):
        """(log-probabilities, index keys by layer, (latents, rotated keys) by layer) of one prompt"""
        self.keys.clear()
        self.latents.clear()
        return self.oracle.prompt_logprobs(tokens), list(self.keys), list(self.latents)


# The decoder


def index_pages(pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[pages, 16 * 132] bytes: first 16 keys of 128 codes, then 16 float32 scales -> codes [slots, 128], scales."""
    codes = pages[:, : BLOCK_SIZE * INDEX_DIM].reshape(-1, INDEX_DIM)
    return codes, pages[:, BLOCK_SIZE * INDEX_DIM :].copy().view("<f4").reshape(-1)


def latent_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[slots, 656] bytes -> codes [slots, 4, 128], scales [slots, 4], rotated keys [slots, 64]."""
    scales = rows[:, LATENTS : LATENTS + 16].copy().view("<f4")
    # bfloat16 is the upper half of a float32.
    rotated = (rows[:, LATENTS + 16 :].copy().view("<u2").astype("<u4") << 16).view("<f4")
    return rows[:, :LATENTS].reshape(-1, LATENTS // GROUP, GROUP), scales, rotated


def ordinal(codes: np.ndarray) -> np.ndarray:
    """Bytes of e4m3 to integers that count its values in order: neighbours differ by 1."""
    magnitude = (codes & 127).astype(int)
    return np.where(codes >> 7, -magnitude, magnitude)


def nearest(values: np.ndarray) -> np.ndarray:
    """e4m3 bytes of the values nearest to ``values``; of two equally near, either."""
    finite = np.flatnonzero(np.isfinite(E4M3))
    finite = finite[np.argsort(E4M3[finite], kind="stable")]
    table = E4M3[finite]
    right = np.clip(np.searchsorted(table, values), 1, len(table) - 1)
    return finite[right - (np.abs(values - table[right - 1]) < np.abs(values - table[right]))]


# Layer 0 sees equal inputs. A code that falls to the other side there is noise in the inputs of all later layers; of
# values near zero, whose codes lie close together, such noise can move more than one code.
NOISE = (1e-6, 2**-12, 2**-12)  # of the largest value


def check_codes(codes: np.ndarray, scales: np.ndarray, values: np.ndarray, ratio: np.ndarray, noise: float) -> None:
    """Codes [..., n] and scales [...] against values [..., n]; each scale the power of two from ``ratio`` up."""
    mantissa, _ = np.frexp(scales)
    assert (mantissa == 0.5).all(), "a scale is no power of two"
    exponent = np.log2(ratio)
    expected = np.exp2(np.ceil(exponent))
    # Two float32 implementations may stand on either side of a power of two.
    border = np.abs(exponent - np.round(exponent)) < 4 * noise
    assert (border | (scales == expected)).all(), "a scale is not the least power of two"
    assert np.isfinite(E4M3[codes]).all()
    off = np.abs(ordinal(codes) - ordinal(nearest(values / scales[..., None])))
    error = np.abs(E4M3[codes] * scales[..., None] - values) / np.abs(values).max()
    assert ((off <= 1) | (error <= noise)).all(), f"{(off > 1).sum()} codes are off by up to {off.max()}"
    assert (off > 0).mean() < 0.02, f"{(off > 0).mean():.1%} of the codes are off by one"


def check_slots(layer, keys, latents, rotated, slots, noise=NOISE[0]) -> None:
    """One layer's bytes at ``slots`` against the oracle's values of the tokens in them."""
    codes, scales = index_pages(layer_bytes(layer.indexer.cache.kv_cache))
    check_codes(codes[slots], scales[slots], keys, np.maximum(np.abs(keys).max(-1), 1e-4) / 448, noise)
    codes, scales, rope = latent_rows(layer_bytes(layer.kv_cache).reshape(-1, ROW_BYTES))
    groups = latents.reshape(-1, LATENTS // GROUP, GROUP)
    check_codes(codes[slots], scales[slots], groups, np.maximum(np.abs(groups).max(-1) / 448, 1e-4), noise)
    assert np.allclose(rope[slots], rotated, rtol=2**-8, atol=noise * np.abs(rotated).max())


def layer_bytes(cache: torch.Tensor) -> np.ndarray:
    """A bound cache [pages, 1, block_size, bytes] as [pages, bytes of a page]."""
    return cache.view(torch.uint8).flatten(1).numpy()


def fill(layers) -> None:
    for layer in layers:
        for cache in (layer.kv_cache, layer.indexer.cache.kv_cache):
            assert cache.dtype == torch.uint8
            cache.fill_(FILL)


class Slots:
    """Which slot each token of each request got, and which pages vLLM itself zeroed."""

    def __init__(self, running):
        self.pages: dict[str, list[int]] = {}
        self.zeroed: set[int] = set()
        schedule = running.scheduler.schedule
        runner = running.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        zero = runner._zero_block_ids

        def recorded(*args, **options):
            output = schedule(*args, **options)
            for new in output.scheduled_new_reqs:
                self.pages[new.req_id] = list(new.block_ids[0])
            cached = output.scheduled_cached_reqs
            for request, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
                self.pages[request] += blocks[0] if blocks else []
            return output

        def zeroed(block_ids):
            self.zeroed |= set(block_ids)
            return zero(block_ids)

        running.scheduler.schedule, runner._zero_block_ids = recorded, zeroed

    def of(self, number: int, length: int) -> np.ndarray:
        """Slots of the first ``length`` tokens of the request that came as ``number``."""
        positions, pages = np.arange(length), np.array(list(self.pages.values())[number])
        return pages[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def test_bytes_are_the_oracles(folder, monkeypatch):
    asked = prompts(config_of(folder), multiples=(1 / 3, 12))
    assert any(len(tokens) % BLOCK_SIZE for tokens in asked), "no page is partly filled"
    # Each alone, then two of whole pages at once: the page of a finished request's last tokens is soon another's.
    batches = [[tokens] for tokens in asked] + [[asked[-1], asked[-1][::-1]]]
    top_k = max(map(len, asked))  # no selection: a near tie that falls the other way would change all later layers
    wanted = Wanted(folder, monkeypatch, top_k)
    options = dict(hf_overrides={"index_topk": top_k}, num_gpu_blocks_override=100, max_model_len=512)
    with engine(folder, kv_cache_dtype="fp8_ds_mla", **options) as running:
        layers, slots = running.layers, Slots(running)
        assert layers[0].kv_cache.shape[1:] == (1, BLOCK_SIZE, ROW_BYTES)
        assert layers[0].indexer.cache.kv_cache.shape[1:] == (1, BLOCK_SIZE, INDEX_DIM + 4)
        for batch in batches:
            fill(layers)
            slots.pages.clear()
            slots.zeroed.clear()
            assert running.llm.reset_prefix_cache()
            given = running.prompt_logprobs(batch)
            written = [slots.of(i, len(tokens)) for i, tokens in enumerate(batch)]
            for tokens, where, logprobs in zip(batch, written, given, strict=True):
                expected, keys, latents = wanted(tokens)
                assert (logprobs - expected).abs().median() <= LIMITS["fp8_ds_mla"][0], "poison was read"
                for layer, key, (latent, rotated), noise in zip(layers, keys, latents, NOISE, strict=True):
                    check_slots(layer, key, latent, rotated, where, noise)
            check_the_rest(layers, np.concatenate(written), slots.zeroed)
        assert max(len(tokens) for tokens in asked) > 64 and len(running.steps) > len(batches), "not chunked"
        check_that_it_can_fail(layers[0], keys[0], *latents[0], where)


def check_the_rest(layers, written, zeroed) -> None:
    """Slots of no token are as they were: filled, or zeroed by vLLM."""
    for layer in layers:
        codes, scales = index_pages(layer_bytes(layer.indexer.cache.kv_cache))
        rows = layer_bytes(layer.kv_cache).reshape(-1, ROW_BYTES)
        free = np.setdiff1d(np.arange(len(rows)), written)
        assert len(written) == len(set(written)) and len(free) > len(written)
        left = np.where(np.isin(free // BLOCK_SIZE, list(zeroed)), 0, FILL)[:, None]
        assert (rows[free] == left).all() and (codes[free] == left).all()
        assert (scales.view("<u1").reshape(-1, 4)[free] == left).all()


def check_that_it_can_fail(layer, keys, latents, rotated, slots) -> None:
    """A bit changed in each part of a row, and rows taken for those of other tokens."""
    latent = layer.kv_cache.view(torch.uint8).view(-1, ROW_BYTES)
    index = layer.indexer.cache.kv_cache.flatten(1)
    page, offset = divmod(int(slots[3]), BLOCK_SIZE)
    scale = BLOCK_SIZE * INDEX_DIM + 4 * offset
    places = [
        (latent[slots[3]], 100, 2),
        (latent[slots[3]], LATENTS + 6, 0x80),  # exponent of the second scale
        (latent[slots[3]], LATENTS + 16 + 1, 1),
        (index[page], offset * INDEX_DIM + 5, 2),
        (index[page], scale + 2, 0x80),
    ]
    check_slots(layer, keys, latents, rotated, slots)
    for part, byte, bit in places:
        part[byte] ^= bit
        with pytest.raises(AssertionError):
            check_slots(layer, keys, latents, rotated, slots)
        part[byte] ^= bit
    with pytest.raises(AssertionError):
        check_slots(layer, keys, latents, rotated, np.roll(slots, 1))
