"""What a load of the model means for its MTP draft: a reload reaches it, and copies that differ are named.

vLLM's `reload_weights` gives the model, and it alone, what it reads. The draft takes embedding and head from the model,
and ignores the copies that its layer has of them.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from vllm_dsa.checkpoint import MTP_COPIES
from vllm_dsa.compat import init_logger, mtp_layer_of_weight

logger = init_logger("vllm.vllm_dsa.drafts")
ORIGINALS = dict(zip(MTP_COPIES, ("model.embed_tokens.weight", "lm_head.weight"), strict=True))
SAMPLED_ROWS = 128  # of a vocabulary; training that goes on changes nearly all
drafts: weakref.WeakSet[Any] = weakref.WeakSet()  # of this process


class DraftWatch:
    """Sees every tensor that a model with an MTP draft is given to load, and then brings the draft up to date."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.draft = next((draft for draft in drafts if draft.is_draft_of(model)), None)
        self.tensors: dict[str, torch.Tensor] = {}  # the draft's, once there is one
        self.samples: dict[str, torch.Tensor] = {}

    def watched(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self._see(name, tensor)
            yield name, tensor

    def _see(self, name: str, tensor: torch.Tensor) -> None:
        of_draft = mtp_layer_of_weight(self.config, name) is not None
        copied = of_draft and any(copy in name for copy in MTP_COPIES)
        if copied or name in ORIGINALS.values():
            count = min(SAMPLED_ROWS, len(tensor))
            # In integers: models load under the default dtype bfloat16, which has no 703.
            rows = torch.arange(count, device=tensor.device) * (len(tensor) - 1) // max(1, count - 1)
            self.samples[name] = tensor[rows].to("cpu", torch.float32)
        elif of_draft and self.draft is not None:
            self.tensors[name] = tensor

    def finish(self) -> None:
        """After the model has loaded what it was given."""
        for name, rows in self.samples.items():
            for copy, original in ORIGINALS.items():
                theirs = self.samples.get(original)
                if copy in name and theirs is not None and not torch.equal(rows, theirs):
                    logger.warning_once(
                        "%s differs from %s and is not used: vLLM gives the MTP draft the model's own. Answers are "
                        "right, but fewer drafts may be accepted. Where that matters, leave --speculative-config out.",
                        name,
                        original,
                    )
        if self.draft is None:
            return
        missing = self.draft.stored_names - set(self.tensors)
        if missing or not self.tensors:
            logger.warning_once(
                "These weights lack %d of %d tensors of the MTP layer, so its draft stays on those it has: answers are "
                "right, but fewer drafts will be accepted. Load all of them at once, as reload_weights does from a "
                "folder that has them, or restart.",
                len(missing),
                len(self.draft.stored_names),
            )
        else:
            self.draft.reload(self.tensors.items())
