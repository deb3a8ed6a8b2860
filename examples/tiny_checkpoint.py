"""Write tiny checkpoints in the published DeepSeek-V3.2 format: `planted` (right answers known) or `random`.

    python examples/tiny_checkpoint.py planted OUT_DIR [--dtype bfloat16] [--fp8] [--family axk2]
    python examples/tiny_checkpoint.py random OUT_DIR [--fp8] [--seed 7] [--config '{"num_attention_heads": 6}']

The planted model has weights set by formula, not trained. Its prompt (planted_text.py) is a long text of filler words,
in which facts are planted as single tokens such as `red=lion`, each fact index_topk (16) times, and then a question
that names a code: `What is red?`. The greedy answer is `lion`, then end-of-sentence. A value may be a code
again (`red=blue`): then the answer goes on (`blue lion`), a new retrieval for each word. A code that nobody
planted is `unknown`. Every feature has its own dims of the residual stream, with amplitude 4:

    fact `red=lion`   CODE red, VALUE lion
    other token       FILLER, VALUE unknown; `red` also ASK red, `lion` also ENDS (EOS is next)
    any token         CONST; SPACE: +1 special tokens, -1 others (answer `lion` or ` lion`); random identity

Layer 0 fetches, layer 1 (and the MTP layer) retrieves. MLPs, experts and routers are small random noise.

    layer 0  select   keys of code words are 1 in all 32 frequencies: near ones score high, other tokens 0
             attend   140 nats for code words, up to 100 for nearness: ASK of the nearest one -> FETCHED, so
                      that the last token, whatever it is, knows what was asked last
    layer 1  select   query = pattern of FETCHED, key = pattern of CODE: asked facts score 6, fillers 4, other
                      facts 0, so the top 16 are the 16 planted copies
             attend   flat, but 1 nat for fillers: mean VALUE of the selected rows -> ANSWER
    head              ANSWER lion -> `lion`, ENDS -> EOS; each wrongly selected row costs margin

What breaks it: dense attention and sliding windows average fillers (`unknown`). The code patterns lie in
index dims 24-31: the right RoPE layout (half-split) turns these by the slow frequencies 24-31, which YaRN
divides by 40, the interleaved one by the fast 12-15, where asked facts fall below fillers. Only k_norm's bias
lifts scores above 0. Odd index heads have negative weights and queries that relu silences. e4m3 rounds none
of the index values.

A completion prompt ends with the question (last token `red`, `?` or any other), a chat message likewise. With
ignore_eos, `lion` and EOS repeat. Right up to 16,384 tokens. `red` is a word of its own, no part of `hatred`.

In family axk2 the gates behind norms are open; those of attention are open in even heads and shut in odd ones,
which would turn the answer round.
"""

import argparse
import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import checkpoint_files as files
import torch
from checkpoint_files import DTYPES, Tensors, load_model
from planted_text import (
    ANIMALS,
    BOS,
    CODES,
    EOS,
    FACTS,
    PAD,
    SPECIAL_TOKENS,
    UNKNOWN,
    VALUES,
    build_prompt,
    build_tokenizer,
    chat_text,
    word_ids,
)

MIN_MARGIN = 3.0  # nats between the two best log-probabilities
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
YARN |= {"original_max_position_embeddings": 4096, "type": "yarn"}
Config = dict[str, Any]

# What A.X-K2's config has beside these keys, and otherwise.
AXK2: Config = {"architectures": ["AXK2ForCausalLM"], "model_type": "axk2", "num_nextn_predict_layers": 0}
AXK2 |= {"attention_output_gate": True, "attn_gate_fused": True, "gated_norm": True, "gated_norm_rank": 16}
AXK2 |= {"n_group": None, "topk_group": None}
FAMILIES: dict[str, Config] = {"deepseek_v32": {}, "axk2": AXK2}

# Dims of the planted model's features, and the config keys that its construction fixes.
CODE, ASK, FETCHED = slice(0, 8), slice(8, 16), slice(16, 24)
VALUE, ANSWER = slice(24, 41), slice(41, 58)
CONST, FILLER, ENDS, SPACE, IDENTITY = 58, 59, 60, 61, 62
AMPLITUDE = 4.0
PLANTED = {"num_hidden_layers": 2, "index_head_dim": 128, "qk_rope_head_dim": 64, "rope_theta": 10000}
PLANTED["rope_scaling"] = YARN


