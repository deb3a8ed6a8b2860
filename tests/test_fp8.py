"""Block-scaled FP8 checkpoints on a CPU: the files are as published, and the model is the dequantised one."""

import itertools
import json
import re
import threading
from pathlib import Path

import checkpoint_files as files
import pytest
import tiny_checkpoint as tiny
import torch
from engine import engine, load, unloaded
from fp8_bytes import all_dequantised, dequantised, read, rewrite
from oracle import Oracle
from test_model import LIMITS, config_of, differences, prompts, within
from test_planted import answers, questions, words

from vllm_dsa import fp8_weights
from vllm_dsa.checkpoint import check
from vllm_dsa.checkpoint_files import CheckpointError

# No width of these is a multiple of 128: all last blocks are ragged, and some weights have a single block.
RAGGED = dict(num_hidden_layers=3, hidden_size=160, num_attention_heads=6, q_lora_rank=40, kv_lora_rank=96)
RAGGED |= dict(qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24, intermediate_size=288)
RAGGED |= dict(moe_intermediate_size=192, index_head_dim=32, index_n_heads=6, index_topk=16)
PUBLISHED = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
IS_FP8 = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj|indexer\.wq_b|indexer\.wk)"
    r"|mlp\.((experts\.\d+|shared_experts)\.)?(gate|up|down)_proj)\.weight"
)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    path = tmp_path_factory.mktemp("ragged")
    tiny.write_random(path, seed=11, fp8=True, **RAGGED)
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    assert tiny.write_planted(path, fp8=True) > 10, "rounding to FP8 cost the margin"
    return path


@pytest.fixture(scope="module")
def plain(ragged, tmp_path_factory):
    """The ragged checkpoint without FP8."""
    config = config_of(ragged)
    del config["quantization_config"]
    return rewrite(ragged, tmp_path_factory.mktemp("plain") / "float32", all_dequantised, config)


# The files


