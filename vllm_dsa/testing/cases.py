"""Named inputs of the three operations, shared by tests and tools: odd lengths, hostile memory, ties, real sizes.

``build`` gives everything that a step's kernels are handed. Each request's context is already in the caches, written
by reference.py; the new tokens are not.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_dsa import cache
from vllm_dsa.kernels import Norms, Rope, reference
from vllm_dsa.metadata import Rows, build_rows, count_decodes, tokens_to_slots

UNUSED_BLOCK = 1_000_000_007  # block-table entries past a request's last block


@dataclass(frozen=True)
class Case:
    """Sizes as named in ``vllm_dsa.kernels``; ``requests`` are (context, new tokens).

    ties: "no"; "all", every index key the same; "few", five different ones; "zero", every score zero or minus zero.
    page_padding: values between one latent page and the next; between index pages four times as many bytes.
    padding_rows: rows at the end that belong to no request: length 0, slot -1.
    decode_rows: leading requests of at most so many new tokens count as decoding (Rows.decodes).
    """

    name: str
    requests: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.float32
    latent_kind: str = "auto"
    rank: int = 128
    rope_dim: int = 32
    heads: int = 4
    index_heads: int = 4
    index_dim: int = 64
    top_k: int = 16
    block_size: int = 16
    page_padding: int = 8
    padding_rows: int = 0
    decode_rows: int = 0
    poison: int = 0xFF
    index_interleaved: bool = False
    ties: str = "no"

    @property
    def tokens(self) -> int:
        """Rows of the step, padding included."""
        return sum(new for _, new in self.requests) + self.padding_rows


@dataclass
class Inputs:
    """The arguments of write_keys, write_queries, select and attend for one case."""

    latent: torch.Tensor
    rope_key: torch.Tensor
    index_key: torch.Tensor
    norms: Norms
    rope: Rope
    positions: torch.Tensor
    slots: torch.Tensor
    latent_cache: torch.Tensor
    index_cache: torch.Tensor
    rope_query: torch.Tensor
    index_query: torch.Tensor
    head_weights: torch.Tensor
    query: torch.Tensor
    rows: Rows
    scale: float

    def keys(self) -> tuple:
        """Arguments of write_keys."""
        return (
            self.latent,
            self.rope_key,
            self.index_key,
            self.norms,
            self.rope,
            self.positions,
            self.slots,
            self.latent_cache,
            self.index_cache,
        )

    def queries(self) -> tuple:
        """Arguments of write_queries."""
        return self.rope_query, self.index_query, self.head_weights, self.rope, self.positions, self.query


# DeepSeek-V3.2 on one of eight ranks; at index_topk - 8 tokens of context its rows cross index_topk.
V32 = Case(
    "v32",
    ((2040, 16),),
    rank=512,
    rope_dim=64,
    heads=16,
    index_heads=64,
    index_dim=128,
    top_k=2048,
    block_size=64,
)

CASES = (
    Case("prefill", ((0, 100),)),
    Case("chunk", ((37, 64),)),
    Case("decode", ((99, 1), (16, 1), (700, 1))),
    Case("mixed", ((0, 40), (250, 1), (31, 33), (5, 1)), padding_rows=3),
    Case("at top_k", ((15, 1), (16, 1), (14, 1), (14, 3), (0, 15), (0, 16), (0, 17))),
    Case("at page borders", ((63, 1), (64, 1), (62, 1), (47, 17), (48, 16), (0, 32)), block_size=32),
    Case("at key tiles", ((511, 1), (512, 1), (510, 4), (1023, 3), (1535, 2))),
    Case("one token", ((0, 1),)),
    Case("no request", (), padding_rows=4),
    Case("no row", ()),
    Case("block of 48", ((500, 70), (47, 1)), block_size=48),
    Case("block of 256", ((300, 20), (3, 2)), block_size=256),
    Case("top_k 64", ((0, 200), (90, 1)), top_k=64),
    Case("top_k 300", ((0, 20), (280, 50), (900, 1)), top_k=300, rank=64, heads=2),
    Case("top_k 1", ((5, 4),), top_k=1),
    Case("compact pages", ((70, 9),), page_padding=0),
    Case("zero poison", ((70, 9),), poison=0),
    Case("one head", ((0, 50), (600, 1)), heads=1, index_heads=1),
    Case("two index heads", ((0, 50), (600, 1)), index_heads=2),
    Case("six heads", ((0, 90),), heads=6, index_heads=6, rank=80, rope_dim=16, index_dim=32),
    Case("interleaved", ((40, 30),), index_interleaved=True),
    Case("ties all", ((90, 20), (30, 1)), ties="all"),
    Case("ties few", ((600, 9), (30, 1)), ties="few"),
    Case("ties zero", ((90, 20),), ties="zero"),
    V32,
    replace(V32, name="v32 short", requests=((100, 4), (0, 30))),
    replace(V32, name="v32 all heads", requests=((2046, 3),), heads=128, latent_kind=cache.FP8_DS_MLA),
    replace(V32, name="glm", requests=((2100, 2), (7, 1)), index_heads=32, index_interleaved=True),
    Case("fp8", ((0, 60), (90, 3)), latent_kind=cache.FP8_DS_MLA, rank=512, rope_dim=64),
    replace(V32, name="fp8 v32", requests=((2100, 1), (300, 5)), latent_kind=cache.FP8_DS_MLA),
)
# Steps of the published models as vLLM lays out their pages, which is all that the vendor's libraries read.
_SERVED = replace(V32, dtype=torch.bfloat16, latent_kind=cache.FP8_DS_MLA, page_padding=0, decode_rows=1)
PUBLISHED = (
    replace(_SERVED, name="published decode", requests=((5000, 1), (2048, 1), (300, 1), (2047, 1))),
    replace(_SERVED, name="published prefill", requests=((3000, 40), (0, 300))),
    replace(_SERVED, name="published mixed", requests=((6000, 1), (40, 1), (2040, 16))),
    # As many rows that decode as requests: what is of a row must not be taken for what is of a request.
    replace(_SERVED, name="published drafts", requests=((3000, 2), (2047, 2), (2040, 16), (0, 5)), decode_rows=2),
    replace(_SERVED, name="published all heads", requests=((4000, 1), (2046, 5)), heads=128),
    replace(_SERVED, name="published bf16 cache", requests=((4000, 1), (2046, 5)), latent_kind="auto"),
    replace(_SERVED, name="published glm", requests=((4000, 1), (0, 70)), index_heads=32, index_interleaved=True),
)
BY_NAME = {case.name: case for case in (*CASES, *PUBLISHED)}


def with_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The same case in another model dtype."""
    return replace(case, name=f"{case.name} {str(dtype).removeprefix('torch.')}", dtype=dtype)


