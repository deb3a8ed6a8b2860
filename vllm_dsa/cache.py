"""Every byte of the two paged caches: sizes, pack, unpack.

Latent cache, one row a token, pages [pages, block_size, row]:
    "auto"        kv_lora_rank + rope values of the model dtype: normed latent, then rotated key
    "fp8_ds_mla"  656 bytes (kv_lora_rank 512, rope 64 only):
                  [0, 512)    512 e4m3 latents
                  [512, 528)  4 float32 scales, one for each 128 latents
                  [528, 656)  64 bfloat16 rotated key
Index-key cache, one page is planar, [pages, block_size * (index_head_dim + 4)] bytes:
    block_size * index_head_dim e4m3 keys, then block_size float32 scales

Scales are written as powers of two (ue8m0) and read as any float32. Both caches may be strided over pages.

What leaves the process, to a store or to another server, leaves as whole pages, and under layout_name().
"""

import torch

LAYOUT_VERSION = 1  # one more with any change to the bytes above

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
LATENT_GROUP = 128
FP8_DS_MLA = "fp8_ds_mla"
FP8_DS_MLA_BYTES = 656
SCALE_BYTES = 4


def index_page_bytes(block_size: int, head_dim: int) -> int:
    """Bytes of one index-key page."""
    return block_size * (head_dim + SCALE_BYTES)


def layout_name(row: str, latent_dim: int, index_dim: int, block_size: int) -> str:
    """What pages of both caches are called wherever they are stored: two servers may share pages if it is the same.

    ``row`` is the latent rows' dtype, or "fp8_ds_mla".
    """
    return f"vllm-dsa-{LAYOUT_VERSION}-{row}-{latent_dim}-{index_dim}-{block_size}"


def power_of_two_scale(amax: torch.Tensor) -> torch.Tensor:
    """2^ceil(log2(amax)) of positive float32 values, exactly."""
    mantissa, exponent = torch.frexp(amax.float())  # amax = mantissa * 2^exponent, mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(mantissa), exponent)


def quantise_index(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index keys or queries [..., D] to e4m3 codes [..., D] and float32 scales [...].

    scale = 2^ceil(log2(max(amax, 1e-4) / 448)).
    """
    x = x.float()
    scale = power_of_two_scale(x.abs().amax(-1).clamp(min=1e-4) / E4M3_MAX)
    return (x / scale.unsqueeze(-1)).to(E4M3), scale


def pack_latent(latent: torch.Tensor, rope_key: torch.Tensor) -> torch.Tensor:
    """Normed latents [T, 512] and rotated keys [T, 64] to fp8_ds_mla rows [T, 656] uint8.

    scale = 2^ceil(log2(max(amax / 448, 1e-4))) for each 128 latents.
    """
    groups = latent.float().unflatten(-1, (-1, LATENT_GROUP))  # [T, 4, 128]
    scale = power_of_two_scale((groups.abs().amax(-1) / E4M3_MAX).clamp(min=1e-4))
    codes = (groups / scale.unsqueeze(-1)).to(E4M3).flatten(-2)
    return torch.cat(
        [codes.view(torch.uint8), scale.view(torch.uint8), rope_key.to(torch.bfloat16).contiguous().view(torch.uint8)],
        dim=-1,
    )


def unpack_latent(rows: torch.Tensor) -> torch.Tensor:
    """fp8_ds_mla rows [..., 656] uint8 to float32 [..., 576]: latents, then rotated key."""
    codes = rows[..., :512].contiguous().view(E4M3).float()
    scale = rows[..., 512:528].contiguous().view(torch.float32)
    rope_key = rows[..., 528:].contiguous().view(torch.bfloat16).float()
    latent = (codes.unflatten(-1, (-1, LATENT_GROUP)) * scale.unsqueeze(-1)).flatten(-2)
    return torch.cat([latent, rope_key], dim=-1)


def store_latent(latent: torch.Tensor, rope_key: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    """Write normed latents [T, R] and rotated keys [T, P] to slots [T]; negative slots are left out."""
    keep = slots >= 0
    latent, rope_key, slots = latent[keep], rope_key[keep], slots[keep]
    block_size = cache.shape[1]
    if cache.dtype == torch.uint8:
        rows = pack_latent(latent, rope_key)
    else:
        rows = torch.cat([latent.to(cache.dtype), rope_key.to(cache.dtype)], dim=-1)
    cache[slots // block_size, slots % block_size] = rows


def load_latent(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rows of slots [n] (none negative) as float32 [n, R + P]."""
    block_size = cache.shape[1]
    rows = cache[slots // block_size, slots % block_size]
    return unpack_latent(rows) if cache.dtype == torch.uint8 else rows.float()


def index_planes(cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of an index-key cache [pages, bytes]: codes [pages, block_size, D] e4m3, scales [pages, block_size] f32."""
    pages, page_bytes = cache.shape
    block_size = page_bytes // (head_dim + SCALE_BYTES)
    codes = cache[:, : block_size * head_dim].view(E4M3).unflatten(1, (block_size, head_dim))
    return codes, cache[:, block_size * head_dim :].view(torch.float32)


def store_index_keys(index_key: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    """Quantise normed, rotated index keys [T, D] into slots [T]; negative slots are left out."""
    keep = slots >= 0
    index_key, slots = index_key[keep], slots[keep]
    codes, scales = index_planes(cache, index_key.shape[-1])
    block_size = scales.shape[1]
    new_codes, new_scales = quantise_index(index_key)
    pages, offsets = slots // block_size, slots % block_size
    codes.view(torch.uint8)[pages, offsets] = new_codes.view(torch.uint8)
    scales[pages, offsets] = new_scales


def load_index_keys(cache: torch.Tensor, pages: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole pages [n] as float32 codes [n * block_size, D] and scales [n * block_size]; key = code * scale."""
    codes, scales = index_planes(cache, head_dim)
    pages = pages.long()
    picked = codes.view(torch.uint8)[pages].view(E4M3).float()
    return picked.flatten(0, 1), scales[pages].flatten()
