"""DeepSeek-V3.2-Exp, V3.2, V3.2-Speciale, DeepSeekMath-V2 and GLM-5.x: the decoder stack and the checkpoint's names.

Everything but attention is vLLM's: embedding, norms, MLP, mixture of experts, head.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn

from vllm_dsa import __version__, envs
from vllm_dsa.attention import DSAAttention, new_selection
from vllm_dsa.checkpoint import EMBEDDING, EXPERTS, FUSED, HEAD, Expected, checked, other_names, split_experts
from vllm_dsa.checkpoint_files import CheckpointError
from vllm_dsa.compat import (
    DeepseekV2MLP,
    DeepseekV2MoE,
    IntermediateTensors,
    LogitsProcessor,
    ParallelLMHead,
    PPMissingLayer,
    RMSNorm,
    SupportsPP,
    VocabParallelEmbedding,
    ask_for_amx,
    default_weight_loader,
    expert_params_mapping,
    get_pp_group,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
    mtp_layer_of_weight,
    repack_experts,
    vllm_version,
)
from vllm_dsa.config import DSAConfig
from vllm_dsa.fp8_weights import DequantisedFp8Config, fitted, with_plain_fp8
from vllm_dsa.models.draft_weights import DraftWatch
from vllm_dsa.models.formats import named, require_kernels
from vllm_dsa.models.ranks import require_agreement
from vllm_dsa.packed_weights import exclude_fused, with_plain_packed


class DecoderLayer(nn.Module):
    """Norm, DSA attention, norm, and an MLP or a mixture of experts."""

    attention: type[DSAAttention] = DSAAttention

    def __init__(self, vllm_config: Any, config: DSAConfig, selection: torch.Tensor, prefix: str) -> None:
        super().__init__()
        hf_config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        index = int(prefix.rsplit(".", 1)[1])
        self.self_attn = self.attention(
            config, quant_config, selection, config.shares_index(index), prefix=f"{prefix}.self_attn"
        )
        if config.is_dense(index):
            self.mlp = DeepseekV2MLP(
                hidden_size=hf_config.hidden_size,
                intermediate_size=hf_config.intermediate_size,
                hidden_act=hf_config.hidden_act,
                quant_config=quant_config,
                prefix=f"{prefix}.mlp",
            )
        else:
            self.mlp = self.experts(vllm_config, prefix=f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(hf_config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hf_config.hidden_size, eps=config.rms_norm_eps)

    def experts(self, vllm_config: Any, prefix: str) -> nn.Module:
        return DeepseekV2MoE(
            config=vllm_config.model_config.hf_config,
            parallel_config=vllm_config.parallel_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
            apply_routed_scale_to_output=True,
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T], hidden_states and residual [T, hidden]; the stream is their sum."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class DeepseekV32Model(nn.Module):
    """Embedding, decoder layers of this pipeline stage, final norm."""

    layer: type[DecoderLayer] = DecoderLayer

    def __init__(self, vllm_config: Any, config: DSAConfig, prefix: str) -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        self.embed_tokens = (
            VocabParallelEmbedding(hf_config.vocab_size, hf_config.hidden_size, prefix=f"{prefix}.embed_tokens")
            if get_pp_group().is_first_rank
            else PPMissingLayer()
        )
        selection = new_selection(vllm_config, config)
        self.start_layer, self.end_layer, self.layers = make_layers(
            hf_config.num_hidden_layers,
            lambda prefix: self.layer(vllm_config, config, selection, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = (
            RMSNorm(hf_config.hidden_size, eps=config.rms_norm_eps) if get_pp_group().is_last_rank else PPMissingLayer()
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | Any:
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(positions, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        return self.norm(hidden_states, residual)[0]


class DeepseekV32ForCausalLM(nn.Module, SupportsPP):
    """The model class that vLLM instantiates for DeepseekV32ForCausalLM and GlmMoeDsaForCausalLM.

    The two families differ in facts that DSAConfig holds: sizes, the indexer's RoPE layout, layers that share.
    """

    decoder: type[DeepseekV32Model] = DeepseekV32Model
    is_draft = False
    packed_modules_mapping = dict(FUSED)  # vLLM's name for it

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = self._read(vllm_config)
        with named(vllm_config):
            self.model = self.decoder(vllm_config, config, prefix=maybe_prefix(prefix, "model"))
        require_kernels(self.model, vllm_config)
        attention = self.model.layers[self.model.start_layer].self_attn
        require_agreement(
            {
                "vllm-dsa": __version__,
                "vLLM": vllm_version(),
                "providers": ", ".join(f"{op}: {name}" for op, name in attention.kernels.providers.items()),
                "caches": f"{attention.latent_kind}, {attention.dtype}, pages of {vllm_config.cache_config.block_size}",
                "VLLM_DSA_SHARD_SCORES": str(envs.VLLM_DSA_SHARD_SCORES),
            }
        )
        with named(vllm_config):
            self.lm_head = (
                ParallelLMHead(
                    self.config.vocab_size,
                    self.config.hidden_size,
                    quant_config=vllm_config.quant_config,
                    prefix=maybe_prefix(prefix, "lm_head"),
                )
                if get_pp_group().is_last_rank
                else PPMissingLayer()
            )
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], self.config.hidden_size
        )

    def _read(self, vllm_config: Any) -> DSAConfig:
        """Keep what loading needs of the config; returns its DSA facts."""
        self.config = vllm_config.model_config.hf_config
        config = DSAConfig.from_hf(self.config)
        self.unused_indexers = tuple(
            f"layers.{i}.self_attn.indexer." for i, unused in enumerate(config.index_shared) if unused
        )
        self.dtype = vllm_config.model_config.dtype
        self.quant_config = vllm_config.quant_config
        exclude_fused(self.quant_config, _fused_modules(config))
        self.expected = Expected.from_hf(self.config)
        if self.expected.packed:
            ask_for_amx()
        self.required = self._required(vllm_config)
        speculation = vllm_config.speculative_config
        self.has_draft = speculation is not None and speculation.method == "mtp"
        return config

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | Any:
        """Token ids and positions [T] to hidden states [T, hidden]."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Hidden states [rows, hidden] to logits [rows, vocab]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def get_expert_mapping(self) -> list[tuple[str, str, int, str]]:
        """(parameter, checkpoint tensor, expert, shard) of every routed expert's weight."""
        return expert_params_mapping(self, self.config.n_routed_experts)

    def _required(self, vllm_config: Any) -> tuple[str, ...]:
        """Names of the tensors that the first load must bring."""
        if vllm_config.load_config.load_format == "dummy":
            return ()
        names = self.expected.draft if self.is_draft else self.expected.model
        if vllm_config.parallel_config.enable_expert_parallel:  # vLLM does not read other ranks' experts
            return tuple(name for name in names if EXPERTS not in name)
        return tuple(names)

    def _is_skipped(self, name: str) -> bool:
        """Is this tensor none of ours: a stored rotary table, the MTP draft's layer, or an indexer that is not used?"""
        if "rotary_emb.inv_freq" in name or mtp_layer_of_weight(self.config, name) is not None:
            return True
        return any(indexer in name for indexer in self.unused_indexers)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a published checkpoint's tensors; returns the names of the parameters that were set.

        The first call must bring every tensor; later ones, which update weights in place, may bring some.
        """
        watch = DraftWatch(self) if self.has_draft and not self.is_draft else None
        weights = watch.watched(weights) if watch else weights
        weights = ((name, tensor) for name, tensor in weights if not self._is_skipped(name))
        weights = split_experts(checked(weights, self.expected, self.required))
        if isinstance(self.quant_config, DequantisedFp8Config):
            weights = with_plain_fp8(weights, self.dtype, self.expected.exponents)
        elif self.expected.packed:
            weights = with_plain_packed(weights, self.dtype, self.expected)
        if getattr(self.config, "tie_word_embeddings", False) and not self.is_draft:
            weights = _with_head(weights)
        params = dict(self.named_parameters())
        experts = self.get_expert_mapping()
        loaded: set[str] = set()
        for name, tensor in weights:
            if EXPERTS in name:
                loaded |= _load_expert(self, params, experts, name, tensor)
            else:
                loaded |= _load_parameter(self, params, name, tensor)
            # While the next one is dequantised, this one would else be there too.
            del tensor
        for module in self.modules():
            if isinstance(module, DSAAttention):  # vLLM's loaders write to .data, which leaves no trace
                module.absorbed_versions = []
        self.required = ()
        if watch:
            watch.finish()
        return loaded


def _fused_modules(config: DSAConfig) -> Iterator[str]:
    """Names of the modules that hold several of the checkpoint's."""
    for layer in range(config.num_hidden_layers + config.mtp_layers):
        mlp = "mlp" if config.is_dense(layer) else "mlp.shared_experts"
        yield from (f"model.layers.{layer}.self_attn.fused_qkv_a_proj", f"model.layers.{layer}.{mlp}.gate_up_proj")


