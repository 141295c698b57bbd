"""The model card: parameters, FLOPs per token and memory of a Config, counted on the meta device."""

import torch
from torch import Tensor

import model
from model import Config, build


def cache_bytes_per_token(config: Config) -> int:
    """Bytes that decoding keeps of each token in all layers together."""
    with torch.device("meta"):
        net = build(config)  # in training mode, where every layer of a pool is computed
        cache, ids = net.cache_type(config, 1, 1), torch.zeros(1, 1, dtype=torch.int64)
        with torch.no_grad():
            net(ids, cache=cache)
    return sum(part[:, :1].nbytes for parts in cache.kept.values() for part in parts)


def activation_bytes(config: Config, seq_len: int) -> int:
    """Bytes that one row of seq_len tokens keeps for backward, counted tensor by tensor.

    T x T tensors (masks, scores) are left out: FlexAttention keeps lists of blocks and recomputes its scores. All
    others are linear in T, so two lengths that no width of the model equals determine the rest."""
    width, meta = config.n_head * config.head_dim, getattr(config, "num_meta_tokens", 0)
    widths = {config.head_dim, config.n_embd, width, width // 2, config.hidden_size, config.hidden_size * config.top_k}
    widths.add(getattr(config, "latent_dim", 0))
    short, long = [T for T in range(128, 1024, 16) if T + meta not in widths][:2]  # FP8 heads need multiples of 16
    few, many = saved_bytes(config, short, meta), saved_bytes(config, long, meta)
    return few + (many - few) * (seq_len - short) // (long - short)


def saved_bytes(config: Config, T: int, meta: int) -> int:
    """Bytes that forward keeps of one row of T tokens, without parameters and T x T tensors."""
    kept, square = {}, (T + meta, T + meta)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage, storage.nbytes() * (tensor.shape[-2:] != square))  # held: no address twice
        return tensor

    with torch.device("meta"):
        net, ids = build(config), torch.zeros(1, T, dtype=torch.int64)
        for parameter in net.parameters():
            keep(parameter.detach())
        parameters = set(kept)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(ids, ids)
    return sum(nbytes for key, (_, nbytes) in kept.items() if key not in parameters)


def model_card(config: Config, seq_len: int) -> str:
    """Parameters in total, active and per kind, FLOPs per token, memory, as text."""
    counts, training = model.count_parameters(config), model.flops_per_token(config, seq_len)
    total, experts = counts["total"], counts["expert"]
    per_expert = f", {experts // config.num_experts:,} for each of {config.num_experts} experts" if experts else ""
    letters = zip(config.per_layer("pattern"), config.per_layer("attention"), config.per_layer("window"))
    vocabulary = f"vocabulary {config.vocab_size} -> {config.padded_vocab_size}"
    rows = {
        "layers": f"{config.n_layer} ({' '.join(map(''.join, letters))})",
        "width": f"n_embd {config.n_embd}, {config.n_head} heads x {config.head_dim}, {vocabulary}",
        "experts": f"{config.describe_experts()}, top-{config.top_k}, router {config.router}",
        **{f"  {kind}": f"{count:,}" for kind, count in counts.items() if kind not in ("total", "active")},
        "parameters": f"{total:,} total, {counts['active']:,} active per token; "
                      f"{total - experts:,} outside experts{per_expert}",
        "FLOPs per token": f"{training / 3:,.0f} forward, {training:,.0f} training, at {seq_len} tokens per row",
        "weights + gradients": f"{8 * total / 2**20:,.1f} MiB in fp32",
        "KV cache": f"{cache_bytes_per_token(config):,} bytes per token",
        "activations": f"{activation_bytes(config, seq_len) / 2**20:,.1f} MiB per row of {seq_len} tokens",
    }
    if config.depth != "stack":
        rows["depth"] = config.describe_depth(seq_len)
    return "\n".join(f"{label:<20} {text}" for label, text in rows.items())
