"""A.X-K2: gated attention and norms, both routing modes, names, facts, and what vLLM gives to names that it knows."""

import os
from types import SimpleNamespace

import openai
import pytest
import torch
from engine import engine, load, unloaded
from faults import dense, k_norm_bias_dropped, planted, rope_swapped
from fp8_bytes import all_dequantised, rewrite
from oracle import Oracle, smaller_first
from planted_text import build_prompt
from test_model import LIMITS, config_of, differences, prompts, within
from test_planted import answers, questions, words
from test_platform import engine_config
from tiny_checkpoint import make_config, tensor_shapes, write_planted, write_random
from transformers import AXK2Config, AXK2ForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.axk2.modeling_axk2 import AXK2TopkRouter

from vllm_dsa import platform
from vllm_dsa.attention import DSAAttention
from vllm_dsa.checkpoint import Expected
from vllm_dsa.config import ConfigError, DSAConfig
from vllm_dsa.models.axk2 import GroupedMoE
from vllm_dsa.testing.compare import BFLOAT16_LOGPROBS
from vllm_dsa.testing.server import serve

LIGHT = dict(
    hidden_size=2048,
    intermediate_size=5120,
    moe_intermediate_size=512,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=32,
    n_routed_experts=128,
    q_lora_rank=384,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    index_n_heads=16,
)
LARGE = dict(
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=64,
    num_key_value_heads=64,
    n_routed_experts=256,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    index_n_heads=64,
)
# Sizes of a head as Light has them, and those of V3.2; one without expert groups, one with.
CHECKPOINTS = {
    "no_groups": dict(num_hidden_layers=4, num_attention_heads=6, q_lora_rank=96, kv_lora_rank=128, qk_nope_head_dim=64)
    | dict(qk_rope_head_dim=32, v_head_dim=40, index_n_heads=8, rope_scaling=None, seed=1),
    "groups": dict(num_hidden_layers=3, num_attention_heads=2, index_n_heads=16, index_topk=32, n_routed_experts=16)
    | dict(n_group=4, topk_group=2, num_experts_per_tok=4, seed=3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder of a random float32 checkpoint."""
    paths = {name: tmp_path_factory.mktemp(name) for name in CHECKPOINTS}
    for name, path in paths.items():
        write_random(path, family="axk2", **CHECKPOINTS[name])
    return paths


# The model against transformers


def gate_dropped(layer):
    return {"output": lambda values, gate: DSAAttention.output(layer, values, None)}


def latents_swapped(layer):
    queries = layer.queries
    return {"queries": lambda normed, raw: queries(raw, normed)}


def gate_of_the_normed(layer):
    queries = layer.queries
    return {"queries": lambda normed, raw: queries(normed, normed)}


def norm_ungated(norm):
    return {"forward": norm.norm.forward}


def others_never(router):
    """Experts outside the chosen groups are out of reach, as vLLM's own grouped routing has it."""

    moe = router.custom_routing_function.__self__

    def route(hidden_states, gating_output, topk, renormalize):
        scores = gating_output.float().sigmoid()
        biased = (scores + moe.gate.e_score_correction_bias).unflatten(-1, (moe.groups, -1))
        best = biased.topk(2).values.sum(-1).topk(moe.chosen_groups).indices
        inside = torch.zeros(biased.shape[:2]).scatter_(1, best, 1.0).bool().unsqueeze(-1)
        experts = biased.masked_fill(~inside, -torch.inf).flatten(1).topk(topk).indices
        weights = scores.gather(1, experts)
        return weights / weights.sum(-1, keepdim=True), experts.int()

    return {"custom_routing_function": route}


def faults_of(running):
    """(fault, what it is planted in): some of DeepSeek-V3.2's, and all parts of the model that are A.X-K2's own."""
    layers = running.model.model.layers
    for fault in (rope_swapped, k_norm_bias_dropped, dense, gate_dropped, latents_swapped, gate_of_the_normed):
        yield fault, running.layers
    yield norm_ungated, [layer.input_layernorm for layer in layers]
    yield norm_ungated, [layer.post_attention_layernorm for layer in layers[1:]]
    if isinstance(layers[1].mlp, GroupedMoE):
        yield others_never, [layer.mlp.experts.router for layer in layers[1:]]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logprobs_equal_transformers(folders, name):
    folder = folders[name]
    asked, oracle = prompts(config_of(folder)), Oracle(folder)
    expected = torch.cat([oracle.prompt_logprobs(prompt) for prompt in asked])
    with engine(folder) as running:
        assert isinstance(running.model.model.layers[1].mlp, GroupedMoE) == (name == "groups")
        difference = (torch.cat(running.prompt_logprobs(asked)) - expected).abs()
        assert max(n for step in running.steps for n in step.values()) < max(map(len, asked)), "not chunked"
        print(f"A.X-K2 {name}: p50 {difference.median():.1e} p90 {difference.quantile(0.9):.1e}")
        assert within(difference, LIMITS["auto"]), (difference.median(), difference.quantile(0.9))
        for fault, places in faults_of(running):
            with planted(fault, places):
                broken = (torch.cat(running.prompt_logprobs(asked)) - expected).abs()
            print(f"  {fault.__name__}: p50 {broken.median():.1e} p90 {broken.quantile(0.9):.1e}")
            assert not within(broken, LIMITS["auto"]), f"{fault.__name__} was not noticed"


def test_fp8_ds_mla(folders):
    """The 656-byte rows of DeepSeek-V3.2; Light's latents do not fit them, and that is refused."""
    folder = folders["groups"]
    with engine(folder, kv_cache_dtype="fp8_ds_mla") as running:
        difference = differences(running, Oracle(folder, "fp8_ds_mla"), prompts(config_of(folder)))
        assert within(difference, LIMITS["fp8_ds_mla"]), (difference.median(), difference.quantile(0.9))
    with pytest.raises(ValueError, match="fp8 is refused: .*this model has 128 and 32"):
        engine_config(folders["no_groups"], kv_cache_dtype="fp8")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bfloat16(name, tmp_path):
    """Files and model in bfloat16 against float32."""
    write_random(tmp_path, family="axk2", dtype="bfloat16", **CHECKPOINTS[name] | {"num_hidden_layers": 2})
    with engine(tmp_path, dtype="bfloat16") as running:
        difference = differences(running, Oracle(tmp_path), prompts(config_of(tmp_path)))
        print(f"A.X-K2 bfloat16 {name}: p50 {difference.median():.1e} p90 {difference.quantile(0.9):.1e}")
        assert within(difference, BFLOAT16_LOGPROBS), (difference.median(), difference.quantile(0.9))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_block_scaled_fp8(name, tmp_path):
    """Scale blocks of q_b_proj cross from queries to gates and from head to head."""
    write_random(tmp_path / "fp8", family="axk2", fp8=True, **CHECKPOINTS[name])
    config = config_of(tmp_path / "fp8")
    del config["quantization_config"]
    plain = rewrite(tmp_path / "fp8", tmp_path / "plain", all_dequantised, config)
    with unloaded(plain) as (model, vllm_config):
        expected = load(model, vllm_config)
    with unloaded(tmp_path / "fp8") as (model, vllm_config):
        found = load(model, vllm_config)
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# Routing


def routers(experts: int, groups: int, chosen: int, top_k: int, bias: torch.Tensor):
    """transformers' router, and ours with its parameters."""
    config = AXK2Config(
        hidden_size=32, n_routed_experts=experts, n_group=groups, topk_group=chosen, num_experts_per_tok=top_k
    )
    theirs = AXK2TopkRouter(config)
    torch.nn.init.normal_(theirs.weight, generator=torch.Generator().manual_seed(experts))
    theirs.e_score_correction_bias.copy_(bias)
    gate = SimpleNamespace(e_score_correction_bias=bias)
    return theirs, SimpleNamespace(groups=groups, chosen_groups=chosen, gate=gate)


@pytest.mark.parametrize("shift", [0.0, -0.5, -2.0])
@pytest.mark.parametrize("experts, groups, chosen, top_k", [(16, 4, 2, 4), (256, 8, 4, 8), (12, 3, 1, 6), (8, 2, 2, 3)])
def test_routing_is_that_of_transformers(experts, groups, chosen, top_k, shift):
    """shift -2: every biased score is negative, so that all experts come from groups that are not chosen.
    (12, 3, 1, 6): the chosen group has fewer experts than are picked."""
    generator = torch.Generator().manual_seed(experts)
    bias = shift + 0.1 * torch.randn(experts, generator=generator)
    theirs, moe = routers(experts, groups, chosen, top_k, bias)
    grouped = theirs.apply_group_scoring
    theirs.apply_group_scoring = lambda scores: smaller_first(grouped(scores))
    hidden = torch.randn(64, 32, generator=generator)
    logits, weights, indices = theirs(hidden)
    found, picked = GroupedMoE.route(moe, hidden, logits, top_k, renormalize=True)
    order = indices.sort(dim=-1)
    assert torch.equal(picked.long().sort(dim=-1).values, order.values)
    expected = weights.gather(1, order.indices) / theirs.routed_scaling_factor
    ours = found.gather(1, picked.long().argsort(dim=-1))
    assert (ours - expected).abs().max() < 1e-6
    assert found.dtype == torch.float32 and picked.dtype == torch.int32
    if shift == -2.0 and chosen < groups:
        inside = logits.sigmoid().add(bias).unflatten(-1, (groups, -1)).topk(2).values.sum(-1).topk(chosen).indices
        assert not (picked.unsqueeze(-1) // (experts // groups) == inside.unsqueeze(1)).any()


def test_a_row_is_routed_alike_in_any_company():
    bias = -0.5 + 0.2 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    theirs, moe = routers(256, 8, 4, 8, bias)
    logits = theirs(torch.randn(300, 32, generator=torch.Generator().manual_seed(2)))[0]
    whole = GroupedMoE.route(moe, logits, logits, 8, True)
    for rows in (slice(0, 1), slice(7, 50), slice(299, 300)):
        alone = GroupedMoE.route(moe, logits, logits[rows], 8, True)
        assert all(torch.equal(x[rows], y) for x, y in zip(whole, alone, strict=True))


# Names and shapes


@pytest.mark.parametrize("sizes", [LIGHT, LARGE])
def test_names_and_shapes_are_those_of_transformers(sizes):
    """At the published sizes, of an empty model; the published weights themselves were not loaded."""
    config = AXK2Config(**sizes)
    with torch.device("meta"):
        model = AXK2ForCausalLM(config)
    published = revert_weight_conversion(model, model.state_dict())
    expected = Expected.from_hf(config)
    assert expected.model == {name: tuple(tensor.shape) for name, tensor in published.items()}
    assert expected.optional == expected.draft == {}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tiny_checkpoints_have_these_names_too(name):
    overrides = {key: value for key, value in CHECKPOINTS[name].items() if key != "seed"}
    config = make_config(family="axk2", **overrides)
    assert tensor_shapes(config) == Expected.from_hf(config).model


def test_a_missing_and_a_misshapen_tensor_are_refused_by_name(folders, tmp_path):
    gate = "model.layers.1.post_attention_layernorm.W_up.weight"
    fused = "model.layers.2.self_attn.q_b_proj.weight"
    for change, message in (
        (lambda t: {k: v for k, v in t.items() if k != gate}, f"lacks 1 of .* layers 1: {gate}"),
        (lambda t: t | {fused: t[fused][:, : t[fused].shape[1] // 2].contiguous()}, rf"{fused} has shape \(\d+, 64\)"),
    ):
        folder = rewrite(folders["groups"], tmp_path / str(len(message)), change, config_of(folders["groups"]))
        with pytest.raises(ValueError, match=message):
            engine_config(folder)


# Config


def facts(**keys) -> DSAConfig:
    return DSAConfig.from_hf(make_config(family="axk2") | keys)


def test_facts():
    config = facts()
    assert config.output_gate and config.gated_norm_rank == 16 and not config.index_rope_interleaved
    assert (config.q_b_inputs, config.q_b_head_dim) == (128, 192 + 128)
    assert config.dense_mlp == (True, False, False) and not config.is_dense(3)
    saved = AXK2Config(first_k_dense_replace=2, num_hidden_layers=4)  # what a config saved by transformers holds
    assert DSAConfig.from_hf(saved).dense_mlp == (True, True, False, False)
    assert DSAConfig.from_hf(saved.to_dict()) == DSAConfig.from_hf(saved)
    others = DSAConfig.from_hf(make_config())
    assert (others.q_b_inputs, others.q_b_head_dim, others.gated_norm_rank) == (64, 192, 0)
    assert facts(num_nextn_predict_layers=1).mtp_layers == 0


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"attention_output_gate": False}, "attention_output_gate: False is refused.*has True.*Restore"),
        ({"attn_gate_fused": False}, "attn_gate_fused: False is refused"),
        ({"gated_norm": False}, "gated_norm: False is refused"),
        ({"attention_bias": True}, "attention_bias: True is refused.*has False"),
        ({"gated_norm_rank": 0}, "gated_norm_rank: 0 is refused"),
        ({"gated_norm_rank": None}, "gated_norm_rank: None is refused"),
        ({"layer_types": ["indexed_attention", "full_attention"]}, "layer_types: 'full_attention' is refused"),
        ({"first_k_dense_replace": None, "mlp_layer_types": ["dense", "moe", "moe"]}, "mlp_layer_types: .*'moe'"),
        ({"first_k_dense_replace": None, "mlp_layer_types": ["dense"]}, "for each of the 3 layers"),
        ({"n_group": 3, "topk_group": 1}, "n_group: 3 with topk_group: 1 and n_routed_experts: 8 is refused"),
        ({"n_group": 8, "topk_group": 2}, "two or more in each"),
        ({"n_group": 2, "topk_group": 3}, "topk_group: 3"),
        ({"n_group": 2, "topk_group": None}, "topk_group: None is refused"),
        ({"n_group": None, "topk_group": 2}, "n_group: None is refused"),
        ({"indexer_rope_interleave": True}, "the indexer of axk2 has non-interleaved RoPE"),
    ],
)
def test_refused_by_key_and_value(keys, message):
    with pytest.raises(ConfigError, match=message):
        facts(**keys)


def test_refused_when_the_engine_is_configured(folders):
    for override, message in (
        ({"gated_norm": False}, "gated_norm: False is refused"),
        ({"scoring_func": "softmax"}, "scoring_func: 'softmax' is refused"),
    ):
        with pytest.raises(ValueError, match=message):
            engine_config(folders["groups"], hf_overrides=override)
    with pytest.raises(NotImplementedError, match="Unsupported speculative method: 'mtp'"):
        engine_config(folders["groups"], speculative_config={"method": "mtp", "num_speculative_tokens": 1})


@pytest.mark.parametrize("asked", ["0", None])
def test_vllm_treats_it_as_deepseek_v32(folders, asked, monkeypatch):
    """The graph default hangs on names that vLLM knows; a user's own setting stands."""
    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH", raising=False)
    if asked:
        monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", asked)
    config = engine_config(folders["groups"], block_size=48, max_num_batched_tokens=64)
    assert os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] == (asked or "1")
    assert config.compilation_config.mode.name == "NONE" or asked
    arch = config.model_config.model_arch_config
    assert (arch.is_deepseek_mla, arch.head_size) == (False, 576)  # a CPU keeps its paged features
    assert config.cache_config.block_size == 48 and config.scheduler_config.enable_chunked_prefill
    assert config.cache_config.enable_prefix_caching
    bfloat16 = engine_config(folders["groups"], dtype="bfloat16", kv_cache_dtype="bfloat16")
    assert bfloat16.cache_config.cache_dtype == "auto"
    platform.treat_as_v32(config)
    assert (arch.is_deepseek_mla, config.model_config.get_num_kv_heads(config.parallel_config)) == (True, 1)


# The planted checkpoint


@pytest.fixture(scope="module")
def planted_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted")
    assert write_planted(path, family="axk2") > 10
    return path


def test_planted_answers_are_right_in_any_company_and_wrong_under_a_fault(planted_folder):
    asked = questions((300, 1500))
    right = [answer for _, answer in asked]
    with engine(planted_folder, max_num_batched_tokens=256) as running:
        batched = answers(running, asked)
        assert [words(tokens) for tokens in batched] == right
        assert any(len(step) > 1 for step in running.steps), "not batched"
        for question, expected in zip(asked, batched, strict=True):
            assert running.llm.reset_prefix_cache()
            assert answers(running, [question]) == [expected]
        for fault in (gate_dropped, rope_swapped, dense):
            assert running.llm.reset_prefix_cache()
            with planted(fault, running.layers):
                wrong = [words(tokens) for tokens in answers(running, asked)]
            assert not any(given == answer for given, answer in zip(wrong, right, strict=True)), (fault, wrong)


def test_planted_answers_are_right_in_fp8(tmp_path):
    assert write_planted(tmp_path, family="axk2", fp8=True, n_group=2, topk_group=1) > 10
    asked = questions((300, 1500))
    with engine(tmp_path, max_num_batched_tokens=512, kv_cache_dtype="fp8_ds_mla", dtype="bfloat16") as running:
        assert [words(tokens) for tokens in answers(running, asked)] == [answer for _, answer in asked]


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}<｜User｜>{{ message.content }}"
    "<｜Assistant｜></think>{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.slow  # a server start; test_serve.py has the default one
