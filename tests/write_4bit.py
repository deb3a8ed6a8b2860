"""Checkpoints of 4 bits, written from the specifications of their formats, and the plain ones that they stand for.

    python tests/write_4bit.py awq OUT_DIR [--planted] [--left-out kv_b_proj,indexer]

What a format says of a weight is in two parts. The values: each is (code - zero) x scale, of groups of consecutive
inputs. The bytes: how codes, zeros and scales are named, shaped and packed. Values are computed here before anything
is packed, so that they are no witness for the packing; tests hold the bytes against each format's own library.

awq                 AutoAWQ, version "gemm": qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out] in
                    float16; an int32 holds outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight, from its lowest bits on
gptq                GPTQModel, symmetric: qweight [in / 8, out], eight consecutive inputs to an int32, lowest first;
                    qzeros [groups, out / 8], which store 8 less 1; scales [groups, out] in float16; g_idx [in]
w4a16, w4a16-zeros  compressed-tensors, pack-quantized: weight_packed [out, in / 8], lowest bits first, weight_scale
                    [out, groups], weight_shape; with zero points: weight_zero_point [out / 8, groups]
nvfp4               ModelOpt: weight uint8 [out, in / 2], the first of two inputs in the low half; weight_scale e4m3
                    [out, in / 16], weight_scale_2 and input_scale float32; value = e2m1 x weight_scale x weight_scale_2
nvfp4a16            compressed-tensors, nvfp4-pack-quantized: weight_packed and weight_scale likewise,
                    weight_global_scale, by which a value is divided
w4a16-fp8           compressed-tensors: attention FP8 (weight e4m3, weight_scale [out, 1] float32), all else w4a16
"""

import argparse
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import checkpoint_files as files
import tiny_checkpoint as tiny
import torch

Tensors = dict[str, torch.Tensor]
FORMATS = ("awq", "gptq", "w4a16", "w4a16-zeros", "nvfp4", "nvfp4a16")
MIXED = "w4a16-fp8"
NVFP4_GROUP = 16
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
LINEAR = re.compile(
    r"(model\.layers\.\d+\."
    r"(self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|indexer\.wq_b|indexer\.wk|indexer\.weights_proj)"
    r"|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj))\.weight"
)
# What vLLM multiplies as one weight has one global scale in NVFP4.
FUSED = {"q_a_proj": "kv_a_proj_with_mqa", "kv_a_proj_with_mqa": "q_a_proj", "gate_proj": "up_proj"}
FUSED["up_proj"] = "gate_proj"


def pack(values: torch.Tensor) -> torch.Tensor:
    """Values 0 to 15 [n, m] to int32 [n, m / 8], the first of eight in the lowest bits."""
    shifted = values.to(torch.int64).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    return shifted.sum(-1).to(torch.uint32).view(torch.int32)


def _integers(weight: torch.Tensor, group: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], zeros and scales [out, groups] of the nearest values; a scale is a bfloat16, for a model in
    bfloat16 rounds it to that."""
    grouped = weight.unflatten(1, (-1, group))
    if symmetric:
        scales, zeros = grouped.abs().amax(-1) / 7, torch.full(grouped.shape[:2], 8)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = (high - low) / 15
        zeros = (-low / torch.where(scales > 0, scales, 1)).round()
    scales = torch.where(scales > 0, scales, 1).bfloat16().float()
    codes = (grouped / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return codes.clamp(0, 15).flatten(1).int(), zeros.int(), scales


def _awq(values: torch.Tensor) -> torch.Tensor:
    """Values [n, out] packed along the outputs, in AWQ's order."""
    return pack(values.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1))


