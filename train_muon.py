"""The speedrun: train the model of model.py with Muon on its matrices and AdamW on the rest.

    python train_muon.py --experiment_name muon                                  # one GPU, or a laptop's CPU
    torchrun --standalone --nproc_per_node=8 train_muon.py --experiment_name muon   # 8 GPUs, the same mathematics

The file reads top to bottom: hyperparameters, Muon, schedules, slabs and buckets (who owns what, and what travels together), the
exchange, checkpoints, guards, evaluation, one training step, the loop, the command line. Who wants the speedrun on one GPU reads Muon,
`train_step` and `train`. train_adamw.py is the control: it imports `main` from here and brings another Recipe.

A parameter is cut into slabs (one matrix, or some rows of a table). Each slab has one owner among the ranks: its gradient is summed
there while backward goes on, updated there, and the new values are gathered back while the next slabs are updated, so optimizer state
exists once in the world. Losses are divided by the constant number of micro-batches in the global batch, so gradients add up to the
same sum at any world size. With --expert_parallel N, N ranks share the experts and tokens travel to them (model.py: exchanged).

Sources: Muon (Jordan et al., kellerjordan.github.io/posts/muon), distributed and overlapped as in modded-nanogpt records 6 and 22-24;
owners balanced by cost as in Megatron's layer-wise optimizer, with padding kept small bucket by bucket.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import itertools
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

import data
import logger
import model as model_file
from checkpoint import OTHER_RATES, Saver, last_good, latest_valid_checkpoint, load_checkpoint, slab_part, slab_view
from guards import (
    MISTAKES,
    AsyncHostCopy,
    Ended,
    StepFlags,
    StopSignals,
    Watchdog,
    World,
    agree,
    agree_on,
    gather_objects,
    init_distributed,
)
from logger import PhaseTimer, Run, RunError
from model import DTYPES, GPT, Config, ConfigError, Parser, add_flags, on_cuda_a_kernel

# -----------------------------------------------------------------------------
# Hyperparameters: every field is a flag


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every optimizer's run has. Rates belong to the speedrun's batch; PRESETS hold the tuned values."""

    # the run
    data: str = "data/fineweb"  # folder of shards
    out_dir: str = "logs"
    seed: int = 0  # data order, initial weights, router noise
    device: str | None = None  # None: cuda if there is one, else cpu
    compile: bool | None = None  # None: on CUDA
    # the budget
    num_iterations: int = 1770
    batch_tokens: int = 8 * 48 * 1024  # per optimizer step, over all ranks
    seq_len: int = 48 * 1024
    micro_batch_tokens: int = 48 * 1024  # per rank and forward pass, at most, but a row at least; accumulation fills in the rest
    # evaluation and safety
    val_every: int = 125  # steps; 0 = at the end only
    val_tokens: int = 10_485_760  # 0 = all
    routes_tokens: int = 0  # of them, whose ways through the model each evaluation keeps, for logger.py --routes
    checkpoint_every: int = 0  # steps; 0 = at the end only
    sample_tokens: int = 256  # generated at the end
    warmup_steps: int = 10  # untimed steps on random tokens, undone before the clock starts
    stuck_after: float = 600.0  # seconds without progress on one of several ranks, after which the run ends and names it
    # several ranks
    expert_parallel: int = 1  # ranks that share the experts, which then need not fit on one
    bucket_mb: float = 25.0  # MiB of gradients, at least, that travel together
    overlap: bool = True  # gradients leave during backward; false: after it, one bucket at a time, with the same result
    # domains, where the data folder is a mixture
    domain_weights: str = ""  # name=number,...; "" = the tokens that each domain has
    domain_temperature: float = 1.0  # shares are weights to the power of 1 / this
    domain_epochs: str = ""  # passes over a domain at most: a number for all, or name=number,...; "" = as many as it takes
    round_robin_steps: int = 0  # at first, whose batches have one domain each, all in turn
    domain_coef: float = 0.0  # price of sending a domain's tokens to other experts than its own ...
    domain_steps: int = 0  # ... which is whole at first ...
    domain_anneal_steps: int = 0  # ... and falls to 0 in so many more
    trunk_domain: str = "web"  # has no expert of its own; the others have the first ones, in order
    # schedule
    cooldown_frac: float = 0.4  # last part of the run, over which the rates fall linearly ...
    final_lr_scale: float = 0.1  # ... to this share
    window_start: int = 128  # tokens that a long layer sees at first; grows linearly to Config.window_size
    # AdamW for everything that is not a matrix
    embed_lr: float = 0.6
    ngram_embed_lr: float = 0.6
    value_embed_lr: float = 0.6
    head_lr: float = 0.008
    router_lr: float = 0.005
    scalar_lr: float = 0.04
    beta1: float = 0.8
    beta2: float = 0.95

    def check(self, field: str, fine: bool, legal: str):
        if not fine:
            raise ConfigError(f"{field} is {getattr(self, field)!r}; it must be {legal}")

    def __post_init__(self):
        check = self.check
        for field in ("num_iterations", "batch_tokens", "seq_len", "micro_batch_tokens", "window_start", "expert_parallel"):
            check(field, getattr(self, field) >= 1, "at least 1")
        for field in ("val_every", "val_tokens", "checkpoint_every", "sample_tokens", "warmup_steps", "routes_tokens",
                      "round_robin_steps", "domain_steps", "domain_anneal_steps"):  # fmt: skip
            check(field, getattr(self, field) >= 0, "at least 0")
        for field in dataclasses.fields(self):
            if field.name.endswith("_lr") or field.name.endswith("decay"):
                check(field.name, 0 <= getattr(self, field.name) < 1e30, "at least 0 and below 1e30")
        for field in ("cooldown_frac", "final_lr_scale", "beta1", "beta2"):
            check(field, 0 <= getattr(self, field) <= 1, "between 0 and 1")
        check("domain_coef", 0 <= self.domain_coef < math.inf, "at least 0")
        check("domain_temperature", 0 < self.domain_temperature < math.inf, "above 0")
        check("bucket_mb", 0 <= self.bucket_mb < math.inf, "at least 0")
        check("stuck_after", 1 <= self.stuck_after <= 10**6, "between 1 and 1,000,000 seconds")
        check("num_iterations", self.num_iterations < 10**6, "below 1,000,000, as checkpoints have six digits")
        check("seed", 0 <= self.seed < 2**63, "between 0 and 2^63 - 1")
        check("device", self.device in (None, "cpu", "cuda")[: 2 + torch.cuda.is_available()], "one that this machine has: cpu, cuda or none")
        check("val_tokens", self.val_tokens == 0 or self.val_tokens >= self.seq_len, f"0 (all) or at least seq_len = {self.seq_len}")
        check("batch_tokens", self.batch_tokens % self.seq_len == 0, f"a multiple of seq_len = {self.seq_len}")


@dataclass(frozen=True, kw_only=True)
class Hyperparameters(Common):
    """Muon's own: modded-nanogpt records 20-21."""

    muon_lr: float = 0.05
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_warmup: int = 300  # steps from momentum_start to momentum
    weight_decay: float = 0.0  # decoupled, on matrices, times the rate
    ns_dtype: str = "bf16"  # Newton-Schulz: a key of DTYPES

    def __post_init__(self):
        super().__post_init__()
        for field in ("momentum", "momentum_start"):
            self.check(field, 0 <= getattr(self, field) < 1, "at least 0 and below 1")
        self.check("momentum_warmup", self.momentum_warmup >= 0, "at least 0")
        self.check("ns_dtype", self.ns_dtype in DTYPES, f"one of {', '.join(DTYPES)}")


CPU_RUN = dict(data="data/python", num_iterations=500, batch_tokens=4096, seq_len=2048, micro_batch_tokens=2048, val_every=125, val_tokens=2**18,
               warmup_steps=1, window_start=512, bucket_mb=1.0, ngram_embed_lr=0.1)  # fmt: skip
SMALL_RUN = dict(num_iterations=3000, batch_tokens=131_072, seq_len=8192, micro_batch_tokens=16_384)

