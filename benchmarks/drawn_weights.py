"""Weights and routing that are drawn, for stock vLLM and for this plugin alike: a plugin of vLLM's, for benchmarks.

vLLM's own dummy weights differ where two sides hold a weight in other parameters, and are so small that every token is
as likely as any other. Here both sides are given the same checkpoint, as if it were read from files: published names,
FP8 with scales where the published model has them, values of a size that keeps the hidden states' size. So their
log-probabilities can be compared. ``--load-format drawn``.

Which experts a token gets hangs on its row in the batch alone, drawn once: a step spreads over experts as independent
tokens would, and both sides use the same experts. VLLM_MOE_ROUTING_SIMULATION_STRATEGY=drawn. A simulated router knows
nothing of routed_scaling_factor, with which stock vLLM 0.33 multiplies the experts' weights there, while this plugin
multiplies the experts' output: DRAWN_EXPERT_SCALE brings it back.

vLLM finds a plugin by its entry point: ``install`` writes one into a folder, which must be on PYTHONPATH.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

NAME = "drawn"
ROWS = 1 << 15  # of a step, at most
SPREAD = 1 << 20  # places in the pool of values at which a weight may begin
STEP = 64.0  # standard deviation of e4m3 codes: their largest is 448


def install(folder: Path, expert_scale: float) -> dict[str, str]:
    """Variables under which vLLM finds this plugin; its entry point is written into ``folder``."""
    entry = folder / f"{NAME}_weights-0.dist-info"
    entry.mkdir(parents=True, exist_ok=True)
    (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}-weights\nVersion: 0\n")
    (entry / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{NAME} = {__name__}:register\n")
    paths = [str(folder.resolve()), str(Path(__file__).parent.resolve()), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": NAME,
        "DRAWN_EXPERT_SCALE": str(expert_scale),
    }


def register() -> None:
    """Make load format and routing known to vLLM. Idempotent."""
    from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import RoutingSimulator, RoutingStrategy
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    if NAME in RoutingSimulator.get_available_strategies():
        return

    scale = float(os.environ["DRAWN_EXPERT_SCALE"])

    class ByRow(RoutingStrategy):
        table: torch.Tensor | None = None

        def route_tokens(
            self,
            hidden_states: torch.Tensor,
            router_logits: torch.Tensor,
            top_k: int,
            indices_type: torch.dtype | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if self.table is None:  # in vLLM's profile run, before any graph is captured
                table = draw_experts(router_logits.shape[-1], top_k)
                self.table = table.to(hidden_states.device, indices_type or torch.int32)
            experts = self.table[: len(hidden_states)]
            return torch.full(experts.shape, scale / top_k, dtype=torch.float32, device=experts.device), experts

    RoutingSimulator.register_strategy(NAME, ByRow())

    @register_model_loader(NAME)
    class DrawnLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            device = next(model.parameters()).device
            # The file and not hf_config, which vLLM rewrites: model types of its own for this family and its drafts.
            config = json.loads((Path(model_config.model) / "config.json").read_text())
            model.load_weights(draw(config, device))


def draw_experts(experts: int, top_k: int, rows: int = ROWS) -> torch.Tensor:
    """Experts [rows, top_k] of each row of a step: different ones, each as likely."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, experts, generator=generator).topk(top_k, dim=-1).indices


def experts_hit(experts: int, top_k: int, rows: int) -> int:
    """How many experts a step of so many rows uses."""
    return draw_experts(experts, top_k)[:rows].unique().numel()


def draw(config: dict[str, Any], device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint of this config, in block-scaled FP8 where the config says so.

    A weight is a part of one pool of normal values, begun at a place that its name gives: nothing is drawn twice, and
    no two weights are alike. Linear layers keep the size of what they read, and what is added to the stream of hidden
    states is half as large, so that the stream does not forget its token.
    """
    from vllm_dsa.checkpoint import MTP_COPIES, Expected
    from vllm_dsa.tools.memory import LINEAR

    expected = Expected.from_hf(config)
    assert expected is not None
    shapes = expected.model | expected.draft | expected.optional
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    generator = torch.Generator(device).manual_seed(0)
    normal = torch.randn(largest + SPREAD, generator=generator, device=device)
    codes = (normal * STEP).clamp(-448, 448).to(torch.float8_e4m3fn)
    plain = normal.to(torch.bfloat16)
    del normal
    for name, shape in shapes.items():
        if any(copy in name for copy in MTP_COPIES):
            source = "lm_head.weight" if ".head." in name else "model.embed_tokens.weight"
        else:
            source = name
        size = torch.Size(shape).numel()
        begin = zlib.crc32(source.encode()) % SPREAD
        if len(shape) == 1:
            kind = torch.float32 if name.endswith("e_score_correction_bias") or ".k_norm." in name else torch.bfloat16
            zero = name.endswith("bias")
            yield (
                name,
                torch.zeros(shape, dtype=kind, device=device) if zero else torch.ones(shape, dtype=kind, device=device),
            )
            continue
        deviation = 1.0 if "embed_tokens" in name else shape[1] ** -0.5
        if ".o_proj." in name or ".down_proj." in name:
            deviation /= 2
        if expected.block and LINEAR.search(name):
            yield name, codes[begin : begin + size].view(shape)
            blocks = expected.shape(f"{name}_scale_inv")
            assert blocks is not None
            yield f"{name}_scale_inv", torch.full(blocks, deviation / STEP, dtype=torch.float32, device=device)
        else:
            yield name, plain[begin : begin + size].view(shape) * deviation