def _fp4(weight: torch.Tensor, amax: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 [out, in / 2], e4m3 scales [out, in / 16] and the global scale, by which values are multiplied."""
    overall = torch.tensor(amax / (6 * 448) if amax else 1.0)
    grouped = weight.unflatten(1, (-1, NVFP4_GROUP))
    scales = (grouped.abs().amax(-1) / 6 / overall).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    shares = grouped / (scales.float() * overall).unsqueeze(-1)
    codes = (shares.abs().unsqueeze(-1) - E2M1).abs().argmin(-1) + 8 * (shares < 0)
    codes = codes.flatten(1).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales, overall


def quantise(weight: torch.Tensor, form: str, group: int, amax: float) -> tuple[Tensors, torch.Tensor]:
    """A float32 weight [out, in] as the format's tensors, and the float32 weight that they stand for.

    amax: largest value of all that shares a global scale with this weight; of NVFP4 only.
    """
    rows, columns = weight.shape
    if form == "fp8":
        scales = (weight.abs().amax(1, keepdim=True) / 448).clamp(1e-12)
        codes = (weight / scales).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scales}, codes.float() * scales
    if form.startswith("nvfp4"):
        packed, scales, overall = _fp4(weight, amax)
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1).int()
        values = (E2M1[codes & 7] * (1 - 2 * (codes >> 3))).unflatten(1, (-1, NVFP4_GROUP))
        if form == "nvfp4":
            parts = {"weight": packed, "weight_scale": scales, "weight_scale_2": overall}
            parts["input_scale"] = torch.tensor(1 / 448)
            return parts, (values * (scales.float() * overall).unsqueeze(-1)).flatten(1)
        divisor = (1 / overall).float()
        parts = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": divisor.view(1)}
        return parts, (values * (scales.float() / divisor).unsqueeze(-1)).flatten(1)
    codes, zeros, scales = _integers(weight, group, symmetric=form in ("gptq", "w4a16"))
    values = (codes - zeros.repeat_interleave(group, 1)).float() * scales.repeat_interleave(group, 1)
    if form == "awq":
        parts = {"qweight": _awq(codes.T), "qzeros": _awq(zeros.T), "scales": scales.T.half().contiguous()}
    elif form == "gptq":
        parts = {"qweight": pack(codes).T.contiguous(), "qzeros": pack(zeros.T - 1), "scales": scales.T.half()}
        parts = {name: tensor.contiguous() for name, tensor in parts.items()}
        parts["g_idx"] = (torch.arange(columns) // group).int()
    else:
        parts = {"weight_packed": pack(codes), "weight_scale": scales.bfloat16()}
        parts["weight_shape"] = torch.tensor([rows, columns])
        if form == "w4a16-zeros":
            parts["weight_zero_point"] = pack(zeros.T).T.contiguous()
    return parts, values


def config_of(form: str, group: int, left_out: list[str], modules: Iterable[str]) -> dict[str, Any]:
    """quantization_config, with the modules in whose names one of ``left_out`` stands left out as the format does."""
    skipped = sorted(m for m in modules if any(part in m for part in left_out))
    if form == "awq":
        config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
        return config | {"modules_to_not_convert": [*left_out, "lm_head"]}
    if form == "gptq":
        dynamic = {f"-:.*{re.escape(part)}.*": {} for part in left_out}
        config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True}
        return config | {"lm_head": False, "checkpoint_format": "gptq", "dynamic": dynamic}
    weights: dict[str, Any] = {"num_bits": 4, "dynamic": False, "symmetric": form != "w4a16-zeros"}
    if form.startswith("w4a16"):
        weights |= {"type": "int", "strategy": "group", "group_size": group, "actorder": None}
    else:
        weights |= {"type": "float", "strategy": "tensor_group", "group_size": NVFP4_GROUP}
    one = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    config = {"config_groups": {"group_0": one}, "ignore": ["lm_head", *skipped]}
    if form == "nvfp4":
        # As ModelOpt writes it, with the FP8 cache that its published checkpoints ask for.
        weights.pop("strategy")
        one["input_activations"] = {"num_bits": 4, "dynamic": False, "type": "float", "group_size": NVFP4_GROUP}
        config["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
        patterns = [f"*{part}*" for part in left_out]
        config["ignore"] = ["lm_head", "*eh_proj*", *patterns]
        return config | {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}}
    packed = "pack-quantized" if form.startswith("w4a16") else "nvfp4-pack-quantized"
    if form == MIXED:
        fp8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
        two = {"targets": ["re:.*self_attn.*"], "weights": fp8 | {"strategy": "channel", "dynamic": False}}
        two |= {"input_activations": fp8 | {"strategy": "token", "dynamic": True}, "format": "float-quantized"}
        config["config_groups"] |= {"group_0": one | {"targets": ["re:.*mlp.*"], "format": packed}, "group_1": two}
        packed = "mixed-precision"
    return config | {"quant_method": "compressed-tensors", "format": packed, "quantization_status": "compressed"}


def write(
    path: Path,
    form: str,
    *,
    planted: bool = False,
    left_out: Iterable[str] = (),
    group: int = 32,
    dtype: str = "bfloat16",
    seed: int = 0,
    **config: Any,
) -> Path:
    """A random or planted checkpoint in ``path`` / form, and in ``path`` / "plain" the one that it stands for, rounded
    to ``dtype``. Returns the first's folder."""
    made = tiny.make_config(dtype, **(tiny.PLANTED if planted else {}) | config)
    tensors = tiny.planted_tensors(made, seed, "embedding") if planted else tiny.random_tensors(made, seed)
    left_out, modules, packed = list(left_out), [], {}
    for name, weight in list(tensors.items()):
        if not (found := LINEAR.fullmatch(name)):
            continue
        modules.append(module := found[1])
        if any(part in module for part in left_out):
            continue
        stem, _, last = module.rpartition(".")
        together = [weight] + ([tensors[f"{stem}.{FUSED[last]}.weight"]] if last in FUSED else [])
        own = form if form != MIXED else "fp8" if ".self_attn." in name else "w4a16"
        packed[name] = quantise(weight, own, group, max(t.abs().max().item() for t in together))
    for name, (_, meant) in packed.items():
        tensors[name] = meant
    tiny._write(path / "plain", made, tensors, max_length=16384)
    stored = {name: tensor for name, tensor in files.read_dequantised(path / "plain").items() if name not in packed}
    for name, (parts, _) in packed.items():
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    folder = path / form
    shutil.copytree(path / "plain", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    made["quantization_config"] = config_of(form, group, left_out, modules)
    files.write(folder, made, {name: stored[name] for name in sorted(stored)})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("form", choices=(*FORMATS, MIXED))
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--left-out", default="", help="parts of names, separated by commas")
    args = parser.parse_args()
    left_out = [part for part in args.left_out.split(",") if part]
    print(write(args.out_dir, args.form, planted=args.planted, left_out=left_out))


if __name__ == "__main__":
    main()
