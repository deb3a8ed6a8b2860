"""4-bit checkpoints: their bytes, the weights that are dequantised while loading, what is refused, and on a CPU the
served model through vLLM's own kernels. On a GPU: test_gpu_w4.py."""

import json
import re
import shutil

import checkpoint_files as files
import pytest
import tiny_checkpoint as tiny
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from engine import engine, load, unloaded
from fp8_bytes import dequantised, read
from test_glm import PATTERN
from test_glm import SIZES as GLM_SIZES
from test_gpu_w4 import kernels, wrong_weights
from test_model import config_of, prompts, within
from test_plan import V32, W4A16, command
from test_planted import answers, questions, words
from test_platform import engine_config
from tiny_checkpoint import check_planted
from vllm.model_executor.layers.quantization.auto_awq import _REVERSE_AWQ_PACK_ORDER
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.scalar_type import scalar_types
from write_4bit import FORMATS, MIXED, quantise, write

from vllm_dsa import checkpoint, packed_weights
from vllm_dsa.checkpoint import ONLY_READ, Expected
from vllm_dsa.checkpoint_files import CheckpointError
from vllm_dsa.config import ConfigError, DSAConfig
from vllm_dsa.packed_weights import plain_weight, with_plain_packed
from vllm_dsa.testing.compare import BFLOAT16_LOGPROBS
from vllm_dsa.tools import memory
from vllm_dsa.tools.main import main

INTEGERS = ("awq", "gptq", "w4a16", "w4a16-zeros")
SMALL = dict(index_n_heads=8, num_hidden_layers=2)
# On a CPU vLLM has kernels for linear layers; that for experts does not take DeepSeek's routing.
NO_EXPERTS = ["mlp.experts"]


