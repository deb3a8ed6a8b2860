"""How results of two providers are compared, and how far apart they may be.

A check raises ``Mismatch``, whose text says what differs, where and by how much.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vllm_dsa import cache
from vllm_dsa.kernels import reference, triton_configs
from vllm_dsa.metadata import Rows

# Largest difference, as a share of the largest value compared.
TOLERANCE = {
    # Sums of up to 2,048 products in two orders: about sqrt(2048) times 2^-24. The CPU's is at most 5e-7.
    torch.float32: 3e-6,
    # Both are rounded to 8 bits, and may fall to either side of a rounding border: one step of the largest value.
    torch.bfloat16: 2.0**-7,
}
# |difference| of a whole model's log-probabilities in bfloat16 by two implementations, median and 90th percentile: each
# activation is rounded to 8 bits, 2^-9 relative, and there is no oracle for the order of those roundings.
BFLOAT16_LOGPROBS = (1.7e-2, 8.7e-2)
# A value next to a rounding border may become the neighbouring e4m3 code; float32 noise does that to 1 in 1,000.
CODES_THAT_MAY_DIFFER = 0.01
# Error of an index score as a share of sum_h |w_h| |q_h| . |k|, by what the dots are accumulated in.
SCORE_ERROR = {
    torch.float32: 2.0**-22,
    # Tensor cores add exact products of two float16 in float32, but truncate where they align them.
    torch.float16: 2.0**-18,
    # Hopper's FP8 tensor cores keep about 14 bits when they align products; 128 dims are four such steps.
    torch.float8_e4m3fn: 2.0**-11,
}


def _triton_scores(device: str) -> torch.dtype:
    fp8_dot = triton_configs.score(torch.empty(0, device=device).device).fp8_dot
    return torch.float8_e4m3fn if fp8_dot else torch.float16


@dataclass(frozen=True)
class Allowance:
    """How far a provider may be from reference.py. The defaults are the strictest, and a new provider's.

    tolerance: of write and attend. scores: the entry of SCORE_ERROR that holds for select on a device, "cpu" or "cuda".
    published_only: of all cases it is given those that are called published.
    """

    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)
    scores: Callable[[str], torch.dtype] = lambda device: torch.float32
    published_only: bool = False


# What holds for a provider where the defaults do not.
ALLOWANCES = {
    "triton": Allowance(
        # Tensor cores' sums, approximate exp2 and log2; attention weights in bfloat16 are rounded to 2^-9, which adds
        # to the outputs' rounding on both sides.
        tolerance={torch.float32: 1e-5, torch.bfloat16: 2.0**-6},
        scores=_triton_scores,
    ),
    "vendor": Allowance(
        # FlashMLA's log-sum-exp is of logits summed in another order and in base 2.
        tolerance={torch.float32: 2e-4, torch.bfloat16: 2.0**-6},
        scores=lambda device: torch.float8_e4m3fn,
        # Its libraries read pages as vLLM lays them out, and in the published cases they are.
        published_only=True,
    ),
}


def allowance(provider: str) -> Allowance:
    """A provider's, by its name in dispatch.PROVIDERS."""
    return ALLOWANCES.get(provider, Allowance())


class Mismatch(AssertionError):
    """Two results that should agree do not."""


