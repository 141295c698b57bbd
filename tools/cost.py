"""What a run costs before it starts: the model card, counted on the meta device, and each rank's part of a plan."""

import torch
from torch import Tensor

import model
from distributed import bucket_bytes, make_buckets
from model import DTYPES, Config, build, flops_per_token

# -----------------------------------------------------------------------------
# The model card


def model_card(config: Config, seq_len: int) -> str:
    """Parameters in total, active and per kind, FLOPs per token, memory, as text."""
    counts, training = model.count_parameters(config), flops_per_token(config, seq_len)
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


# -----------------------------------------------------------------------------
# The plan of a run on several ranks


def plan(config: Config, hp, recipe, world_size: int) -> dict:
    """Bytes and FLOPs of one step on the busiest of world_size ranks.

    Rings send (W-1)/W of a buffer twice: out as gradients, back as values. With experts shared by N ranks, k rows per
    token and routed layer travel, of which (N-1)/N leave the rank at even load: out and back, forward and backward. Of
    an n-gram table the rows of a rank's tokens go to all others, and the new ones back from the owner: a row for each
    token is the most there can be."""
    parts = hp.expert_parallel
    buckets = make_buckets(config, world_size, parts, hp.bucket_mb)
    ring, held, state, newton_schulz = ([0] * world_size for _ in range(4))
    for bucket in buckets:
        numel = bucket_bytes(bucket.slabs) // 4
        sent = 0 if bucket.is_rows else 2 * 4 * bucket.part * (len(bucket.ranks) - 1)
        for rank in bucket.ranks:
            ring[rank] += sent
            held[rank] += numel
        for slab, owner in zip(bucket.slabs, bucket.owners):
            state[owner] += 4 * slab.numel * (recipe.matrix_state if slab.is_matrix else 2)
            state[owner] += 4 * slab.numel // config.n_embd * bucket.is_rows  # the last step of each row
            newton_schulz[owner] += slab.cost * recipe.newton_schulz * slab.is_matrix

    dense = [bucket for bucket in buckets if not bucket.is_rows]
    numel, numel_dense = (sum(bucket_bytes(bucket.slabs) for bucket in some) // 4 for some in (buckets, dense))
    tokens = hp.batch_tokens / world_size
    row_bytes = [8 + 4 * config.n_embd, 4 * config.n_embd * world_size]  # a token's number and gradient; its new row
    rows = 4 * tokens * config.top_k * routed_runs(config) * config.n_embd * DTYPES[config.dtype].itemsize
    return {
        "parameters": numel,
        "held": max(held),
        "all_reduce_bytes": round(2 * 4 * numel_dense * (world_size - 1) / world_size),
        "sent_bytes": max(ring),
        "rows_bytes": round(rows * (parts - 1) / parts),
        "table_bytes": round(tokens * sum(row_bytes) * (world_size - 1) * (len(buckets) - len(dense))),
        "optimizer_bytes": max(state),
        "optimizer_bytes_total": sum(state),
        "newton_schulz_flops": max(newton_schulz),
        "newton_schulz_total": sum(newton_schulz),
        "model_flops": round(flops_per_token(config, hp.seq_len) * tokens),
        "buckets": buckets,
    }


def routed_runs(config: Config) -> float:
    """Routed layers that a token passes, each as often as it runs."""
    runs = getattr(config, "layer_runs", [1] * config.n_layer)
    return sum(times for times, letter in zip(runs, config.per_layer("pattern")) if letter == "M")


def plan_text(config: Config, hp, recipe, world_size: int) -> str:
    """The plan as text: the optimizer's and the communication's part of the model card. Raises UserError."""
    recipe.check(config, hp, world_size, "cpu")
    p, mib = plan(config, hp, recipe, world_size), lambda number: f"{number / 2**20:,.1f} MiB"
    sizes = [4 * bucket.part * len(bucket.ranks) for bucket in p["buckets"] if len(bucket.ranks) > 1]
    extra, sign = p["sent_bytes"] - p["all_reduce_bytes"], "+" if p["sent_bytes"] >= p["all_reduce_bytes"] else "-"
    reason = "padding" if hp.expert_parallel == 1 else "padding and experts that stay"
    busiest = p["newton_schulz_flops"] / max(p["newton_schulz_total"] / world_size, 1)
    divides = hp.batch_rows % world_size == 0
    refused = "" if divides else f" (a run is refused: its {hp.batch_rows} rows per step do not divide)"
    rows = {
        "ranks": f"{world_size}, experts shared by {hp.expert_parallel}; "
                 f"{hp.batch_tokens // world_size:,} tokens of each step per rank{refused}",
        "parameters": f"{p['parameters']:,}, at most {p['held']:,} on a rank",
        "buckets": f"{len(sizes)} travel" + (f", {mib(min(sizes))} to {mib(max(sizes))} each" if sizes else ""),
        "sent per step": f"{mib(p['sent_bytes'])} per rank: a plain all-reduce's {mib(p['all_reduce_bytes'])} "
                         f"{sign} {mib(abs(extra))} of {reason}",
        "rows exchanged": f"{mib(p['rows_bytes'])} per rank and step at even load",
        "rows of n-grams": f"at most {mib(p['table_bytes'])} per rank and step",
        "optimizer state": f"{mib(p['optimizer_bytes'])} per rank, {mib(p['optimizer_bytes_total'])} in the world",
        "Newton-Schulz": f"{p['newton_schulz_flops'] / 1e9:,.2f} GFLOPs per rank and step, "
                         f"{100 * p['newton_schulz_flops'] / p['model_flops']:.2f}% of forward + backward; "
                         f"the busiest rank has {busiest:.2f} of the mean",
    }  # fmt: skip
    return "\n".join(f"{label:<20} {text}" for label, text in rows.items())
