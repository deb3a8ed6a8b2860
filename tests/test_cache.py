"""Every byte of both caches, against decoders written here from the formats' definitions and nothing of cache.py."""

import struct
from bisect import bisect
from fractions import Fraction

import pytest
import torch

from vllm_dsa import cache
from vllm_dsa.testing.cases import copy_pages

pytestmark = pytest.mark.usefixtures("one_thread")


def e4m3(byte: int) -> float:
    """Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, 0x7f is NaN."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return float("nan")
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def bfloat16(two_bytes: bytes) -> float:
    return struct.unpack("<f", b"\0\0" + two_bytes)[0]


E4M3_VALUES = sorted({e4m3(b) for b in range(256) if b & 127 != 127})


def nearest(value: Fraction) -> set[float]:
    """The e4m3 values that rounding to nearest may give (two at a tie)."""
    at = bisect(E4M3_VALUES, value)
    around = E4M3_VALUES[max(0, at - 1) : at + 1]
    least = min(abs(value - Fraction(v)) for v in around)
    return {v for v in around if abs(value - Fraction(v)) == least}


def power_of_two_above(value: Fraction) -> Fraction:
    """The smallest power of two that is at least a positive value."""
    power = Fraction(1)
    while power < value:
        power *= 2
    while power / 2 >= value:
        power /= 2
    return power


def latent_scale(amax: float) -> Fraction:
    return power_of_two_above(max(Fraction(amax) / 448, Fraction(1e-4)))


def index_scale(amax: float) -> Fraction:
    return power_of_two_above(max(Fraction(amax), Fraction(1e-4)) / 448)


def assert_quantised(codes: bytes, scale: float, values: torch.Tensor, expected_scale: Fraction) -> None:
    assert Fraction(scale) == expected_scale
    for byte, value in zip(codes, values.tolist(), strict=True):
        assert e4m3(byte) in nearest(Fraction(value) / expected_scale)


# Largest magnitudes at which a scale is easily got wrong.
AMAX = [0.0, 1e-30, 1e-4, 0.04, 0.0448, 0.5, 1.0, 448.0, 447.0, 449.0, 448 * 2.0**-9, 448 * 2.0**7, 3e4, 1e30]
AMAX += [float(torch.nextafter(torch.tensor(448 * 2.0**k), torch.tensor(torch.inf))) for k in (-9, 0, 3)]


def vector(size: int, amax: float, seed: int = 0) -> torch.Tensor:
    """Values of which the largest magnitude is amax, spread over many binary orders."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=random) * 2.0 ** torch.randint(-12, 1, (size,), generator=random)
    values *= amax / values.abs().max()
    values[size // 2] = -amax
    return values.clamp(-amax, amax)


def test_torch_decodes_e4m3_as_the_format_says():
    ours = torch.tensor([e4m3(b) for b in range(256)])
    assert torch.equal(
        torch.arange(256, dtype=torch.uint8).view(cache.E4M3).float().nan_to_num(1e9), ours.nan_to_num(1e9)
    )


@pytest.mark.parametrize("amax", AMAX)
def test_power_of_two_scale_is_exact(amax):
    if amax:
        (scale,) = cache.power_of_two_scale(torch.tensor([amax])).tolist()
        assert Fraction(scale) == power_of_two_above(Fraction(torch.tensor(amax).item()))


def test_power_of_two_scale_of_every_exponent():
    powers = 2.0 ** torch.arange(-126, 127).float()
    assert torch.equal(cache.power_of_two_scale(powers), powers)
    assert torch.equal(cache.power_of_two_scale(powers * 1.0000001192), powers * 2)
    assert torch.equal(cache.power_of_two_scale(powers * 0.9999999404), powers)


@pytest.mark.parametrize("amax", AMAX)
def test_fp8_ds_mla_row(amax):
    latent = torch.cat([vector(128, amax), vector(128, 1.0, 1), vector(128, amax / 7, 2), vector(128, 0.0)])
    rope_key = vector(64, 5.0, 3)
    row = bytes(cache.pack_latent(latent.unsqueeze(0), rope_key.unsqueeze(0))[0].tolist())
    assert len(row) == 656 == cache.FP8_DS_MLA_BYTES
    scales = struct.unpack("<4f", row[512:528])
    for group, scale in enumerate(scales):
        values = latent[128 * group : 128 * (group + 1)]
        expected = latent_scale(values.abs().max().item())
        assert_quantised(row[128 * group : 128 * (group + 1)], scale, values, expected)
    stored_key = [bfloat16(row[i : i + 2]) for i in range(528, 656, 2)]
    assert stored_key == rope_key.bfloat16().tolist()

    decoded = [e4m3(row[i]) * scales[i // 128] for i in range(512)] + stored_key
    assert cache.unpack_latent(torch.tensor([list(row)], dtype=torch.uint8))[0].tolist() == decoded


def test_unpack_reads_scales_that_are_no_powers_of_two():
    codes, scales, key = bytes(range(64)) * 8, (0.3, 1e-5, 77.0, 2.0), struct.pack("<64e", *range(64))
    row = codes + struct.pack("<4f", *scales) + key
    read = cache.unpack_latent(torch.tensor([list(row)], dtype=torch.uint8))[0]
    expected = torch.tensor([e4m3(b) for b in codes]).view(4, 128) * torch.tensor(scales).unsqueeze(1)
    assert torch.equal(read[:512], expected.flatten())


@pytest.mark.parametrize("amax", AMAX)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_index_page_is_planar(amax, head_dim):
    block_size, pages = 16, 3
    index = torch.full((pages, cache.index_page_bytes(block_size, head_dim) + 12), 0xFF, dtype=torch.uint8)[:, :-12]
    keys = torch.stack([vector(head_dim, amax, 1), vector(head_dim, 1.0, 2), vector(head_dim, 0.0)])
    slots = torch.tensor([2 * block_size + 15, 7, 2 * block_size])
    cache.store_index_keys(keys, slots, index)
    untouched = set(range(pages * block_size)) - set(slots.tolist())
    for slot, key in [*zip(slots.tolist(), keys, strict=True), *((slot, None) for slot in untouched)]:
        page, offset = bytes(index[slot // block_size].tolist()), slot % block_size
        assert len(page) == block_size * (head_dim + 4)
        codes = page[offset * head_dim : (offset + 1) * head_dim]
        at = block_size * head_dim + 4 * offset
        if key is None:
            assert set(codes) | set(page[at : at + 4]) == {0xFF}
        else:
            (scale,) = struct.unpack("<f", page[at : at + 4])
            assert_quantised(codes, scale, key, index_scale(key.abs().max().item()))


def test_load_index_keys_reads_whole_pages_in_the_order_asked():
    block_size, head_dim = 16, 32
    raw = torch.randint(0, 127, (4, cache.index_page_bytes(block_size, head_dim)), dtype=torch.uint8)
    index = copy_pages(raw, 8, 0xFF, "cpu")
    codes, scales = cache.load_index_keys(index, torch.tensor([3, 1], dtype=torch.int32), head_dim)
    assert codes.shape == (32, head_dim)
    for i, page in enumerate((3, 1)):
        content = bytes(raw[page].tolist())
        for offset in range(block_size):
            at = offset * head_dim
            assert codes[i * block_size + offset].tolist() == [e4m3(b) for b in content[at : at + head_dim]]
        expected = struct.unpack(f"<{block_size}f", content[block_size * head_dim :])
        assert scales[i * block_size : (i + 1) * block_size].tolist() == list(expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.uint8])
def test_store_latent_writes_its_slots_and_nothing_else(kind):
    rank, rope, width = (512, 64, 656) if kind == torch.uint8 else (48, 16, 64)
    pages = torch.full((4, 16, width * kind.itemsize), 0xFF, dtype=torch.uint8).view(kind)
    latent_cache = copy_pages(pages, 8, 0xFF, "cpu")
    latent, key = torch.randn(5, rank), torch.randn(5, rope)
    slots = torch.tensor([63, -1, 0, 17, -16])
    cache.store_latent(latent, key, slots, latent_cache)
    rows = latent_cache.contiguous().view(torch.uint8).flatten(0, 1)
    written = [63, 0, 17]
    rest = [slot for slot in range(64) if slot not in written]
    assert (rows[rest] == 0xFF).all()
    memory = torch.as_strided(latent_cache, (4, 8), (latent_cache.stride(0), 1), 16 * width)[:-1]
    assert (memory.contiguous().view(torch.uint8) == 0xFF).all()  # between the pages
    kept = [0, 2, 3]
    read = cache.load_latent(latent_cache, torch.tensor(written))
    if kind == torch.uint8:
        assert torch.equal(rows[written], cache.pack_latent(latent[kept], key[kept]))
        assert torch.equal(read, cache.unpack_latent(rows[written]))
    else:
        assert torch.equal(read, torch.cat([latent, key], 1)[kept].to(kind).float())


def test_index_slots_below_zero_are_left_out():
    index = torch.full((2, cache.index_page_bytes(16, 32)), 0xFF, dtype=torch.uint8)
    cache.store_index_keys(torch.randn(2, 32), torch.tensor([-1, -32]), index)
    assert (index == 0xFF).all()
