"""What a run costs before it starts: what each rank sends, holds and computes."""

from distributed import bucket_bytes, make_buckets
from model import DTYPES, Config, flops_per_token

# -----------------------------------------------------------------------------
# The plan of a run on several ranks


def plan(config: Config, hp, recipe, world_size: int) -> dict:
    """Bytes and FLOPs of one step on the busiest of world_size ranks.

    Rings send (W-1)/W of a buffer twice: out as gradients, back as values. With experts shared by N ranks, k rows per
    token and routed layer travel, of which (N-1)/N leave the rank at even load: out and back, forward and backward."""
    parts = hp.expert_parallel
    buckets = make_buckets(config, world_size, parts, hp.bucket_mb)
    ring, held, state, newton_schulz = ([0] * world_size for _ in range(4))
    for bucket in buckets:
        sent, numel = 2 * 4 * bucket.part * (len(bucket.ranks) - 1), bucket_bytes(bucket.slabs) // 4
        for rank in bucket.ranks:
            ring[rank] += sent
            held[rank] += numel
        for slab, owner in zip(bucket.slabs, bucket.owners):
            state[owner] += 4 * slab.numel * (recipe.matrix_state if slab.is_matrix else 2)
            newton_schulz[owner] += slab.cost * recipe.newton_schulz * slab.is_matrix

    numel = sum(bucket_bytes(bucket.slabs) for bucket in buckets) // 4
    tokens = hp.batch_tokens / world_size
    rows = 4 * tokens * config.top_k * routed_runs(config) * config.n_embd * DTYPES[config.dtype].itemsize
    return {
        "parameters": numel,
        "held": max(held),
        "all_reduce_bytes": round(2 * 4 * numel * (world_size - 1) / world_size),
        "sent_bytes": max(ring),
        "rows_bytes": round(rows * (parts - 1) / parts),
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
    """The plan as text: the optimizer's and the communication's part of the model card. Raises ConfigError."""
    recipe.check(config, hp, world_size, "cpu")
    p, mib = plan(config, hp, recipe, world_size), lambda number: f"{number / 2**20:,.1f} MiB"
    sizes = [4 * bucket.part * len(bucket.ranks) for bucket in p["buckets"] if len(bucket.ranks) > 1]
    extra, sign = p["sent_bytes"] - p["all_reduce_bytes"], "+" if p["sent_bytes"] >= p["all_reduce_bytes"] else "-"
    reason = "padding" if hp.expert_parallel == 1 else "padding and experts that stay"
    busiest = p["newton_schulz_flops"] / max(p["newton_schulz_total"] / world_size, 1)
    rows = {
        "ranks": f"{world_size}, experts shared by {hp.expert_parallel}; "
                 f"{hp.batch_tokens // world_size:,} tokens of each step per rank",
        "parameters": f"{p['parameters']:,}, at most {p['held']:,} on a rank",
        "buckets": f"{len(sizes)} travel" + (f", {mib(min(sizes))} to {mib(max(sizes))} each" if sizes else ""),
        "sent per step": f"{mib(p['sent_bytes'])} per rank: a plain all-reduce's {mib(p['all_reduce_bytes'])} "
                         f"{sign} {mib(abs(extra))} of {reason}",
        "rows exchanged": f"{mib(p['rows_bytes'])} per rank and step at even load",
        "optimizer state": f"{mib(p['optimizer_bytes'])} per rank, {mib(p['optimizer_bytes_total'])} in the world",
        "Newton-Schulz": f"{p['newton_schulz_flops'] / 1e9:,.2f} GFLOPs per rank and step, "
                         f"{100 * p['newton_schulz_flops'] / p['model_flops']:.2f}% of forward + backward; "
                         f"the busiest rank has {busiest:.2f} of the mean",
    }  # fmt: skip
    return "\n".join(f"{label:<20} {text}" for label, text in rows.items())