@pytest.mark.serve
def test_served_chat_answers_right(planted_folder):
    """As a user starts it: the chat template is a file of the checkpoint, and nothing names this package."""
    (planted_folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    options = ["--dtype", "float32", "--max-model-len", "4096", "--enforce-eager", "--served-model-name", "planted"]
    with serve(planted_folder, *options, env={"VLLM_DSA_REQUIRED": "1"}) as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120)
        for length in (300, 3000):
            prompt = build_prompt(length, seed=length, chat=True, hops=2)
            messages = [{"role": "user", "content": prompt.text}]
            reply = client.chat.completions.create(model="planted", messages=messages, temperature=0, max_tokens=8)
            assert reply.choices[0].message.content.split() == prompt.answer.split()
            assert (reply.choices[0].finish_reason, reply.usage.prompt_tokens) == ("stop", length)


# On a GPU


@pytest.mark.gpu
@pytest.mark.own_process
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bfloat16_through_triton(name, graphs, tmp_path, monkeypatch):
    """Log-probabilities as on the CPU, with CUDA graphs and without."""
    monkeypatch.setenv("VLLM_DSA_PROVIDER", "triton")
    write_random(tmp_path, family="axk2", dtype="bfloat16", **CHECKPOINTS[name] | {"num_hidden_layers": 2})
    options = dict(dtype="bfloat16", block_size=64, kv_cache_memory_bytes=1 << 30, enforce_eager=not graphs)
    options |= dict(gpu_memory_utilization=0.1)  # others may use this GPU as well
    with engine(tmp_path, **options) as running:
        assert "attend: triton" in running.layers[0].kernels.summary
        difference = differences(running, Oracle(tmp_path), prompts(config_of(tmp_path)))
        print(f"A.X-K2 on a GPU, {name}: p50 {difference.median():.1e} p90 {difference.quantile(0.9):.1e}")
        assert within(difference, BFLOAT16_LOGPROBS), (difference.median(), difference.quantile(0.9))
