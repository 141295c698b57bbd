"""Scale on paper: what a step of this code would take, send and hold, on 1 GPU to 1,024 and with 124M to 100B
parameters.

    python benchmarks/scaling.py                                 # table, where each scheme stops, scaling.png
    python benchmarks/scaling.py --gpu H200 --models 30x3584-e128k4 --scaling weak --json rows.json

Nothing here is measured on a cluster. Bytes, optimizer state and Newton-Schulz FLOPs are those of cost.plan, parameters
those of model.count_parameters, activations those of cost.activation_bytes; this file adds seconds. Every number that
it divides by is a flag whose help names its source.

Three schemes, as many as --expert_parallel can express:
  replicated  every rank holds all experts; their gradients and values travel
  node        the ranks of a node share the experts; rows travel over NVLink, gradients to the other nodes
  spread      as many ranks share the experts as divide both the ranks and the experts; rows cross nodes

A step (seconds; rates are achieved ones, nominal times a fraction):
  compute      model FLOPs of a rank / rate; where experts are shared, the busiest rank's experts do --imbalance times
               the mean
  memory       held weights to bf16 and their gradients back to fp32 in each micro-batch, copies into buckets and out of
               them, the optimizers' passes on the slowest owner: bytes / HBM rate
  rows         four all-to-alls of rows and one of counts per routed layer and micro-batch; on the critical path,
               nothing hides them
  gradients    each bucket leaves when the last backward has reached it and the one before has left; transfers that
               outlast backward are waited for
  updates      Newton-Schulz on the slowest owner, at a rate that grows with the matrix; then the passes
  values       each bucket goes back when its slowest owner has updated it, while the next is updated; the last one is
               waited for
The GPU and its link are two clocks (`two_clocks`), so the tail bucket, whose gradients come last, is exposed by itself.
A ring's time is its hops plus the bytes that a rank sends over the slowest link. Between nodes that is --network times
the ranks that the ring has in a node: each of them leads another ring out through its own adapter. MFU counts active
parameters, as training does.

Memory of a rank: fp32 weights, the buckets' buffers (Transfer.send_buf and .recv_buf), the optimizer state of the
busiest owner, --reserve, and the larger of two moments: backward (all gradients and the activations of a micro-batch,
the largest that fits up to --micro_batch_tokens: an upper bound, as gradients come while activations go) and update
(the temporaries of Muon.step, which takes up to MAX_BATCH_NUMEL elements of a bucket's matrices of one shape at once,
and the gradients that do not travel).

Not modelled: stragglers, congestion and rail mismatch in the network, collectives slowing the kernels beside them,
trees and NVLink SHARP, host synchronisation in each exchange of rows, uneven experts other than by --imbalance, data
loading, checkpoints, validation, the shorter attention windows at a run's start, and that a larger batch (weak scaling)
needs more tokens for the same loss.

One check against hardware: modded-nanogpt's record 23 (nearly the dense twin of the speedrun, the same batch, 8 x H100)
took 178.7 s for 1,770 steps; test_scaling.py holds the prediction to within a fifth of that. The rows with experts have
no such check."""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import facts  # noqa: E402
import settings  # noqa: E402
import train_muon  # noqa: E402
from cli import Parser, UserError, command_line, positive  # noqa: E402
from distributed import Bucket, Slab, World, backward_order  # noqa: E402
from model import DTYPES, Config, build, count_parameters, flops_per_token  # noqa: E402
from tools import cost  # noqa: E402
from tools.cost import activation_bytes  # noqa: E402
from tools.plots import COLOURS, open_figure  # noqa: E402
from train_muon import MUON, MuonConfig  # noqa: E402

# -----------------------------------------------------------------------------
# The machine: every field is a flag

# NVIDIA's data sheets of the SXM boards: HBM in bytes and bytes/s, NVLink per GPU and direction (half of "900 GB/s")
GPUS = {
    "H100": dict(peak=facts.PEAK_FLOPS["H100"], memory=80e9, hbm=3.35e12, nvlink=450e9),
    "H200": dict(peak=facts.PEAK_FLOPS["H200"], memory=141e9, hbm=4.8e12, nvlink=450e9),
}