@pytest.mark.parametrize("kind", ["ragged", "planted"])
def test_files_are_as_published(kind, request):
    folder = request.getfixturevalue(kind)
    tensors, index = read(folder), json.loads((folder / "model.safetensors.index.json").read_text())
    assert config_of(folder)["quantization_config"] == PUBLISHED
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    weights = {name: t for name, t in tensors.items() if not name.endswith("_scale_inv")}
    fp8 = {name for name in weights if IS_FP8.fullmatch(name)}
    assert fp8 == {name for name, t in weights.items() if t.dtype == torch.float8_e4m3fn}
    assert {name for name in tensors if name.endswith("_scale_inv")} == {f"{name}_scale_inv" for name in fp8}
    order = set()
    for name in fp8:
        scale, (rows, columns) = tensors[f"{name}_scale_inv"], weights[name].shape
        assert scale.dtype == torch.float32 and scale.shape == ((rows + 127) // 128, (columns + 127) // 128)
        powers = torch.exp2(torch.log2(scale).round()) == scale
        assert powers.all() if kind == "planted" else not powers.any()
        where = [index["weight_map"][key] for key in (name, f"{name}_scale_inv")]
        order.add((where[0] > where[1]) - (where[0] < where[1]))
    assert order == {-1, 0, 1}, "pairs in one shard, and in two in either order"
    assert {t.dtype for name, t in weights.items() if name not in fp8} == {torch.float32}


def test_rounding_is_that_of_e4m3(ragged, tmp_path):
    tiny.write_random(tmp_path, seed=11, **RAGGED)
    original, rounded = read(tmp_path), all_dequantised(read(ragged))
    assert original.keys() == rounded.keys()
    for name, tensor in original.items():
        # Half of the last place, which is 2^-3 of a value, and of the subnormals 2^-9 of a scale.
        step = tensor.abs() / 16 + tensor.abs().max() / 448 * 2**-9
        assert ((tensor - rounded[name]).abs() <= (step if IS_FP8.fullmatch(name) else 0)).all(), name


# Dequantisation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (127, 129), (300, 257), (64, 384), (576, 200)])
def test_dequantised_exactly(shape, dtype):
    generator = torch.Generator().manual_seed(shape[0])
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[codes & 127 == 127] = 0  # NaN
    blocks = [-(-n // 128) for n in shape]
    scale = torch.rand(blocks, generator=generator) * torch.tensor([1e-6, 1e3])[torch.arange(blocks[1]) % 2]
    weight = codes.view(torch.float8_e4m3fn)
    ours = fp8_weights.dequantise(weight, scale, dtype, "w")
    assert ours.dtype == dtype and torch.equal(ours, dequantised(weight, scale).to(dtype))


def exponents_of(tensors, dtype):
    """Scales that are powers of two as these exponents alone, in one byte."""

    def exponent(scale):
        assert (torch.exp2(scale.log2().round()) == scale).all()
        return (scale.log2().round() + 127).to(torch.uint8).view(dtype)

    return {n: exponent(t) if n.endswith("_scale_inv") else t for n, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu, torch.bfloat16])
def test_scales_in_another_dtype(planted, tmp_path, dtype):
    """bfloat16 holds these scales exactly; of 8 bits the config says that they are exponents, or the dtype does."""
    config = config_of(planted)
    if dtype != torch.uint8:
        config["quantization_config"] = {k: v for k, v in PUBLISHED.items() if k != "scale_fmt"}

    def change(tensors):
        if dtype != torch.bfloat16:
            return exponents_of(tensors, dtype)
        return {n: t.to(dtype) if n.endswith("_scale_inv") else t for n, t in tensors.items()}

    folder = rewrite(planted, tmp_path / "other", change, config)
    assert {t.dtype for n, t in read(folder).items() if n.endswith("_scale_inv")} == {dtype}
    with unloaded(planted) as (model, vllm_config):
        expected = load(model, vllm_config)
    with unloaded(folder) as (model, vllm_config):
        found = load(model, vllm_config)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("fmt", [None, "float"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_scales_of_integers_are_refused_by_name(ragged, tmp_path, fmt, dtype):
    """At the start, and while tensors come. int8 and int32 are no exponents whatever the config says."""
    config = config_of(ragged)
    config["quantization_config"] = PUBLISHED | {"scale_fmt": "ue8m0" if dtype != torch.uint8 and fmt else fmt}

    def change(tensors):
        return {n: torch.full_like(t, 120).to(dtype) if n.endswith("_scale_inv") else t for n, t in tensors.items()}

    folder = rewrite(ragged, tmp_path / "other", change, config)
    message = r"_scale_inv holds scales as [UI]\d+, and quantization_config does not say which numbers.*scale_fmt"
    with pytest.raises(CheckpointError, match=message):
        check(folder, config)
    with unloaded(folder, load_format="dummy") as (model, _), pytest.raises(CheckpointError, match=message):
        model.load_weights(iter(read(folder).items()))


E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
BITS = torch.tensor([120, 127, 130], dtype=torch.uint8)
NUMBERS = torch.tensor([2.0**-7, 1.0, 8.0])


@pytest.mark.parametrize(
    "given, held, copied",
    [
        (BITS, torch.float32, NUMBERS),  # vLLM's parameter of block scales on GPUs
        (BITS.view(E8M0), torch.float32, NUMBERS),
        (BITS, E8M0, BITS.view(E8M0)),
        (BITS.view(E8M0), torch.uint8, BITS),  # that of MXFP8 and MXFP4
        (BITS, torch.uint8, BITS),
        (NUMBERS, torch.float32, NUMBERS),
        (NUMBERS.bfloat16(), torch.float32, NUMBERS),
        (BITS, E4M3, None),  # of NVFP4: no exponents, whatever another part of the model has
        (BITS.to(torch.int8), torch.float32, None),
        (BITS.int(), torch.float32, None),
    ],
)
def test_scales_as_vllms_parameters_hold_them(given, held, copied):
    """Where vLLM multiplies FP8 it copies scales into parameters of its own: bits must not become integers there."""
    name, parameter = "m.weight_scale_inv", torch.empty(3).to(held)
    if copied is None:
        with pytest.raises(CheckpointError, match=f"{name} holds scales as"):
            fp8_weights.fitted(name, given, parameter, exponents=True)
        return
    parameter.copy_(fp8_weights.fitted(name, given, parameter, exponents=True))
    assert torch.equal(parameter.view(torch.uint8), copied.view(torch.uint8))


def test_integers_for_an_unquantised_weight_are_refused():
    with pytest.raises(CheckpointError, match=r"m\.weight holds integers \(uint8\).*config\.json .*not quantised"):
        fp8_weights.fitted("m.weight", BITS, torch.empty(3), exponents=True)
    packed = torch.empty(3, dtype=torch.int32)
    assert fp8_weights.fitted("m.qweight", BITS.int(), packed, exponents=False).dtype == torch.int32


def pair(name: str) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.ones(130, 4).to(torch.float8_e4m3fn)), (f"{name}_scale_inv", torch.tensor([[2.0], [3.0]]))]


def test_pairs_come_in_any_order():
    expected = {"a.weight": [2.0, 3.0], "b.weight": [2.0, 3.0], "norm": [7.0, 7.0]}
    for order in itertools.permutations([*pair("a.weight"), *pair("b.weight"), ("norm", torch.full((130, 4), 7.0))]):
        found = dict(fp8_weights.with_plain_fp8(order, torch.float32))
        assert {name: [t[0, 0].item(), t[129, 3].item()] for name, t in found.items()} == expected


def test_damaged_pairs_are_refused_by_name():
    (weight, scale), (other_weight, other_scale) = pair("a.weight"), pair("b.weight")
    for alone, missing in ((weight, "a.weight_scale_inv"), (scale, "a.weight")):
        with pytest.raises(CheckpointError, match=rf"{alone[0]}' has no FP8 partner '{missing}'.*Download"):
            list(fp8_weights.with_plain_fp8([other_scale, alone, other_weight], torch.float32))
    wrong = ("a.weight_scale_inv", torch.ones(1, 1))
    with pytest.raises(CheckpointError, match=r"a.weight_scale_inv: shape \(1, 1\) .*\(130, 4\).*\(2, 1\) blocks"):
        list(fp8_weights.with_plain_fp8([weight, wrong], torch.float32))


@pytest.mark.parametrize("block", [[64, 64], [128, 64], [1, 128]])
def test_other_block_sizes_are_refused(ragged, block):
    wrong = {"quantization_config": PUBLISHED | {"weight_block_size": block}}
    with (
        pytest.raises(ValueError, match=rf"weight_block_size: {re.escape(str(block))} is refused.*Restore"),
        unloaded(ragged, hf_overrides=wrong, load_format="dummy"),
    ):
        pytest.fail("built")


# The model


def columns_swapped(weight, scale, dtype, name):
    return right(weight, scale.flip(1), dtype, name)


def last_block_unscaled(weight, scale, dtype, name):
    out = right(weight, scale, dtype, name)
    start = (len(weight) - 1) // 128 * 128
    out[start:] = weight[start:].to(dtype)
    return out


def powers_of_two(weight, scale, dtype, name):
    return right(weight, torch.exp2(torch.log2(scale).round()), dtype, name)


right = fp8_weights.dequantise
FAULTS = (columns_swapped, last_block_unscaled, powers_of_two)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_those_of_the_dequantised_checkpoint(ragged, plain, dtype, monkeypatch):
    with unloaded(plain, dtype=dtype) as (model, config):
        expected = load(model, config)
    with unloaded(ragged, dtype=dtype) as (model, config):
        found = load(model, config)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        for fault in FAULTS if dtype == "float32" else ():
            monkeypatch.setattr(fp8_weights, "dequantise", fault)
            load(model, config)
            assert not all(torch.equal(tensor, expected[name]) for name, tensor in found.items()), fault.__name__


def test_what_shards_a_weight_gets_it_whole(ragged):
    """Tensor parallelism cuts after the pairs are one: parts of ranks do not end where blocks end."""
    given = []

    def watched(loader):
        def load_part(parameter, tensor, *args, **options):
            given.append((tuple(tensor.shape), tensor.dtype))
            return loader(parameter, tensor, *args, **options)

        return load_part

    with unloaded(ragged, dtype="bfloat16") as (model, config):
        for parameter in model.parameters():
            # vLLM's own parameter classes have the loader as a property.
            name = "_weight_loader" if hasattr(parameter, "_weight_loader") else "weight_loader"
            if hasattr(parameter, name):
                setattr(parameter, name, watched(getattr(parameter, name)))
        load(model, config)
    decoder = {name: t for name, t in read(ragged).items() if IS_FP8.fullmatch(name) and ".layers.3." not in name}
    # All else is float32 in this checkpoint.
    dequantised_here = [shape for shape, dtype in given if dtype == torch.bfloat16]
    assert sorted(dequantised_here) == sorted(tuple(tensor.shape) for tensor in decoder.values())
    assert {dtype for _, dtype in given} == {torch.bfloat16, torch.float32}


def test_some_weights_may_be_left_as_they_are(ragged, plain, tmp_path):
    """Whatever part of the FP8 weights a checkpoint has unquantised."""

    def mixed(tensors):
        whole = all_dequantised(tensors)
        for name in [name for i, name in enumerate(whole) if IS_FP8.fullmatch(name) and i % 3 == 0]:
            del tensors[f"{name}_scale_inv"]
            tensors[name] = whole[name]
        return tensors

    folder = rewrite(ragged, tmp_path / "mixed", mixed, config_of(ragged))
    assert len({t.dtype for name, t in read(folder).items() if IS_FP8.fullmatch(name)}) == 2
    with unloaded(plain) as (model, config):
        expected = load(model, config)
    with unloaded(folder) as (model, config):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load(model, config).items())


def test_logprobs_equal_transformers_on_the_dequantised_checkpoint(ragged, plain, monkeypatch):
    asked, oracle = prompts(config_of(ragged)), Oracle(plain)
    with engine(plain) as running:
        dequantised_before = torch.cat(running.prompt_logprobs(asked))
    with engine(ragged) as running:
        difference = differences(running, oracle, asked)
        print(f"FP8: p50 {difference.median():.1e} p90 {difference.quantile(0.9):.1e}")
        assert within(difference, LIMITS["auto"]), (difference.median(), difference.quantile(0.9))
        assert within((torch.cat(running.prompt_logprobs(asked)) - dequantised_before).abs(), LIMITS["auto"])
    monkeypatch.setattr(fp8_weights, "dequantise", last_block_unscaled)
    with engine(ragged) as running:
        assert not within(differences(running, oracle, asked), LIMITS["auto"])


def test_planted_checkpoint_answers_right_in_fp8(planted):
    asked = questions((300, 1500))
    with engine(planted, max_num_batched_tokens=512, kv_cache_dtype="fp8_ds_mla") as running:
        assert isinstance(running.model.quant_config, fp8_weights.DequantisedFp8Config)
        assert [words(tokens) for tokens in answers(running, asked)] == [answer for _, answer in asked]


# Memory


class Peak:
    """Largest anonymous memory of this process while the block runs, above what it was at first."""

    def __enter__(self):
        self.first = self.last = self._anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    @property
    def bytes(self) -> int:
        return self.last - self.first

    def _watch(self):
        while not self.done.wait(0.0005):
            self.last = max(self.last, self._anonymous())

    @staticmethod
    def _anonymous() -> int:
        """Without the pages of mapped files, which the kernel may drop."""
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


def through_float32(weight, scale, dtype, name):
    wide = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return (weight.float() * wide).to(dtype)


def test_loading_needs_little_more_memory_than_in_bfloat16(tmp_path, monkeypatch):
    """At most twice the largest tensor; the checkpoint has 100 million weights, a third of them in one tensor."""
    config = tiny.make_config(
        "bfloat16", hidden_size=2048, intermediate_size=16384, num_hidden_layers=1, num_nextn_predict_layers=0
    )
    tensors = {name: torch.ones(shape) for name, shape in tiny.tensor_shapes(config).items()}
    for name in [name for name in tensors if IS_FP8.fullmatch(name)]:
        rows, columns = tensors[name].shape
        tensors[name] = torch.randint(127, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(-(-rows // 128), -(-columns // 128)) / 1000
    plain = {name: tensor.bfloat16() for name, tensor in all_dequantised(tensors).items()}
    largest = max(tensor.nbytes for tensor in plain.values())
    files.write(tmp_path / "plain", config, plain)
    files.write(tmp_path / "fp8", config | {"quantization_config": PUBLISHED}, tensors)
    del tensors, plain
    peaks = {}
    for name, dequantise in (
        ("plain", fp8_weights.dequantise),
        ("fp8", fp8_weights.dequantise),
        ("wasteful", through_float32),
    ):
        monkeypatch.setattr(fp8_weights, "dequantise", dequantise)
        folder = tmp_path / ("plain" if name == "plain" else "fp8")
        with unloaded(folder, dtype="bfloat16", skip_tokenizer_init=True) as (model, vllm_config), Peak() as peak:
            load(model, vllm_config)
        peaks[name] = peak.bytes
    print(f"largest {largest / 2**20:.0f} MiB; peaks", {k: f"{v / 2**20:.0f} MiB" for k, v in peaks.items()})
    assert peaks["fp8"] - peaks["plain"] <= 2 * largest < peaks["wasteful"] - peaks["plain"]
