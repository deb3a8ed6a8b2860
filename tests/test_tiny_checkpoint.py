"""The generated checkpoints are complete, and the planted one answers right in transformers, and only when DSA is.

transformers' indexer is replaced by a copy that can round as the caches do, and can be wrong on purpose.
"""

import json
import math
import re

import pytest
import tiny_checkpoint as tiny
import torch
import torch.nn.functional as F
from planted_text import (
    ASSISTANT,
    CODES,
    END_THINK,
    EOS,
    FACTS,
    FILLERS,
    SPECIAL_TOKENS,
    UNKNOWN,
    USER,
    VALUES,
    build_prompt,
    build_tokenizer,
    chat_text,
    word_ids,
)
from safetensors import safe_open
from transformers import AutoTokenizer, DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as modeling

ODD = {"num_attention_heads": 6, "index_topk": 48, "index_n_heads": 3, "hidden_size": 160, "q_lora_rank": 40}
WORDS = (*FACTS, *VALUES, *FILLERS)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    assert tiny.write_planted(path) > 10
    return path


@pytest.fixture(scope="module")
def model(planted):
    return tiny.load_model(planted)


@pytest.fixture(scope="module")
def folders(planted, tmp_path_factory):
    odd = tmp_path_factory.mktemp("random")
    tiny.write_random(odd, seed=3, dtype="bfloat16", num_hidden_layers=4, rope_scaling=None, **ODD)
    return {"planted": planted, "random": odd}


# transformers' indexer, rounded or at fault


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """x [..., n] through e4m3 with one power-of-two scale for each `group` of the last dim."""
    groups = x.float().unflatten(-1, (-1, group))
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448)))
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2).to(x.dtype)


def indexer_forward(fault: str, rounding: bool, selected: dict[int, list[int]]):
    def forward(self, hidden, q_latent, angles, mask, position_ids, past_key_values=None):
        q = self.wq_b(q_latent).unflatten(-1, (self.n_heads, self.head_dim))  # [B, S, H, D]
        bias = None if fault == "k_norm bias dropped" else self.k_norm.bias
        k = F.layer_norm(self.wk(hidden), (self.head_dim,), self.k_norm.weight, bias, 1e-6).unsqueeze(2)
        swapped = fault == "RoPE swapped"
        rotate = modeling.apply_rotary_pos_emb_interleave if swapped else modeling.apply_rotary_pos_emb
        rope = self.qk_rope_head_dim
        q_pe, k_pe = rotate(q[..., :rope], k[..., :rope], *angles, unsqueeze_dim=2)
        q, k = torch.cat([q_pe, q[..., rope:]], -1), torch.cat([k_pe, k[..., rope:]], -1).squeeze(2)
        if rounding:
            q, k = rounded(q, self.head_dim), rounded(k, self.head_dim)
        k = past_key_values.update_indexer(k, self.layer_idx)  # [B, T, D]
        dots = q.float() @ k.float().mT.unsqueeze(1)  # [B, S, H, T]
        if fault != "relu dropped":
            dots = dots.relu()
        scores = (self.weights_proj(hidden.to(self.weights_proj.weight.dtype)).float().unsqueeze(2) @ dots)[:, :, 0]
        length = k.shape[1]
        if fault == "sliding window":
            scores = torch.arange(length).expand_as(scores).float()
        visible = mask if mask.dtype == torch.bool else mask == 0
        if fault == "own token unseen":
            visible = visible & ~torch.eye(length, dtype=torch.bool)[-scores.shape[1] :]
        top_k = length if fault == "dense" else min(self.index_topk, length)
        positions = scores.masked_fill(~visible, -math.inf).topk(top_k).indices
        selected[self.layer_idx] = sorted(positions[0, -1].tolist())
        return positions.int()

    return forward


def alter(monkeypatch, model, fault: str = "", rounding: bool = False) -> dict[int, list[int]]:
    """Replace the model's indexers (and round its latents); returns what its last row selects, by layer."""
    selected: dict[int, list[int]] = {}
    monkeypatch.setattr(modeling.DeepseekV32Indexer, "forward", indexer_forward(fault, rounding, selected))
    for layer in model.model.layers if rounding else ():
        monkeypatch.setattr(
            layer.self_attn,
            "expand_kv",
            lambda kv, k_pe, expand=layer.self_attn.expand_kv: expand(rounded(kv, 128), k_pe.bfloat16().to(kv.dtype)),
        )
    return selected