DOMAINS_RUN = dict(data="data/domains", num_iterations=6000, batch_tokens=131_072, seq_len=4096, micro_batch_tokens=16_384, domain_coef=0.3,
                   domain_steps=2000, domain_anneal_steps=1000, embed_lr=0.008)  # fmt: skip
DOMAINS_CPU_RUN = CPU_RUN | dict(data="data/domains", num_iterations=400, seq_len=512, val_tokens=6 * 2**14, window_start=256, domain_coef=0.3,
                                 domain_steps=150, domain_anneal_steps=50, embed_lr=0.012)  # fmt: skip

PRESETS = {
    "cpu": Hyperparameters(**CPU_RUN, muon_lr=0.04, momentum=0.8, momentum_start=0.8),  # hundreds of steps are few for a mean over twenty
    "small": Hyperparameters(**SMALL_RUN),
    "100m": Hyperparameters(**DOMAINS_RUN),
    "100m-cpu": Hyperparameters(**DOMAINS_CPU_RUN, muon_lr=0.03, momentum_warmup=100),
    "speedrun": Hyperparameters(),
}

# -----------------------------------------------------------------------------
# Muon


def newton_schulz(G: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix to each of (..., rows, cols): singular values land in [0.68, 1.21].

    Five steps of the quintic 3.4445 x - 4.7750 x^3 + 2.0315 x^5, whose slope at 0 is steep rather than its fixed point exact.
    They start from G over its Schatten-4 norm, ||G G^T||^(1/2), which the first step has at hand: never below the largest singular
    value, and for n equal ones n^(1/4) times that, where the Frobenius norm is n^(1/2). What starts larger ends nearer to one: 0.004 bits
    per byte less in two pairs of 600 steps; a fifth step saved instead costs 0.007 (records/cpu/NEGATIVE.md). A zero matrix stays zero.
    Returns `dtype`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.reshape(-1, *G.shape[-2:]).to(dtype)
    wide = X.size(-2) <= X.size(-1)
    X = X if wide else X.mT
    A = gram(X)
    largest = torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True) + 1e-14  # at least the largest singular value's square
    X, A = X / largest.sqrt(), A / largest
    for step in range(NEWTON_SCHULZ_STEPS):
        A = A if step == 0 else gram(X)
        X = torch.baddbmm(X, gram_polynomial(A, b, c), X, beta=a)
    return (X if wide else X.mT).reshape(G.shape)


@on_cuda_a_kernel
def gram(X: Tensor) -> Tensor:
    """X X^T of (N, rows, cols)."""
    return X @ X.mT


@on_cuda_a_kernel
def gram_polynomial(A: Tensor, b: float, c: float) -> Tensor:
    """b A + c A A of symmetric (N, rows, rows)."""
    return torch.baddbmm(A, A, A, beta=b, alpha=c)


NEWTON_SCHULZ_STEPS = 5
MOST_TOGETHER = 2**28  # elements orthogonalised at once: 14 bytes of temporaries for each


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised matrix by matrix.

    params: tensors (..., rows, cols); every leading index is a matrix of its own (an expert, a part of QKV). The update is
    scaled by sqrt(max(1, rows / cols)). Momentum is a lerp, so its buffers hold a mean gradient. A matrix whose gradient is
    exactly zero (an expert that saw no token) only decays: stale momentum would still move it by a full-norm step.
    Raises ValueError for parameters with fewer than two dimensions."""

    def __init__(self, params, lr: float = 0.05, momentum: float = 0.95, weight_decay: float = 0.0, ns_dtype: torch.dtype = torch.bfloat16):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_dtype=ns_dtype))
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon takes matrices; a parameter of shape {tuple(p.shape)} belongs to AdamW")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}  # (rows, cols) -> batches of parameters
            for p in group["params"]:
                if p.grad is not None:
                    earlier = by_shape.setdefault(p.shape[-2:], [])
                    if not earlier or sum(q.numel() for q in earlier[-1]) + p.numel() > MOST_TOGETHER:
                        earlier.append([])
                    earlier[-1].append(p)
            for (rows, cols), params in ((shape, params) for shape, batches in by_shape.items() for params in batches):
                grads = [p.grad for p in params]
                for p in params:
                    if p not in self.state:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                batch = torch.cat([u.reshape(-1, rows, cols).to(group["ns_dtype"]) for u in nesterov])
                seen = torch.cat([g.reshape(-1, rows * cols).any(-1) for g in grads])
                update = newton_schulz(batch, group["ns_dtype"]) * seen[:, None, None]
                step_size = group["lr"] * max(1, rows / cols) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                pieces = update.split([p.numel() // (rows * cols) for p in params])
                torch._foreach_add_(params, [u.view_as(p).to(p.dtype) for u, p in zip(pieces, params)], alpha=-step_size)


def adamw_groups(tensors: dict[str, list[Tensor]], hp: Common) -> list[dict]:
    """AdamW's groups for the kinds that are not matrices; `base_lr` is what the schedule scales."""
    kinds = ("embed", "ngram_embed", "value_embed", "head", "router", "scalar")
    return [dict(params=tensors[kind], base_lr=getattr(hp, f"{kind}_lr")) for kind in kinds if tensors.get(kind)]


def adamw(groups: list[dict], hp: Common) -> list[torch.optim.Optimizer]:
    """[AdamW] over these groups, or [] where a rank owns none of them."""
    return [torch.optim.AdamW(groups, lr=0.0, betas=(hp.beta1, hp.beta2), eps=1e-10, weight_decay=0.0, fused=True)] if groups else []


def make_optimizers(tensors: dict[str, list[Tensor]], hp: Hyperparameters) -> list[torch.optim.Optimizer]:
    """kind -> the slabs this rank owns, to [AdamW, Muon] over those kinds that it owns any of."""
    matrices = [dict(params=tensors[kind], base_lr=hp.muon_lr) for kind in ("matrix", "expert") if tensors.get(kind)]
    muon = [Muon(matrices, weight_decay=hp.weight_decay, ns_dtype=DTYPES[hp.ns_dtype])] if matrices else []
    return adamw(adamw_groups(tensors, hp), hp) + muon


# -----------------------------------------------------------------------------
# Schedules: pure functions of the step


def lr_scale(step: int, hp: Common) -> float:
    """1, then linear to final_lr_scale over the last cooldown_frac of the run."""
    left = (hp.num_iterations - step) / hp.num_iterations / max(hp.cooldown_frac, 1e-9)
    return 1.0 if left >= 1 else left + (1 - left) * hp.final_lr_scale