def make_config(dtype: str = "float32", family: str = "deepseek_v32", **overrides: Any) -> Config:
    """config.json with the family's published keys and tiny sizes. `overrides` replaces values; it adds no keys."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r}; allowed: {', '.join(DTYPES)}")
    tokens = build_tokenizer().get_vocab_size()
    config: Config = {
        "architectures": ["DeepseekV32ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 128, "index_head_dim": 128, "index_n_heads": 4, "index_topk": 16,
        "initializer_range": 0.02, "intermediate_size": 128, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v32", "moe_intermediate_size": 64,
        "moe_layer_freq": 1, "n_group": 2, "n_routed_experts": 8, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3,
        "num_key_value_heads": 4, "num_nextn_predict_layers": 1, "q_lora_rank": 64, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_scaling": dict(YARN), "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 1,
        "topk_method": "noaux_tc", "torch_dtype": dtype, "use_cache": True, "v_head_dim": 128,
        "vocab_size": 64 * math.ceil(tokens / 64),
    }  # fmt: skip
    config |= FAMILIES[family]
    for key, value in overrides.items():
        if key not in config:
            raise ValueError(f"{key}: {value!r} is no key of the config; allowed: {', '.join(config)}")
    config |= overrides
    config["num_key_value_heads"] = config["num_attention_heads"]
    rules = (("hidden_size", 32, 32), ("n_routed_experts", config["n_group"] or 1, 1), ("vocab_size", 1, tokens))
    for key, divisor, least in rules:
        if config[key] % divisor or config[key] < least:
            raise ValueError(f"{key}: {config[key]}; allowed: multiples of {divisor}, at least {least}")
    return config


def mtp_layers(config: Config) -> range:
    """Indices of the MTP layers, which follow the decoder's."""
    return range(n := config["num_hidden_layers"], n + config["num_nextn_predict_layers"])


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor, MTP layers included, in file order."""
    c, hidden, vocab = config, config["hidden_size"], (config["vocab_size"], config["hidden_size"])
    heads, index_dim, rope = c["num_attention_heads"], c["index_head_dim"], c["qk_rope_head_dim"]
    q_b_rows, q_b_inputs = heads * (c["qk_nope_head_dim"] + rope), c["q_lora_rank"]
    if gated := c["model_type"] == "axk2":  # each head's gate follows its query, and reads the raw latent
        q_b_rows, q_b_inputs = q_b_rows + heads * c["v_head_dim"], 2 * q_b_inputs
    shapes = {"model.embed_tokens.weight": vocab}

    def add_mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, width)

    for layer in range(mtp_layers(c).stop):
        name = f"model.layers.{layer}"
        attention = {
            "q_a_proj.weight": (c["q_lora_rank"], hidden),
            "q_a_layernorm.weight": (c["q_lora_rank"],),
            "q_b_proj.weight": (q_b_rows, q_b_inputs),
            "kv_a_proj_with_mqa.weight": (c["kv_lora_rank"] + rope, hidden),
            "kv_a_layernorm.weight": (c["kv_lora_rank"],),
            "kv_b_proj.weight": (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"]),
            "o_proj.weight": (hidden, heads * c["v_head_dim"]),
            "indexer.wq_b.weight": (c["index_n_heads"] * index_dim, c["q_lora_rank"]),
            "indexer.wk.weight": (index_dim, hidden),
            "indexer.k_norm.weight": (index_dim,),
            "indexer.k_norm.bias": (index_dim,),
            "indexer.weights_proj.weight": (c["index_n_heads"], hidden),
        }
        shapes |= {f"{name}.self_attn.{key}": shape for key, shape in attention.items()}
        norms = ["input_layernorm", "post_attention_layernorm"]
        if gated:
            behind, rank = norms[: 1 if layer < c["first_k_dense_replace"] else 2], c["gated_norm_rank"]
            shapes |= {f"{name}.{norm}.W_down.weight": (rank, hidden) for norm in behind}
            shapes |= {f"{name}.{norm}.W_up.weight": (hidden, rank) for norm in behind}
            norms = [f"{norm}.norm" if norm in behind else norm for norm in norms]
        if layer < c["first_k_dense_replace"]:
            add_mlp(f"{name}.mlp", c["intermediate_size"])
        else:
            shapes[f"{name}.mlp.gate.weight"] = (c["n_routed_experts"], hidden)
            shapes[f"{name}.mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
            for expert in range(c["n_routed_experts"]):
                add_mlp(f"{name}.mlp.experts.{expert}", c["moe_intermediate_size"])
            add_mlp(f"{name}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
        if layer in mtp_layers(c):
            norms += ["enorm", "hnorm", "shared_head.norm"]
            shapes |= {f"{name}.embed_tokens.weight": vocab, f"{name}.shared_head.head.weight": vocab}
            shapes[f"{name}.eh_proj.weight"] = (hidden, 2 * hidden)
        shapes |= {f"{name}.{norm}.weight": (hidden,) for norm in norms}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": vocab}


def random_tensors(config: Config, seed: int) -> Tensors:
    """float32: matrices N(0, initializer_range); norm weights, and k_norm's and the routers' biases too."""
    generator = torch.Generator().manual_seed(seed)
    mean_std = {"norm.weight": (1.0, 0.2), "norm.bias": (0.0, 0.5), "e_score_correction_bias": (0.0, 0.1)}
    if config["model_type"] == "axk2":  # gates far from 1/2, and biased scores on both sides of the 0 of other groups
        mean_std |= {"W_down.weight": (0.0, 0.2), "W_up.weight": (0.0, 0.5), "e_score_correction_bias": (-0.5, 0.2)}
    mean_std[""] = (0.0, config["initializer_range"])  # every other name ends with this
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        mean, std = next(value for suffix, value in mean_std.items() if name.endswith(suffix))
        tensors[name] = mean + std * torch.randn(shape, generator=generator)
        if name.endswith("q_b_proj.weight") and config["model_type"] == "axk2":
            query, gate = _queries_and_gates(tensors[name], config)
            for part, of_normed, of_raw in ((query, 1, 4), (gate, 5, 20)):  # raw latents are small
                part[..., : config["q_lora_rank"]] *= of_normed
                part[..., config["q_lora_rank"] :] *= of_raw
    return tensors


def _queries_and_gates(q_b_proj: torch.Tensor, config: Config) -> Sequence[torch.Tensor]:
    """Views [heads, qk dims, inputs] and [heads, v_head_dim, inputs] of a q_b_proj; gates are none in DeepSeek-V3.2."""
    query = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    heads = q_b_proj.view(config["num_attention_heads"], -1, q_b_proj.shape[1])
    return heads[:, :query], heads[:, query:]


def planted_tensors(config: Config, seed: int, draft: str) -> Tensors:
    """float32: the circuit of the module docstring; MLPs, experts and routers stay random."""
    tensors = random_tensors(config, seed)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        elif ".self_attn." in name:
            tensor.zero_()
        elif name.endswith("W_down.weight"):
            tensor.zero_()[:, CONST] = 10 / AMPLITUDE
        elif name.endswith("W_up.weight"):
            tensor.fill_(4 / config["gated_norm_rank"])  # sigmoid(40) is 1
    tensors["model.embed_tokens.weight"] = _embedding(config, seed)
    head = tensors["lm_head.weight"]
    for i, value in enumerate(VALUES):
        for token, sign in zip(word_ids(value), (-1, 1), strict=True):
            head[token, ANSWER.start + i], head[token, SPACE] = 5.0, 2.5 * sign
    head[SPECIAL_TOKENS.index(EOS), ENDS] = 12.0
    for layer in range(mtp_layers(config).stop):
        prefix = f"model.layers.{layer}.self_attn."
        weights = {k.removeprefix(prefix): tensor for k, tensor in tensors.items() if k.startswith(prefix)}
        (_set_retrieve if layer else _set_fetch)(weights, config)
        if config["model_type"] == "axk2":
            _set_gates(weights, config)
        if layer in mtp_layers(config):  # a draft sees the next token's embedding: what that asks is fetched
            eh_proj = torch.nn.init.eye_(tensors[f"model.layers.{layer}.eh_proj.weight"])
            eh_proj[FETCHED, ASK] = torch.eye(len(CODES))
            if draft == "hidden":  # else what was fetched for the token before; both asked, the next token is louder
                eh_proj[FETCHED, ASK] *= 2
                eh_proj[FETCHED, config["hidden_size"] :][:, FETCHED] = 1.2 * torch.eye(len(CODES))
    return tensors


def _embedding(config: Config, seed: int) -> torch.Tensor:
    """[vocab, hidden]: each token's features, filled up with random identity to rows of RMS 1."""
    rows = torch.zeros(config["vocab_size"], config["hidden_size"])
    unknown = VALUE.start + VALUES.index(UNKNOWN)
    rows[:, [CONST, FILLER, unknown]] = 1
    rows[:, SPACE] = -1
    rows[: len(SPECIAL_TOKENS), SPACE] = 1
    for fact in FACTS:
        code, value = fact.split("=")
        for token in word_ids(fact):
            rows[token, [FILLER, unknown]] = 0
            rows[token, [CODE.start + CODES.index(code), VALUE.start + VALUES.index(value)]] = 1
    for i, code in enumerate(CODES):
        rows[word_ids(code), ASK.start + i] = 1
    for word in (*ANIMALS, UNKNOWN):
        rows[word_ids(word), ENDS] = 1
    rows *= AMPLITUDE
    signs = torch.randn(rows[:, IDENTITY:].shape, generator=torch.Generator().manual_seed(seed)).sign()
    missing = rows.shape[1] - rows.square().sum(1, keepdim=True)
    rows[:, IDENTITY:] = signs * (missing / signs.shape[1]).sqrt()
    return rows