# Files


@pytest.mark.parametrize("kind", ["planted", "random"])
def test_index_and_shards_agree(folders, kind):
    path = folders[kind]
    config = json.loads((path / "config.json").read_text())
    index = json.loads((path / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            assert {index["weight_map"][name] for name in file.keys()} == {shard.name}  # noqa: SIM118
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(set(index["weight_map"].values())) >= 2
    assert tensors.keys() == index["weight_map"].keys() == tiny.tensor_shapes(config).keys()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == tiny.tensor_shapes(config)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert all(t.isfinite().all() for t in tensors.values())
    for name, tensor in tensors.items():
        expected = torch.float32 if name.endswith("e_score_correction_bias") else tiny.DTYPES[config["torch_dtype"]]
        assert tensor.dtype == expected, name


@pytest.mark.parametrize("kind", ["planted", "random"])
def test_names_and_shapes_are_those_of_transformers(folders, kind):
    """Published names hold one expert a tensor, transformers' stack them; and it has no MTP layer."""
    config = json.loads((folders[kind] / "config.json").read_text())
    with torch.device("meta"):
        expected = DeepseekV32ForCausalLM(DeepseekV32Config.from_pretrained(folders[kind])).state_dict()
    ours: dict[str, tuple[int, ...]] = {}
    experts = config["n_routed_experts"]
    for name, shape in tiny.tensor_shapes(config).items():
        if int((re.search(r"layers\.(\d+)\.", name) or [0, 0])[1]) in tiny.mtp_layers(config):
            continue
        name = re.sub(r"experts\.\d+\.(gate|up)_proj\.weight", "experts.gate_up_proj", name)
        name = re.sub(r"experts\.\d+\.down_proj\.weight", "experts.down_proj", name)
        if name.endswith("experts.gate_up_proj"):
            shape = (experts, 2 * shape[0], shape[1])
        elif name.endswith("experts.down_proj"):
            shape = (experts, *shape)
        ours[name] = shape
    assert ours == {name: tuple(tensor.shape) for name, tensor in expected.items()}


def test_mtp_layer_is_complete(folders):
    names = {n for n in tiny.tensor_shapes(tiny.make_config()) if n.startswith("model.layers.3.")}
    decoder = {n.replace("layers.2.", "layers.3.") for n in tiny.tensor_shapes(tiny.make_config()) if "layers.2." in n}
    own = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens")
    assert names - decoder == {f"model.layers.3.{name}.weight" for name in own}
    assert decoder <= names


def test_config(folders):
    for path in folders.values():
        config = json.loads((path / "config.json").read_text())
        assert config["architectures"] == ["DeepseekV32ForCausalLM"]
        assert config["num_key_value_heads"] == config["num_attention_heads"]
        assert "quantization_config" not in config
        assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == 1
    assert config | ODD == config and config["rope_scaling"] is None


def test_random_leaves_nothing_at_its_neutral_value():
    tensors = tiny.random_tensors(tiny.make_config(), seed=5)
    assert all(t.std() > 0.005 for t in tensors.values())
    for name, tensor in tensors.items():
        if name.endswith(("norm.weight", "norm.bias", "correction_bias")):
            assert tensor.std() > 0.04, name
    again = tiny.random_tensors(tiny.make_config(), seed=5)
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_random_loads_and_runs(folders):
    model = tiny.load_model(folders["random"])
    logits = model(torch.arange(8, 108)[None], logits_to_keep=1).logits
    assert logits.isfinite().all() and logits.std() > 0.01


# Tokenizer and prompts


def test_every_known_word_is_one_token_and_text_comes_back(planted):
    tokenizer = AutoTokenizer.from_pretrained(planted)
    for word in (*SPECIAL_TOKENS, *WORDS, *(" " + word for word in WORDS)):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word
    for text in ("What is red? reduced=lion, red=lions", " ünï 中文 \n\t\x00 ", '<｜DSML｜invoke name="x">', "a  b"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert ids == build_tokenizer().encode(text, add_special_tokens=False).ids
    assert not set(word_ids("red")) & set(tokenizer.encode(" reduced hatred Red"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.encode("a")[0] == 0, "completions start with BOS"
    assert tokenizer.decode([4, 6, 7, 1], skip_special_tokens=True) == "<｜Assistant｜></think>｜DSML｜"


def test_chat_text_is_what_vllm_encodes(planted):
    deepseek_v32 = pytest.importorskip("vllm.tokenizers.deepseek_v32")
    tokenizer = deepseek_v32.DeepseekV32Tokenizer.from_pretrained(planted)
    messages = [{"role": "user", "content": "What is red?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == chat_text("What is red?")
    ids = build_tokenizer().encode(chat_text("What is red?"), add_special_tokens=False).ids
    assert tokenizer.apply_chat_template(messages) == ids


@pytest.mark.parametrize("total", [300, 1234])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("placement", ["scattered", "first", "last", 0.25])
def test_prompt_has_the_length_and_the_copies(total, chat, placement):
    prompt = build_prompt(total, 1, chat=chat, asked="red", placement=placement)
    text = chat_text(prompt.text) if chat else prompt.text
    ids = build_tokenizer().encode(text, add_special_tokens=not chat).ids
    assert len(ids) == total
    places = [i for i, token in enumerate(ids) if token in word_ids(f"red={prompt.answer}")]
    assert len(places) == 16
    assert sum(token in facts() for token in ids) == 128
    start, end = (2, total - 6) if chat else (1, total - 4)
    if placement != "scattered":
        first = {"first": start, "last": end - 16, 0.25: start + round((end - 16 - start) / 4)}[placement]
        assert places == list(range(first, first + 16))


def facts() -> set[int]:
    return {token for fact in FACTS for token in word_ids(fact)}


def test_prompts_of_one_seed_share_what_stands_before_the_question():
    red, blue = (build_prompt(500, 9, asked=code) for code in ("red", "blue"))
    assert red.text.removesuffix(" red?") == blue.text.removesuffix(" blue?")
    assert red.answer != blue.answer


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build_prompt(100, 0), "total_tokens: 100; allowed: at least 133"),
        (lambda: build_prompt(300, 0, asked="mauve"), "asked: 'mauve'"),
        (lambda: build_prompt(300, 0, hops=9), "hops: 9"),
        (lambda: build_prompt(300, 0, placement="middle"), "placement: 'middle'"),
        (lambda: build_prompt(300, 0, placement=1.5), "placement: 1.5; allowed: .* 0.0 to 1.0"),
        (lambda: tiny.make_config("float16"), "dtype: 'float16'; allowed: float32, bfloat16"),
        (lambda: tiny.make_config(hidden_size=100), "hidden_size: 100; allowed: multiples of 32"),
        (lambda: tiny.make_config(vocab_size=64), "vocab_size: 64; allowed: .* at least"),
        (lambda: tiny.make_config(index_top_k=16), "index_top_k: 16 is no key of the config"),
        (lambda: tiny.write_planted("unwritten", index_head_dim=64), "index_head_dim: 64; allowed .*: 128"),
        (lambda: tiny.write_planted("unwritten", rope_scaling=None), "rope_scaling: None; allowed .*: {"),
        (lambda: tiny.write_planted("unwritten", q_lora_rank=24), "q_lora_rank: 24; allowed .*: multiples of 16"),
        (lambda: tiny.write_planted("unwritten", hidden_size=64), "hidden_size: 64; allowed .*: at least 96"),
    ],
)
def test_refusals_name_the_thing_and_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The planted model's answers


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("length", [300, pytest.param(1000, marks=pytest.mark.slow), 3000])
def test_planted_answers_right(planted, model, monkeypatch, length, rounding):
    alter(monkeypatch, model, rounding=rounding)
    cases = ({"chat": True, "placement": "first"}, {"hops": 3}, {"placement": "last"}, {"chat": True, "hops": 2})
    for options in cases if length < 3000 else cases[:1]:
        prompt = build_prompt(length, length, **options)
        answer, margin = tiny.ask(model, prompt.text, chat=options.get("chat", False))
        assert answer == prompt.answer, options
        assert margin > 10, options


@pytest.mark.parametrize("rounding", [False, True])
def test_planted_answers_right_in_bfloat16(tmp_path, monkeypatch, rounding):
    assert math.isnan(tiny.write_planted(tmp_path, dtype="bfloat16", check=False))
    model = tiny.load_model(tmp_path, "bfloat16")
    alter(monkeypatch, model, rounding=rounding)
    for length, hops in ((300, 1), (1000, 4)):
        prompt = build_prompt(length, 2, chat=True, hops=hops)
        answer, margin = tiny.ask(model, prompt.text, chat=True)
        assert (answer, margin > 10) == (prompt.answer, True)


@pytest.mark.parametrize("length", [300, 2000])
@pytest.mark.parametrize("fault", ["RoPE swapped", "dense", "sliding window", "k_norm bias dropped", "relu dropped"])
def test_planted_answers_wrong_when_dsa_is_wrong(model, monkeypatch, fault, length):
    prompt = build_prompt(length, length, chat=True)
    alter(monkeypatch, model, fault)
    answer, margin = tiny.ask(model, prompt.text, chat=True)
    assert answer == UNKNOWN
    assert margin > 3, "wrong by chance"


def test_a_query_that_does_not_see_its_own_token_loses_the_chain(model, monkeypatch):
    prompt = build_prompt(300, 4, hops=3)
    assert len(prompt.answer.split()) == 3
    alter(monkeypatch, model, "own token unseen")
    assert tiny.ask(model, prompt.text)[0] != prompt.answer


def test_selection_is_exactly_the_planted_copies(model, monkeypatch):
    selected = alter(monkeypatch, model, rounding=True)
    prompt = build_prompt(1500, 6, question=" What is {code}")
    tiny.ask(model, prompt.text, max_tokens=1)
    ids = build_tokenizer().encode(prompt.text).ids
    asked = prompt.text.split()[-1]
    fact = word_ids(f"{asked}={prompt.answer}")
    assert selected[1] == [i for i, token in enumerate(ids) if token in fact]
    assert len(ids) - 1 in selected[0], "the code word itself is fetched"


def test_one_missing_copy_costs_margin(model):
    prompt = build_prompt(600, 8)
    fact = next(word for word in prompt.text.split() if word.endswith(f"={prompt.answer}"))
    fewer = prompt.text.replace(fact, "the", 1)
    (answer, full), (same, less) = tiny.ask(model, prompt.text), tiny.ask(model, fewer)
    assert answer == same == prompt.answer
    assert 2 < full - less < 8


def test_the_last_question_counts(model):
    """In a conversation, and even if nobody planted what it asks for."""
    prompt = build_prompt(400, 3, codes=4)
    planted = {fact.split("=")[0]: fact.split("=")[1] for fact in prompt.text.split() if "=" in fact}
    assert len(planted) == 4
    turns = f"{prompt.text}{ASSISTANT}{END_THINK}{prompt.answer}{EOS}{USER}"
    for code in CODES:
        answer = planted.get(code, UNKNOWN)
        assert tiny.ask(model, f"{turns}What is {code}?", chat=True)[0] == answer
        assert tiny.ask(model, f"{prompt.text} Or {code}")[0] == answer


def test_check_refuses_a_checkpoint_that_answers_wrong(folders):
    with pytest.raises(ValueError, match=r"answers '.*' by .* nats; allowed: '\w+' by 3.0 nats"):
        tiny.check_planted(folders["random"], lengths=[300])


def test_other_sizes(tmp_path):
    sizes = {"index_topk": 64, "num_attention_heads": 6, "index_n_heads": 3, "hidden_size": 160, "kv_lora_rank": 128}
    assert tiny.write_planted(tmp_path, seed=1, qk_nope_head_dim=32, v_head_dim=32, **sizes) > 10


def test_command_line(tmp_path, capsys):
    tiny.main(["random", str(tmp_path / "r"), "--seed", "2", "--dtype", "bfloat16", "--config", '{"index_topk": 48}'])
    assert json.loads((tmp_path / "r" / "config.json").read_text())["index_topk"] == 48
    tiny.main(["planted", str(tmp_path / "p")])
    assert re.search(r"smallest margin 1\d\.\d nats", capsys.readouterr().out)