def quantity(default: float | None, source: str, least: float = 1, most: float = math.inf):
    return dataclasses.field(default=default, metadata=dict(source=source, least=least, most=most))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU, its links, and how much of their nominal rates is reached."""

    peak: float = quantity(None, "FLOP/s of dense bf16 (NVIDIA data sheet)")
    memory: float = quantity(None, "bytes of HBM (NVIDIA data sheet)")
    hbm: float = quantity(None, "bytes/s of HBM (NVIDIA data sheet)")
    nvlink: float = quantity(None, "bytes/s per GPU and direction inside a node (NVIDIA data sheet)")
    network: float = quantity(
        50e9, "bytes/s per GPU and direction between nodes: 400 Gb/s InfiniBand NDR (NVIDIA ConnectX-7 data sheet)"
    )
    efficiency: float = quantity(
        0.46,
        "share of the peak in forward and backward of a dense model: nanochat d18, 46%% MFU on H100 (its dev/LOG.md, "
        "2026-02-19)",
        least=0.01,
        most=1,
    )
    moe_efficiency: float = quantity(
        0.35,
        "the same with routed layers: nanochat d18 with 8 experts, 35%% (same entry); Megatron-Core reports 39 to "
        "49%% for MoEs of 57B and 141B (2504.14960)",
        least=0.01,
        most=1,
    )
    ns_efficiency: float = quantity(
        0.17,
        "share of the peak in Newton-Schulz of 768-wide matrices: modded-nanogpt's 560 + 545 us per step on "
        "8 x H100, for 190 GFLOPs per GPU by our count; taken to grow with the smaller side up to --efficiency "
        "(assumed)",
        least=0.01,
        most=1,
    )
    hbm_fraction: float = quantity(
        0.8, "share of --hbm that copies and element-wise kernels reach (assumed)", least=0.01, most=1
    )
    link_fraction: float = quantity(
        0.8, "share of --nvlink and --network that collectives reach (assumed)", least=0.01, most=1
    )
    base_latency: float = quantity(
        8.4e-6, "seconds before a collective moves anything (NCCL src/graph/tuning.cc, ring, Simple)", least=0, most=1
    )
    nvlink_hop: float = quantity(3.4e-6, "seconds per hop of a ring inside a node (same table)", least=0, most=1)
    network_hop: float = quantity(14e-6, "seconds per hop between nodes (same table)", least=0, most=1)
    imbalance: float = quantity(
        1.14,
        "rows of the busiest rank over the mean, where experts are shared: max/mean load of noisy top-k with its "
        "balance losses, measured by Shazeer et al. (1701.06538); your run logs moe/load_max_over_mean",
    )
    reserve: float = quantity(
        5e9,
        "bytes that nothing below counts: CUDA and NCCL, a chunk of logits (up to 3.2 GB), fragments (assumed)",
        least=0,
    )
    gpus_per_node: int = quantity(8, "GPUs that NVLink joins (HGX and DGX boards)")


def nodes_of(ranks: tuple[int, ...], machine: Machine) -> int:
    return len({rank // machine.gpus_per_node for rank in ranks})


def ring_seconds(ranks: tuple[int, ...], part: int, machine: Machine) -> float:
    """One reduce-scatter, or one all-gather, of fp32 buffers with `part` elements for each of `ranks`."""
    n, nodes = len(ranks), nodes_of(ranks, machine)
    if n == 1:
        return 0.0
    rate = machine.nvlink if nodes == 1 else min(machine.nvlink, machine.network * n / nodes)
    hops = (n - nodes) * machine.nvlink_hop + (nodes - 1) * machine.network_hop
    return machine.base_latency + hops + 4 * part * (n - 1) / (rate * machine.link_fraction)


def rows_seconds(leaving: float, exchanges: int, parts: int, machine: Machine) -> float:
    """All-to-alls among `parts` ranks in a row, of which a rank sends `leaving` bytes to others in all; near and far
    bytes move at once."""
    if parts == 1:
        return 0.0
    neighbours = math.gcd(parts, machine.gpus_per_node)
    far = leaving * (parts - neighbours) / (parts - 1)
    hop = machine.network_hop if parts > neighbours else machine.nvlink_hop
    seconds = max((leaving - far) / machine.nvlink, far / machine.network) / machine.link_fraction
    return exchanges * (machine.base_latency + hop) + machine.imbalance * seconds


# -----------------------------------------------------------------------------
# The ladder of models, and the schemes

SPEEDRUN = dict(window="LSSS")  # with Config's defaults: the speedrun's model at other sizes
LADDER = {  # layers x width, then e experts, k of them per token; k * hidden = 4 * width
    "12x768-dense": Config(**SPEEDRUN, pattern="D", num_experts=1, top_k=1),  # 124M active: the class of GPT-2 small
    "12x768-e8k2": Config(**SPEEDRUN),
    "16x1024-e16k2": Config(**SPEEDRUN, n_layer=16, n_embd=1024, n_head=8, num_experts=16),
    "24x1536-e32k4": Config(**SPEEDRUN, n_layer=24, n_embd=1536, n_head=12, num_experts=32, top_k=4),
    "24x2048-e64k8": Config(**SPEEDRUN, n_layer=24, n_embd=2048, n_head=16, num_experts=64, top_k=8),
    "32x3072-e64k4": Config(**SPEEDRUN, n_layer=32, n_embd=3072, n_head=24, num_experts=64, top_k=4),
    "30x3584-e128k4": Config(**SPEEDRUN, n_layer=30, n_embd=3584, n_head=28, num_experts=128, top_k=4),  # 100B
}

SCHEMES = {  # name -> ranks that share the experts: (experts, ranks, GPUs per node) -> expert_parallel
    "replicated": lambda experts, ranks, per_node: 1,
    "node": lambda experts, ranks, per_node: (
        math.gcd(experts, ranks, per_node) if ranks > per_node else math.gcd(experts, ranks)
    ),
    "spread": lambda experts, ranks, per_node: math.gcd(experts, ranks),
}


counts_of, flops_of = functools.cache(count_parameters), functools.cache(flops_per_token)


@functools.cache
def matrix_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Parameter name -> the shape of its matrices."""
    with torch.device("meta"):
        model = build(config)
    return {name: tuple(p.shape[-2:]) for name, p in model.named_parameters()}


