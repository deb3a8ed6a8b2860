"""e4m3 codes inside Triton kernels: converted by the chip, or in integer arithmetic on bytes where it cannot.

HARDWARE is a constexpr: True needs compute capability 8.9. Both ways give the same bits. A code is a byte everywhere;
no kernel takes or returns a float8 tensor.
"""

import triton
import triton.language as tl


@triton.jit
def encode(x, HARDWARE: tl.constexpr):
    """float32 to codes (uint8): to nearest, ties to even, saturating at 448."""
    if HARDWARE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 20 of the mantissa's 23 bits are rounded away; the exponent's bias falls from 127 to 7.
    rounded = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    normal = tl.minimum(rounded - (120 << 3), 0x7E)
    # Below 2^-6 codes are multiples of 2^-9, which is the last place of a float32 at 2^14.
    steps = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, steps, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode(codes, HARDWARE: tl.constexpr):
    """Codes (uint8) to float16: their value if HARDWARE, else 2^-8 of it; exact, but for NaN, which becomes 480."""
    if HARDWARE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    # Moved up by 7 bits, a code is a float16 whose exponent is 8 too small, subnormals included.
    bits = codes.to(tl.int8, bitcast=True).to(tl.int16) << 7  # repeats the sign in bits 14 and 15
    return (bits & -0x4001).to(tl.float16, bitcast=True)


# Four codes a word, in order, times one scale.
_FOUR = tl.constexpr("""{
    .reg .b16 low, high; .reg .b32 first, second, both;
    mov.b32 {low, high}, $4; mov.b32 both, {$5, $5};
    cvt.rn.f16x2.e4m3x2 first, low; cvt.rn.f16x2.e4m3x2 second, high;
    mul.rn.f16x2 first, first, both; mul.rn.f16x2 second, second, both;
    mov.b32 {$0, $1}, first; mov.b32 {$2, $3}, second;
}""")


@triton.jit
def decode_words(words, scales, DTYPE: tl.constexpr, HARDWARE: tl.constexpr):
    """Codes times scales, [K, 4 * W] of DTYPE (float16 or float32): words int32 [K, W] of four codes each, scales
    float32 [K, G], one for each W // G words. Exact, but for scales that DTYPE does not hold.

    Words, not bytes: Triton then fits the layout of what it loads to what multiplies it.
    """
    KEYS: tl.constexpr = words.shape[0]
    GROUPS: tl.constexpr = scales.shape[1]
    EACH: tl.constexpr = words.shape[1] // GROUPS
    words = tl.reshape(words, [KEYS, GROUPS, EACH])
    if HARDWARE and tl.float16 == DTYPE:
        scale = tl.broadcast_to(scales.to(tl.float16)[:, :, None], [KEYS, GROUPS, EACH])
        a, b, c, d = tl.inline_asm_elementwise(
            _FOUR, "=h,=h,=h,=h,r,h", [words, scale], dtype=(tl.float16,) * 4, is_pure=True, pack=1
        )
    else:
        # As in decode, two codes at a time.
        scale = (scales * 256.0).to(DTYPE)[:, :, None]
        even = ((words << 7) & 0x3F803F80) | ((words << 8) & -0x7FFF8000)
        odd = ((words >> 1) & 0x3F803F80) | (words & -0x7FFF8000)
        a = even.to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE) * scale
        b = odd.to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE) * scale
        c = (even >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE) * scale
        d = (odd >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(DTYPE) * scale
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [KEYS, 4 * GROUPS * EACH])


@triton.jit
def power_of_two(amax):
    """2^ceil(log2(amax)) of positive normal float32 values, and its reciprocal; both exact."""
    exponent = (amax.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)