def window(step: int, hp: Common, config: Config) -> int:
    """Tokens that a long layer sees, in whole blocks of 128, growing linearly over the run (modded-nanogpt record 13)."""
    now = hp.window_start + (config.window_size - hp.window_start) * step / hp.num_iterations
    return min(config.window_size, -(-int(now) // 128) * 128)


def domain_price(step: int, hp: Common) -> float:
    """domain_coef for domain_steps, then linear to 0 over domain_anneal_steps."""
    gone = (step - hp.domain_steps + 1) / (hp.domain_anneal_steps + 1)
    return hp.domain_coef * min(1.0, max(0.0, 1 - gone))


def set_rates(optimizers: list[torch.optim.Optimizer], step: int, hp: Hyperparameters):
    warm = min(1.0, step / max(1, hp.momentum_warmup))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_scale(step, hp)
            if "momentum" in group:
                group["momentum"] = hp.momentum_start + warm * (hp.momentum - hp.momentum_start)


class Recipe(NamedTuple):
    """What differs between train_muon.py and train_adamw.py."""

    name: str  # also the default experiment name
    hyperparameters: type
    presets: dict
    make_optimizers: callable  # (kind -> owned slabs, hyperparameters) -> optimizers
    set_rates: callable  # (optimizers, step, hyperparameters): writes the groups' values for this step
    matrix_state: int  # floats of optimizer state for each element of a matrix
    newton_schulz: int  # of each matrix in a step


# -----------------------------------------------------------------------------
# Slabs, their owners and the buckets they travel in: pure functions of the model and the number of ranks


class Slab(NamedTuple):
    """A piece of a parameter whose identity never depends on the number of ranks."""

    name: str  # blocks.3.ffn.experts.up[5]
    kind: str
    numel: int
    cost: int  # what updating it takes, comparable within a family (matrices, the rest)

    @property
    def is_matrix(self) -> bool:
        return self.kind in ("matrix", "expert")


TABLE_BLOCKS = 64  # row blocks that a large table is cut into, at most; a small one into 8


def cut_slabs(config: Config) -> list[Slab]:
    """Every parameter of the whole model exactly once: 3-D ones by matrix, tables by blocks of rows, the others whole."""
    with torch.device("meta"):
        model = GPT(config)
    slabs, kinds = [], model.parameter_kinds()
    for name, p in model.named_parameters():
        if p.numel() == 0:  # the skips of a single layer
            continue
        if kinds[name] in ("matrix", "expert"):
            rows, cols = sorted(p.shape[-2:])
            names = [f"{name}[{i}]" for i in range(len(p))] if p.ndim == 3 else [name]
            cost = NEWTON_SCHULZ_STEPS * 2 * rows**2 * (2 * cols + rows)  # FLOPs of newton_schulz
        else:
            blocks = min(TABLE_BLOCKS, max(8, p.numel() // 2**16))
            edges = [len(p) * i // blocks for i in range(blocks + 1)]
            names = [f"{name}[{a}:{b}]" for a, b in zip(edges, edges[1:])] if p.ndim == 2 and len(p) >= blocks else [name]
            cost = p.numel() // len(names)
        tensors = {name: p}
        slabs += [Slab(slab, kinds[name], slab_view(tensors, slab).numel(), cost) for slab in names]
    return slabs


class Bucket(NamedTuple):
    """Slabs that travel together, in one reduce-scatter and one all-gather among `ranks`."""

    ranks: tuple[int, ...]
    slabs: tuple[Slab, ...]
    owners: tuple[int, ...]  # the rank that updates each slab

    @property
    def part(self) -> int:
        """Elements of the longest owner's part, to which all parts are padded: the collectives want equal ones."""
        lengths = collections.Counter()
        for slab, owner in zip(self.slabs, self.owners):
            lengths[owner] += slab.numel
        return max(lengths.values())

    @property
    def padding(self) -> float:
        """Padded elements per real one."""
        return self.part * len(self.ranks) / sum(slab.numel for slab in self.slabs) - 1


BACKWARD_ORDER = {"head": 0, "blocks": 1, "depth": 2, "value_embeds": 3}  # then the embedding, which every block reads


def backward_order(slab: Slab) -> tuple[int, int]:
    """When in the backward pass its gradient is ready: the head's first, then block by block from the last, then skips and tables."""
    module, number, *_ = *slab.name.partition("[")[0].split("."), ""
    return BACKWARD_ORDER.get(module, 4), -int(number) if number.isdigit() else 0


MOST_PADDING = 0.25  # of a bucket, before it is closed


def make_buckets(config: Config, world_size: int, expert_parallel: int = 1, bucket_mb: float = 0.0) -> list[Bucket]:
    """Which slabs travel together, in the order in which they leave, and who owns each.

    A bucket closes with the gradients of a block (or of a table) when it has bucket_mb MiB in fp32 and little padding. Experts
    travel among the ranks that hold the same ones: every expert_parallel-th. Where a slab has one holder nothing travels."""

    def holders(slab: Slab) -> tuple[int, ...]:
        first = 0
        if slab.kind == "expert":
            first = slab_part(slab.name)[1] * expert_parallel // config.num_experts
        return tuple(range(first, world_size, expert_parallel if slab.kind == "expert" else 1))

    waiting, buckets, work = {}, [], collections.Counter()  # work: (family, rank) -> cost so far

    def close(ranks: tuple[int, ...], most_padding: float):
        nonlocal work
        after = work.copy()
        bucket = Bucket(ranks, tuple(waiting[ranks]), tuple(assign_owners(waiting[ranks], ranks, after)))
        if bucket.padding <= most_padding:
            buckets.append(bucket)
            del waiting[ranks]
            work = after

    for _, unit in itertools.groupby(sorted(cut_slabs(config), key=backward_order), key=backward_order):
        for slab in unit:
            waiting.setdefault(holders(slab), []).append(slab)
        for ranks in [ranks for ranks, slabs in waiting.items() if len(ranks) > 1 and bucket_bytes(slabs) >= bucket_mb * 2**20]:
            close(ranks, MOST_PADDING)
    for ranks in list(waiting):
        close(ranks, math.inf)
    return buckets


def bucket_bytes(slabs: list[Slab]) -> int:
    return 4 * sum(slab.numel for slab in slabs)


def assign_owners(slabs: list[Slab], ranks: tuple[int, ...], work: collections.Counter) -> list[int]:
    """The owner of each slab: dearest first, each to the rank with the least work so far, in all buckets, of those with room for it.

    Room is what the longest part has when sizes alone are balanced, so that balancing work costs no padding. Adds to `work`."""
    parts = [0] * len(ranks)
    for numel in sorted((slab.numel for slab in slabs), reverse=True):
        heapq.heapreplace(parts, parts[0] + numel)
    room, owners = dict.fromkeys(ranks, max(parts)), [0] * len(slabs)
    idlest = {family: [(work[family, rank], rank) for rank in ranks] for family in (False, True)}  # heaps, sorted lists at first
    for queue in idlest.values():
        queue.sort()
    for i in sorted(range(len(slabs)), key=lambda i: (-slabs[i].cost, slabs[i].name)):
        slab, queue, full = slabs[i], idlest[slabs[i].is_matrix], []
        while queue and room[queue[0][1]] < slab.numel:
            full.append(heapq.heappop(queue))
        done, owner = heapq.heappop(queue) if queue else full.pop(full.index(max(full, key=lambda entry: room[entry[1]])))
        for entry in (*full, (done + slab.cost, owner)):
            heapq.heappush(queue, entry)
        owners[i] = owner
        work[slab.is_matrix, owner] += slab.cost
        room[owner] -= slab.numel
    return owners


def plan(config: Config, hp: Common, recipe: Recipe, world_size: int) -> dict:
    """What a step of this run sends, holds and computes on world_size ranks, without running it. Bytes and FLOPs of the busiest rank.

    Rings send (W-1)/W of a buffer twice: out as gradients, back as values. An exchange of rows sends k rows per token and routed
    layer, of which (N-1)/N leave the rank if the load is even: out and back, forward and backward."""
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
    row_bytes = config.n_embd * DTYPES[config.dtype].itemsize
    routed_runs = sum(times for times, letter in zip(config.layer_runs, config.tiled("pattern")) if letter == "M")
    rows = 4 * tokens * config.top_k * routed_runs * row_bytes * (parts - 1) / parts
    flops = model_file.flops_per_token(config, hp.seq_len) * tokens
    return {
        "parameters": numel,
        "held": max(held),
        "all_reduce_bytes": round(2 * 4 * numel * (world_size - 1) / world_size),
        "sent_bytes": max(ring),
        "rows_bytes": round(rows),
        "optimizer_bytes": max(state),
        "optimizer_bytes_total": sum(state),
        "newton_schulz_flops": max(newton_schulz),
        "newton_schulz_total": sum(newton_schulz),
        "model_flops": round(flops),
        "buckets": buckets,
    }


def plan_text(config: Config, hp: Common, recipe: Recipe, world_size: int) -> str:
    """plan() for reading: the optimizer's and the communication's part of the model card."""
    check_expert_parallel(config, hp.expert_parallel, world_size)
    p, mib = plan(config, hp, recipe, world_size), lambda number: f"{number / 2**20:,.1f} MiB"
    travelling = [bucket for bucket in p["buckets"] if len(bucket.ranks) > 1]
    sizes = [4 * bucket.part * len(bucket.ranks) for bucket in travelling]
    mean = p["newton_schulz_total"] / world_size
    rows = [
        ("ranks", f"{world_size}, experts shared by {hp.expert_parallel}; {hp.batch_tokens // world_size:,} tokens of each step per rank"),
        ("parameters", f"{p['parameters']:,}, at most {p['held']:,} on a rank"),
        ("buckets", f"{len(travelling)} travel" + (f", {mib(min(sizes))} to {mib(max(sizes))} each" if sizes else "")),
        ("sent per step", f"{mib(p['sent_bytes'])} per rank: a plain all-reduce's {mib(p['all_reduce_bytes'])} "
                          f"{'+' if p['sent_bytes'] >= p['all_reduce_bytes'] else '-'} {mib(abs(p['sent_bytes'] - p['all_reduce_bytes']))} of "
                          f"{'padding' if hp.expert_parallel == 1 else 'padding and experts that stay'}"),
        ("rows exchanged", f"{mib(p['rows_bytes'])} per rank and step at even load"),
        ("optimizer state", f"{mib(p['optimizer_bytes'])} per rank, {mib(p['optimizer_bytes_total'])} in the world"),
        ("Newton-Schulz", f"{p['newton_schulz_flops'] / 1e9:,.2f} GFLOPs per rank and step, "
                          f"{100 * p['newton_schulz_flops'] / p['model_flops']:.2f}% of forward + backward; "
                          f"the busiest rank has {p['newton_schulz_flops'] / max(mean, 1):.2f} of the mean"),
    ]  # fmt: skip
    return "\n".join(f"{label:<20} {text}" for label, text in rows)


# -----------------------------------------------------------------------------
# The exchange: gradients go to their owners during backward, new values come back during the updates


reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def copy_all(targets: list[Tensor], sources: list[Tensor]):
    if targets:  # _foreach_copy_ refuses empty lists
        torch._foreach_copy_(targets, sources)


class Piece(NamedTuple):
    """A slab on one of the ranks that hold it."""

    slab: Slab
    parameter: torch.nn.Parameter
    part: int | slice  # of the parameter's dimension 0
    value: Tensor  # that part, a view; its gradient in .grad while its owner updates it
    packed: Tensor | None  # its place in Transfer.parts
    mine: Tensor | None  # its place in Transfer.mine, on its owner


class Transfer:
    """One bucket on one of its ranks. Its buffers live as long as the run: nothing is freed under a collective in flight."""

    def __init__(self, bucket: Bucket, model: GPT, world: World, overlap: bool):
        self.travels = len(bucket.ranks) > 1
        self.group, self.overlap, self.work, self.missing = world.groups.get(bucket.ranks), overlap, None, 0
        padded = bucket.part if self.travels else 0
        self.parts = torch.zeros(len(bucket.ranks), padded, device=world.device)  # to each owner, later from each
        self.mine = torch.zeros(padded, device=world.device)  # sums of the gradients that this rank owns, later their new values
        self.slabs, ends = [], collections.Counter()
        for slab, owner in zip(bucket.slabs, bucket.owners):
            name, part = slab_part(slab.name)
            parameter = model.get_parameter(name)
            if slab.kind == "expert":
                part -= model.ranks.first(model.config.num_experts)
            value, place = parameter.detach()[part], slice(ends[owner], ends[owner] + slab.numel)
            ends[owner] = place.stop
            packed = self.parts[bucket.ranks.index(owner), place].view(value.shape) if self.travels else None
            mine = self.mine[place].view(value.shape) if self.travels and owner == world.rank else None
            self.slabs.append(Piece(slab, parameter, part, value, packed, mine))
        self.parameters = list({id(piece.parameter): piece.parameter for piece in self.slabs}.values())
        self.owned = [piece for piece, owner in zip(self.slabs, bucket.owners) if owner == world.rank]
        self.others = [piece for piece, owner in zip(self.slabs, bucket.owners) if owner != world.rank]
        self.optimizers = []

    def owned_by_kind(self) -> dict[str, list[Tensor]]:
        tensors = {}
        for piece in self.owned:
            tensors.setdefault(piece.slab.kind, []).append(piece.value)
        return tensors

    def start(self, collective, output: Tensor, source: Tensor):
        self.work = collective(output, source, group=self.group, async_op=True)
        if not self.overlap:
            self.wait()

    def wait(self):
        if self.work is not None:
            self.work.wait()
            self.work = None

    def send_gradients(self):
        """Begin to sum each slab's gradient on its owner; a parameter without a gradient here adds zero."""
        if self.travels:
            there = [piece for piece in self.slabs if piece.parameter.grad is not None]
            if len(there) < len(self.slabs):
                self.parts.zero_()
            copy_all([piece.packed for piece in there], [piece.parameter.grad[piece.part] for piece in there])
            for parameter in self.parameters:
                parameter.grad = None
            self.start(reduce_scatter, self.mine, self.parts.flatten())

    def receive_gradients(self):
        """Wait until the gradients that this rank owns are whole, in .grad of the slabs."""
        self.wait()
        for piece in self.owned:
            grad = piece.parameter.grad
            piece.value.grad = piece.mine if self.travels else torch.zeros_like(piece.value) if grad is None else grad[piece.part]

    def send_values(self):
        """Begin to hand the owners' new values to the other ranks."""
        for piece in self.owned:
            piece.value.grad = None
        if self.travels:
            copy_all([piece.mine for piece in self.owned], [piece.value for piece in self.owned])
            self.start(all_gather, self.parts.flatten(), self.mine)

    def receive_values(self):
        self.wait()
        for parameter in self.parameters:
            parameter.grad = None
        copy_all([piece.value for piece in self.others], [piece.packed for piece in self.others])


class Exchange:
    """Every bucket of this rank, in the order in which all ranks send them.

    A bucket leaves when its last gradient of the last micro-batch is there and the buckets before it have left, so a late one
    holds up the rest and no two ranks ever differ in order. overlap=False sends the same buckets in the same order after backward
    and waits for each: the reference, bit for bit, and what the benchmark compares with."""

    def __init__(self, model: GPT, world: World, bucket_mb: float = 0.0, overlap: bool = True):
        self.world, self.model, self.overlap = world, model, overlap
        buckets = make_buckets(model.config, world.size, world.expert_parallel, bucket_mb)
        self.transfers = [Transfer(bucket, model, world, overlap) for bucket in buckets if world.rank in bucket.ranks]
        self.armed, self.sent, self.totals_work = False, 0, None
        if world.size > 1 and overlap:
            for transfer in self.transfers:
                for parameter in transfer.parameters:
                    parameter.register_post_accumulate_grad_hook(functools.partial(self.gradient_is_there, transfer))

    @property
    def owned(self) -> list[Piece]:
        return [piece for transfer in self.transfers for piece in transfer.owned]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for transfer in self.transfers for optimizer in transfer.optimizers]

    def equip(self, recipe: Recipe, hp: Common) -> list[torch.optim.Optimizer]:
        """Give every bucket the optimizers of the slabs that this rank owns; returns them all."""
        for transfer in self.transfers:
            transfer.optimizers = recipe.make_optimizers(transfer.owned_by_kind(), hp)
        return self.optimizers

    def arm(self, totals: Tensor):
        """Before the last backward: buckets may leave from now on, and `totals` is summed over the ranks beside them, in place."""
        self.armed, self.sent = True, 0
        for transfer in self.transfers:
            transfer.missing = len(transfer.parameters)
        if self.world.size > 1:
            self.totals_work = dist.all_reduce(totals, async_op=True)
            if not self.overlap:
                self.totals_work.wait()

    def gradient_is_there(self, transfer: Transfer, parameter: Tensor):
        if self.armed:
            transfer.missing -= 1
            while self.sent < len(self.transfers) and self.transfers[self.sent].missing == 0:
                self.send_next()

    def send_next(self):
        self.transfers[self.sent].send_gradients()
        self.sent += 1

    def flush(self):
        """After the last backward: send what is left, as a parameter that took no part in it has called no hook."""
        self.armed = False
        while self.sent < len(self.transfers):
            self.send_next()

    def finish(self):
        """Wait for the totals and for all new values."""
        if self.totals_work is not None:
            self.totals_work.wait()
            self.totals_work = None
        for transfer in self.transfers:
            transfer.receive_values()


# -----------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model: GPT, step: int, hp: Common, micro_rows: int, token_bytes: Tensor | None, world: World,
             timer: PhaseTimer) -> dict[str, float]:  # fmt: skip
    """val/loss in nats per token over the first val_tokens, and val/bpb in bits per byte of text when the byte lengths are known; of a mixture
    the same for each domain, val/<domain>/..., which experts its tokens meet, and how many bits of the domain a choice of expert tells."""
    model.eval()
    window_now = window(step, hp, model.config)
    names, L, E = list(data.domains(hp.data)), *model.bias_LE.shape
    totals_DX = torch.zeros(len(names), 3 + L * E, dtype=torch.float64, device=world.device)  # nats, tokens, bytes, choices of experts
    batches = data.validation_batches(hp.data, seq_len=hp.seq_len, rows=micro_rows, max_tokens=hp.val_tokens or None, rank=world.rank,
                                      world_size=world.size, vocab_size=model.config.vocab_size, device=world.device)  # fmt: skip
    for batch in batches:
        timer.begin("validation")
        model.set_step(hp.seed, step, batch.first_row * hp.seq_len, window_now)  # objective masked hides by a token's number
        counts = batch.targets_BT >= 0
        _, loss, stats = model(batch.inputs_BT, batch.targets_BT, real_B=counts.any(1) if len(names) > 1 else None)
        nbytes = counts.sum() * 0 if token_bytes is None else (token_bytes[batch.targets_BT.clamp(min=0)] * counts).sum()
        sums = torch.stack([loss.double() * counts.numel(), counts.sum().double(), nbytes.double()])
        row_X = torch.cat([sums, stats["counts_LE"].flatten().double()])
        totals_DX.index_add_(0, batch.domain_B[:1], row_X[None])  # no copy to the host, which would wait for the batch
    timer.begin("communication")
    if world.size > 1:
        dist.all_reduce(totals_DX)
    model.train()

    def losses(prefix: str, totals_X: Tensor) -> dict[str, float]:
        nats, tokens, nbytes = totals_X[:3].tolist()
        return {f"{prefix}/loss": nats / tokens} | ({f"{prefix}/bpb": nats / nbytes / math.log(2)} if nbytes else {})

    values = losses("val", totals_DX.sum(0))
    for name, totals_X in zip(names, totals_DX) if len(names) > 1 else ():
        values |= losses(f"val/{name}", totals_X)
    if len(names) > 1 and L:
        share_DLE = totals_DX[:, 3:].view(-1, L, E) / totals_DX[:, 3:].view(-1, L, E).sum(-1, keepdim=True)
        values |= {"moe/domain_load": share_DLE, "moe/domain_information": domain_information(share_DLE).mean()}
    return values


def domain_information(share_DLE: Tensor) -> Tensor:
    """Mutual information (L,) of domain and chosen expert in bits, all domains being equally likely: 0 = the choice tells nothing."""
    joint_DLE = share_DLE / len(share_DLE)
    apart_DLE = joint_DLE.sum(0) * joint_DLE.sum(-1, keepdim=True)
    return torch.where(joint_DLE > 0, joint_DLE * (joint_DLE / apart_DLE.clamp(min=1e-30)).log2(), 0.0).sum((0, 2))


# -----------------------------------------------------------------------------
# One training step


@contextlib.contextmanager
def phase(timer: PhaseTimer, name: str):
    """A named part of the step, in the metrics and in a profiler's trace."""
    timer.begin(name)
    with record_function(name):
        yield
    timer.mark(name)


TOTALS = ("ce", "balance_loss", "z_loss", "entropy", "loops", "domain_loss")  # sums over the global batch, beside the counts
NO_FLAGS = StepFlags()


def train_step(model: GPT, exchange: Exchange, optimizers: list, next_step, step: int, hp: Common, recipe: Recipe,
               timer: PhaseTimer, alarms: StepFlags = NO_FLAGS, expert_D: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """One optimizer step over the global batch; returns its statistics, and [loss, *alarms] summed over ranks, on the device.

    next_step() gives this rank's micro-batches; expert_D each domain's own expert, -1 for none, or is None where nobody is told. While the last
    backward goes on, its gradients leave bucket by bucket, and the losses, counts and alarms beside them; while a bucket is updated, those
    before it go back and those behind it arrive.
    The phase "communication" is what nothing hid: the time spent waiting."""
    device, world = exchange.world.device, exchange.world
    timer.start(step)
    with phase(timer, "data"):
        batches = next_step()
    share = 1 / (len(batches) * world.size)  # of the global batch that one micro-batch is: a constant, so gradients add
    sums = torch.zeros(len(TOTALS), dtype=torch.float64, device=device)
    counts_LE = torch.zeros_like(model.bias_LE, dtype=torch.float64)
    alarm = torch.tensor(alarms, dtype=torch.float64).to(device, non_blocking=True)
    for batch in batches:
        with phase(timer, "forward"):
            model.set_step(hp.seed, step, batch.first_row * hp.seq_len, window(step, hp, model.config))
            _, loss, stats = model(batch.inputs_BT, batch.targets_BT, expert_B=None if expert_D is None else expert_D[batch.domain_B])
            if expert_D is not None:
                loss = loss + domain_price(step, hp) * stats["domain_loss"]
            sums += share * torch.stack([stats[key].detach() for key in TOTALS])
            counts_LE += stats["counts_LE"]
        with phase(timer, "backward"):
            if batch is batches[-1]:
                totals = torch.cat([sums, alarm, counts_LE.flatten()])
                exchange.arm(totals)
            (loss * share).backward()
    with phase(timer, "communication"):
        exchange.flush()
    recipe.set_rates(optimizers, step, hp)
    for transfer in exchange.transfers:
        with phase(timer, "communication"):
            transfer.receive_gradients()
        with phase(timer, "optimizer"):
            for optimizer in transfer.optimizers:
                optimizer.step()
        with phase(timer, "communication"):
            transfer.send_values()
    with phase(timer, "communication"):
        exchange.finish()
    sums, alarm, counts = totals.split([len(sums), len(alarm), counts_LE.numel()])
    counts_LE = counts.view_as(counts_LE).long()
    model.balance(counts_LE)
    ce, balance_loss, z_loss, entropy, loops, domain_loss = sums.unbind()
    row = {"train/loss": ce} | ({} if model.config.depth == "stack" else {"depth/loops": loops})
    if expert_D is not None:
        row |= {"train/domain_loss": domain_loss, "train/domain_price": domain_price(step, hp)}
    if len(counts_LE):
        load_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
        row |= {"train/balance_loss": balance_loss, "train/z_loss": z_loss, "moe/router_entropy": entropy, "moe/load": load_LE,
                "moe/load_max_over_mean": (load_LE.amax(-1) * load_LE.size(-1)).mean()}  # fmt: skip
    return row, torch.cat([ce[None], alarm])


# -----------------------------------------------------------------------------
# Training


class Prepared(NamedTuple):
    """What a rank finds out before training, when every mistake can still be told in one sentence."""

    meta: dict  # of the data
    loader: data.Loader
    micro_rows: int  # of one forward pass
    expert_D: Tensor | None  # each domain's own expert


def prepare(config: Config, hp: Common, folder: Path, resume: bool, fresh: bool, world: World) -> Prepared:
    """Check what flags, data, folder and ranks must fulfil together. Raises ConfigError, DataError, RunError."""
    if resume and not folder.exists():
        raise RunError(f"there is no {folder} to resume; start the run without --resume, or correct --experiment_name or --out_dir")
    if fresh:
        logger.refuse_existing(folder)
    check_expert_parallel(config, hp.expert_parallel, world.size)
    if config.objective != "next" and hp.sample_tokens:
        raise ConfigError(f"sample_tokens is {hp.sample_tokens}; it must be 0 with objective {config.objective}, which cannot continue a text")
    rows = hp.batch_tokens // hp.seq_len
    micro_rows = micro_batch_rows(rows, hp, world)
    if world.device.type == "cuda":
        check_for_cuda(config, hp)
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    data.verify(hp.data, local_rank, local_size)  # the ranks of one host share the reading
    loader = data.Loader(hp.data, seq_len=hp.seq_len, batch_rows=rows, micro_rows=micro_rows, rank=world.rank, world_size=world.size,
                         seed=hp.seed, vocab_size=config.vocab_size, device=world.device, mix=mix(hp), steps=hp.num_iterations)  # fmt: skip
    data.validation_batches(hp.data, seq_len=hp.seq_len, rows=1, max_tokens=hp.val_tokens or None)  # raises here, not after the last step
    if hp.routes_tokens:
        model_file.routes_batches(config, hp.data, hp.routes_tokens)
    return Prepared(data.load_meta(hp.data), loader, micro_rows, domain_experts(config, hp, world.device))


def check_expert_parallel(config: Config, parts: int, ranks: int):
    if ranks % parts or config.num_experts % parts:
        raise ConfigError(f"expert_parallel is {parts}; it must divide both the {ranks} ranks and num_experts = {config.num_experts}")
    if parts > 1 and len(config.expert_counts) > 1:
        raise ConfigError(f"experts is {config.experts!r}; with expert_parallel = {parts} all must be of one kind")
    if parts > 1 and (config.depth == "routed" or config.halt != "none"):
        raise ConfigError(f"expert_parallel is {parts}; it must be 1 where tokens go apart (depth {config.depth}, halt {config.halt}), "
                          "as ranks would not exchange rows equally often")  # fmt: skip


def check_for_cuda(config: Config, hp: Common):
    """What a GPU's matmuls and FlexAttention ask for beyond what a CPU does."""
    for name, value, step in (("seq_len", hp.seq_len, 16), ("n_embd", config.n_embd, 16)):
        if config.head == "fp8" and value % step:
            raise ConfigError(f"{name} is {value}; with head fp8 on CUDA it must be a multiple of {step}, or pass --head bf16")
    if config.head_dim < 16:
        raise ConfigError(f"head_dim is {config.head_dim}; on CUDA it must be at least 16")
    tokens, block = hp.seq_len + config.num_meta_tokens, model_file.FlexMask.BLOCK
    if tokens % block and tokens > MOST_MASKED:
        raise ConfigError(f"seq_len + num_meta_tokens is {tokens}; on CUDA it must be a multiple of {block} beyond {MOST_MASKED}, or attention would "
                          "hold a mask of all pairs")  # fmt: skip


MOST_MASKED = 8192  # tokens of a row whose pairs all fit into a mask


def mix(hp: Common) -> data.Mix:
    return data.Mix(hp.domain_weights, hp.domain_temperature, hp.domain_epochs, hp.round_robin_steps)


def domain_experts(config: Config, hp: Common, device: torch.device) -> Tensor | None:
    """The expert that each domain's tokens should choose: the first ones in the order of the domains, -1 for the trunk's; None where domain_coef
    is 0. Raises ConfigError where there are too few, or where nothing can learn to choose."""
    if hp.domain_coef == 0:
        return None
    names = list(data.domains(hp.data))
    own = [name for name in names if name != hp.trunk_domain]
    most = sum(count for kind, count in config.expert_counts.items() if model_file.EXPERTS[kind].has_matmuls)
    learns = config.routed_layers > 0 and issubclass(model_file.ROUTERS[config.router], model_file.Router)
    if len(names) == 1 or len(own) > most or not learns:
        raise ConfigError(f"domain_coef is {hp.domain_coef}; it must be 0, or {hp.data} a mixture of at most {most} domains (and that of "
                          f"trunk_domain), one for each expert that a learned router can choose; it has "
                          f"{', '.join(names) if len(names) > 1 else 'none'}")
    return torch.tensor([own.index(name) if name in own else -1 for name in names], device=device)


SOURCES = [Path(__file__).with_name(f"{name}.py") for name in "train_muon train_adamw model kernels checkpoint guards data logger".split()]


def shared_facts(config: Config, hp: Common, **others) -> dict:
    """What must be the same on all ranks: settings, data, code, torch."""
    fields = dataclasses.asdict(config) | dataclasses.asdict(hp) | others
    flags = {f"--{name}": value for name, value in fields.items() if name != "data"}  # the path may differ, what it holds may not
    shards = {f"shard {name}": contents for name, contents in data.fingerprint(hp.data).items()}
    code = {f"the code of {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in SOURCES}
    return flags | shards | code | {"torch": torch.__version__}


def train(config: Config, hp: Common, recipe: Recipe, experiment_name: str, resume: bool, enable_profiling: bool, world: World, sinks=()):
    """Train to hp.num_iterations; leaves run.log, metrics.jsonl, config.json and checkpoint/ in out_dir/experiment_name. sinks: see logger.SINKS."""
    device, folder, timer = world.device, Path(hp.out_dir) / experiment_name, PhaseTimer(world.device.type)
    fresh = not (resume or enable_profiling)
    meta, loader, micro_rows, expert_D = agree(world, lambda: prepare(config, hp, folder, resume, fresh, world))
    agree_on(shared_facts(config, hp, experiment_name=experiment_name, resume=resume, enable_profiling=enable_profiling), world)
    world = world.with_expert_groups(hp.expert_parallel, collectives_timeout(hp))
    rows = hp.batch_tokens // hp.seq_len
    token_bytes = None if meta["token_bytes"] is None else torch.tensor(meta["token_bytes"], device=device)

    # ---- the model, its buckets, and the optimizers of each
    model = GPT(config, world.expert_ranks).init_weights(hp.seed).to(device)
    exchange = Exchange(model, world, hp.bucket_mb, hp.overlap)
    optimizers = exchange.equip(recipe, hp)
    check_cover(exchange, optimizers)
    compile_note = compile_model(model, hp, device)

    watchdog, saver = Watchdog(world, timer, hp.stuck_after), Saver(folder / "checkpoint", exchange, world)
    with StopSignals(world) as signals, watchdog, saver, contextlib.ExitStack() as opened:
        opened.callback(loader.close)
        # ---- warm up: compile and allocate everything on random tokens, then put the model back
        before = {name: value.to("cpu", copy=True) for name, value in model.state_dict().items()}
        random_step = random_batches(config, hp, rows // micro_rows // world.size, micro_rows, device)
        for _ in range(hp.warmup_steps):
            train_step(model, exchange, optimizers, random_step, 0, hp, recipe, timer, NO_FLAGS, expert_D)
        model.load_state_dict(before)
        for optimizer in optimizers:
            optimizer.state.clear()
        if enable_profiling:
            one_step = lambda step: train_step(model, exchange, optimizers, loader.next_step, step, hp, recipe, timer, NO_FLAGS, expert_D)
            return profile(folder / "profile", one_step, config, hp, world)

        # ---- where a resumed run goes on
        start, train_time, resume_step, validated, notes = 0, 0.0, None, False, []
        if resume:
            timer.begin("resuming")
            path, notes = latest_valid_checkpoint(folder / "checkpoint", world)
            resume_step = -1  # a run that left no checkpoint starts over
            if path is not None:
                manifest = agree(world, lambda: load_checkpoint(path, exchange, config, hp))
                loader.load_state_dict(manifest["loader"])
                start, train_time, resume_step, validated = manifest["step"], manifest["train_time"], manifest["step"], manifest["validated"]
                if start == hp.num_iterations and gather_objects(logger.has_ended(folder), world)[0]:
                    if world.rank == 0:
                        print(f"{folder} has all its {start} steps; nothing is left to do")
                    return

        # ---- the log
        per_token = model_file.flops_per_token(config, hp.seq_len)
        peak = world.size * matmul_rate(device, config.dtype)
        parameters = model_file.count_parameters(config)
        facts = {"experiment_name": experiment_name, "optimizer": recipe.name, "model": dataclasses.asdict(config),
                 "hyperparameters": dataclasses.asdict(hp), "parameters": parameters, "flops_per_token": per_token,
                 "encoding": meta["encoding"], "world_size": world.size, "matmul_flops_per_second": peak}  # fmt: skip
        config_class = f"{type(config).__module__}.{type(config).__qualname__}"
        run = opened.enter_context(Run(hp.out_dir, experiment_name, config=facts, sources=SOURCES, resume_step=resume_step,
                                       active=world.rank == 0, sinks=sinks))  # fmt: skip
        for note in notes:
            run.print(f"{note}; going on from step {start} instead")
        run.print(f"{recipe.name}: {parameters['total']:,} parameters, {parameters['active']:,} active; {rows} rows x {hp.seq_len} tokens per step, "
                  f"{micro_rows} rows at a time on {world.size} x {device.type}; activations {config.dtype}; {compile_note}")  # fmt: skip
        bar = progress_bar(hp.num_iterations, start, world)
        opened.callback(bar.close)
        look_every = 1 if device.type == "cpu" else 25  # bringing rows to the host makes a GPU wait

        # ---- the loop: validate, checkpoint, step
        latest, stopping, values = AsyncHostCopy(torch.zeros(3)), False, {}
        model.train()
        synchronize(device)
        clock = time.perf_counter()
        for step in range(start, hp.num_iterations + 1):
            last = step == hp.num_iterations
            due = last or (hp.val_every and step % hp.val_every == 0)
            validate_now = due and (last or not stopping) and not (step == resume_step and validated)
            save_now = (last or stopping or (hp.checkpoint_every and step % hp.checkpoint_every == 0)) and step not in (0, resume_step)
            if validate_now or save_now:
                check_health(latest, step, saver)
                synchronize(device)
            if validate_now:
                train_time += time.perf_counter() - clock
                values = evaluate(model, step, hp, micro_rows, token_bytes, world, timer)
                if hp.routes_tokens:
                    arrays = model_file.validation_routes(model, meta["encoding"], hp.data, hp.routes_tokens)  # all ranks, as they may share experts
                    if world.rank == 0:
                        model_file.write_routes(folder / "routes" / f"step_{step:06d}.npz", arrays)
                run.log({"step": step, "train_time": train_time, "train/flops": step * hp.batch_tokens * per_token, **values})
                run.flush()
                line = f"step:{step}/{hp.num_iterations} val_loss:{values['val/loss']:.5f} train_time:{train_time:.3f}s"
                line += f" step_avg:{1000 * train_time / max(step, 1):.2f}ms"
                run.print(line + "".join(f" {key.replace('/', '_')}:{value:.4f}" for key, value in values.items() if key.endswith("/bpb")))
                synchronize(device)
                clock = time.perf_counter()
            if save_now:
                timer.begin("saving")
                run.flush()
                seconds, validated = train_time + time.perf_counter() - clock, bool(validate_now or not due)
                progress = {"train_time": seconds, "validated": validated, "loader": loader.state_dict()}
                saver.save(step, facts | {"config_class": config_class} | progress, run)
            if last or stopping:
                break
            began = time.perf_counter()
            row, signs = train_step(model, exchange, optimizers, loader.next_step, step, hp, recipe, timer,
                                    StepFlags(signals.received > 0, saver.failed), expert_D)  # fmt: skip
            before_latest, latest = latest, AsyncHostCopy(signs)
            timer.begin("communication")
            stopping = check_health(before_latest, step, saver)  # a host that is ahead of its GPU waits here
            now = time.perf_counter()
            speed = hp.batch_tokens / (now - began)
            row |= {"train/tok_per_sec": speed, "train/mfu": speed * per_token / peak, "train/lr_scale": lr_scale(step, hp),
                    "train/flops": (step + 1) * hp.batch_tokens * per_token, "memory/peak_bytes": peak_bytes(device)}  # fmt: skip
            run.log({"step": step + 1, "train_time": train_time + now - clock, **row, **timer.row()})
            if (step + 1) % look_every == 0:
                run.flush()
            bar.update()

        # ---- the end: what was reached, beside what compressors need, and a sample
        bar.close()
        if stopping and not last:
            saver.wait()
            run.flush()
            run.print(f"stopped by a signal after step {step}; the checkpoint is {saver.last_good}; go on with --resume")
            raise SystemExit(128 + (signals.received or signal.SIGTERM))
        end = {"step": hp.num_iterations, "event": "end", "train_time": train_time, "train/flops": hp.num_iterations * hp.batch_tokens * per_token,
               "memory/peak_bytes": peak_bytes(device)}  # fmt: skip
        run.print(f"peak memory: {end['memory/peak_bytes'] / 2**20:,.0f} MiB")
        timer.begin("sampling")
        prompt, continuation = sample(model, hp, device)  # on all ranks, as one may hold a part of the experts only
        if world.rank == 0:
            try:
                encoding = data.get_encoding(meta["encoding"])
            except data.DataError as error:
                run.print(f"no comparison with compressors and no sample: {error}")
            else:
                rivals = compressors(encoding, hp)
                end |= {f"val/{name}": bpb for name, bpb in rivals.items()}
                ours = f", this model {values['val/bpb']:.4f}" if "val/bpb" in values else ""
                run.print(f"bits per byte of the validation text: gzip -9 {rivals['gzip_bpb']:.4f}, xz -9 {rivals['xz_bpb']:.4f}{ours}")
                if hp.sample_tokens:
                    end["sample/text"] = f"{encoding.decode(prompt)}|>{encoding.decode(continuation)}"
                    run.print(f"{'-' * 30} sample\n{end['sample/text']}\n{'-' * 37}")
        run.log(end)
        saver.wait()
        timer.begin("communication")
        gather_objects("done", world)  # no rank takes the shared store with it while another still needs it


def check_health(flags: AsyncHostCopy, step: int, saver: Saver) -> bool:
    """Whether a rank received a signal to stop. Raises Ended if the loss of `step` is not finite, or a checkpoint could not be written."""
    loss, stop, disk = flags.tolist()
    if not math.isfinite(loss):
        saver.join()
        raise Ended(f"the loss of step {step} is {loss}; {last_good(saver.folder)}; {OTHER_RATES}")
    if disk:
        saver.wait()
    return stop > 0


def micro_batch_rows(rows: int, hp: Common, world: World) -> int:
    """Rows per forward pass: the most that fit micro_batch_tokens and divide this rank's share of the batch."""
    if rows % world.size:
        raise RunError(f"batch_tokens / seq_len = {rows} rows per step do not divide over {world.size} ranks; "
                       "change --batch_tokens or --nproc_per_node")  # fmt: skip
    most = max(1, hp.micro_batch_tokens // hp.seq_len)
    return max(n for n in range(1, rows // world.size + 1) if rows // world.size % n == 0 and n <= most)


def check_cover(exchange: Exchange, optimizers: list):
    """Every owned slab is in exactly one optimizer group."""
    grouped = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(piece.value) for piece in exchange.owned), "the optimizers' groups do not cover the parameters exactly once"


def compile_model(model: GPT, hp: Common, device: torch.device) -> str:
    """Compile block by block, so that gradients are ready during backward, and say what was done."""
    if not (device.type == "cuda" if hp.compile is None else hp.compile):
        return "eager"
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "eager (--compile needs a C++ compiler and found none)"
    if model.depth.needs_keys:
        return "eager (tokens that leave a loop make shapes of their own)"
    torch._dynamo.config.recompile_limit = 64  # graphs: one for each kind of layer, while training and while evaluating
    for block in model.blocks:
        block.compile(fullgraph=model.ranks.size == 1, dynamic=False)  # an exchange of rows between ranks breaks the graph
    for name in model.depth.to_compile:
        setattr(model.depth, name, torch.compile(getattr(model.depth, name), dynamic=False))
    if device.type == "cpu":  # CUDA has a kernel
        model.chunk_nll = torch.compile(model.chunk_nll, dynamic=False)
    return "compiled"


def random_batches(config: Config, hp: Common, count: int, micro_rows: int, device: torch.device):
    """A stand-in for loader.next_step whose tokens come from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def next_step() -> list[data.Batch]:
        ids = torch.randint(config.vocab_size, (count, micro_rows, hp.seq_len + 1), generator=generator).to(device)
        return [data.Batch(micro[:, :-1], micro[:, 1:], i * micro_rows, micro.new_zeros(len(micro))) for i, micro in enumerate(ids)]

    return next_step


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12, "L40S": 362e12, "B200": 2250e12}  # dense bf16


def matmul_rate(device: torch.device, dtype: str) -> float:
    """FLOP/s that MFU is a share of: a known GPU's dense bf16 peak, else the best of fifty 1024^3 matmuls on this machine."""
    if device.type == "cuda":
        for name, peak in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name():
                return peak
    x, best = torch.randn(1024, 1024, device=device).to(DTYPES[dtype]), math.inf
    for _ in range(50):
        synchronize(device)
        began = time.perf_counter()
        x @ x
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best


def peak_bytes(device: torch.device) -> int:
    """The most that the GPU's tensors, or this process on a CPU, have taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def progress_bar(total: int, start: int, world: World):
    """A tqdm bar on rank 0's terminal; in a file, or without tqdm installed, the lines at each evaluation are all there is."""
    try:
        from tqdm import tqdm
    except ImportError:
        return argparse.Namespace(update=lambda: None, close=lambda: None)
    return tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=world.rank != 0 or None, smoothing=0.1)


def compressors(encoding: data.Encoding, hp: Common) -> dict[str, float]:
    """Bits per byte that gzip and xz need for the text that evaluate() predicts, up to COMPRESSED_BYTES of it."""
    names, ids = data.domains(hp.data), {}
    most = min(hp.val_tokens or data.COMPRESSED_BYTES, data.COMPRESSED_BYTES)
    for batch in data.validation_batches(hp.data, seq_len=hp.seq_len, rows=1, max_tokens=max(most, hp.seq_len * len(names))):
        ids.setdefault(batch.domain_B[0].item(), []).append(batch.targets_BT[batch.targets_BT >= 0])
    texts = [encoding.decode_bytes(torch.cat(parts)) for parts in ids.values()]
    return data.compressed_bpb(b"".join(text[: data.COMPRESSED_BYTES // len(texts)] for text in texts))  # as much of each domain


def sample(model: GPT, hp: Common, device: torch.device) -> tuple[list[int], list[int]]:
    """Ids: the beginning of the validation text, and how the model goes on."""
    prompt = next(data.validation_batches(hp.data, seq_len=min(32, hp.seq_len), rows=1, device=device)).inputs_BT
    ids, length = model.generate(prompt, hp.sample_tokens, temperature=0.8, seed=hp.seed)[0].tolist(), prompt.size(1)
    return ids[:length], ids[length:]


# -----------------------------------------------------------------------------
# Profiling


def phase_seconds(events) -> dict[str, float]:
    """Of each named part of a step, the host's time: on CUDA each also has an entry for what ran on the device meanwhile."""
    names, host = ("data", "forward", "backward", "communication", "optimizer"), torch.autograd.DeviceType.CPU
    return {e.key: e.cpu_time_total / 1e6 for e in events if e.key in names and e.device_type == host}


def profile(folder: Path, step_function, config: Config, hp: Common, world: World):
    """Three steady steps under torch.profiler: trace.json for Perfetto or chrome://tracing, summary.txt with the top ten operators."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    folder.mkdir(parents=True, exist_ok=True)
    cuda, waits, steps = world.device.type == "cuda", 20, 3  # on a CPU experts meet new row counts for a while, which cost a primitive each
    for step in range(waits):
        step_function(step)
    synchronize(world.device)
    if cuda:
        torch.cuda.memory._record_memory_history()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch_profile(activities=activities, acc_events=True) as profiler:
        began = time.perf_counter()
        for step in range(waits, waits + steps):
            step_function(step)
        synchronize(world.device)
        seconds = (time.perf_counter() - began) / steps
    if world.rank > 0:
        return
    profiler.export_chrome_trace(str(folder / "trace.json"))
    if cuda:
        torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    events = profiler.key_averages()
    phases = phase_seconds(events)
    rate = hp.batch_tokens * model_file.flops_per_token(config, hp.seq_len) / seconds
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    lines = [
        f"{seconds * 1000:.1f} ms per step under the profiler, {hp.batch_tokens / seconds:,.0f} tokens/s",
        f"MFU {100 * rate / world.size / matmul_rate(world.device, config.dtype):.1f}% on active parameters",
        f"peak memory {peak_bytes(world.device) / 2**20:,.0f} MiB",
        "share of the host's time: " + ", ".join(f"{name} {100 * t / sum(phases.values()):.1f}%" for name, t in phases.items()),
        events.table(sort_by=order, row_limit=10, max_name_column_width=45),
        f"trace: {folder / 'trace.json'} (open it in https://ui.perfetto.dev or chrome://tracing)",
    ]
    (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


# -----------------------------------------------------------------------------
# Command line


def parse(recipe: Recipe, argv: list[str] | None = None) -> tuple[Config, Common, argparse.Namespace]:
    """Flags -> configuration, hyperparameters, and the flags that belong to neither. Nothing is allocated and no data are looked at yet.
    Raises ConfigError."""
    parser = Parser(prog=f"train_{recipe.name}.py", description=f"Train with {recipe.name}; every field of Config and Hyperparameters is a flag.")
    parser.add_argument("--experiment_name", "--experiment-name", default=recipe.name, help="folder below out_dir")
    parser.add_argument("--preset", choices=list(recipe.presets), help="default: speedrun with CUDA, cpu without")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of this experiment")
    for sink in logger.SINKS:
        parser.add_argument(f"--{sink}", action="store_true", help=f"feed the same numbers to {sink} besides")
    parser.add_argument("--enable_profiling", "--enable-profiling", action="store_true", help="profile a few steps into profile/ and stop")
    parser.add_argument("--plan", action="store_true", help="print what --world_size ranks would send, hold and compute, and stop")
    parser.add_argument("--world_size", "--world-size", type=model_file.positive, default=8, help="ranks of the --plan")
    add_flags(parser, recipe.hyperparameters, "the run, whose defaults a preset changes")
    add_flags(parser, Config, "the model, likewise")
    args = parser.parse_args(argv)
    args.preset = args.preset or ("speedrun" if torch.cuda.is_available() else "cpu")
    given = vars(args)
    pick = lambda cls: {field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given}
    hp = dataclasses.replace(recipe.presets[args.preset], **pick(recipe.hyperparameters))
    config = dataclasses.replace(model_file.PRESETS[args.preset], **pick(Config))
    return config, hp, args


def fit_to_data_and_machine(config: Config, hp: Common, args: argparse.Namespace, device: torch.device) -> Config:
    """The data's vocabulary, and fp32 where a CPU has no bf16 of its own, unless flags say otherwise."""
    meta, changes = data.load_meta(hp.data), {}
    if "vocab_size" not in args:
        changes |= {"vocab_size": meta["vocab_size"], "eot_token": getattr(args, "eot_token", meta["eot_token"])}
    elif config.vocab_size < meta["vocab_size"]:
        raise ConfigError(f"vocab_size is {config.vocab_size}; it must be at least {meta['vocab_size']}, the vocabulary of {hp.data}")
    if device.type == "cpu" and "dtype" not in args and not cpu_has_bf16():
        changes["dtype"] = "fp32"
    return dataclasses.replace(config, **changes)


def cpu_has_bf16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return supported() or getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def collectives_timeout(hp: Common) -> timedelta:
    """The watchdog speaks first."""
    return timedelta(seconds=2 * hp.stuck_after)


def main(recipe: Recipe):
    world, start = World(0, 1, torch.device("cpu")), f"train_{recipe.name}.py: error: "
    try:
        config, hp, args = parse(recipe)
        if args.plan:
            print(plan_text(config, hp, recipe, args.world_size))
            return
        sinks = [name for name in logger.SINKS if vars(args)[name]]
        for name in sinks:
            logger.sink_module(name)  # is it there? Better said before training than after
        world = init_distributed(hp.device, collectives_timeout(hp))
        config = agree(world, lambda: fit_to_data_and_machine(config, hp, args, world.device))
        restarted = gather_objects(world.restarted and (Path(hp.out_dir) / args.experiment_name).exists(), world)
        resume = args.resume or any(restarted)
        train(config, hp, recipe, args.experiment_name, resume, args.enable_profiling, world, sinks)
    except Ended as error:
        if world.rank == 0:
            print(f"{start}{error}", file=sys.stderr, flush=True)
        if world.size > 1:
            dist.barrier()  # nobody leaves before it is said: torchrun ends the others when one has left
        sys.exit(1)
    except MISTAKES as error:  # of this rank alone: torchrun ends the others
        sys.exit(f"{start}{error}" if world.size == 1 else f"{start}rank {world.rank}: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


MUON = Recipe("muon", Hyperparameters, PRESETS, make_optimizers, set_rates, matrix_state=1, newton_schulz=1)

if __name__ == "__main__":
    main(MUON)