def parameter_of(slab: Slab) -> str:
    return slab.name.partition("[")[0]


@functools.cache
def planned(config: Config, world_size: int, parts: int, seq_len: int, bucket_mb: float) -> dict:
    """cost.plan of one row per rank (what depends on tokens grows with them, the rest does not), the rank that sends
    most, and what its buckets take there besides weights and state."""
    hp = MuonConfig(
        batch_tokens=seq_len * world_size, seq_len=seq_len, val_tokens=0, expert_parallel=parts, bucket_mb=bucket_mb
    )
    p = cost.plan(config, hp, MUON, world_size)
    busiest = busiest_rank(p["buckets"])
    own = [bucket for bucket in p["buckets"] if busiest in bucket.ranks]
    staying = sum(slab.numel for bucket in own if len(bucket.ranks) == 1 for slab in bucket.slabs)
    update = max(largest_update(bucket, matrix_shapes(config)) for bucket in p["buckets"])
    return p | {
        "busiest": busiest,
        "buffer_bytes": sum(map(buffer_bytes, own)),
        "staying": staying,
        "largest_update": update,
    }


def busiest_rank(buckets: list[Bucket]) -> int:
    """The rank that sends most: plan()'s sent_bytes are its."""
    sent = Counter()
    for bucket in buckets:
        elements = bucket.part * (len(bucket.ranks) - 1)
        for rank in bucket.ranks:
            sent[rank] += elements
    return max(sent, key=lambda rank: (sent[rank], -rank))


def buffer_bytes(bucket: Bucket) -> int:
    """Of Transfer.send_buf and Transfer.recv_buf on each of its ranks."""
    return 4 * bucket.part * (len(bucket.ranks) + 1) if len(bucket.ranks) > 1 else 0


def largest_update(bucket: Bucket, shapes: dict[str, tuple[int, int]]) -> int:
    """Elements that one owner hands to Newton-Schulz at once: all of a shape, up to MAX_BATCH_NUMEL."""
    together, matrices = Counter(), [slab for slab in bucket.slabs if slab.is_matrix]
    for slab, owner in zip(bucket.slabs, bucket.owners):
        if slab.is_matrix:
            together[owner, shapes[parameter_of(slab)]] += slab.numel
    most = max(train_muon.MAX_BATCH_NUMEL, max((slab.numel for slab in matrices), default=0))
    return min(most, max(together.values(), default=0))


# -----------------------------------------------------------------------------
# Memory


@functools.cache
def kept_activations(config: Config) -> tuple[float, float]:
    """Bytes kept for backward: (whatever the tokens, per token). The first are the bf16 copies of weights and the
    head's gradient."""
    short, long = 136, 264
    a, b = activation_bytes(config, short), activation_bytes(config, long)
    return a - (b - a) / (long - short) * short, (b - a) / (long - short)


MUON_TEMPORARIES = (
    14  # bytes per element in Muon.step: Nesterov 4, batch 2, X 2, next X 2, A 2, B 2 (square matrices; 12 at 1:2)
)


