"""Train a tiny DeepSeek-V3.2 model, indexer and all, and write it as a published checkpoint: a model whose indexer's
RoPE layout can be told from its weights. Under a minute on one CPU core.

    python tests/train_tiny.py OUT_DIR [--steps 100] [--index-head-dim 16] [--swapped]

Of the 16 index dims all are rotated, so the layout shows early. --index-head-dim 32: half of them are, as in the
published models; that takes 200 steps. --swapped: the other layout is the right one.

The text is a stream of facts and questions among filler words. A fact `red=lion` holds until the next `red=...`; after
`red` comes what holds. So attention must find tokens by what they are and by how near they are. The indexer learns as
in DSA's warm-up: dense attention trains the model, and the indexer's scores follow each layer's attention, the mean of
its heads, by their Kullback-Leibler divergence, with no gradient into the model.
"""

import argparse
import random
import time
from pathlib import Path

import checkpoint_files as files
import torch
import torch.nn.functional as F
from planted_text import ANIMALS, CODES, EOS, FILLERS, build_tokenizer
from tiny_checkpoint import make_config, random_tensors

from vllm_dsa.kernels import Rope, reference

SIZES = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "index_n_heads": 4, "index_head_dim": 16,
    "index_topk": 16, "first_k_dense_replace": 2, "intermediate_size": 128, "num_nextn_predict_layers": 0,
    "rope_scaling": None, "max_position_embeddings": 4096,
}  # fmt: skip
LENGTH, BATCH, STEPS = 256, 8, 100


def stream(length: int, seed: int) -> tuple[list[str], list[bool]]:
    """Words of a text, and of each whether it follows from those before it."""
    rng, words, known, follows = random.Random(seed), [], {}, []
    while len(words) < length:
        kind = rng.random()
        if kind < 0.08:
            code = rng.choice(CODES)
            known[code] = rng.choice(ANIMALS)
            words.append(f"{code}={known[code]}")
        elif kind < 0.35 and known:
            code = rng.choice(sorted(known))
            words += [code, known[code]]
            follows += [False, True]
            continue
        else:
            words.append(rng.choice(FILLERS))
        follows.append(False)
    return words[:length], follows[:length]