def max_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest |got - want| over the largest |want|, both finite; infinite where only one is, or infinities differ."""
    got, want = got.double().cpu(), want.double().cpu()
    finite = got.isfinite() & want.isfinite()
    same = (got == want) | (got.isnan() & want.isnan())
    if not (finite | same).all():
        return float("inf")
    got, want = got[finite], want[finite]
    if not want.numel():
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """``max_error`` within tolerance, of tensors of one shape."""
    if got.shape != want.shape:
        raise Mismatch(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    error = max_error(got, want)
    if not error <= tolerance:
        raise Mismatch(f"{name}: largest error {error:.3g} of the largest value, allowed {tolerance:.3g}")


def assert_same_bits(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """One shape, one dtype, the same bytes."""
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        raise Mismatch(f"{name}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}")
    if not got.numel():
        return
    differ = (_bytes(got) != _bytes(want)).any(-1)
    if differ.any():
        raise Mismatch(f"{name}: {int(differ.sum())} of {differ.numel()} values differ in their bits")


def assert_codes_close(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """e4m3 codes: few differ, and those by one step."""
    got, want = (_bytes(x).squeeze(-1).int() for x in (got, want))
    # Codes order as sign and magnitude: 0x80 is -0.
    got, want = (torch.where(x < 128, x, 128 - x) for x in (got, want))
    share = (got != want).double().mean().item() if got.numel() else 0.0
    steps = int((got - want).abs().max()) if got.numel() else 0
    if share > CODES_THAT_MAY_DIFFER or steps > 1:
        raise Mismatch(
            f"{name}: {share:.2%} of the e4m3 codes differ, by up to {steps} steps; "
            f"allowed {CODES_THAT_MAY_DIFFER:.2%}, by 1"
        )


def check_caches(
    latent: torch.Tensor,
    index: torch.Tensor,
    want_latent: torch.Tensor,
    want_index: torch.Tensor,
    slots: torch.Tensor,
    head_dim: int,
) -> None:
    """What write_keys left in both caches at ``slots``, and that it touched nothing else."""
    slots = slots[slots >= 0]
    pages, offsets = slots // latent.shape[1], slots % latent.shape[1]
    got, want = latent[pages, offsets], want_latent[pages, offsets]
    if latent.dtype == torch.uint8:
        assert_codes_close("latent codes", got[:, :512], want[:, :512])
        assert_same_bits("latent scales", got[:, 512:528], want[:, 512:528])
        got, want = (x[:, 528:].contiguous().view(torch.bfloat16) for x in (got, want))
        assert_close("rotated key", got, want, TOLERANCE[torch.bfloat16])
    else:
        assert_close("latent rows", got, want, TOLERANCE[latent.dtype])
    planes, want_planes = cache.index_planes(index, head_dim), cache.index_planes(want_index, head_dim)
    codes, want_codes = (x[0].view(torch.uint8)[pages, offsets] for x in (planes, want_planes))
    assert_codes_close("index codes", codes, want_codes)
    assert_same_bits("index scales", planes[1][pages, offsets], want_planes[1][pages, offsets])

    untouched = torch.ones(latent.shape[:2], dtype=torch.bool, device=latent.device)
    untouched[pages, offsets] = False
    assert_same_bits("latent rows not written to", latent[untouched], want_latent[untouched])
    for plane, want_plane, name in zip(planes, want_planes, ("codes", "scales"), strict=True):
        got, want = (_bytes(x)[untouched.cpu()] for x in (plane, want_plane))
        assert_same_bits(f"index {name} not written to", got, want)


def score_error(
    codes: torch.Tensor, weights: torch.Tensor, index_cache: torch.Tensor, rows: Rows, row: int, unit: float
) -> float:
    """How far a provider's scores of one row may be from reference.py's; ``unit`` is an entry of SCORE_ERROR."""
    if not rows.lengths[row]:
        return 0.0
    dim = codes.shape[-1]
    length = int(rows.lengths[row])
    pages = rows.block_table[int(rows.requests[row]), : -(-length // rows.block_size)]
    keys, scales = cache.load_index_keys(index_cache, pages, dim)
    products = codes[row].float().abs() @ keys[:length].abs().T  # [H, length]
    return unit * float(((weights[row].abs() @ products) * scales[:length]).max())


def check_selection(
    selected: torch.Tensor,
    own_scores: Sequence[torch.Tensor] | None,
    ref_scores: Sequence[torch.Tensor],
    k: int,
    eps: Sequence[float],
) -> None:
    """Selected positions [T, k] of every row against the provider's own scores and reference.py's, one [length] a row.

    Ascending positions of the row's own request, then -1; as many as there are, up to k. By the own scores, where a
    provider shows them, the exact top-k. By the reference's, with e = eps[row]: every selected position scores at least
    the k-th best - 2e, and whatever scores above the k-th best + 2e is selected.
    """
    if selected.shape != (len(ref_scores), k) or selected.dtype != torch.int32:
        raise Mismatch(f"selected: {selected.dtype} {tuple(selected.shape)}, expected int32 {(len(ref_scores), k)}")
    for row, (chosen, scores) in enumerate(zip(selected.cpu().long(), ref_scores, strict=True)):
        scores, count = scores.double().cpu(), min(k, len(scores))
        where = f"row {row}, length {len(scores)}"
        if not (chosen[count:] == -1).all():
            raise Mismatch(f"{where}: {chosen[count:].tolist()} past the {count} positions it has, expected -1")
        chosen = chosen[:count]
        if not ((chosen >= 0) & (chosen < len(scores))).all():
            raise Mismatch(f"{where}: selects {chosen[(chosen < 0) | (chosen >= len(scores))].tolist()}")
        if not (chosen.diff() > 0).all():
            raise Mismatch(f"{where}: positions do not ascend: {chosen.tolist()}")
        if own_scores is not None:
            expected = reference.top_k(own_scores[row].cpu(), k).long()
            if not torch.equal(chosen, expected):
                raise Mismatch(f"{where}: not the top {k} of its own scores: {_differences(chosen, expected)}")
        if count:
            kth, slack = scores.topk(count).values[-1], 2 * eps[row]
            low = chosen[scores[chosen] < kth - slack]
            must = torch.nonzero(scores > kth + slack).squeeze(1)
            missed = must[~torch.isin(must, chosen)]
            if len(low) or len(missed):
                raise Mismatch(
                    f"{where}: selects {low.tolist()}, which score below {kth - slack:.6g}, "
                    f"and misses {missed.tolist()}, which score above {kth + slack:.6g}"
                )


def _differences(got: torch.Tensor, want: torch.Tensor) -> str:
    extra, missing = got[~torch.isin(got, want)].tolist(), want[~torch.isin(want, got)].tolist()
    return f"{extra} in place of {missing}"


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """[..., itemsize] uint8, on the CPU."""
    return x.cpu().contiguous().unsqueeze(-1).view(torch.uint8)
