"""benchmarks/rank.py, as far as it needs no GPU: what it draws, how it reads a trace, and when it prints a ratio."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def tiny() -> dict:
    config = json.loads((BENCHMARKS / "v32" / "config.json").read_text())
    config |= dict(num_hidden_layers=2, first_k_dense_replace=1, hidden_size=256, q_lora_rank=128, n_routed_experts=4)
    config |= dict(num_experts_per_tok=2, n_group=2, topk_group=1, vocab_size=300)
    return config | dict(num_attention_heads=2, moe_intermediate_size=128, intermediate_size=128)


def test_drawn_weights_are_a_whole_checkpoint():
    from drawn_weights import draw

    from vllm_dsa.checkpoint import Expected, checked

    config = tiny()
    expected = Expected.from_hf(config)
    required = [*expected.model, *expected.draft]
    tensors = dict(checked(draw(config, torch.device("cpu")), expected, required))
    # Linear layers keep the size of their input; no two weights are alike.
    weight = tensors["model.layers.1.mlp.experts.3.up_proj.weight"].float()
    scale = tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"][0, 0]
    assert (weight * scale).std() == pytest.approx(256**-0.5, rel=0.05)
    assert not torch.equal(weight, tensors["model.layers.1.mlp.experts.2.up_proj.weight"].float())
    copy = tensors["model.layers.2.shared_head.head.weight"]
    assert torch.equal(copy, tensors["lm_head.weight"])
    again = dict(draw(config, torch.device("cpu")))
    assert all(torch.equal(a.view(torch.uint8), again[name].view(torch.uint8)) for name, a in tensors.items())


def test_experts_are_hit_as_independent_tokens_would():
    from drawn_weights import draw_experts, experts_hit

    table = draw_experts(256, 8, 4096)
    assert all(len(set(row)) == 8 for row in table.tolist())
    counts = table.flatten().bincount(minlength=256)
    assert counts.min() > 80 and counts.max() < 180  # 128 each on average
    assert experts_hit(256, 8, 1) == 8
    for rows in (16, 64):  # of n tokens, each expert is missed by all with probability (1 - 8/256)^n
        assert experts_hit(256, 8, rows) == pytest.approx(256 * (1 - (1 - 8 / 256) ** rows), rel=0.06)


def test_a_rank_holds_its_share():
    from argparse import Namespace

    from rank import rank_config

    published = BENCHMARKS / "v32" / "config.json"
    tensor = rank_config(Namespace(published=published, tp=8, ep=1, config="{}"))
    asked = ("num_attention_heads", "moe_intermediate_size", "intermediate_size", "vocab_size", "n_routed_experts")
    assert [tensor[key] for key in asked] == [16, 256, 2304, 16160, 256]
    experts = rank_config(Namespace(published=published, tp=1, ep=8, config="{}"))
    assert [experts[key] for key in asked] == [128, 2048, 18432, 129280, 32]
    with pytest.raises(SystemExit, match="num_attention_heads 128 is not shared by 7 ranks"):
        rank_config(Namespace(published=published, tp=7, ep=1, config="{}"))


def events(layers: int, steps: int) -> list[dict]:
    """Two kernels a layer, the second half beside the first, one a step, and a pause of 10 us between steps."""
    found, now = [], 0.0
    for _ in range(steps):
        for _ in range(layers):
            found.append({"name": "sm90_fp8_gemm_1d2d", "ts": now, "dur": 4.0})
            found.append({"name": "_attend_kernel", "ts": now + 2, "dur": 4.0})
            now += 6
        found.append({"name": "argmax", "ts": now, "dur": 1.0})
        now += 11
    return found


def test_a_trace_is_read_by_step():
    from rank import kernels

    found = kernels(events(layers=61, steps=8), 61)
    assert found["steps"] == 8
    assert found["wall_ms"] == pytest.approx((8 * (61 * 6 + 11) - 10) / 8e3, abs=1e-3)
    assert found["busy_ms"] == pytest.approx((61 * 6 + 1) / 1e3)
    assert found["parts_ms"] == {"linear layers": 0.244, "attend": 0.244, "the rest": 0.001}


def row(who: str, **values) -> dict:
    facts = {"date": "2026-11-28 15:00", "machine": "NVIDIA H200, 580, GPU-1", "cache": "fp8_ds_mla", "layers": 61}
    return facts | {"what": "times", "who": who, "rank": {"tp": 8, "ep": 1, "heads": 16}} | values


def agreement(apart: float) -> dict:
    return {"within": {"p50": apart, "p90": 2 * apart, "max": 1.0, "unrelated": 1.0}}


def test_no_ratio_without_agreement_and_across_days():
    from rank import table

    sides = [row("stock", prefill_4096_ms=[420.0, 422.0]), row("plugin", prefill_4096_ms=[210.0, 212.0])]
    right = [sides[0], sides[1] | {"agreement": agreement(0.01)}]
    assert any("2.00x" in line and "spread 0.9%" in line for line in table(right))
    assert any("log-probabilities within index_topk: p50 1.0e-02" in line for line in table(right))
    for wrong in (
        sides,  # never compared
        [sides[0], sides[1] | {"agreement": agreement(0.2)}],  # compared, and apart
        [sides[0], right[1] | {"date": "2026-11-29 01:00"}],
    ):
        assert not any("2.00x" in line for line in table(wrong))


def test_what_two_sides_differ_by():
    from rank import differences

    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(2000, generator=generator)
    near = differences(ours.tolist(), (ours + 0.01 * torch.randn(2000, generator=generator)).tolist())
    # The median of |a - b| of two normal values is 0.954.
    assert near["p50"] == pytest.approx(0.0067, rel=0.1) and near["unrelated"] == pytest.approx(0.954, rel=0.1)
    other = differences(ours.tolist(), torch.randn(2000, generator=generator).tolist())
    assert other["p50"] == pytest.approx(0.954, rel=0.1)