def memory(config: Config, p: dict, parts: int, tokens: int, machine: Machine) -> dict[str, float]:
    """Bytes on the busiest rank, with micro-batches of `tokens`, when it holds most."""
    fixed, per_token = kept_activations(config)
    itemsize = DTYPES[config.dtype].itemsize
    elsewhere = itemsize * counts_of(config)["expert"] * (1 - 1 / parts)  # copies of experts that other ranks hold
    rows = (
        itemsize * config.num_moe_layers * config.top_k * (config.n_embd + 2 * config.hidden_size)
    )  # what experts keep of a token
    uneven = (machine.imbalance - 1) * rows if parts > 1 else 0.0
    always = {
        "weights": 4 * p["held"],
        "buffers": p["buffer_bytes"],
        "optimizer": p["optimizer_bytes"],
        "reserve": machine.reserve,
    }
    backward = {
        "gradients": 4 * p["held"],
        "activations": fixed - elsewhere + tokens * (per_token + uneven),
        "temporaries": 0,
    }
    update = {"gradients": 4 * p["staying"], "activations": 0, "temporaries": MUON_TEMPORARIES * p["largest_update"]}
    return always | max(backward, update, key=lambda moment: sum(moment.values()))


# -----------------------------------------------------------------------------
# Time

# bytes per element, read and written, of what PyTorch runs one after the other
CAST = 12  # a weight to bf16 in forward (4 + 2), its gradient to fp32 in backward (2 + 4)
ACCUMULATE = 12  # grad += in every micro-batch but the first
COPY = 8  # into a bucket or out of it
ADAMW = 28  # fused: read weight, gradient and two moments, write all but the gradient
MUON_PASSES = 68  # Muon.step: lerp 12, Nesterov 12, cast and cat 10, any 4, times seen 4, decay 8, cast and add 18


class Leg(NamedTuple):
    """One bucket on the busiest rank."""

    ready: float  # share of backward after which its gradients are there
    ring: float  # seconds of one way
    pack: float  # seconds of copies: gradients in, ...
    give: float  # ... its own new values in, ...
    unpack: float  # ... the others' new values out
    update: float  # seconds until its slowest owner has updated it, after the bucket before


class Legs(NamedTuple):
    legs: list[Leg]
    newton_schulz: float  # seconds of the busiest owner
    passes: float  # its seconds over weights and optimizer state


def newton_schulz_rate(side: int, machine: Machine) -> float:
    """FLOP/s on matrices whose smaller dimension is `side`."""
    return machine.peak * min(machine.efficiency, machine.ns_efficiency * side / 768)


@functools.cache
def make_legs(config: Config, world_size: int, parts: int, seq_len: int, bucket_mb: float, machine: Machine) -> Legs:
    p = planned(config, world_size, parts, seq_len, bucket_mb)
    buckets, me, shapes, hbm = p["buckets"], p["busiest"], matrix_shapes(config), machine.hbm * machine.hbm_fraction
    active = {
        "matrix": 1,
        "head": 1,
        "router": 1,
        "expert": config.top_k / config.num_experts,
    }  # share of a weight's FLOPs; tables have none

    work = Counter()  # of backward, by the moment at which gradients come
    for slab in itertools.chain.from_iterable(bucket.slabs for bucket in buckets):
        work[backward_order(slab)] += slab.numel * active.get(slab.kind, 0)
    moments = sorted(work)
    reached = dict(zip(moments, itertools.accumulate(work[moment] for moment in moments)))

    legs, busy, done = [], np.zeros((2, world_size)), 0.0  # seconds so far of each owner: Newton-Schulz, passes
    for bucket in buckets:
        own = 0
        for slab, owner in zip(bucket.slabs, bucket.owners):
            own += slab.numel * (owner == me)
            busy[1, owner] += slab.numel * (MUON_PASSES if slab.is_matrix else ADAMW) / hbm
            if slab.is_matrix:
                rate = newton_schulz_rate(min(shapes[parameter_of(slab)]), machine)
                busy[0, owner] += MUON.newton_schulz * slab.cost / rate
        if me in bucket.ranks:
            slowest, travels = float(busy[:, bucket.ranks].sum(0).max()), len(bucket.ranks) > 1
            copy = COPY * travels / hbm
            held = sum(slab.numel for slab in bucket.slabs)
            ready = max(reached[backward_order(slab)] for slab in bucket.slabs) / reached[moments[-1]]
            legs.append(
                Leg(
                    ready,
                    ring_seconds(bucket.ranks, bucket.part, machine),
                    copy * held,
                    copy * own,
                    copy * (held - own),
                    max(0.0, slowest - done),
                )
            )
            done = max(done, slowest)
    total = busy.sum(0)
    legs[-1] = legs[-1]._replace(
        update=legs[-1].update + float(total.max()) - done
    )  # a slower owner may sit in a bucket of others
    return Legs(legs, *map(float, busy[:, total.argmax()]))


