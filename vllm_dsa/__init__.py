"""DeepSeek Sparse Attention for vLLM, on every machine. vLLM calls ``register()`` once in each of its processes.

Nothing but the standard library is imported here: vLLM reads this module before it has chosen a device, and set-up
tools read the version from it.
"""

from collections.abc import Callable

__version__ = "0.1.0"

# vLLM's name of a model class -> ours, as text, so that registering loads neither. The names are vLLM's own because its
# MTP mapping, tokenizer mode and CUDA-graph defaults hang on them. vLLM does not know AXK2ForCausalLM: what that needs
# of these, platform.py supplies.
MODELS = {
    "DeepseekV32ForCausalLM": "vllm_dsa.models.deepseek_v32:DeepseekV32ForCausalLM",
    "GlmMoeDsaForCausalLM": "vllm_dsa.models.deepseek_v32:DeepseekV32ForCausalLM",
    "AXK2ForCausalLM": "vllm_dsa.models.axk2:AXK2ForCausalLM",
    "DeepseekV32MTPModel": "vllm_dsa.models.mtp:DeepseekV32MTP",
}
BACKEND_NAME = "DSA"
BACKEND = "vllm_dsa.backend.DSABackend"


def register() -> None:
    """Make vLLM serve the models above with this package. May be called any number of times.

    Changes nothing where VLLM_DSA_DISABLE=1 or where vLLM's version is not one this package was written for; with
    VLLM_DSA_REQUIRED=1 either is a RuntimeError.
    """
    from vllm_dsa import compat, envs

    logger = compat.init_logger("vllm.vllm_dsa")
    if envs.VLLM_DSA_DISABLE:
        # Else --fail-on-environ-validation would refuse to start over this very variable.
        compat.environment_variables.update(envs.TABLE)
        _decline(logger.info_once, "VLLM_DSA_DISABLE=1 is set. Unset it to serve DSA models with vllm-dsa.")
        return
    version = compat.vllm_version()
    if not compat.is_supported(version):
        _decline(
            logger.warning_once,
            f"vLLM {version} is installed, vllm-dsa {__version__} supports {' and '.join(compat.SUPPORTED)}. "
            f"Install one of these, or set VLLM_DSA_DISABLE=1 to go on with stock vLLM.",
        )
        return
    compat.environment_variables.update(envs.TABLE)
    for architecture, model in MODELS.items():
        compat.ModelRegistry.register_model(architecture, model)
    # A name is taken by its first registration; after that the member it created is the key.
    member = compat.AttentionBackendEnum.__members__.get(BACKEND_NAME, BACKEND_NAME)
    compat.register_backend(member, BACKEND)

    from vllm_dsa import fp8_weights, platform

    platform.install()
    fp8_weights.register()
    logger.info_once("vllm-dsa %s serves %s.", __version__, ", ".join(MODELS))


def _decline(log: Callable[[str, str], None], reason: str) -> None:
    from vllm_dsa import envs

    if envs.VLLM_DSA_REQUIRED:
        raise RuntimeError(f"VLLM_DSA_REQUIRED=1, but vllm-dsa would not serve: {reason}")
    log("vllm-dsa leaves vLLM as it is: %s", reason)
