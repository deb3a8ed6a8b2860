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


@triton.jit
def power_of_two(amax):
    """2^ceil(log2(amax)) of positive normal float32 values, and its reciprocal; both exact."""
    exponent = (amax.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)