def build(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Deterministic inputs of a case: the seed and the case's name decide them."""
    random = torch.Generator().manual_seed(seed << 32 | zlib.crc32(case.name.encode()))

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    ends = [context + new for context, new in case.requests]
    rows = _rows(case, ends, random)
    pages = sum(-(-end // case.block_size) for end in ends) + 2
    latent_cache, index_cache = _caches(case, pages)
    norms = Norms(
        latent_weight=1 + 0.2 * normal(case.rank),
        latent_eps=1e-6,
        index_weight=1 + 0.2 * normal(case.index_dim, dtype=torch.float32),
        index_bias=0.2 * normal(case.index_dim, dtype=torch.float32),
    )
    rope = _rope(case, max(ends, default=1))

    # Every token of every request, the new ones marked, then the padding rows, which are new.
    none = torch.empty(0, dtype=torch.int64)
    places = [torch.arange(end) for end in ends]
    slots = [tokens_to_slots(p, rows.block_table[i], case.block_size) for i, p in enumerate(places)]
    new = [p >= context for p, (context, _) in zip(places, case.requests, strict=True)]
    unplaced = torch.zeros(case.padding_rows, dtype=torch.int64)
    positions = torch.cat([none, *places, unplaced])
    slots = torch.cat([none, *slots, unplaced - 1])
    new = torch.cat([none > 0, *new, unplaced == 0])

    latent = normal(len(new), case.rank)
    rope_key = normal(len(new), case.rope_dim)
    index_key = normal(len(new), case.index_dim)
    index_query = normal(case.tokens, case.index_heads, case.index_dim)
    if case.ties != "no":
        # RoPE turns the first dims by the position, so keys are the same only where these are zero.
        norms.index_weight[: case.rope_dim] = 0
        norms.index_bias[: case.rope_dim] = 0
        index_key = index_key[torch.randint(5 if case.ties == "few" else 1, (len(new),), generator=random)]
    if case.ties == "zero":
        key = reference.layer_norm(index_key[:1], norms.index_weight, norms.index_bias, norms.index_eps)
        index_query = (-key * index_query[..., :1].abs()).to(case.dtype)

    keys = (latent, rope_key, index_key)
    written = (positions[~new], slots[~new])
    reference.write_keys(*(key[~new] for key in keys), norms, rope, *written, latent_cache, index_cache)
    return Inputs(
        *(key[new].to(device) for key in keys),
        norms=_to(norms, device),
        rope=_to(rope, device),
        positions=positions[new].to(device),
        slots=slots[new].to(device),
        latent_cache=copy_pages(latent_cache, case.page_padding, case.poison, device),
        index_cache=copy_pages(index_cache, 4 * case.page_padding, case.poison, device),
        rope_query=normal(case.tokens, case.heads, case.rope_dim).to(device),
        index_query=index_query.to(device),
        head_weights=normal(case.tokens, case.index_heads).to(device),
        query=normal(case.tokens, case.heads, case.rank + case.rope_dim).to(device),
        rows=_to(rows, device),
        scale=(case.rank + case.rope_dim) ** -0.5,
    )


def copy_pages(pages: torch.Tensor, padding: int, poison: int, device: str) -> torch.Tensor:
    """Pages [pages, ...] on a device, ``padding`` values of ``poison`` bytes between them."""
    size = pages[0].numel()
    memory = torch.full((len(pages) * (size + padding) * pages.itemsize,), poison, dtype=torch.uint8, device=device)
    copy = memory.view(pages.dtype).view(len(pages), -1)[:, :size].unflatten(1, pages.shape[1:])
    return copy.copy_(pages)


def _rows(case: Case, ends: list[int], random: torch.Generator) -> Rows:
    blocks = [-(-end // case.block_size) for end in ends]
    order = torch.randperm(sum(blocks) + 2, generator=random).int()
    table = torch.full((max(1, len(ends)), max(blocks, default=0) + 2), UNUSED_BLOCK, dtype=torch.int32)
    for i, taken in enumerate(order[: sum(blocks)].split(blocks)):
        table[i, : len(taken)] = taken
    starts = torch.tensor([0, *(new for _, new in case.requests)]).cumsum(0).int()
    rows = build_rows(starts, torch.tensor(ends, dtype=torch.int32), table, case.block_size, case.tokens)
    return replace(rows, decodes=count_decodes(rows.starts, case.decode_rows, case.tokens) if case.decode_rows else 0)


def _caches(case: Case, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    fp8 = case.latent_kind == cache.FP8_DS_MLA
    width = cache.FP8_DS_MLA_BYTES if fp8 else (case.rank + case.rope_dim) * case.dtype.itemsize
    latent = torch.full((pages, case.block_size, width), case.poison, dtype=torch.uint8)
    index_bytes = cache.index_page_bytes(case.block_size, case.index_dim)
    index = torch.full((pages, index_bytes), case.poison, dtype=torch.uint8)
    return latent if fp8 else latent.view(case.dtype), index


def _rope(case: Case, positions: int) -> Rope:
    frequencies = 1e4 ** -torch.linspace(0, 1, case.rope_dim // 2)
    angles = torch.outer(torch.arange(positions), frequencies)
    return Rope(torch.cat([angles.cos(), angles.sin()], dim=1), case.index_interleaved)


def _to(facts: Any, device: str) -> Any:
    """A dataclass with its tensors on a device."""
    return replace(facts, **{k: v.to(device) for k, v in vars(facts).items() if isinstance(v, torch.Tensor)})