def text(length: int, seed: int) -> str:
    """A text of about ``length`` tokens that training, whose seeds are small, has not seen."""
    return " ".join(stream(length, 10**9 + seed)[0])


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [LENGTH, BATCH], and whether each follows from those before it."""
    vocab, rows = build_tokenizer().get_vocab(), []
    for i in range(BATCH):
        words, follows = stream(LENGTH - 1, seed * BATCH + i)
        rows.append(([0, *(vocab["Ġ" + word] for word in words)], [False, *follows]))
    ids, follows = (torch.tensor([row[i] for row in rows]).T for i in (0, 1))
    return ids, follows


def rope_of(config: files.Tensors, length: int) -> Rope:
    dims = config["qk_rope_head_dim"]
    frequencies = config["rope_theta"] ** -(torch.arange(0, dims, 2) / dims)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return Rope(torch.cat([angles.cos(), angles.sin()], dim=1), index_interleaved=False)


def forward(tensors: files.Tensors, config: dict, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [length, batch, vocab] of ids [length, batch] with dense attention, and the indexers' divergence."""
    length, size = ids.shape
    heads, nope, turned = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rank, eps, scale = config["kv_lora_rank"], config["rms_norm_eps"], (nope + turned) ** -0.5
    rope, positions = rope_of(config, length), torch.arange(length)
    cos_sin = rope.cos_sin
    hidden_from = torch.ones(length, length, dtype=torch.bool).triu(1)
    x, divergence = F.embedding(ids, tensors["model.embed_tokens.weight"]), torch.zeros(())
    for i in range(config["num_hidden_layers"]):
        w = {k.removeprefix(f"model.layers.{i}."): v for k, v in tensors.items() if k.startswith(f"model.layers.{i}.")}
        attn = {k.removeprefix("self_attn.").removesuffix(".weight"): v for k, v in w.items() if "self_attn" in k}
        normed = reference.rms_norm(x, w["input_layernorm.weight"], eps)
        query_latent = reference.rms_norm(normed @ attn["q_a_proj"].T, attn["q_a_layernorm"], eps)
        query = (query_latent @ attn["q_b_proj"].T).view(length, size, heads, -1)
        query = torch.cat([query[..., :nope], reference.rotate(query[..., nope:], cos_sin, interleaved=True)], -1)
        latent, rope_key = (normed @ attn["kv_a_proj_with_mqa"].T).split([rank, turned], -1)
        latent, rope_key = (
            reference.rms_norm(latent, attn["kv_a_layernorm"], eps),
            reference.rotate(rope_key, cos_sin, interleaved=True),
        )
        key, value = (
            (latent @ attn["kv_b_proj"].T).view(length, size, heads, -1).split([nope, config["v_head_dim"]], -1)
        )
        key = torch.cat([key, rope_key.unsqueeze(2).expand(-1, -1, heads, -1)], -1)
        logits = torch.einsum("qbnd,kbnd->bnqk", query, key) * scale
        weights = logits.masked_fill(hidden_from, float("-inf")).softmax(-1)
        x = x + torch.einsum("bnqk,kbnd->qbnd", weights, value).flatten(2) @ attn["o_proj"].T

        scores = index_scores(attn, config, normed.detach(), query_latent.detach(), rope, positions)
        scores = scores.masked_fill(hidden_from, float("-inf")).log_softmax(-1)
        target = weights.detach().mean(1)
        share = target * (target.clamp(min=1e-9).log() - scores.masked_fill(hidden_from, 0))
        divergence = divergence + share.sum(-1).mean()

        normed = reference.rms_norm(x, w["post_attention_layernorm.weight"], eps)
        gate, up = normed @ w["mlp.gate_proj.weight"].T, normed @ w["mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ w["mlp.down_proj.weight"].T
    return reference.rms_norm(x, tensors["model.norm.weight"], eps) @ tensors["lm_head.weight"].T, divergence


def index_scores(
    attn: files.Tensors, config: dict, normed: torch.Tensor, query_latent: torch.Tensor, rope: Rope, at: torch.Tensor
) -> torch.Tensor:
    """The indexer's scores [batch, query, key], without the caches' rounding."""
    heads, dim = config["index_n_heads"], config["index_head_dim"]
    query = (query_latent @ attn["indexer.wq_b"].T).unflatten(-1, (heads, dim))
    key = normed @ attn["indexer.wk"].T
    key = reference.layer_norm(key, attn["indexer.k_norm"], attn["indexer.k_norm.bias"], 1e-6)
    query, key = (reference.rotate_index(z, rope, at) for z in (query, key))
    head_weights = normed @ attn["indexer.weights_proj"].T * (heads * dim) ** -0.5
    dots = torch.einsum("qbhd,kbd->bhqk", query, key).relu()
    return torch.einsum("bhqk,qbh->bqk", dots, head_weights)


def train(steps: int, *, report: bool = False, **sizes: int) -> tuple[dict, files.Tensors]:
    """Config and tensors of a model trained for so many steps; sizes: config values other than those of SIZES."""
    config = make_config(**SIZES | sizes)
    tensors = random_tensors(config, seed=0)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        elif name.endswith("norm.bias"):
            tensor.zero_()
        elif tensor.dim() == 2 and "embed" not in name:
            tensor *= tensor.shape[1] ** -0.5 / config["initializer_range"]
        tensor.requires_grad_()
    optimiser = torch.optim.AdamW(tensors.values(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.1)
    start = time.monotonic()
    for step in range(steps):
        ids, follows = batch(step)
        logits, divergence = forward(tensors, config, ids)
        losses = F.cross_entropy(logits[:-1].flatten(0, 1), ids[1:].flatten(), reduction="none")
        asked = follows[1:].flatten()
        loss = losses[asked].mean() + 0.1 * losses.mean() + 2 * divergence
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        optimiser.step()
        schedule.step()
        if report and step % 25 == 24:
            right = (logits[:-1].flatten(0, 1).argmax(-1) == ids[1:].flatten())[asked].float().mean()
            print(
                f"step {step + 1}: answers {losses[asked].mean():.2f} nats, {right:.0%} right, "
                f"divergence {divergence:.2f}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return config, {name: tensor.detach() for name, tensor in tensors.items()}


def swap_layout(config: dict, tensors: files.Tensors) -> files.Tensors:
    """The same model for an indexer with interleaved RoPE: its rotated dims, halves before, are interleaved."""
    dims = config["qk_rope_head_dim"]
    order = torch.arange(dims).view(2, -1).T.flatten()  # pair (i, i + P/2) goes to (2i, 2i + 1)
    order = torch.cat([order, torch.arange(dims, config["index_head_dim"])])
    swapped = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("indexer.wq_b.weight"):
            swapped[name] = tensor.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
        elif ".indexer.wk." in name or ".indexer.k_norm." in name:
            swapped[name] = tensor[order]
    return swapped


def write(path: Path, config: dict, tensors: files.Tensors) -> None:
    """The checkpoint's folder."""
    files.write(path, config, {name: tensor.contiguous() for name, tensor in tensors.items()})
    build_tokenizer().save(str(path / "tokenizer.json"))
    files.write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--index-head-dim", type=int, default=SIZES["index_head_dim"])
    parser.add_argument("--swapped", action="store_true")
    args = parser.parse_args()
    config, tensors = train(args.steps, report=True, index_head_dim=args.index_head_dim)
    write(args.out_dir, config, swap_layout(config, tensors) if args.swapped else tensors)
    (args.out_dir / "text.txt").write_text(text(1024, 0))


if __name__ == "__main__":
    main()