def sample(form: str, rows: int = 48, columns: int = 128, group: int = 32) -> tuple[dict, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02
    weight[:, 0] += torch.linspace(-0.05, 0.05, rows)  # zero points on either side
    return quantise(weight, form, group, weight.abs().max().item())


# The bytes


def nibble(word: int, i: int) -> int:
    return (word & 0xFFFFFFFF) >> 4 * i & 15


def fp4(code: int) -> float:
    """Sign, two exponent bits with bias 1, one mantissa bit."""
    exponent, mantissa = code >> 1 & 3, code & 1
    return (-1) ** (code >> 3) * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def by_the_book(form: str, parts: dict[str, torch.Tensor], out: int, at: int, group: int = 32) -> float:
    """One value of a weight, read from the format's tensors."""
    at_group, eighth = at // group, out % 8
    if form == "awq":
        place = (0, 4, 1, 5, 2, 6, 3, 7)[eighth]
        code, zero = (nibble(parts[n][i, out // 8].item(), place) for n, i in (("qweight", at), ("qzeros", at_group)))
        return (code - zero) * parts["scales"][at_group, out].item()
    if form == "gptq":
        code, zero = nibble(parts["qweight"][at // 8, out].item(), at % 8), parts["qzeros"][at_group, out // 8].item()
        return (code - nibble(zero, eighth) - 1) * parts["scales"][at_group, out].item()
    if form.startswith("w4a16"):
        code, zero = nibble(parts["weight_packed"][out, at // 8].item(), at % 8), 8
        if form == "w4a16-zeros":
            zero = nibble(parts["weight_zero_point"][out // 8, at_group].item(), eighth)
        return (code - zero) * parts["weight_scale"][out, at_group].item()
    byte = parts["weight" if form == "nvfp4" else "weight_packed"][out, at // 2].item()
    value = fp4(byte >> 4 if at % 2 else byte & 15) * parts["weight_scale"][out, at // 16].float().item()
    return value * parts["weight_scale_2"].item() if form == "nvfp4" else value / parts["weight_global_scale"].item()


def by_library(form: str, parts: dict[str, torch.Tensor], group: int = 32) -> torch.Tensor:
    """The weight as compressed-tensors' own library, or vLLM's code for the format, has it."""
    if form in ("w4a16", "w4a16-zeros", "nvfp4a16"):
        weights = {"num_bits": 4, "symmetric": form != "w4a16-zeros"}
        weights |= {"type": "int", "strategy": "group", "group_size": group}
        name = "pack-quantized"
        if form == "nvfp4a16":
            weights |= {"type": "float", "strategy": "tensor_group", "group_size": 16}
            name = "nvfp4-pack-quantized"
        parts = {n: t.float() if n == "weight_scale" and form != "nvfp4a16" else t for n, t in parts.items()}
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        return BaseCompressor.get_value_from_registry(name).decompress(parts, scheme)["weight"]
    if form == "nvfp4":
        weight, scale = parts["weight"], parts["weight_scale"]
        return dequantize_to_dtype(weight, scale, parts["weight_scale_2"], torch.float32, 16, swizzle=False)
    codes, zeros = unpacked(parts["qweight"], 0 if form == "gptq" else 1), 8
    if form == "awq":
        codes, zeros = (
            values.unflatten(1, (-1, 8))[..., _REVERSE_AWQ_PACK_ORDER].flatten(1)
            for values in (codes, unpacked(parts["qzeros"], 1))
        )
        zeros = zeros.repeat_interleave(group, 0)
    return ((codes - zeros) * parts["scales"].float().repeat_interleave(group, 0)).T


def unpacked(packed: torch.Tensor, dim: int) -> torch.Tensor:
    return unpack_quantized_values_into_int32(packed, scalar_types.uint4, dim)


@pytest.mark.parametrize("form", FORMATS)
def test_weights_are_what_the_format_says(form):
    """Ours, the writer's, every value by the book, and the libraries'."""
    parts, meant = sample(form)
    ours = plain_weight("m", parts, (48, 128))
    assert torch.equal(ours, meant) and len(ours.unique()) > 100
    book = torch.tensor([[by_the_book(form, parts, i, j) for j in range(128)] for i in range(48)])
    assert torch.allclose(ours, book, rtol=1e-6, atol=0)
    library = by_library(form, parts).float()
    # Of NVFP4 the library gives bfloat16.
    assert torch.allclose(ours, library, rtol=2**-8 if form == "nvfp4a16" else 1e-6, atol=0)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape, group", [((8, 32), 32), ((64, 512), 512), ((40, 256), 128), ((16, 64), 16)])
def test_shapes_and_groups(form, shape, group):
    parts, meant = sample(form, *shape, group)
    assert torch.equal(plain_weight("m", parts, shape), meant)


def halves_swapped(packed):
    return e2m1(packed >> 4 | packed << 4)


e2m1, integers, grouped = packed_weights._e2m1, packed_weights._integers, packed_weights._grouped
FAULTS = {
    "awq": ("AWQ_COLUMN", tuple(range(8))),
    "gptq": ("_integers", lambda packed, bits: integers(packed, bits).flip(1)),
    "w4a16": ("_grouped", lambda values, scales, zeros=None: grouped(values + 1, scales, zeros)),
    "w4a16-zeros": ("_grouped", lambda values, scales, zeros=None: grouped(values, scales, zeros - 1)),
    "nvfp4": ("_e2m1", halves_swapped),
    "nvfp4a16": ("E2M1", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)),
}


@pytest.mark.parametrize("form", FORMATS)
def test_a_wrong_reading_shows(form, monkeypatch):
    parts, meant = sample(form)
    monkeypatch.setattr(packed_weights, *FAULTS[form])
    assert not torch.equal(plain_weight("m", parts, (48, 128)), meant)


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_8_bits(symmetric):
    """As compressed-tensors' library packs them; and symmetric GPTQ, which has the same bytes by columns."""
    weight, scale = torch.randn(16, 64), torch.full((16, 2), 0.03)
    weights = {"num_bits": 8, "symmetric": symmetric, "type": "int", "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    given = {"weight": weight, "weight_scale": scale}
    if not symmetric:
        given["weight_zero_point"] = torch.arange(-16, 16, dtype=torch.int8).view(16, 2)
    parts = compressor.compress(given, scheme)
    expected = compressor.decompress(parts, scheme)["weight"]
    assert torch.allclose(plain_weight("m", parts, (16, 64)), expected, rtol=1e-6, atol=1e-7)
    if symmetric:
        gptq = {"qweight": parts["weight_packed"].T.contiguous(), "scales": scale.T.contiguous()}
        assert torch.allclose(plain_weight("m", gptq, (16, 64)), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(), (1,), (300,), (300, 1), (3, 2)])
def test_fp8_beside_4_bits(shape):
    """One scale for all, one an output, or one a block of 128x128."""
    scale = torch.rand(shape)
    weight = torch.randn(300, 256).to(torch.float8_e4m3fn)
    wide = scale.view(-1, 1) if scale.numel() != 6 else scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)
    found = plain_weight("m", {"weight": weight, "weight_scale": scale, "input_scale": torch.ones(1)}, (300, 256))
    assert torch.equal(found, weight.float() * wide)


@pytest.mark.parametrize("rows, columns", [(4, 512), (3, 384), (2, 200), (300, 256), (4, 128), (130, 100)])
def test_fp8_scales_are_told_by_their_shape(rows, columns):
    """As many blocks as outputs, in some: A.X-K2-Light's weights_proj has 16 of both."""
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    blocks = (-(-rows // 128), -(-columns // 128))
    for shape in {(), (1,), (1, 1), (rows,), (rows, 1), blocks}:
        scale = torch.rand(shape) + 0.5
        if shape == blocks:
            meant = dequantised(weight, scale)
        else:
            meant = weight.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)
        found = plain_weight("m", {"weight": weight, "weight_scale": scale}, (rows, columns))
        assert torch.equal(found, meant), shape
    for shape in {(1, rows), (rows, 7), (blocks[0] + 1, blocks[1]), (2, 2, 2)} - {blocks, (1, 1), (rows, 1)}:
        if shape[0] == rows and columns % shape[1] == 0:
            continue  # groups of inputs
        with pytest.raises(CheckpointError, match=r"^m: its tensors .*weight_scale"):
            plain_weight("m", {"weight": weight, "weight_scale": torch.rand(shape)}, (rows, columns))


@pytest.mark.parametrize("columns", [512, 384])
def test_block_scales_of_compressed_tensors_as_many_as_outputs(tmp_path, columns):
    """A whole checkpoint: weights_proj [4, 512] with scales [1, 4], and [3, 384] with [1, 3]."""
    heads = columns // 128
    sizes = dict(hidden_size=columns, index_n_heads=heads, num_hidden_layers=1, num_nextn_predict_layers=0)
    tiny.write_random(tmp_path / "source", dtype="bfloat16", first_k_dense_replace=1, **sizes)
    tensors, name = read(tmp_path / "source"), "model.layers.0.self_attn.indexer.weights_proj.weight"
    weight, scale = tensors[name].float(), torch.rand(1, heads) + 0.5
    tensors[name] = (weight / scale.repeat_interleave(128, 1)).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = scale
    eight = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    group = {"targets": ["re:.*weights_proj"], "weights": eight | {"strategy": "block", "block_structure": [128, 128]}}
    group |= {"input_activations": {**eight, "dynamic": True, "strategy": "group", "group_size": 128}}
    config = config_of(tmp_path / "source") | {
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": [],
        }
    }  # fmt: skip
    folder = tmp_path / "block"
    shutil.copytree(tmp_path / "source", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    files.write(folder, config, tensors)
    with unloaded(folder, dtype="bfloat16") as (model, vllm_config):
        found = load(model, vllm_config)[name]
    assert torch.equal(found, dequantised(tensors[name], scale).bfloat16())


@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("form", ["mxfp8", "mxfp4, compressed-tensors", "mxfp4"])
def test_exponents_for_scales(form, stored):
    """OCP's formats: groups of 32 inputs with one ue8m0; by the book."""
    exponents = torch.randint(118, 130, (6, 4), dtype=torch.uint8)
    scale = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    if form == "mxfp8":
        weight = torch.randn(6, 128).to(torch.float8_e4m3fn)
        parts, values = {"weight": weight}, weight.float()
    else:
        packed = torch.randint(0, 256, (6, 64), dtype=torch.uint8)
        parts = {"weight_packed" if "," in form else "weight": packed}
        values = torch.tensor([[fp4(half) for b in row for half in (b & 15, b >> 4)] for row in packed.tolist()])
    parts["weight_scale"] = exponents.view(stored)
    assert torch.equal(plain_weight("m", parts, (6, 128), exponents=True), values * scale)
    if stored == torch.uint8:
        with pytest.raises(CheckpointError, match=r"m.*weight_scale"):
            plain_weight("m", parts, (6, 128))
    config = {"quant_method": "modelopt", "quant_algo": form.upper()}
    assert Expected.from_hf(tiny.make_config() | {"quantization_config": config}).exponents


@pytest.mark.parametrize("form", ["nvfp4", "nvfp4a16"])
def test_scales_of_nvfp4_are_no_exponents(folders, form, tmp_path):
    """Their bits as uint8 are refused: what they are of, nothing says."""

    def as_bits(stored):
        for name in [name for name in stored if name.endswith("weight_scale")]:
            stored[name] = stored[name].view(torch.uint8)

    target = rewritten(folders[form], tmp_path / "bits", as_bits)
    with pytest.raises(CheckpointError, match=r"weight_scale holds scales as U8, and quantization_config does not say"):
        checkpoint.check(target, config_of(target))
    parts, _ = sample(form)
    parts["weight_scale"] = parts["weight_scale"].view(torch.uint8)
    with pytest.raises(CheckpointError, match="holds scales as uint8"):
        plain_weight("m", parts, (48, 128), exponents=True)


def test_damaged_weights_are_refused_by_name():
    for form in FORMATS:
        parts, _ = sample(form)
        for name in set(parts) - {"weight_shape", "input_scale", "weight_zero_point", "g_idx"}:
            if (form, name) == ("gptq", "qzeros"):
                continue  # symmetric: always 8
            rest = {n: t for n, t in parts.items() if n != name}
            with pytest.raises(CheckpointError, match=r"^a\.kv_b_proj: its tensors .*shape \(48, 128\).*ignore list"):
                plain_weight("a.kv_b_proj", rest, (48, 128))
        with pytest.raises(CheckpointError, match=r"a\.kv_b_proj: .*no weight of shape \(48, 256\)"):
            plain_weight("a.kv_b_proj", parts, (48, 256))


# The stream of tensors


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """form -> a random checkpoint in which everything but experts is quantised."""
    path = tmp_path_factory.mktemp("random")
    return {form: write(path / form, form, left_out=NO_EXPERTS, **SMALL) for form in FORMATS}


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_only_read_comes_plain_in_any_order(folders, form):
    folder = folders[form]
    stored, plain, expected = read(folder), read(folder.parent / "plain"), Expected.from_hf(config_of(folder))
    order = sorted(stored, key=lambda name: name[::-1])
    passed = dict(with_plain_packed([(name, stored[name]) for name in order], torch.bfloat16, expected))
    only_read = {name for name in plain if ONLY_READ.search(name) and "eh_proj" not in name}
    assert len(only_read) == 3 * 3
    for name, tensor in passed.items():
        assert torch.equal(tensor, plain[name]) if name in only_read else tensor is stored[name], name
    left = set(stored) - set(passed)
    assert left == {n for n in stored if (ONLY_READ.search(n) and n not in passed) or n.endswith("g_idx")}


def test_an_mtp_layer_and_modules_left_out(tmp_path):
    """eh_proj, too, may be packed; what is plain passes as it is, and what the config knows nothing of."""
    folder = write(tmp_path, "awq", left_out=["kv_b_proj", "indexer"], **SMALL)
    stored, plain, expected = read(folder), read(folder.parent / "plain"), Expected.from_hf(config_of(folder))
    eh_proj = "model.layers.2.eh_proj"
    parts, meant = quantise(stored.pop(f"{eh_proj}.weight").float(), "awq", 32, 1)
    stored |= {f"{eh_proj}.{name}": tensor for name, tensor in parts.items()}
    stored[unknown := "model.layers.9.self_attn.kv_b_proj.qweight"] = parts["qweight"]
    passed = dict(with_plain_packed(stored.items(), torch.bfloat16, expected))
    assert torch.equal(passed[f"{eh_proj}.weight"], meant.bfloat16()) and passed[unknown] is stored[unknown]
    for name in (n for n in plain if "kv_b_proj" in n or ".indexer." in n):
        assert torch.equal(passed[name], plain[name])


def test_scales_of_a_cache_are_left_out():
    names = [f"model.layers.0.self_attn.{name}" for name in ("k_proj.k_scale", "kv_b_proj.v_scale", "attn.kv_scale")]
    assert not list(with_plain_packed([(name, torch.ones(1)) for name in names], torch.bfloat16, None))


def test_inputs_in_another_order_are_refused(folders):
    stored, name = read(folders["gptq"]), "model.layers.0.self_attn.q_b_proj.g_idx"
    stored[name] = stored[name].flip(0)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} .*activation order.*desc_act false"):
        dict(with_plain_packed(stored.items(), torch.bfloat16, Expected.from_hf(config_of(folders["gptq"]))))


@pytest.mark.parametrize("form, scale", [("nvfp4", "weight_scale_2"), ("nvfp4a16", "weight_global_scale")])
@pytest.mark.parametrize("module", ["self_attn.kv_a_proj_with_mqa", "mlp.up_proj"])
def test_global_scales_that_vllm_would_mix_up_are_refused(folders, form, scale, module):
    stored, name = read(folders[form]), f"model.layers.0.{module}.{scale}"
    stored[name] = stored[name] * 1.5
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*one of these global scales"):
        dict(with_plain_packed(stored.items(), torch.bfloat16, Expected.from_hf(config_of(folders[form]))))


# The files


def rewritten(folder, target, change):
    stored = read(folder)
    change(stored)
    files.write(target, config_of(folder), stored)
    return target


@pytest.mark.parametrize("form", FORMATS)
def test_files_are_checked_by_name(folders, form, tmp_path):
    folder = folders[form]
    checkpoint.check(folder, config_of(folder), drafts=True)
    module = "model.layers.1.self_attn.q_b_proj"
    parts = [name for name in read(folder) if name.startswith(module) and not re.search("shape|g_idx|input|zero", name)]
    assert len(parts) >= 2
    for i, name in enumerate(parts):
        if name.endswith(("weight_global_scale", "qzeros")) and form != "awq":
            continue
        target = rewritten(folder, tmp_path / str(i), lambda stored, name=name: stored.pop(name))
        with pytest.raises(CheckpointError, match=rf"lacks .*{re.escape(module)}\.\w+"):
            checkpoint.check(target, config_of(folder))
        with pytest.raises(CheckpointError, match=rf"lacks .*{re.escape(module)}\.\w+"):
            expected = Expected.from_hf(config_of(folder))
            list(checkpoint.checked(read(target).items(), expected, expected.model))


@pytest.mark.parametrize("form", FORMATS)
def test_doctor_sees_a_packed_mtp_layer(folders, form, capsys):
    main(["doctor", str(folders[form])])
    assert re.search(r"ok +weights +\d+ files", said := capsys.readouterr().out) and "MTP weights" not in said


def test_formats_are_found_where_vllm_finds_them(folders, tmp_path, capsys):
    """compressed-tensors' key of old, and ModelOpt's file of old: without them these are no plain weights."""
    for form in ("w4a16", "nvfp4"):
        folder, config = shutil.copytree(folders[form], tmp_path / form), config_of(folders[form])
        quantisation = config.pop("quantization_config")
        if form == "w4a16":
            config["compression_config"] = quantisation
        else:
            old = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": quantisation["ignore"]}
            old = {"producer": {"name": "modelopt"}, "quantization": old}
            files.write_json(folder / "hf_quant_config.json", old)
        files.write_json(folder / "config.json", config)
        assert main(["doctor", str(folder)]) == 0, capsys.readouterr().out
        lacking = rewritten(folder, tmp_path / f"{form} less", lambda stored: stored.pop(next(
            name for name in stored if name.endswith(".o_proj.weight_scale")
        )))  # fmt: skip
        if form == "w4a16":
            with unloaded(folder, dtype="bfloat16") as (model, vllm_config):
                load(model, vllm_config)
        else:
            files.write_json(lacking / "hf_quant_config.json", old)
        assert main(["doctor", str(lacking)]) == 1
        assert "lacks model.layers.0.self_attn.o_proj.weight_scale" in " ".join(capsys.readouterr().out.split())


def test_a_conversion_without_the_indexer_is_refused(folders, tmp_path):
    def drop(stored):
        for name in [name for name in stored if ".indexer." in name]:
            del stored[name]

    target = rewritten(folders["w4a16"], tmp_path / "dense", drop)
    with pytest.raises(CheckpointError, match="no indexer tensors.*a conversion has dropped the indexer"):
        checkpoint.check(target, config_of(target))


def test_packed_weights_of_another_size_are_refused(folders, tmp_path):
    name = "model.layers.0.self_attn.o_proj.weight_packed"

    def shorten(stored):
        stored[name] = stored[name][:96].contiguous()

    target = rewritten(folders["w4a16"], tmp_path / "short", shorten)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} has shape \(96, 64\)"):
        checkpoint.check(target, config_of(target))


# vLLM's side


def test_nvfp4_is_refused_on_a_cpu(folders):
    for form in ("nvfp4", "nvfp4a16"):
        with pytest.raises(ValueError, match=r"NVFP4 is refused here: .*compute capability 7\.5.*AWQ, GPTQ"):
            engine_config(folders[form], dtype="bfloat16")


FUSED = {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"], "gate_up_proj": ["gate_proj", "up_proj"]}


def modelopt(ignore):
    config = ModelOptNvFp4Config.from_config({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignore})
    config.packed_modules_mapping = FUSED
    return config


def test_patterns_of_modelopt_hold_for_fused_modules():
    """vLLM matches a fused module with its own name: patterns of its parts miss it."""
    attention, mlp = "model.layers.3.self_attn.fused_qkv_a_proj", "model.layers.3.mlp.shared_experts.gate_up_proj"
    for ignore, left_out in (
        (["*q_a_proj*", "*kv_a_proj_with_mqa*"], {attention}),
        (["model.layers.3.self_attn.q_a_proj", "*kv_a_proj_with_mqa"], {attention}),
        (["model.layers.3.self_attn*", "*.shared_experts.*"], {attention, mlp}),
        (["model.layers.3.mlp.shared_experts.gate_proj", "model.layers.3.mlp.shared_experts.up_proj"], {mlp}),
        (["model.layers.3.mlp.gate", "lm_head"], set()),
    ):
        config = modelopt(list(ignore))
        packed_weights.exclude_fused(config, [attention, mlp])
        assert {module for module in (attention, mlp) if config.is_layer_excluded(module)} == left_out, ignore
    assert not modelopt(["*q_a_proj*", "*kv_a_proj_with_mqa*"]).is_layer_excluded(attention), "vLLM knows by itself now"
    with pytest.raises(ConfigError, match=r"leaves out model\.layers\.3\.self_attn\.q_a_proj, and not all of q_a_proj"):
        packed_weights.exclude_fused(modelopt(["*q_a_proj*"]), [attention])


@pytest.mark.parametrize("form, left_out", [("awq", []), ("w4a16-zeros", []), ("gptq", ["kv_b_proj", "indexer"])])
def test_every_tensor_is_where_it_belongs(form, left_out, tmp_path):
    """vLLM's own methods hold what is multiplied, as it is stored; what is only read is plain, as it is meant."""
    folder = write(tmp_path, form, left_out=NO_EXPERTS + left_out, **SMALL)
    stored, plain = read(folder), read(folder.parent / "plain")
    with unloaded(folder, dtype="bfloat16") as (model, config):
        found = load(model, config)
    placed = set()
    for name, tensor in found.items():
        assert not (tensor.is_floating_point() and tensor.isnan().any()), name
        if ".mlp.experts." in name or name.endswith(("e_score_correction_bias", "weight_shape")):
            continue
        fused = next((f for f in FUSED if f".{f}." in name), None)
        names = [name.replace(fused, part) for part in FUSED[fused]] if fused else [name]
        placed |= set(names)
        only_read = ONLY_READ.search(name) is not None
        parts = [(plain if only_read else stored)[n] for n in names]
        dim = next(d for d in (0, 1) if parts[0].dim() == 1 or {p.shape[1 - d] for p in parts} == {tensor.shape[1 - d]})
        assert torch.equal(tensor, torch.cat(parts, dim).to(tensor.dtype)), name
    parts = re.compile(r"model\.layers\.[01]\..*\.(qweight|scales|weight_packed|weight_scale|weight_zero_point)")
    packed = {name for name in stored if parts.fullmatch(name) and not ONLY_READ.search(name)}
    assert packed and packed <= placed
    # What `vllm-dsa plan` counts is what was loaded; files also have shapes, and k_norm in bfloat16.
    counted = memory.weights(folder, config_of(folder), DSAConfig.from_hf(config_of(folder)))
    for part, mark in (("attention", r"attn\.(?!indexer)"), ("indexer", "indexer"), ("dense MLP", r"layers\.0\.mlp")):
        loaded = sum(tensor.nbytes for name, tensor in found.items() if re.search(mark, name))
        assert abs(counted.total(part) - loaded) <= 2048, part


def test_plan_refuses_ranks_that_would_split_a_group(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V32 | {"quantization_config": W4A16}))
    done = command(tmp_path, "--gpu", "H100", "--num-gpus", 32)
    message = "2048, over 32 ranks is no multiple of the 128 of a group that shares a scale. Pass --ep"
    assert done.returncode == 2 and message in done.stderr, done.stdout + done.stderr
    assert "made plain while loading" in command(tmp_path, "--gpu", "H100", "--num-gpus", 16).stdout


# The served model, on a CPU


@pytest.fixture
def sixteen_bits(monkeypatch):
    """vLLM's CPU kernels of 4-bit weights otherwise round activations to 8 bits where there is AMX."""
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")


@pytest.mark.slow
@pytest.mark.parametrize("form", INTEGERS)
def test_logprobs_are_those_of_the_dequantised_checkpoint(form, tmp_path, sixteen_bits, monkeypatch):
    folder = write(tmp_path, form, left_out=NO_EXPERTS, index_topk=48, **SMALL)
    asked = prompts(config_of(folder))
    with engine(folder.parent / "plain", dtype="bfloat16") as running:
        expected = torch.cat(running.prompt_logprobs(asked))

    def compared(running):
        difference = (torch.cat(running.prompt_logprobs(asked)) - expected).abs()
        p50, p90, most = difference.median(), difference.quantile(0.9), difference.max()
        print(f"{form}: p50 {p50:.1e} p90 {p90:.1e} max {most:.1e} of {expected.std():.1e}")
        return within(difference, BFLOAT16_LOGPROBS)

    with engine(folder, dtype="bfloat16") as running:
        assert kernels(running.model) >= {"CPUWNA16LinearKernel"}
        assert compared(running) and expected.std() > BFLOAT16_LOGPROBS[1]
    if form in ("awq", "w4a16"):  # of the weights that are only read
        monkeypatch.setattr(packed_weights, *FAULTS[form])
        with engine(folder, dtype="bfloat16") as running:
            assert not compared(running)


@pytest.mark.slow
def test_glm(tmp_path, sixteen_bits):
    """Its sizes, interleaved indexers, and layers that share a selection, whose packed indexers are not loaded."""
    folder = write(tmp_path, "awq", left_out=NO_EXPERTS, index_topk=32, rope_scaling=None, **GLM_SIZES)
    logprobs = []
    for path in (folder.parent / "plain", folder):
        config = config_of(path) | {"model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"]}
        config |= {"index_topk_pattern": PATTERN}
        files.write_json(path / "config.json", config)
        with engine(path, dtype="bfloat16") as running:
            assert [layer.indexer is None for layer in running.layers] == [c == "S" for c in PATTERN]
            logprobs.append(torch.cat(running.prompt_logprobs(prompts(config))))
    difference = (logprobs[0] - logprobs[1]).abs()
    print(f"GLM: p50 {difference.median():.1e} p90 {difference.quantile(0.9):.1e} of {logprobs[0].std():.1e}")
    assert within(difference, BFLOAT16_LOGPROBS) and logprobs[0].std() > BFLOAT16_LOGPROBS[1]


@pytest.mark.slow
@pytest.mark.parametrize("form", [*INTEGERS, MIXED])
def test_planted_checkpoint_answers_right(form, tmp_path):
    """As vLLM multiplies by default (with AMX: activations in 8 bits); with drafts of a 4-bit MTP layer."""
    folder = write(tmp_path, form, planted=True, left_out=NO_EXPERTS, index_n_heads=8)
    checkpoint.check(folder, config_of(folder), drafts=True)
    assert check_planted(folder.parent / "plain") > 10, "rounding to 4 bits cost the margin"
    asked, options = questions((300, 1500)), dict(dtype="bfloat16", max_num_batched_tokens=512)
    if form == "awq":
        options |= dict(speculative_config={"method": "mtp", "num_speculative_tokens": 1})
    with engine(folder, kv_cache_dtype="fp8_ds_mla", **options) as running:
        assert kernels(running.model) >= {"CPUWNA16LinearKernel"}
        assert wrong_weights(running, folder.parent / "plain") == []
        assert [words(tokens) for tokens in answers(running, asked)] == [answer for _, answer in asked]


def test_experts_without_a_kernel_are_refused(tmp_path):
    folder = write(tmp_path, "awq", **SMALL)
    with (
        pytest.raises(ConfigError, match="quant_method 'awq', bits 4 is refused here: .*on a CPU, serve a"),
        unloaded(folder, dtype="bfloat16"),
    ):
        pytest.fail("built")