def _with_head(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tied: the embedding is the head too. Each has a parameter, the first and the last pipeline stage may differ."""
    for name, tensor in weights:
        yield name, tensor
        if name == EMBEDDING:
            yield HEAD, tensor


def _load_parameter(model: Any, params: dict[str, nn.Parameter], name: str, tensor: torch.Tensor) -> set[str]:
    """Hand a tensor to the parameter that it is, or that it is one shard of, unless another stage holds that."""
    target, shard = name, ()
    for fused, parts in FUSED.items():
        for i, part in enumerate(parts):
            if f".{part}." in name:
                target, shard = name.replace(f".{part}.", f".{fused}."), (i,)
    if is_pp_missing_parameter(target, model):
        return set()
    if target not in params:
        raise _unknown(model, name)
    loader = getattr(params[target], "weight_loader", default_weight_loader)
    loader(params[target], fitted(name, tensor, params[target], model.expected.exponents), *shard)
    return {target}


def _load_expert(
    model: Any, params: dict[str, nn.Parameter], experts: list[Any], name: str, tensor: torch.Tensor
) -> set[str]:
    """Hand one expert's tensor to the fused parameter that holds it, unless another rank holds that expert."""
    known = False
    for parameter, part, expert, shard in experts:
        if part not in name:
            continue
        target = name.replace(part, parameter)
        if is_pp_missing_parameter(target, model):
            known = True
            continue
        if target not in params:
            continue
        known = True
        repack_experts(model.get_submodule(target.rpartition(".")[0]))
        tensor = fitted(name, tensor, params[target], model.expected.exponents)
        if params[target].weight_loader(
            params[target], tensor, target, shard_id=shard, expert_id=expert, return_success=True
        ):
            return {target}
    if not known:
        raise _unknown(model, name)
    return set()


def _unknown(model: Any, name: str) -> CheckpointError:
    return CheckpointError(
        other_names(model.expected.names(), [name])
        or f"checkpoint tensor {name!r} belongs to no parameter of {type(model).__name__}. "
        f"Check that config.json and the safetensors files are of the same model."
    )
