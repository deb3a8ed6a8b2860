"""An in-process vLLM engine for the whole-model proofs, and what they ask of it."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_dsa.testing.server import HOST, free_port

DEFAULTS = dict(
    dtype="float32",
    enforce_eager=True,
    max_model_len=4096,
    max_num_batched_tokens=64,
    max_num_seqs=8,
    block_size=16,
    disable_log_stats=True,
    kernel_config={"enable_flashinfer_autotune": False},  # on a GPU ten seconds of a start
)


class Engine:
    """vLLM on one checkpoint; ``steps`` lists the tokens that the scheduler gave each request, step by step."""

    def __init__(self, path: str | Path, **options: Any) -> None:
        self.llm = LLM(model=str(path), **{**DEFAULTS, **options})
        self.steps: list[dict[str, int]] = []
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        schedule = self.scheduler.schedule

        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.steps.append(dict(output.num_scheduled_tokens))
            return output

        self.scheduler.schedule = recorded

    @property
    def model(self) -> torch.nn.Module:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The DSA attention layers."""
        return [layer.self_attn for layer in self.model.model.layers]

    def prompt_logprobs(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """Log-probability of every prompt token but the first, a tensor a prompt."""
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [
            torch.tensor([step[token].logprob for step, token in zip(o.prompt_logprobs[1:], p[1:], strict=True)])
            for o, p in zip(outputs, prompts, strict=True)
        ]

    def generate(self, prompts: list[list[int]], max_tokens: int, **params: Any) -> list[list[int]]:
        """Greedy tokens of each prompt."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, detokenize=False, **params)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]


@contextmanager
def engine(path: str | Path, **options: Any) -> Iterator[Engine]:
    """An engine that is gone, with its process groups, when the block ends."""
    running = Engine(path, **options)
    try:
        yield running
    finally:
        running.llm.llm_engine.engine_core.shutdown()
        del running
        gc.collect()
        cleanup_dist_env_and_memory()


@contextmanager
def unloaded(path: str | Path, **options: Any) -> Iterator[tuple[torch.nn.Module, VllmConfig]]:
    """The model that vLLM would load a checkpoint into, its parameters NaN (integers -1), and the config; no engine."""
    config = EngineArgs(model=str(path), **{**DEFAULTS, **options}).create_engine_config()
    try:
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            init_distributed_environment(1, 0, f"tcp://{HOST}:{free_port()}", 0, "gloo")
            initialize_model_parallel()
            model = initialize_model(vllm_config=config)
            for parameter in model.parameters():
                parameter.data.fill_(torch.nan if parameter.is_floating_point() else -1)
            yield model, config
    finally:
        cleanup_dist_env_and_memory()


def load(model: torch.nn.Module, config: VllmConfig) -> dict[str, torch.Tensor]:
    """Load the config's checkpoint with the loader that it names; returns the parameters."""
    get_model_loader(config.load_config).load_weights(model, config.model_config)
    return {name: parameter.data for name, parameter in model.named_parameters()}
