"""Ranks of one model must agree on what they compute and on what their caches hold: asked once, before weights load."""

from collections.abc import Mapping
from datetime import timedelta

import torch

from vllm_dsa.compat import get_world_group
from vllm_dsa.config import ConfigError

ARRIVAL_SECONDS = 120.0  # from the first rank's model to the last one's; weights load later


def require_agreement(facts: Mapping[str, str], seconds: float = ARRIVAL_SECONDS) -> None:
    """Stop the start, on every rank, if ``facts`` (name -> value) are not the same on all.

    Raises ConfigError where they differ, RuntimeError after ``seconds`` where a rank does not come: one that serves the
    model without this package never will.
    """
    world = get_world_group()
    if world.world_size == 1:
        return
    # Without this, ranks would wait for the one that does not come as long as vLLM's groups do, half an hour.
    if torch.distributed.get_backend(world.cpu_group) == "gloo":
        try:
            torch.distributed.monitored_barrier(
                world.cpu_group, timeout=timedelta(seconds=seconds), wait_all_ranks=True
            )
        except RuntimeError as error:
            raise RuntimeError(
                f"not every rank of this model has come to compare its vllm-dsa within {seconds:g} s: {error} Install "
                f"the same vllm-dsa on every node, with the same VLLM_DSA_* and VLLM_PLUGINS, and see the log of the "
                f"rank that is named."
            ) from error
    found: list[Mapping[str, str]] = [{}] * world.world_size
    torch.distributed.all_gather_object(found, dict(facts), group=world.cpu_group)
    for rank, other in enumerate(found):
        for name in {**found[0], **other}:
            if found[0].get(name) != other.get(name):
                raise ConfigError(
                    f"rank {rank} has {name} {other.get(name)}, rank 0 has {found[0].get(name)}. Install the same "
                    f"vllm-dsa and vLLM on every node, on GPUs of one kind, with the same VLLM_DSA_* variables."
                )
