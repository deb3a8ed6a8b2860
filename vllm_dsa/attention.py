"""One DSA attention layer: MLA's projections around write, select and attend.

MLA is run absorbed: W_UK is folded into the query and W_UV into the output, so that attention works on the latent rows
as they are cached, and one row serves all heads.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from vllm_dsa import cache, envs
from vllm_dsa.backend import DSABackend, DSAMetadata, kernel_request
from vllm_dsa.compat import (
    AttentionLayerBase,
    BreakableCUDAGraphCapture,
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    MLAAttentionSpec,
    RMSNorm,
    RowParallelLinear,
    aux_stream,
    dequantised_weight,
    eager_break_during_capture,
    get_current_vllm_config,
    get_forward_context,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    init_logger,
    kv_connector,
    register_layer,
)
from vllm_dsa.config import ConfigError, DSAConfig
from vllm_dsa.indexer import Indexer
from vllm_dsa.kernels import Norms, Rope, dispatch
from vllm_dsa.metadata import Rows, between, cut, dense_parts, shared_chunks, without
from vllm_dsa.packed_weights import none_if_packed

logger = init_logger("vllm.vllm_dsa.attention")
WARM_ROWS = 320  # enough for the kernels of many rows


def new_selection(vllm_config: Any, config: DSAConfig) -> torch.Tensor:
    """Room for the positions that a step selects, [max tokens, DSAConfig.top_k] int32."""
    tokens, top_k = vllm_config.scheduler_config.max_num_batched_tokens, kernel_request(vllm_config, config).top_k
    return torch.empty(tokens, top_k, dtype=torch.int32)


class DSAAttention(nn.Module, AttentionLayerBase):
    """MLA with a lightning indexer; owns the layer's latent cache.

    Parameters carry the checkpoint's names, but for fused_qkv_a_proj (q_a_proj, kv_a_proj_with_mqa).

    selection, new_selection()'s, is shared by all layers: a layer with an indexer writes the step's
    selection there, and one that shares (config.index_shared) has no indexer and reads what stands there.
    """

    supports_dcp = False  # vLLM's base class promises it

    def __init__(
        self, config: DSAConfig, quant_config: Any, selection: torch.Tensor, shares_index: bool, prefix: str
    ) -> None:
        super().__init__()
        vllm_config = get_current_vllm_config()
        ranks = get_tensor_model_parallel_world_size()
        if config.num_attention_heads % ranks:
            raise ConfigError(
                f"tensor parallel size {ranks} does not divide num_attention_heads {config.num_attention_heads}. "
                f"Choose a size that does."
            )
        self.config = config
        self.heads = config.num_attention_heads // ranks
        self.dtype = vllm_config.model_config.dtype

        self.fused_qkv_a_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.q_lora_rank, config.latent_dim],
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.fused_qkv_a_proj",
            disable_tp=True,
        )
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
        self.q_b_proj = ColumnParallelLinear(
            config.q_b_inputs,
            config.num_attention_heads * config.q_b_head_dim,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.q_b_proj",
        )
        # Holds the parameter only: write_keys norms.
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps)
        self.kv_b_proj = ColumnParallelLinear(
            config.kv_lora_rank,
            config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim),
            bias=False,
            quant_config=none_if_packed(quant_config),
            prefix=f"{prefix}.kv_b_proj",
        )
        # Its weight is read after loading and never multiplied as it is: vLLM's CPU path must not repack it.
        self.kv_b_proj._cpu_skip_gemm_dispatch = True
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.v_head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.selection = selection
        self.reuses_selection = False  # set for the later steps of an MTP draft that share its first step's selection
        self.indexer = None if shares_index else Indexer(config, quant_config, prefix=f"{prefix}.indexer")
        # A buffer, because vLLM's sleep mode saves buffers and drops every other tensor of a model.
        table = _cos_sin(
            frozenset(config.rope.items()),
            config.qk_rope_head_dim,
            vllm_config.model_config.max_model_len,
            torch.get_default_device(),
        )
        self.register_buffer("cos_sin", table, persistent=False)
        self.rope = Rope(self.cos_sin, config.index_rope_interleaved)
        request = kernel_request(vllm_config, config)
        self.latent_kind = request.latent_kind
        self.kernels = dispatch.choose(request)
        logger.info_once(self.kernels.summary)

        self.layer_name = f"{prefix}.attn"
        self.kv_cache = torch.empty(0)
        self.warm = False
        self.vllm_config = vllm_config
        register_layer(self.layer_name, self)

    def get_attn_backend(self) -> type:
        return DSABackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        fp8 = self.latent_kind == cache.FP8_DS_MLA
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=cache.FP8_DS_MLA_BYTES if fp8 else self.config.latent_dim,
            dtype=torch.uint8 if fp8 else self.dtype,
            cache_dtype_str=self.latent_kind,
        )

    def process_weights_after_loading(self, dtype: torch.dtype) -> None:
        """Split kv_b_proj into W_UK [N, nope, R] and W_UV [N, R, v]; join what the indexer multiplies at once."""
        config = self.config
        weight = dequantised_weight(self.kv_b_proj, dtype).view(
            self.heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank
        )
        w_uk, w_uv = weight.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        _follow(self, "w_uk", w_uk)
        _follow(self, "w_uv", w_uv.transpose(1, 2))
        sources = [self.kv_b_proj]
        if self.indexer is not None:
            _follow(self.indexer, "fused", self.indexer.derived(dtype))
            sources += [self.indexer.wk, self.indexer.weights_proj]
        self.norms = Norms(
            latent_weight=self.kv_a_layernorm.weight.data,
            latent_eps=config.rms_norm_eps,
            index_weight=None if self.indexer is None else self.indexer.k_norm.weight.data,
            index_bias=None if self.indexer is None else self.indexer.k_norm.bias.data,
        )
        self.absorbed = tuple(parameter for linear in sources for parameter in linear.parameters())
        self.absorbed_versions = [parameter._version for parameter in self.absorbed]

    def reserve(self, values: torch.Tensor) -> None:
        """Hold for a moment what a step of values [T, N, v] may take, so that vLLM's profile run counts it."""
        tokens, config = len(values), self.config
        width = self.kernels.query_heads * config.latent_dim + self.heads * config.kv_lora_rank
        held = values.new_empty(tokens, width)
        ranks = get_tensor_model_parallel_world_size()
        own = 4 * self.selection.shape[1] * -(-tokens // ranks) if ranks > 1 else 0  # of a selection that ranks share
        taken = max(self.kernels.workspace(tokens) + own, own * (ranks + 1))
        torch.empty(taken, dtype=torch.uint8, device=values.device)
        del held

    def warm_up(self, positions: torch.Tensor, *tensors: torch.Tensor | None) -> None:
        """Run _step on made-up caches, so that every kernel is compiled before the first request: a prefill that
        selects, one that does not, one decode, and many, these also on two streams. tensors: of a step on one."""
        top_k, device = self.selection.shape[1], positions.device
        block_size = self.vllm_config.cache_config.block_size
        blocks = -(-(top_k + WARM_ROWS) // block_size)
        owners = [self] if self.indexer is None else [self, self.indexer.cache]
        caches = [owner.kv_cache for owner in owners]
        for owner in owners:
            spec = owner.get_kv_cache_spec(self.vllm_config)
            owner.kv_cache = torch.zeros(blocks, 1, block_size, spec.head_size, dtype=spec.dtype, device=device)
        width = max(blocks, -(-self.vllm_config.model_config.max_model_len // block_size))
        table = torch.zeros(1, width, dtype=torch.int32, device=device)
        table[0, :blocks] = torch.arange(blocks, dtype=torch.int32, device=device)
        for first, count, decodes, beside in (
            (top_k, WARM_ROWS, 0, None),
            (0, WARM_ROWS, 0, None),
            (top_k, 1, 1, None),
            (top_k, WARM_ROWS, WARM_ROWS, None),
            (top_k, WARM_ROWS, WARM_ROWS, aux_stream()),
        ):
            count = min(count, len(positions))
            rows = Rows(
                requests=torch.zeros(count, dtype=torch.int32, device=device),
                lengths=torch.arange(first + 1, first + count + 1, dtype=torch.int32, device=device),
                block_table=table,
                block_size=block_size,
                starts=(0, count),
                ends=(first + count,),
                decodes=min(decodes, count),
            )
            slots = torch.full((count,), -1, dtype=torch.int64, device=device)
            places = torch.zeros_like(positions)
            _fork(beside)
            _step(self, DSAMetadata(rows, slots, count), places, *tensors, beside)
        for owner, bound in zip(owners, caches, strict=True):
            owner.kv_cache = bound
        self.warm = True

    def follow_weights(self) -> None:
        """Derive anew what derives from weights that have changed: vLLM does not tell where they are written in place
        (`reload_weights` with is_checkpoint_format=False, sparse weight transfer). Called before every step.

        Seen are `load_weights` and in-place operations on the parameters, not writes to a parameter's ``.data``.
        """
        with torch._C.DisableTorchFunctionSubclass():  # vLLM's parameters take 15 times as long to answer else
            versions = [parameter._version for parameter in self.absorbed]
        if versions != self.absorbed_versions:
            self.process_weights_after_loading(self.dtype)

    def second_stream(self) -> torch.cuda.Stream | None:
        """Where keys are made beside the index queries, and queries while the indexer selects, if anywhere: in decodes
        that are captured as one CUDA graph. A prefill's kernels fill the GPU, and kernels launched one by one wait for
        the host.

        A decode's linear layers and scores each take the whole memory bandwidth; writing keys and top-k take a
        fraction. So the small run beside the large, the small launched first: behind a linear layer's programs they
        would find no room.

        What is allocated on one stream may be read on the other: it lives until the layer has joined both, and the
        next layer begins with the second waiting for the first. Two micro-batches at a time, which platform.py
        refuses, would break that.
        """
        if not self.cos_sin.is_cuda or not torch.cuda.is_current_stream_capturing():
            return None
        if BreakableCUDAGraphCapture.is_active() or get_forward_context().attn_metadata is None:
            return None
        return aux_stream()

    def queries(self, query_latent: torch.Tensor, raw_latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Query latents [T, q_lora_rank], normed and raw, to queries [T, N, nope + rope] and what output() gets as its
        gate."""
        return self.q_b_proj(query_latent)[0].view(-1, self.heads, self.config.qk_head_dim), None

    def output(self, values: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """Attended values [T, N, v] to the layer's output [T, hidden], summed over ranks."""
        return self.o_proj(values.flatten(1))[0]

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [T] int64, hidden_states [T, hidden] to the layer's output [T, hidden], summed over ranks."""
        config, index_query, head_weights, index_key, gate = self.config, None, None, None, None
        selects = self.indexer is not None and self.kernels.select is not None and not self.reuses_selection
        beside = self.second_stream() if selects else None
        _fork(beside)
        raw_latent, latent, rope_key = self.fused_qkv_a_proj(hidden_states)[0].split(
            [config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        if selects:
            with _on(beside):
                head_weights, index_key = self.indexer.weights_and_key(hidden_states)
        _fork(beside)
        query_latent = self.q_a_layernorm(raw_latent)
        if selects:
            index_query = self.indexer.queries(query_latent)

        def queries() -> torch.Tensor:
            nonlocal gate
            query, gate = self.queries(query_latent, raw_latent)
            return query

        query = queries() if beside is None else queries
        values = hidden_states.new_empty(len(hidden_states), self.heads, config.v_head_dim)
        _write_select_attend(
            self, positions, latent, rope_key, index_key, query, index_query, head_weights, values, beside
        )
        return self.output(values, gate)


@eager_break_during_capture
def _write_select_attend(
    layer: DSAAttention,
    positions: torch.Tensor,
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    index_key: torch.Tensor | None,
    query: torch.Tensor | Callable[[], torch.Tensor],
    index_query: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    values: torch.Tensor,
    beside: torch.cuda.Stream | None,
) -> None:
    """The three operations on the step's real rows: ``values`` [T, N, v] of ``query`` [T, N, nope + P], which is left
    rotated in part, or of what makes it on ``beside``; zero in padding rows."""
    metadata: DSAMetadata | None = (get_forward_context().attn_metadata or {}).get(layer.layer_name)
    if metadata is None:  # a profiling or warm-up run
        layer.reserve(values)
        tensors = (positions, latent, rope_key, index_key, query, index_query, head_weights, values)
        if values.is_cuda and not layer.warm:
            layer.warm_up(*tensors)
        values.zero_()
        return
    connector = kv_connector()
    owners = [layer, *(() if layer.indexer is None else (layer.indexer.cache,))] if connector else []
    for owner in owners:
        connector.wait_for_layer_load(owner.layer_name)
    _step(layer, metadata, positions, latent, rope_key, index_key, query, index_query, head_weights, values, beside)
    for owner in owners:
        connector.save_kv_layer(owner.layer_name, owner.kv_cache, metadata)


def _step(
    layer: DSAAttention,
    metadata: DSAMetadata,
    positions: torch.Tensor,
    latent: torch.Tensor,
    rope_key: torch.Tensor,
    index_key: torch.Tensor | None,
    query: torch.Tensor | Callable[[], torch.Tensor],
    index_query: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    values: torch.Tensor,
    beside: torch.cuda.Stream | None,
) -> None:
    n, config, kernels, rows, rope = metadata.num_tokens, layer.config, layer.kernels, metadata.rows, layer.rope
    values[n:].zero_()
    positions, selected = positions[:n], layer.selection[:n]
    latent_pages = layer.kv_cache.squeeze(1)
    dense = dense_parts(rows, selected.shape[1], kernels.dense_rows) if kernels.attend_dense else ()
    sparse = between([part for _, part in dense], n)

    index, index_pages = (None, None), None
    if index_key is not None:
        index, index_key, index_pages = (index_query[:n], head_weights[:n]), index_key[:n], layer.indexer.cache.pages
    with _on(beside):
        kernels.write_keys(
            latent[:n],
            rope_key[:n],
            index_key,
            layer.norms,
            rope,
            positions,
            metadata.slots[:n],
            latent_pages,
            index_pages,
        )
    _join(beside)
    if beside is not None:
        none = values.new_empty(n, 0, config.latent_dim)
        codes, weights = kernels.write_queries(none[..., config.kv_lora_rank :], *index, rope, positions, none)
        _select(kernels, codes, weights, index_pages, rows, selected, functools.partial(_fork, beside))
        index = (None, None)
    with _on(beside):
        query = (query if isinstance(query, torch.Tensor) else query())[:n]
        nope_query, rope_query = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        absorbed = query.new_empty(n, kernels.query_heads, config.latent_dim)
        own_heads = absorbed[:, : layer.heads]
        for part in sparse:
            torch.bmm(
                nope_query[part].transpose(0, 1),
                layer.w_uk,
                out=own_heads[part, :, : config.kv_lora_rank].transpose(0, 1),
            )
        quantised = kernels.write_queries(rope_query, *index, rope, positions, own_heads)
    if quantised is not None:
        _select(kernels, *quantised, index_pages, rows, selected)
    _join(beside)
    if sparse:
        attended = query.new_empty(n, layer.heads, config.kv_lora_rank)
        kernels.attend(absorbed, latent_pages, without(rows, dense), selected, config.softmax_scale, attended)
        for part in sparse:
            torch.bmm(attended[part].transpose(0, 1), layer.w_uv, out=values[part].transpose(0, 1))
    for request, part in dense:
        rope_query[part] = own_heads[part, :, config.kv_lora_rank :]
        kernels.attend_dense(
            query[part],
            latent_pages,
            rows,
            request,
            layer.w_uk,
            layer.w_uv,
            config.softmax_scale,
            values[part],
        )


def _fork(beside: torch.cuda.Stream | None) -> None:
    """What is launched on ``beside`` from now on sees what was launched before."""
    if beside is not None:
        beside.wait_stream(torch.cuda.current_stream())


def _on(beside: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    return nullcontext() if beside is None else torch.cuda.stream(beside)


def _join(beside: torch.cuda.Stream | None) -> None:
    """What is launched from now on sees what was launched on ``beside`` before."""
    if beside is not None:
        torch.cuda.current_stream().wait_stream(beside)


def _select(
    kernels: dispatch.Kernels,
    codes: torch.Tensor,
    weights: torch.Tensor,
    index_pages: torch.Tensor,
    rows: Rows,
    selected: torch.Tensor,
    *scored: Callable[[], None],
) -> None:
    """select. Every rank of a TP group would compute the same; where that is much, each computes its share of the
    prefill rows, and all gather what was selected."""
    group = get_tp_group()
    chunks = shared_chunks(rows, selected.shape[1], group.world_size, envs.VLLM_DSA_SHARD_SCORES)
    if not chunks:
        kernels.select(codes, weights, index_pages, rows, selected, *scored)
        return
    rank, size = group.rank_in_group, chunks[0].stop - chunks[0].start
    own = selected.new_empty(2, size, selected.shape[1])
    for part, place in ((chunks[rank], own[0]), (chunks[-1 - rank], own[1]), (slice(0, rows.decodes), selected)):
        if count := part.stop - part.start:
            kernels.select(codes[part], weights[part], index_pages, cut(rows, part), place[:count])
    # As floats: vLLM's gather on a CPU takes nothing else.
    places = group.all_gather(own.view(torch.float32), dim=0).view(torch.int32).unbind()
    for part, place in zip(chunks, (*places[::2], *places[::-2]), strict=True):
        selected[part] = place[: part.stop - part.start]


def _follow(module: nn.Module, name: str, derived: torch.Tensor) -> None:
    """Store a weight that derives from others; where weights are reloaded, at the address that CUDA graphs hold."""
    if hasattr(module, name):
        getattr(module, name).copy_(derived)
    else:
        setattr(module, name, derived.contiguous())


@functools.lru_cache(maxsize=1)  # one table for all layers
def _cos_sin(rope: frozenset[tuple[str, Any]], dims: int, positions: int, device: torch.device) -> torch.Tensor:
    """DSAConfig.rope's items as a table [positions, dims] in float32: cosines, then sines. Made on the CPU, so that
    every device has the same."""
    facts = dict(rope)
    with torch.device("cpu"):
        steps = facts["rope_theta"] ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        frequencies = 1.0 / steps
        if facts["rope_type"] == "yarn":
            pairs = torch.arange(dims // 2, dtype=torch.float32)
            kept = 1 - ((pairs - facts["low"]) / (facts["high"] - facts["low"])).clamp(0, 1)
            frequencies = 1.0 / (facts["factor"] * steps) * (1 - kept) + frequencies * kept
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        table = torch.cat([angles.cos(), angles.sin()], dim=-1) * facts.get("attention_factor", 1.0)
    return table.to(device)
