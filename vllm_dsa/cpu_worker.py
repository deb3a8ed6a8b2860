"""vLLM's worker on a CPU, without three of its faults: seeds on a prompt in chunks, what clients ask of drafts, top_k.

vLLM's config names the class of its worker, and platform.py names this one. Nothing here concerns DSA: the faults are
vLLM's own in 0.32 and 0.33, with any model, and two of the three end the engine.
"""

from typing import Any

import torch

from vllm_dsa import compat
from vllm_dsa.compat import CPUWorker, RejectionSampler


class DSACPUWorker(CPUWorker):
    """The worker that a DSA model gets on a CPU."""

    def init_device(self) -> None:
        super().init_device()
        if self.vllm_config.speculative_config is None or self.use_v2_model_runner:
            return
        if not compat.has_triton():
            compat.register_draft_kernels(expand, reject)
        runner = self.model_runner
        if hasattr(runner, "rejection_sampler"):  # the last pipeline stage has one
            runner.rejection_sampler = DraftSampler(runner.sampler, runner.speculative_config, runner.device)

    def sample_tokens(self, grammar_output: Any) -> Any:
        if not self.use_v2_model_runner:
            keep_seeds(self.model_runner)
        return super().sample_tokens(grammar_output)


class SeededGenerator(torch.Generator):
    """A generator that goes back to where it was.

    What is sampled after a part of a prompt is thrown away, and vLLM then takes the seeded generator four numbers back,
    as CUDA's are: "RuntimeError: CPU Generator does not support set_offset" ends the engine.
    """

    kept: torch.Tensor

    def keep(self) -> None:
        self.kept = self.get_state()

    def get_offset(self) -> int:
        return 0  # of a CPU's generator there is none

    def set_offset(self, offset: int) -> None:
        self.set_state(self.kept)


def keep_seeds(runner: Any) -> None:
    """Before it samples: every seeded generator whose sample will be thrown away can go back."""
    batch = runner.input_batch
    for index, generator in list(batch.generators.items()):
        if index < batch.num_reqs and runner.discard_request_mask.np[index]:
            if not isinstance(generator, SeededGenerator):
                state, generator = generator.get_state(), SeededGenerator()
                generator.set_state(state)
                batch.generators[index] = runner.requests[batch.req_ids[index]].generator = generator
            generator.keep()


class DraftSampler(RejectionSampler):
    """Samples plainly where no request of a batch has a draft, as after a prompt.

    vLLM would take the top-k of no rows: "RuntimeError: max(): Expected reduction dim" ends the engine.
    """

    def forward(self, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        if not any(metadata.num_draft_tokens):
            return self.sampler(logits=logits, sampling_metadata=sampling_metadata)
        return super().forward(metadata, draft_probs, logits, sampling_metadata)


def expand(
    output: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    replace_from: int,
    replace_to: int,
    MAX_NUM_TOKENS: int = 0,
) -> None:
    """Into output [tokens] for each request its value of values [requests], as often as it has tokens; ends [requests]
    are their running sum. vLLM's stand-in for this kernel fills a copy of the output, and takes 0.7 for 0."""
    tokens = ends.diff(prepend=ends.new_zeros(1))
    output.copy_(values.where(values != replace_from, replace_to).repeat_interleave(tokens))


def reject(
    output: torch.Tensor,
    ends: torch.Tensor,
    drafts: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus: torch.Tensor,
    recovered: torch.Tensor,
    uniform: torch.Tensor,
    *rest: Any,
) -> None:
    """Into output [requests, drafts + 1] what rejection sampling leaves of drafts [tokens]. -1 is no draft, where a
    grammar has cut it, and is always rejected: vLLM's stand-in for this kernel reads the probability before the first
    row for it."""
    none = drafts < 0
    compat.reject_drafts_on_cpu(
        output,
        ends,
        drafts.masked_fill(none, 0),
        draft_probs,
        target_probs,
        bonus,
        recovered,
        uniform.masked_fill(none, torch.inf),
        *rest,
    )