def two_clocks(legs: list[Leg], backward: float) -> float:
    """Seconds from the start of the last backward to the end of the step: the clock of the GPU, and that of the link,
    which sends one bucket after the other, first all gradients, then all values."""
    gpu = link = spent = 0.0
    arrived, returned = [], []
    for leg in legs:
        gpu += max(0.0, leg.ready - spent) * backward + leg.pack
        spent = max(spent, leg.ready)
        link = max(link, gpu) + leg.ring if leg.ring else link
        arrived.append(link if leg.ring else 0.0)
    gpu += (1 - spent) * backward
    for leg, there in zip(legs, arrived):
        gpu = max(gpu, there) + leg.update + leg.give
        link = max(link, gpu) + leg.ring if leg.ring else link
        returned.append(link if leg.ring else 0.0)
    for leg, there in zip(legs, returned):
        gpu = max(gpu, there) + leg.unpack
    return gpu


def seconds_of_step(
    config: Config,
    world_size: int,
    parts: int,
    rows: int,
    micro_batches: int,
    seq_len: int,
    bucket_mb: float,
    machine: Machine,
) -> dict[str, float]:
    """Where a step of `rows` rows per rank goes; the values add up to it."""
    p, hbm = planned(config, world_size, parts, seq_len, bucket_mb), machine.hbm * machine.hbm_fraction
    legs, newton_schulz, passes = make_legs(config, world_size, parts, seq_len, bucket_mb, machine)
    in_experts = (
        6 * counts_of(config)["expert"] * config.top_k / config.num_experts / flops_of(config, seq_len)
    )  # share of the FLOPs
    uneven = (machine.imbalance - 1) * in_experts if parts > 1 else 0.0
    rate = machine.peak * (machine.moe_efficiency if config.num_moe_layers else machine.efficiency)
    compute = p["model_flops"] * rows / rate * (1 + uneven)
    backward = 2 / 3 * compute / micro_batches  # of the last micro-batch: gradients leave then, not before
    tail = two_clocks(legs, backward)
    copies = sum(leg.pack + leg.give + leg.unpack for leg in legs)
    return {
        "compute": compute,
        "newton_schulz": newton_schulz,
        "memory": p["held"] * (CAST * micro_batches + ACCUMULATE * (micro_batches - 1)) / hbm + copies + passes,
        "rows": rows_seconds(p["rows_bytes"] * rows, 5 * config.num_moe_layers * micro_batches, parts, machine),
        "waiting": max(0.0, tail - backward - copies - sum(leg.update for leg in legs)),
    }


# -----------------------------------------------------------------------------
# Rows of the table


BOUND = {
    "compute": "compute",
    "newton_schulz": "Newton-Schulz",
    "memory": "memory passes",
    "rows": "rows between ranks",
    "waiting": "gradients and values",
}


