"""vllm_dsa_info on vLLM's /metrics: which version serves a model, with which caches and which kernels.

The gauge is set where an engine's config is checked: in the process of the API server, or in each of several, and for
models of this package only. It is no stat logger: while one is installed, vLLM gathers statistics of every model, its
own included, even under --disable-log-stats. The name has no "vllm:" before it, because vLLM unregisters all that do
when an engine starts.

The kernels are those of dispatch.survey() for the config's sizes on this machine, as the workers choose them; ranks
that chose others would have refused to start (models/ranks.py).
"""

import functools
from typing import Any

from vllm_dsa import __version__, cache
from vllm_dsa.backend import kernel_request
from vllm_dsa.config import DSAConfig
from vllm_dsa.kernels import OPS, dispatch

NAME = "vllm_dsa_info"
LABELS = ("model_name", "version", "cache", "latent_bytes", "index_bytes", "index_topk", *OPS)


def publish(vllm_config: Any, config: DSAConfig) -> None:
    """Set the gauge of the model of a checked config. May be called any number of times."""
    _gauge().labels(**labels(vllm_config, config)).set(1)


def labels(vllm_config: Any, config: DSAConfig) -> dict[str, str]:
    """The gauge's labels. cache: fp8_ds_mla or the rows' dtype; bytes of a token in a layer's two caches."""
    request = kernel_request(vllm_config, config)
    providers = dispatch.survey(request).providers
    fp8 = request.latent_kind == cache.FP8_DS_MLA
    return {
        "model_name": vllm_config.model_config.served_model_name,
        "version": __version__,
        "cache": request.latent_kind if fp8 else str(request.dtype).removeprefix("torch."),
        "latent_bytes": str(cache.FP8_DS_MLA_BYTES if fp8 else config.latent_dim * request.dtype.itemsize),
        "index_bytes": str(config.index_head_dim + cache.SCALE_BYTES),
        "index_topk": str(config.index_topk),
        **{op: providers[op].name if op in providers else "none" for op in OPS},
    }


@functools.cache
def _gauge() -> Any:
    from prometheus_client import Gauge

    # mostrecent: of several API servers, which all set the same, one is shown.
    text = "The vllm-dsa that serves a model: its version, its caches, the provider of each operation."
    return Gauge(NAME, text, LABELS, multiprocess_mode="mostrecent")