def _hadamard(size: int) -> torch.Tensor:
    """[size, size] of +-1 with orthogonal rows; size is a power of two."""
    return functools.reduce(torch.kron, [torch.tensor([[1.0, 1.0], [1.0, -1.0]])] * (size.bit_length() - 1))


def _spread(config: Config, rank: str, features: int) -> torch.Tensor:
    """[rank, features] of +-1 with orthogonal columns: a feature lies in all values of a latent."""
    size = 1 << (features - 1).bit_length()
    if config[rank] % size:
        raise ValueError(f"{rank}: {config[rank]}; allowed in a planted checkpoint: multiples of {size}")
    return _hadamard(size)[:, :features].repeat(config[rank] // size, 1)


def _set_attention(
    w: Tensors, config: Config, source: slice, target: slice, favour: list[float], near: float
) -> torch.Tensor:
    """MLA that writes the mean of `source` over the selected rows to `target`. `w` is all zero before.

    favour: nats in the softmax for a row, by source feature; near: nats x mean of cos(frequency x distance).
    Returns [9, q_lora_rank], which reads FETCHED (8) and CONST off q's latent, of joint length 1 there.
    A row of the latent cache holds `source` and CONST, also of joint length 1: hence the factors sqrt(2).
    """
    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    v_dim, rank, width = config["v_head_dim"], config["kv_lora_rank"], source.stop - source.start
    yarn = config["rope_scaling"]
    mscale = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1
    nats = (nope + rope) ** 0.5 / mscale**2  # q.k that gives one nat
    spread_q, spread = _spread(config, "q_lora_rank", 9), _spread(config, "kv_lora_rank", width + 1)
    read_q, read = spread_q.T / len(spread_q), spread.T[:width] / rank
    q_a, kv_a = w["q_a_proj.weight"], w["kv_a_proj_with_mqa.weight"]
    q_a[:, FETCHED], q_a[:, CONST] = spread_q[:, :8], spread_q[:, 8]
    kv_a[:rank, source], kv_a[:rank, CONST] = spread[:, :width], spread[:, width]
    kv_a[rank::2, CONST] = 1 / AMPLITUDE  # rotated key: (1, 0) in every pair
    q_b = _queries_and_gates(w["q_b_proj.weight"], config)[0][..., : config["q_lora_rank"]]
    kv_b = w["kv_b_proj.weight"].view(heads, nope + v_dim, -1)
    o_proj = w["o_proj.weight"].view(-1, heads, v_dim)
    for head in range(heads):
        key, values = head % nope, (torch.arange(width) + head) % v_dim  # each head has other dims
        q_b[head, key] = read_q[8] * math.sqrt(2) * nats
        q_b[head, nope::2] = read_q[8] * near * nats / (rope // 2)
        kv_b[head, key] = torch.tensor(favour) @ read
        kv_b[head, nope + values] = read
        o_proj[target, head, values] = torch.eye(width) * AMPLITUDE * math.sqrt(2) / heads
    return read_q


def _set_fetch(w: Tensors, config: Config) -> None:
    """ASK of the nearest code word -> FETCHED."""
    read_q = _set_attention(w, config, ASK, FETCHED, favour=[140.0] * len(CODES), near=100.0)
    wk, wq_b = w["indexer.wk.weight"], w["indexer.wq_b.weight"].view(config["index_n_heads"], 128, -1)
    wk[:32, ASK], wk[96:, ASK] = 1.0, -1.0  # one dim of each frequency; the other half keeps the mean at 0
    wk[64:96:2, CONST], wk[65:96:2, CONST] = 1.0, -1.0  # a background, so that no key is all zero
    w["indexer.k_norm.weight"].fill_(math.sqrt(96 / 128))  # 96 dims of a code word's key: +-1
    wq_b[:, :32] = read_q[8]
    w["indexer.weights_proj.weight"][:, CONST] = 1 / AMPLITUDE


def _set_retrieve(w: Tensors, config: Config) -> None:
    """Mean VALUE of the rows whose CODE is in FETCHED -> ANSWER."""
    favour = [math.sqrt(2) * (value == UNKNOWN) for value in VALUES]  # 1 nat: FETCHED is half of the query
    read_q = _set_attention(w, config, VALUE, ANSWER, favour, near=0.0) * math.sqrt(2)
    wk, wq_b = w["indexer.wk.weight"], w["indexer.wq_b.weight"].view(config["index_n_heads"], 128, -1)
    codes, stripes = _hadamard(8), torch.tensor([1.0, -1.0] * 4)
    code, filler, const, lift = slice(24, 32), slice(64, 72), slice(72, 80), slice(80, 88)  # index dims
    wk[code, CODE], wk[filler, FILLER], wk[const, CONST] = codes, stripes, stripes
    w["indexer.k_norm.weight"].fill_(math.sqrt(16 / 128))  # 16 dims of a key: +-1
    w["indexer.k_norm.bias"][lift] = stripes
    # Even heads: 8 x (1 for the asked code or 0.75 for a filler, - 1.25 + 1). Odd heads: below 0 before relu.
    wq_b[::2, code] = codes @ read_q[:8]
    for dims, score in ((filler, 0.75), (const, -1.25), (lift, 1.0)):
        wq_b[::2, dims] = score * torch.outer(stripes, read_q[8])
    wq_b[1::2, filler] = -torch.outer(stripes, read_q[8])
    w["indexer.weights_proj.weight"][::2, CONST] = 1 / AMPLITUDE
    w["indexer.weights_proj.weight"][1::2, CONST] = -1 / AMPLITUDE


def _set_gates(w: Tensors, config: Config) -> None:
    """Open gates in even heads; odd heads' are shut, and would write twice the opposite."""
    heads, rank = config["num_attention_heads"], config["q_lora_rank"]
    const = _spread(config, "q_lora_rank", 9)[:, 8] / rank  # reads CONST off the raw latent
    gates = _queries_and_gates(w["q_b_proj.weight"], config)[1][..., rank:]
    gates[::2], gates[1::2] = 10 * const, -10 * const
    o_proj = w["o_proj.weight"].view(-1, heads, config["v_head_dim"])
    o_proj *= heads / len(gates[::2])
    o_proj[:, 1::2] *= -2


def write_random(
    path: str | Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    fp8: bool = False,
    family: str = "deepseek_v32",
    **config_overrides: Any,
) -> Config:
    """Write a random checkpoint and return its config. `rope_scaling=None` leaves YaRN out; scales are any float32."""
    config = make_config(dtype, family, **config_overrides)
    tensors = random_tensors(config, seed)
    if fp8:
        config["quantization_config"], tensors = files.QUANTIZATION, files.to_fp8(tensors, seed)
    _write(Path(path), config, tensors, max_length=config["max_position_embeddings"])
    return config


def write_planted(
    path: str | Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    fp8: bool = False,
    family: str = "deepseek_v32",
    check: bool = True,
    draft: str = "embedding",
    **config_overrides: Any,
) -> float:
    """Write the planted checkpoint and return `check_planted`'s margin (NaN if not `check`).

    draft: what the MTP layer reads. "embedding": the next token alone; its guess is right where that is a code or an
    answer, and wrong after EOS. "hidden": also the hidden state, and its guess is right everywhere.
    """
    if draft not in ("embedding", "hidden"):
        raise ValueError(f"draft: {draft!r}; allowed: embedding, hidden")
    config = make_config(dtype, family, **PLANTED | config_overrides)
    for key, value in PLANTED.items():
        if config[key] != value:
            raise ValueError(f"{key}: {config[key]}; allowed in a planted checkpoint: {value}")
    for key, least in (("hidden_size", 96), ("v_head_dim", len(VALUES)), ("index_n_heads", 2)):
        if config[key] < least:
            raise ValueError(f"{key}: {config[key]}; allowed in a planted checkpoint: at least {least}")
    tensors = planted_tensors(config, seed, draft)
    if fp8:
        config["quantization_config"], tensors = files.QUANTIZATION, files.to_fp8(tensors, None)
    _write(Path(path), config, tensors, max_length=16384)
    return check_planted(path) if check else math.nan


def _write(path: Path, config: Config, tensors: Tensors, max_length: int) -> None:
    for layer in mtp_layers(config):  # copies, as published
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    for name in tensors:
        # float32 in every checkpoint, like the scales of FP8
        if tensors[name].dtype == torch.float32 and not name.endswith(("e_score_correction_bias", files.SCALE)):
            tensors[name] = tensors[name].to(DTYPES[config["torch_dtype"]])
    files.write(path, config, tensors)
    build_tokenizer().save(str(path / "tokenizer.json"))
    tokenizer = {"model_max_length": max_length, "tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer |= {"add_bos_token": True, "bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    files.write_json(path / "tokenizer_config.json", tokenizer)
    generation = {"bos_token_id": 0, "do_sample": False, "eos_token_id": 1}
    files.write_json(path / "generation_config.json", generation)


@torch.no_grad()
def ask(model: Any, text: str, *, chat: bool = False, max_tokens: int = 16) -> tuple[str, float]:
    """Greedy answer to a completion prompt or a chat message, and its smallest margin (EOS included)."""
    from transformers import DynamicCache

    tokenizer, cache, generated, margin = build_tokenizer(), DynamicCache(config=model.config), [], math.inf
    ids = tokenizer.encode(chat_text(text) if chat else text, add_special_tokens=not chat).ids
    while len(generated) < max_tokens:
        for part in torch.tensor([ids]).split(256, dim=1):  # chunks: memory grows with chunk x length
            logits = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        best = logits.float().topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        ids = [int(best.indices[0])]
        if ids == [model.config.eos_token_id]:
            break
        generated += ids
    return tokenizer.decode(generated).strip(), margin


def check_planted(path: str | Path, lengths: Iterable[int] = (300, 1000)) -> float:
    """Ask transformers in float32; return the smallest margin. Raises if that or an answer is wrong."""
    model, smallest = load_model(path), math.inf
    copies = model.config.index_topk
    for length in lengths:
        codes = max(1, min(len(CODES), length // copies - 1))
        for chat, hops in ((True, 1), (False, min(3, codes))):
            tokens = max(length, (codes + 1) * copies)  # a large index_topk: fewer facts, longer prompts
            prompt = build_prompt(tokens, length, chat=chat, hops=hops, copies=copies, codes=codes)
            answer, margin = ask(model, prompt.text, chat=chat)
            smallest = min(smallest, margin)
            if answer != prompt.answer or margin < MIN_MARGIN:
                needed = f"{prompt.answer!r} by {MIN_MARGIN} nats"
                raise ValueError(f"{path}: answers {answer!r} by {margin:.2f} nats; allowed: {needed}")
    return smallest


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("planted", "random"))
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--fp8", action="store_true", help="block-scaled FP8 weights, as published")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="deepseek_v32")
    parser.add_argument("--config", type=json.loads, default={}, help="config values, a JSON object")
    args = parser.parse_args(argv)
    write = write_planted if args.kind == "planted" else write_random
    result = write(args.out_dir, seed=args.seed, dtype=args.dtype, fp8=args.fp8, family=args.family, **args.config)
    for file in sorted(args.out_dir.iterdir()):
        print(f"{file.stat().st_size:>12,}  {file}")
    if args.kind == "planted":
        print(f"planted answers are right in transformers float32; smallest margin {result:.1f} nats")


if __name__ == "__main__":
    main()