def predict(config: Config, world_size: int, parts: int, batch_tokens: int, args: argparse.Namespace) -> dict:
    """A model on world_size ranks of which `parts` share the experts. Raises UserError if the batch does not divide."""
    machine = args.machine
    p = planned(config, world_size, parts, args.seq_len, args.bucket_mb)
    world, room = World(0, world_size, torch.device("cpu")), args.micro_batch_tokens
    while True:  # the largest micro-batch that fits, as a user would look for it
        hp = MuonConfig(batch_tokens=batch_tokens, seq_len=args.seq_len, micro_batch_tokens=room, val_tokens=0)
        micro_rows = settings.micro_batch_rows(batch_tokens // args.seq_len, hp, world)
        held = memory(config, p, parts, micro_rows * args.seq_len, machine)
        if sum(held.values()) <= machine.memory or micro_rows == 1:
            break
        room = (micro_rows - 1) * args.seq_len
    rows = batch_tokens // args.seq_len // world_size
    seconds = seconds_of_step(
        config, world_size, parts, rows, rows // micro_rows, args.seq_len, args.bucket_mb, machine
    )
    step, counts = sum(seconds.values()), counts_of(config)
    return {
        "parameters": counts["total"],
        "active": counts["active"],
        "world_size": world_size,
        "expert_parallel": parts,
        "batch_tokens": batch_tokens,
        "micro_batch_tokens": micro_rows * args.seq_len,
        "micro_batches": rows // micro_rows,
        "step_seconds": step,
        "seconds": seconds,
        "exposed": (seconds["rows"] + seconds["waiting"]) / step,
        "sent_bytes": p["sent_bytes"] + p["rows_bytes"] * rows,
        "newton_schulz_flops": p["newton_schulz_flops"],
        "memory_bytes": sum(held.values()),
        "memory": held,
        "fits": sum(held.values()) <= machine.memory,
        "mfu": p["model_flops"] * rows / (machine.peak * step),
        "tokens_per_second": batch_tokens / step,
        "bound": BOUND[max(seconds, key=seconds.get)],
    }


def parts_of(scheme: str, name: str, world_size: int, machine: Machine) -> int:
    return SCHEMES[scheme](LADDER[name].num_experts, world_size, machine.gpus_per_node)


def all_rows(args: argparse.Namespace) -> list[dict]:
    """Each way of placing experts once; where the batch has no rows for so many ranks there is none."""
    rows = []
    for name, scaling, world_size in itertools.product(args.models, args.scaling, args.world_sizes):
        tokens = args.batch_tokens if scaling == "strong" else args.tokens_per_gpu * world_size
        for parts in dict.fromkeys(parts_of(scheme, name, world_size, args.machine) for scheme in SCHEMES):
            try:
                rows.append(
                    {"model": name, "scaling": scaling} | predict(LADDER[name], world_size, parts, tokens, args)
                )
            except UserError:
                break
    return rows


def select(rows: list[dict], name: str, scaling: str, scheme: str, machine: Machine) -> list[dict]:
    """A scheme's rows by number of ranks; schemes that place experts alike share them."""
    return [
        row
        for row in rows
        if (row["model"], row["scaling"]) == (name, scaling)
        and row["expert_parallel"] == parts_of(scheme, name, row["world_size"], machine)
    ]


def stop(rows: list[dict], world_sizes: list[int]) -> tuple[int, str]:
    """(the last number of ranks that is worth it, why no more); 0 if none is.

    Worth it: it fits, and MFU is at least half of the best on fewer ranks. Why: memory, or what costs most time besides
    compute."""
    best, last, why = 0.0, 0, ""
    for row in rows:
        if not row["fits"]:
            why = "memory"
        elif row["mfu"] < best / 2:
            why = BOUND[max(row["seconds"].keys() - {"compute"}, key=row["seconds"].get)]
        else:
            best, last, why = max(best, row["mfu"]), row["world_size"], ""
    if not last:
        return 0, f"at least {min(row['memory_bytes'] for row in rows) / 1e9:,.0f} GB per GPU"
    return last, why or ("no more rows" if last < max(world_sizes) else "")


def stop_lines(rows: list[dict], args: argparse.Namespace) -> list[str]:
    """One line per scheme and scaling: for each model the last number of GPUs, and why no more."""
    lines = []
    for scaling, scheme in itertools.product(args.scaling, SCHEMES):
        words = []
        for name in args.models:
            mine = select(rows, name, scaling, scheme, args.machine)
            if not mine or (scheme != "replicated" and LADDER[name].num_experts == 1):
                continue
            last, why = stop(mine, args.world_sizes)
            words.append(f"{name} {f'up to {last}' if last else 'nowhere'}" + (f" ({why})" if why else ""))
        if words:
            lines.append(f"{scheme}, {scaling}: " + ", ".join(words))
    return lines


def table(rows: list[dict]) -> str:
    lines = []
    for name, group in itertools.groupby(rows, key=lambda row: row["model"]):
        group = list(group)
        lines += [
            "",
            f"{name}: {short(group[0]['parameters'])} parameters, {short(group[0]['active'])} active",
            f"{'scaling':<8}{'GPUs':>5}{'experts':>9}{'tokens':>9}{'micro':>8}{'step':>14}"
            f"{'exposed':>9}{'sent/GPU':>10}{'memory/GPU':>12}"
            f"{'fits':>6}{'MFU':>7}  bound by",
        ]
        for row in group:
            shared = "all here" if row["expert_parallel"] == 1 else f"over {row['expert_parallel']}"
            lines.append(
                f"{row['scaling']:<8}{row['world_size']:>5}{shared:>9}{short(row['batch_tokens']):>9}"
                f"{short(row['micro_batch_tokens']):>8}"
                f"{1000 * row['step_seconds']:>11,.1f} ms{row['exposed']:>9.1%}{row['sent_bytes'] / 1e9:>7,.2f} GB"
                f"{row['memory_bytes'] / 1e9:>9,.1f} GB{'yes' if row['fits'] else 'NO':>6}"
                f"{row['mfu']:>7.1%}  {row['bound']}"
            )
    return "\n".join(lines[1:])


def short(number: float) -> str:
    """1,234,567,890 -> 1.2B"""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{letter}" if number < 100 * unit else f"{number / unit:.0f}{letter}"
    return f"{number:.0f}"


# -----------------------------------------------------------------------------
# The picture


def draw(rows: list[dict], args: argparse.Namespace, path: Path):
    """A column per model (the last and at most three before): MFU under each scaling, and memory per GPU."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    names = [name for name in args.models if any(row["model"] == name for row in rows)]
    names = [names[round(i * (len(names) - 1) / 3)] for i in range(4)] if len(names) > 4 else names
    looks = dict(
        zip(SCHEMES, zip(COLOURS, ("o", "s", "^"), (7, 5, 4)))
    )  # where schemes coincide, the larger marker shows behind
    panels = [(scaling, "mfu") for scaling in args.scaling] + [(args.scaling[-1], "memory_bytes")]
    with open_figure(path) as figure:
        figure.set_size_inches(1.2 + 2.8 * len(names), 0.9 + 2.5 * len(panels))
        axes = figure.subplots(len(panels), len(names), sharex=True, sharey="row", squeeze=False)
        for (scaling, key), line in zip(panels, axes):
            for name, ax in zip(names, line):
                for scheme, (colour, marker, size) in looks.items():
                    mine = (
                        select(rows, name, scaling, scheme, args.machine)
                        if scheme == "replicated" or LADDER[name].num_experts > 1
                        else []
                    )
                    xs, ys = (
                        [row["world_size"] for row in mine],
                        [row[key] * (100 if key == "mfu" else 1e-9) for row in mine],
                    )
                    ax.plot(xs, ys, color=colour, linewidth=1.3, alpha=0.8)
                    for fits in (True, False):
                        kept = [i for i, row in enumerate(mine) if row["fits"] == fits]
                        ax.plot(
                            [xs[i] for i in kept],
                            [ys[i] for i in kept],
                            marker,
                            color=colour,
                            markersize=size,
                            linestyle="none",
                            markerfacecolor=colour if fits else "white",
                        )
                ax.set_xscale("log", base=2)
                ax.xaxis.set_major_locator(FixedLocator([2**i for i in range(0, 21, 2)]))
                ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
                ax.xaxis.set_minor_locator(NullLocator())
                ax.axvline(args.machine.gpus_per_node, color="#8a929c", linewidth=0.8, linestyle=(0, (1, 2)))
                least, most = args.world_sizes[0], args.world_sizes[-1]
                ax.set_xlim(least / 1.4, 1.4 * most)
                ends = max(
                    (row["world_size"] for row in rows if (row["model"], row["scaling"]) == (name, scaling)),
                    default=most,
                )
                if ends < most:
                    ax.axvspan(1.4 * ends, 1.4 * most, color="#f3f4f6", zorder=0)
                    ax.text(
                        1.4 * math.sqrt(ends * most),
                        0.5,
                        "the batch has\nno more rows",
                        color="#57606a",
                        fontsize=9.5,
                        ha="center",
                        va="center",
                        transform=ax.get_xaxis_transform(),
                    )
                if key == "mfu":
                    ax.set_ylim(bottom=0)
                else:
                    ax.set_yscale("log")
                    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
                    ax.axhline(args.machine.memory / 1e9, color="#8a929c", linewidth=1, linestyle=(0, (4, 3)))
        for name, ax in zip(names, axes[0]):
            counts = next(row for row in rows if row["model"] == name)
            ax.set_title(
                f"{name}\n{short(counts['parameters'])} parameters, {short(counts['active'])} active", fontsize=10
            )
        for (scaling, key), line in zip(panels, axes):
            strong, weak = f"{short(args.batch_tokens)} tokens/step", f"{short(args.tokens_per_gpu)} tokens/GPU"
            unit, amount = "MFU (%)" if key == "mfu" else "GB per GPU", strong if scaling == "strong" else weak
            line[0].set_ylabel(f"{unit}\n{scaling}: {amount}", fontsize=11)
        lines = f"dotted: a node of {args.machine.gpus_per_node}; dashed: {args.machine.memory / 1e9:.0f} GB"
        figure.supxlabel(f"GPUs ({args.gpu}; {lines})", fontsize=11)
        says = {
            "replicated": "experts on every GPU",
            "node": "shared inside a node",
            "spread": "shared over all GPUs that divide them",
        }
        handles = [
            Line2D([], [], color=colour, marker=marker, markersize=5, label=says[scheme])
            for scheme, (colour, marker, _) in looks.items()
        ]
        handles.append(
            Line2D(
                [],
                [],
                color="#57606a",
                marker="o",
                markersize=5,
                markerfacecolor="white",
                linestyle="none",
                label="does not fit",
            )
        )
        figure.legend(handles=handles, loc="outside upper center", ncols=4)


# -----------------------------------------------------------------------------
# Command line


def number_in(least: float, most: float, kind: type = float):
    """A flag's parser: a finite number between two others."""

    def parse(text: str):
        value = kind(text)
        if not (math.isfinite(value) and least <= value <= most):
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def writable(text: str) -> Path:
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.absolute().parent} to write {path.name} in")
    return path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags -> their values; `machine` holds those of Machine."""
    speedrun = train_muon.PRESETS["speedrun"]
    parser = Parser(prog="scaling.py", description="Predict step time, bytes sent, memory per GPU and MFU, on paper.")

    def add(name: str, **options):
        parser.add_argument(*sorted({f"--{name}", f"--{name.replace('_', '-')}"}), **options)

    add(
        "models", nargs="+", choices=list(LADDER), default=list(LADDER), metavar="MODEL", help=f"of {', '.join(LADDER)}"
    )
    add(
        "world_sizes",
        nargs="+",
        type=positive,
        default=[2**i for i in range(11)],
        metavar="GPUS",
        help="numbers of GPUs",
    )
    add(
        "scaling",
        nargs="+",
        choices=("strong", "weak"),
        default=["strong", "weak"],
        help="strong: --batch_tokens per step whatever the GPUs; weak: --tokens_per_gpu on each",
    )
    add(
        "batch_tokens",
        type=positive,
        default=speedrun.batch_tokens,
        help="tokens per step of strong scaling (the speedrun's)",
    )
    add(
        "tokens_per_gpu",
        type=positive,
        default=speedrun.batch_tokens // 8,
        help="tokens per step and GPU of weak scaling (the speedrun's on 8)",
    )
    add(
        "seq_len",
        type=positive,
        default=2048,
        help="tokens per row; a rank needs at least one row (the speedrun's 49,152 would end at 8 GPUs)",
    )
    add(
        "micro_batch_tokens",
        type=positive,
        default=speedrun.micro_batch_tokens,
        help="tokens of one forward pass, at most",
    )
    add(
        "bucket_mb",
        type=number_in(0, math.inf),
        default=speedrun.bucket_mb,
        help="MiB of gradients, at least, that travel together",
    )
    add("gpu", choices=list(GPUS), default="H100", help="whose data sheet fills in peak, memory, hbm and nvlink")
    for field in dataclasses.fields(Machine):
        parse_one = number_in(field.metadata["least"], field.metadata["most"], int if field.type is int else float)
        fill = "" if field.default is not None else "; of the --gpu"
        add(
            field.name,
            type=parse_one,
            default=field.default if fill == "" else argparse.SUPPRESS,
            metavar=field.name.upper(),
            help=field.metadata["source"] + fill,
        )
    add("out", type=writable, default=Path(__file__).with_name("scaling.png"), help="where the picture goes")
    add("json", type=writable, metavar="FILE", help="write all rows there too")
    args = parser.parse_args(argv)
    values = GPUS[args.gpu] | {
        field.name: getattr(args, field.name) for field in dataclasses.fields(Machine) if field.name in args
    }
    args.machine, args.world_sizes, args.models = (
        Machine(**values),
        sorted(set(args.world_sizes)),
        [n for n in LADDER if n in args.models],
    )
    for tokens in (args.batch_tokens, args.tokens_per_gpu):
        if tokens % args.seq_len:
            parser.error(f"argument --seq_len: {args.seq_len} does not divide {tokens} tokens into rows")
    return args


@command_line("scaling.py")
def main():
    args = parse()
    rows = all_rows(args)
    if not rows:
        mend = "raise --batch_tokens or --tokens_per_gpu, or lower --world_sizes"
        raise UserError(f"no model's batch has a row for each of so many GPUs; {mend}")
    stops = stop_lines(rows, args)
    print(table(rows))
    print(
        "\nWhere each scheme stops: the last number of GPUs on which it fits and keeps "
        "half of the best MFU on fewer GPUs"
    )
    print("\n".join(stops))
    if args.json:
        args.json.write_text(
            json.dumps({"machine": dataclasses.asdict(args.machine), "rows": rows, "stops": stops}, indent=1) + "\n"
        )
    draw(rows, args, args.out)
    print(f"\n{args.out}")


if __name__ == "__main__":
    main()
