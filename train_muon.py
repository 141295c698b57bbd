"""The speedrun: train the model of model.py with Muon on its matrices and AdamW on the rest.

    python train_muon.py --experiment_name muon                                     # one GPU, or a laptop's CPU
    torchrun --standalone --nproc_per_node=8 train_muon.py --experiment_name muon   # 8 GPUs, the same mathematics

From top to bottom: settings, Muon, schedules, the exchange between ranks, evaluation, a training step, the run, the
command line. On one GPU, Muon, `train_step` and `train` are all there is to read.

Each slab of a parameter (distributed.py) has one owner rank. Its gradient is summed there during backward and its
update computed there; new values are gathered while later slabs are updated. Losses are divided by the constant number
of micro-batches in the global batch, so gradients add up to the same sum at any world size. With --expert_parallel N,
N ranks share the experts, and token rows travel to them (model.py).

Sources: Muon (kellerjordan.github.io/posts/muon); distribution and overlap as in modded-nanogpt records 6 and 22-24.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

import data
import distributed
import facts
import guards
import logger
import model
import settings
from checkpoint import Saver, latest_valid_checkpoint, load_checkpoint
from cli import Parser, UserError, add_flags, rank_count, require, with_flags
from distributed import Bucket, Slab, World, make_buckets, slab_part
from facts import synchronize
from guards import AsyncHostCopy, Ended, StepFlags, agree, agree_on, check_health, gather_objects
from logger import PhaseTimer, Run
from model import DTYPES, GPT, Config
from ops import kernel_on_cuda
from rows import RowAdamW, gather_rows
from terminal import LastingStream, Progress, say

# -----------------------------------------------------------------------------
# Settings: every field is a flag

@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run with any optimizer. The defaults are the speedrun's; PRESETS hold others."""

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
    micro_batch_tokens: int = 48 * 1024  # per rank and forward pass, at most, but a row at least; accumulated
    # evaluation and safety
    val_every: int = 125  # steps; 0 = at the end only
    val_tokens: int = 10_485_760  # 0 = all
    checkpoint_every: int = 125  # steps; 0 = at the end only
    sample_tokens: int = 256  # generated at the end
    warmup_steps: int = 10  # untimed steps on random tokens, undone before the clock starts
    stuck_after: float = 600.0  # seconds without progress of one of several ranks, after which the run ends
    # several ranks
    expert_parallel: int = 1  # ranks that share the experts, which then need not fit on one
    bucket_mb: float = 25.0  # MiB of gradients, at least, that travel together
    overlap: bool = True  # gradients leave during backward; false: after it, with the same result
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

    def __post_init__(self):
        for name in "num_iterations batch_tokens seq_len micro_batch_tokens window_start expert_parallel".split():
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in "val_every val_tokens checkpoint_every sample_tokens warmup_steps bucket_mb".split():
            require(self, name, 0 <= getattr(self, name) < math.inf, "at least 0")
        for name in (field.name for field in dataclasses.fields(self) if field.name.endswith(("_lr", "decay"))):
            require(self, name, 0 <= getattr(self, name) < 1e30, "at least 0 and below 1e30")
        for name in ("cooldown_frac", "final_lr_scale"):
            require(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        for name in ("beta1", "beta2"):
            require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        require(self, "stuck_after", 1 <= self.stuck_after <= 10**6, "between 1 and 1,000,000 seconds")
        require(self, "seed", 0 <= self.seed < 2**63, "between 0 and 2^63 - 1")
        require(self, "sample_tokens", self.sample_tokens <= 10**5, "at most 100,000")
        require(self, "num_iterations", self.num_iterations < 10**6, "below 1,000,000, as checkpoints have six digits")
        devices = (None, "cpu", "cuda") if torch.cuda.is_available() else (None, "cpu")
        require(self, "device", self.device in devices, "one that this machine has: cpu, cuda or none")
        enough = self.val_tokens == 0 or self.val_tokens >= self.seq_len
        require(self, "val_tokens", enough, f"0 (all) or at least seq_len = {self.seq_len}")
        require(self, "batch_tokens", self.batch_tokens % self.seq_len == 0, f"a multiple of seq_len = {self.seq_len}")

    @property
    def batch_rows(self) -> int:
        """Rows of a step on all ranks together."""
        return self.batch_tokens // self.seq_len

    @property
    def collectives_timeout(self) -> timedelta:
        return timedelta(seconds=2 * self.stuck_after)  # so that the watchdog reports first


@dataclass(frozen=True, kw_only=True)
class MuonConfig(TrainConfig):
    """Settings of a run with Muon (modded-nanogpt records 20-21)."""

    # Muon
    muon_lr: float = 0.05
    momentum: float = 0.95
    momentum_start: float = 0.85
    momentum_warmup: int = 300  # steps from momentum_start to momentum
    weight_decay: float = 0.0  # decoupled, on matrices, times the rate
    ns_dtype: str = "bf16"  # Newton-Schulz: a key of DTYPES

    def __post_init__(self):
        super().__post_init__()
        for name in ("momentum", "momentum_start"):
            require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        require(self, "momentum_warmup", self.momentum_warmup >= 0, "at least 0")
        require(self, "ns_dtype", self.ns_dtype in DTYPES, f"one of {', '.join(DTYPES)}")


CPU_RUN = dict(data="data/python", num_iterations=750, batch_tokens=4096, seq_len=1024, micro_batch_tokens=4096,
               val_every=125, val_tokens=2**18, warmup_steps=1, bucket_mb=1.0, ngram_embed_lr=0.2)  # fmt: skip
SMALL_RUN = dict(num_iterations=3000, batch_tokens=131_072, seq_len=8192, micro_batch_tokens=16_384)

PRESETS = {
    "cpu": MuonConfig(**CPU_RUN, muon_lr=0.04, momentum=0.8, momentum_start=0.8),  # a shorter mean, as steps are few
    "small": MuonConfig(**SMALL_RUN),
    "speedrun": MuonConfig(),
}

# -----------------------------------------------------------------------------
# Muon

NEWTON_SCHULZ_STEPS = 5
MAX_BATCH_NUMEL = 2**28  # elements orthogonalised at once: 14 bytes of temporaries for each


def newton_schulz(G: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest semi-orthogonal matrix to each of (..., rows, cols), roughly: singular values in [0.68, 1.21].

    Five steps of the quintic 3.4445 x - 4.7750 x^3 + 2.0315 x^5, which is steep at 0 instead of exact at 1. G is first
    divided by its Schatten-4 norm ||G G^T||^(1/2), closer to the largest singular value than the Frobenius norm, which
    is 0.004 bits per byte worse (n = 2). Four steps cost 0.012 (records/cpu/NEGATIVE.md). A zero matrix stays zero."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.reshape(-1, *G.shape[-2:]).to(dtype)
    exponent = X.abs().amax((-2, -1), keepdim=True).float().frexp().exponent
    X = X * torch.exp2(-exponent.clamp(min=0)).to(dtype)  # exact; 4th powers of entries above 1 could overflow
    wide = X.size(-2) <= X.size(-1)
    X = X if wide else X.mT

    A = gram(X)
    norm_squared = torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True) + 1e-14  # of the Schatten-4 norm
    X, A = X / norm_squared.sqrt(), A / norm_squared
    for step in range(NEWTON_SCHULZ_STEPS):
        A = A if step == 0 else gram(X)
        X = torch.baddbmm(X, gram_polynomial(A, b, c), X, beta=a)
    return (X if wide else X.mT).reshape(G.shape)


@kernel_on_cuda
def gram(X: Tensor) -> Tensor:
    """X X^T of (N, rows, cols)."""
    return X @ X.mT


@kernel_on_cuda
def gram_polynomial(A: Tensor, b: float, c: float) -> Tensor:
    """b A + c A A of symmetric (N, rows, rows)."""
    return torch.baddbmm(A, A, A, beta=b, alpha=c)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised matrix by matrix.

    params: tensors (..., rows, cols); each leading index is a matrix of its own (an expert, a part of QKV). The update
    is scaled by sqrt(max(1, rows / cols)). Momentum is a lerp, so its buffers hold a mean gradient. A matrix with an
    all-zero gradient (an expert without tokens) only decays, as stale momentum would still give it a full-norm step.
    Raises ValueError for parameters with fewer than two dimensions."""

    def __init__(self, params, lr: float = 0.05, momentum: float = 0.95, weight_decay: float = 0.0,
                 ns_dtype: torch.dtype = torch.bfloat16):  # fmt: skip
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_dtype=ns_dtype))
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim < 2:
                raise ValueError(f"Muon takes matrices; a parameter of shape {tuple(p.shape)} belongs to AdamW")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for params in batches_of_one_shape([p for p in group["params"] if p.grad is not None]):
                self.update(params, group["lr"], group["momentum"], group["weight_decay"], group["ns_dtype"])

    def update(self, params: list[Tensor], lr: float, momentum: float, weight_decay: float, ns_dtype: torch.dtype):
        """One step of parameters whose matrices have the same (rows, cols)."""
        rows, cols = params[0].shape[-2:]
        grads = [p.grad for p in params]
        for p in params:
            if p not in self.state:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        nesterov = torch._foreach_lerp(grads, momenta, momentum)

        batch = torch.cat([u.reshape(-1, rows, cols).to(ns_dtype) for u in nesterov])
        has_grad = torch.cat([g.reshape(-1, rows * cols).any(-1) for g in grads])
        update = newton_schulz(batch, ns_dtype) * has_grad[:, None, None]

        torch._foreach_mul_(params, 1 - lr * weight_decay)
        updates = update.split([p.numel() // (rows * cols) for p in params])
        updates = [u.view_as(p).to(p.dtype) for u, p in zip(updates, params)]
        torch._foreach_add_(params, updates, alpha=-lr * max(1, rows / cols) ** 0.5)


def batches_of_one_shape(params: list[Tensor]) -> list[list[Tensor]]:
    """Parameters by their last two dimensions, at most MAX_BATCH_NUMEL elements together."""
    by_shape = {}
    for p in params:
        batches = by_shape.setdefault(p.shape[-2:], [])
        if not batches or sum(q.numel() for q in batches[-1]) + p.numel() > MAX_BATCH_NUMEL:
            batches.append([])
        batches[-1].append(p)
    return [batch for batches in by_shape.values() for batch in batches]


# -----------------------------------------------------------------------------
# Optimizers and schedules: rates are pure functions of the step

def make_optimizers(tensors: dict[str, list[Tensor]], hp: MuonConfig) -> list[torch.optim.Optimizer]:
    """Both AdamWs and Muon over this rank's slabs, given by kind; only those with any."""
    matrices = [dict(params=tensors[kind], base_lr=hp.muon_lr) for kind in ("matrix", "expert") if tensors.get(kind)]
    muon = [Muon(matrices, weight_decay=hp.weight_decay, ns_dtype=DTYPES[hp.ns_dtype])] if matrices else []
    return adamw(tensors, hp) + muon


def adamw(tensors: dict[str, list[Tensor]], hp: TrainConfig, matrices=()) -> list[torch.optim.Optimizer]:
    """RowAdamW over n-gram tables, and AdamW over the other kinds that are no matrices and over the groups `matrices`.

    Schedules scale `base_lr`. Only optimizers with any parameters are made."""
    group = lambda kind: dict(params=tensors[kind], base_lr=getattr(hp, f"{kind}_lr"))
    kinds = [kind for kind in ("embed", "value_embed", "head", "router", "scalar") if tensors.get(kind)]
    groups, options = [*map(group, kinds), *matrices], dict(lr=0.0, betas=(hp.beta1, hp.beta2), eps=1e-10)
    tables = [RowAdamW([group("ngram_embed")], **options)] if tensors.get("ngram_embed") else []
    return tables + ([torch.optim.AdamW(groups, weight_decay=0.0, fused=True, **options)] if groups else [])


def set_rates(optimizers: list[torch.optim.Optimizer], step: int, hp: TrainConfig, scale: float):
    """Write this step's rates, base_lr * scale, and Muon's momentum into the groups."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["base_lr"] * scale
        if "momentum" in group:
            warm = min(1.0, step / hp.momentum_warmup) if hp.momentum_warmup else 1.0
            group["momentum"] = hp.momentum_start + warm * (hp.momentum - hp.momentum_start)


def lr_scale(step: int, hp: TrainConfig) -> float:
    """1, then linear to final_lr_scale over the last cooldown_frac of the run."""
    left = (hp.num_iterations - step) / hp.num_iterations / max(hp.cooldown_frac, 1e-9)
    return 1.0 if left >= 1 else left + (1 - left) * hp.final_lr_scale


def window(step: int, hp: TrainConfig, config: Config) -> int:
    """Attention window of a long layer in tokens: whole blocks of 128, linear growth (modded-nanogpt record 13)."""
    now = hp.window_start + (config.window_size - hp.window_start) * step / hp.num_iterations
    return min(config.window_size, -(-int(now) // 128) * 128)


# -----------------------------------------------------------------------------
# The exchange: gradients to their owners during backward, new values back during the updates


def copy_all(targets: list[Tensor], sources: list[Tensor]):
    if targets:  # _foreach_copy_ cannot take empty lists
        torch._foreach_copy_(targets, sources)


class LocalSlab(NamedTuple):
    """A slab on one of the ranks that hold it."""

    slab: Slab
    parameter: torch.nn.Parameter
    part: int | slice  # of the parameter's dimension 0
    value: Tensor  # view of that part; the owner's update finds its gradient in .grad
    in_send_buf: Tensor | None  # None if it does not travel, or its rows do
    in_recv_buf: Tensor | None  # None on ranks that do not own it


class Transfer:
    """One bucket on one of its ranks. Buffers live as long as the run, so none is freed under a running collective."""

    def __init__(self, bucket: Bucket, net: GPT, world: World, overlap: bool):
        self.travels = len(bucket.ranks) > 1
        self.group, self.overlap, self.work, self.missing = world.groups.get(bucket.ranks), overlap, None, 0
        in_buffers = self.travels and not bucket.is_rows
        part_numel = bucket.part if in_buffers else 0
        self.send_buf = torch.zeros(len(bucket.ranks), part_numel, device=world.device)  # all owners' parts
        self.recv_buf = torch.zeros(part_numel, device=world.device)  # this rank's part
        self.slabs, ends = [], collections.Counter()
        for slab, owner in zip(bucket.slabs, bucket.owners):
            name, part = slab_part(slab.name)
            parameter = net.get_parameter(name)
            if slab.kind == "expert":
                part -= net.ranks.first(net.config.num_experts)
            value, place = parameter.detach()[part], slice(ends[owner], ends[owner] + slab.numel)
            ends[owner] = place.stop
            sent = self.send_buf[bucket.ranks.index(owner), place].view(value.shape) if in_buffers else None
            received = self.recv_buf[place].view(value.shape) if in_buffers and owner == world.rank else None
            self.slabs.append(LocalSlab(slab, parameter, part, value, sent, received))
        self.parameters = list({id(local.parameter): local.parameter for local in self.slabs}.values())
        self.owner = bucket.owners[0]
        self.owned = [local for local, owner in zip(self.slabs, bucket.owners) if owner == world.rank]
        self.others = [local for local, owner in zip(self.slabs, bucket.owners) if owner != world.rank]
        self.optimizers = []

    def owned_by_kind(self) -> dict[str, list[Tensor]]:
        tensors = {}
        for local in self.owned:
            tensors.setdefault(local.slab.kind, []).append(local.value)
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
        """Start to sum each slab's gradient on its owner. A parameter without a gradient here adds zero."""
        if self.travels:
            with_grad = [local for local in self.slabs if local.parameter.grad is not None]
            if len(with_grad) < len(self.slabs):
                self.send_buf.zero_()
            grads = [local.parameter.grad[local.part] for local in with_grad]
            copy_all([local.in_send_buf for local in with_grad], grads)
            for parameter in self.parameters:
                parameter.grad = None
            self.start(distributed.reduce_scatter, self.recv_buf, self.send_buf.flatten())

    def receive_gradients(self):
        """Wait for the summed gradients of the slabs that this rank owns, and set their .grad."""
        self.wait()
        for local in self.owned:
            if self.travels:
                local.value.grad = local.in_recv_buf
            else:
                grad = local.parameter.grad
                local.value.grad = torch.zeros_like(local.value) if grad is None else grad[local.part]

    def send_values(self):
        """Start to gather the owners' new values on all ranks."""
        for local in self.owned:
            local.value.grad = None
        if self.travels:
            copy_all([local.in_recv_buf for local in self.owned], [local.value for local in self.owned])
            self.start(distributed.all_gather, self.send_buf.flatten(), self.recv_buf)

    def receive_values(self):
        self.wait()
        for parameter in self.parameters:
            parameter.grad = None
        copy_all([local.value for local in self.others], [local.in_send_buf for local in self.others])


class RowTransfer(Transfer):
    """An n-gram table on one of its ranks: the rows that a step touched travel, with their numbers.

    They leave after backward, of which their gradients are the last; ranks and host wait for each other."""

    def send_gradients(self):
        (parameter,) = self.parameters
        grad, parameter.grad = parameter.grad, None
        self.row_U, self.grad_UD = parameter.new_empty(0, dtype=torch.int64), parameter.new_empty(0, parameter.size(1))
        if grad is not None:  # else no token reached the table on this rank
            grad = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()  # dense: of a table made elsewhere
            self.row_U, self.grad_UD = grad.indices()[0], grad.values()

    def receive_gradients(self):
        (local,), row_R, grad_RD = self.slabs, self.row_U, self.grad_UD
        if self.travels:
            row_R, grad_RD = gather_rows(row_R, grad_RD, self.group)
        rows = torch.sparse_coo_tensor(row_R[None], grad_RD, local.value.shape, check_invariants=False,
                                       is_coalesced=not self.travels).coalesce()  # fmt: skip
        (self.row_U,) = rows.indices()  # of all ranks
        for local in self.owned:
            local.value.grad = rows

    def send_values(self):
        (local,) = self.slabs
        local.value.grad = None
        if self.travels:
            self.rows_UD = local.value.index_select(0, self.row_U)
            self.work = dist.broadcast(self.rows_UD, src=self.owner, group=self.group, async_op=True)

    def receive_values(self):
        self.wait()
        for local in self.others:
            local.value.index_copy_(0, self.row_U, self.rows_UD)


class Exchange:
    """Every bucket of this rank, in the order in which all ranks send them.

    A bucket leaves once its last gradient of the last micro-batch is ready and the buckets before it have left. So a
    late one delays the rest, and the order is the same on all ranks. overlap=False sends the same buckets in the same
    order after backward and waits for each: the reference, with the same bits."""

    def __init__(self, net: GPT, world: World, bucket_mb: float = 0.0, overlap: bool = True):
        self.world, self.model, self.overlap = world, net, overlap
        buckets = make_buckets(net.config, world.size, world.expert_parallel, bucket_mb)
        net.sparse_tables = True  # of n-grams: their gradients hold the touched rows
        self.transfers = [(RowTransfer if bucket.is_rows else Transfer)(bucket, net, world, overlap)
                          for bucket in buckets if world.rank in bucket.ranks]  # fmt: skip
        self.reducing, self.sent, self.totals_work = False, 0, None
        if world.size > 1 and overlap:
            for transfer in self.transfers:
                for parameter in transfer.parameters:
                    parameter.register_post_accumulate_grad_hook(functools.partial(self.on_grad_ready, transfer))

    @property
    def owned(self) -> list[LocalSlab]:
        return [local for transfer in self.transfers for local in transfer.owned]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [optimizer for transfer in self.transfers for optimizer in transfer.optimizers]

    def attach_optimizers(self, recipe: "Recipe", hp: TrainConfig):
        """Make the optimizers of each bucket, for the slabs that this rank owns."""
        for transfer in self.transfers:
            transfer.optimizers = recipe.make_optimizers(transfer.owned_by_kind(), hp)
        self.check_cover()

    def check_cover(self):
        """Assert that every owned slab is in exactly one optimizer group."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        grouped = sorted(id(p) for group in groups for p in group["params"])
        owned = sorted(id(local.value) for local in self.owned)
        assert grouped == owned, "the optimizers' groups do not cover the parameters exactly once"

    def begin_reduce(self, totals: Tensor):
        """Call before the last backward: buckets may leave from now on. `totals` is summed over ranks, in place."""
        self.reducing, self.sent = True, 0
        for transfer in self.transfers:
            transfer.missing = len(transfer.parameters)
        if self.world.size > 1:
            self.totals_work = dist.all_reduce(totals, async_op=True)
            if not self.overlap:
                self.totals_work.wait()

    def on_grad_ready(self, transfer: Transfer, parameter: Tensor):
        if self.reducing:
            transfer.missing -= 1
            while self.sent < len(self.transfers) and self.transfers[self.sent].missing == 0:
                self.transfers[self.sent].send_gradients()
                self.sent += 1

    def flush_reduce(self):
        """Call after the last backward: send the rest, as a parameter outside the graph runs no hook."""
        self.reducing = False
        for transfer in self.transfers[self.sent :]:
            transfer.send_gradients()

    def finish(self):
        """Wait for the totals and for all new values."""
        if self.totals_work is not None:
            self.totals_work.wait()
            self.totals_work = None
        for transfer in self.transfers:
            transfer.receive_values()


# -----------------------------------------------------------------------------
# A run: the parts that another script replaces, and the parts that stay the same during it

class Recipe(NamedTuple):
    """The parts of a run that differ between train_muon.py, train_adamw.py and train_zoo.py."""

    script: str
    name: str  # of the optimizer, and the default experiment name
    train_config: type
    presets: dict
    make_optimizers: callable  # (kind -> owned slabs, hp) -> optimizers
    lr_scale: callable  # (step, hp) -> factor on all rates
    matrix_state: int  # floats of optimizer state per element of a matrix
    newton_schulz: int  # iterations for each matrix in a step
    model_config: type
    model_presets: dict
    check: callable  # (config, hp, world size, device type): raises UserError
    data: ModuleType  # with load_meta, verify, fingerprint and validation_batches of data.py
    open_loader: callable  # (config, hp, world, micro_rows) -> loader; raises UserError
    loss: callable  # (model, batch, step, hp) -> loss, statistics
    evaluate: callable  # (session, step) -> metrics
    validation_text: callable  # (session, encoding) -> bytes, for the compressors


class Session(NamedTuple):
    """The parts of a run that stay the same during it."""

    recipe: Recipe
    hp: TrainConfig
    model: GPT
    exchange: Exchange
    timer: PhaseTimer
    folder: Path = Path()  # of the run
    micro_rows: int = 1  # rows of one forward pass
    token_bytes: Tensor | None = None  # UTF-8 bytes of each id, where known
    signals: guards.StopSignals = guards.StopSignals(World(0, 1, torch.device("cpu")))

    @property
    def world(self) -> World:
        return self.exchange.world


def compute_loss(net: GPT, batch: data.Batch, step: int, hp: TrainConfig) -> tuple[Tensor, dict]:
    """Loss of a micro-batch, and its statistics: 0-d tensors, counts_LE, and numbers."""
    output = net(batch.inputs_BT, batch.targets_BT)
    return output.loss, output.stats


def open_loader(config: Config, hp: TrainConfig, world: World, micro_rows: int, kind=data.Loader, **options):
    return kind(hp.data, seq_len=hp.seq_len, batch_rows=hp.batch_rows, micro_rows=micro_rows,
                rank=world.rank, world_size=world.size, seed=hp.seed, vocab_size=config.vocab_size,
                device=world.device, **options)  # fmt: skip


# -----------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(session: Session, step: int) -> dict[str, float]:
    """val/loss in nats per token of the first val_tokens; val/bpb in bits per byte if the bytes of ids are known."""
    net, world = session.model, session.world
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)
    net.eval()
    for batch in validation_batches(session, step):
        totals += loss_totals(net(batch.inputs_BT, batch.targets_BT).loss, batch.targets_BT, session.token_bytes)
    net.train()

    session.timer.begin("communication")
    if world.size > 1:
        dist.all_reduce(totals)
    return loss_metrics("val", totals)


def validation_batches(session: Session, step: int):
    """Validation batches of this rank until a signal; sets the model's step, position and window for each."""
    hp, net, world = session.hp, session.model, session.world
    window_now = window(step, hp, net.config)
    for batch in session.recipe.data.validation_batches(
            hp.data, seq_len=hp.seq_len, rows=session.micro_rows, max_tokens=hp.val_tokens or None, rank=world.rank,
            world_size=world.size, vocab_size=net.config.vocab_size, device=world.device):  # fmt: skip
        session.timer.begin("validation")
        net.set_step(hp.seed, step, batch.first_row * hp.seq_len, window_now)
        yield batch
        if session.signals.received and hp.expert_parallel == 1:  # else other ranks would wait for this rank's experts
            return


def loss_totals(mean_loss: Tensor, targets_BT: Tensor, token_bytes: Tensor | None) -> Tensor:
    """(3,) in fp64: nats, tokens and bytes of a batch. mean_loss is over all positions, with or without a target."""
    is_target = targets_BT >= 0
    nbytes = is_target.sum() * 0 if token_bytes is None else (token_bytes[targets_BT.clamp(min=0)] * is_target).sum()
    return torch.stack([mean_loss.double() * is_target.numel(), is_target.sum().double(), nbytes.double()])


def loss_metrics(prefix: str, totals: Tensor) -> dict[str, float]:
    nats, tokens, nbytes = totals.tolist()
    metrics = {f"{prefix}/loss": nats / max(tokens, 1)}
    return metrics | ({f"{prefix}/bpb": nats / nbytes / math.log(2)} if nbytes else {})


# -----------------------------------------------------------------------------
# One training step

@contextlib.contextmanager
def phase(timer: PhaseTimer, name: str):
    """A named part of the step, in the metrics and in a profiler's trace."""
    timer.begin(name)
    with record_function(name):
        yield
    timer.mark(name)


NO_FLAGS = StepFlags()


def train_step(session: Session, next_step, step: int, flags: StepFlags = NO_FLAGS) -> tuple[dict, dict[str, Tensor]]:
    """One optimizer step over the global batch; returns its metrics; and loss, parts of it, and flags of all ranks.

    next_step() returns the micro-batches of this rank. During the last backward, gradients leave bucket by bucket, with
    the losses, counts and flags beside them. While one bucket is updated, earlier ones are gathered and later ones
    reduced. The phase "communication" is the wait that computation does not hide."""
    recipe, hp, net, exchange, timer = session[:5]
    device = exchange.world.device
    timer.start(step)
    with phase(timer, "data"):
        batches = next_step()
    share = 1 / (len(batches) * exchange.world.size)  # of a micro-batch in the global batch; constant, so gradients add
    sums = torch.zeros((), dtype=torch.float64, device=device)
    counts_LE = torch.zeros_like(net.bias_LE, dtype=torch.float64)
    flags = torch.tensor(flags, dtype=torch.float64).to(device, non_blocking=True)

    for batch in batches:
        with phase(timer, "forward"):
            net.set_step(hp.seed, step, batch.first_row * hp.seq_len, window(step, hp, net.config))
            loss, stats = recipe.loss(net, batch, step, hp)
            stats = stats | {"loss": loss}
            names = [name for name, value in stats.items() if torch.is_tensor(value) and value.ndim == 0]
            sums = sums + (share * torch.stack([stats[name].detach() for name in names])).double()
            counts_LE += stats["counts_LE"]
        with phase(timer, "backward"):
            if batch is batches[-1]:
                totals = torch.cat([sums, flags, counts_LE.flatten()])
                exchange.begin_reduce(totals)
            (loss * share).backward()

    with phase(timer, "communication"):
        exchange.flush_reduce()
    set_rates(exchange.optimizers, step, hp, recipe.lr_scale(step, hp))
    norms = facts.Norms(exchange, step)
    for transfer in exchange.transfers:
        with phase(timer, "communication"):
            transfer.receive_gradients()
        with phase(timer, "optimizer"), norms.measure(transfer):
            for optimizer in transfer.optimizers:
                optimizer.step()
        with phase(timer, "communication"):
            transfer.send_values()
    with phase(timer, "communication"):
        exchange.finish()
        norm_row = norms.row()

    sums, flags, counts = totals.split([len(names), len(flags), counts_LE.numel()])
    counts_LE = counts.view_as(counts_LE).long()
    net.balance(counts_LE)
    means = dict(zip(names, sums.unbind()))
    return step_metrics(stats | means, counts_LE) | norm_row, means | dict(zip(StepFlags._fields, flags.unbind()))


ROUTER_NAMES = {"balance_loss": "train/balance_loss", "z_loss": "train/z_loss", "entropy": "moe/router_entropy"}


def step_metrics(stats: dict, counts_LE: Tensor) -> dict:
    """Statistics under the names of the log, and the load of experts. Others are logged if their name has a slash."""
    names = {"ce": "train/loss"} | (ROUTER_NAMES if len(counts_LE) else {})
    row = {names.get(name, name): value for name, value in stats.items() if name in names or "/" in name}
    if len(counts_LE):
        load_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
        row |= {"moe/load": load_LE, "moe/load_max_over_mean": (load_LE.amax(-1) * load_LE.size(-1)).mean()}
    return row


# -----------------------------------------------------------------------------
# Training

def train(config: Config, hp: TrainConfig, recipe: Recipe, experiment_name: str, resume: bool, enable_profiling: bool,
          world: World, sinks=()):  # fmt: skip
    """Train to hp.num_iterations: run.log, metrics.jsonl, config.json and checkpoint/ in out_dir/experiment_name."""
    folder, timer = Path(hp.out_dir) / experiment_name, PhaseTimer(world.device.type)
    fresh, is_first = not (resume or enable_profiling), world.rank == 0
    meta, loader = agree(world, lambda: prepare(config, hp, recipe, folder, resume, fresh, world))
    choices = dict(experiment_name=experiment_name, resume=resume, enable_profiling=enable_profiling)
    agree_on(facts.shared_facts(config, hp, recipe, **choices), world)
    world = world.with_expert_groups(hp.expert_parallel, hp.collectives_timeout)

    # ---- the model, its buckets, and the optimizers of each
    net = model.build(config, world.expert_ranks).init_weights(hp.seed).to(world.device)
    exchange = Exchange(net, world, hp.bucket_mb, hp.overlap)
    exchange.attach_optimizers(recipe, hp)
    compile_note = compile_model(net, hp, world.device)
    token_bytes = None if meta["token_bytes"] is None else torch.tensor(meta["token_bytes"], device=world.device)
    signals = guards.StopSignals(world)
    session = Session(recipe, hp, net, exchange, timer, folder, loader.micro_rows, token_bytes, signals)

    watchdog = guards.Watchdog(world, timer, hp.stuck_after)
    saver = Saver(folder / "checkpoint", exchange, world, meta["encoding"])
    with signals, watchdog, saver, contextlib.ExitStack() as stack:
        stack.callback(loader.close)
        say("compiling in the first step: minutes, or seconds from a cache", compile_note == "compiled" and is_first)
        say(f"warm-up steps: {hp.warmup_steps}, undone before the clock starts", hp.warmup_steps > 0 and is_first)
        warm_up(session)
        if enable_profiling:
            from tools.profile import profile

            return profile(folder / "profile", lambda i: train_step(session, loader.next_step, i), config, hp, world)

        # ---- where the run begins
        start = resume_run(session, loader, saver) if resume else Start()
        if start.step == hp.num_iterations and gather_objects(logger.has_ended(folder), world)[0]:
            if is_first:
                print(f"{folder} has all its {start.step} steps; nothing is left to do")
            return
        run_info = facts.run_facts(session, experiment_name, meta["encoding"])
        log = stack.enter_context(Run(hp.out_dir, experiment_name, config=run_info, sources=facts.source_files(),
                                      resume_step=start.step if resume else None, active=is_first,
                                      sinks=sinks))  # fmt: skip
        for note in (*start.notes, facts.header(session, run_info, compile_note)):
            log.print(note)

        # ---- train, and sum up
        step, train_time, metrics = train_steps(session, loader, log, saver, start, run_info)
        if step < hp.num_iterations or metrics is None:
            saver.wait()
            log.flush()
            where = f"the checkpoint is {saver.last_good}" if saver.last_good else saver.describe_last_good()
            log.print(f"stopped by a signal after step {step}; {where}; go on with --resume")
            raise SystemExit(128 + (session.signals.received or signal.SIGTERM))
        facts.log_end(session, log, meta["encoding"], train_time, metrics, run_info)
        saver.wait()
        timer.begin("communication")
        gather_objects("done", world)  # or rank 0 could end, and the shared store with it, while another rank needs it
        if is_first:
            print(facts.next_commands(folder))


class Start(NamedTuple):
    """Where a run begins: at step 0, or at a checkpoint."""

    step: int = 0
    train_time: float = 0.0  # seconds
    validated: bool = False  # the evaluation of this step is in the log already
    notes: tuple[str, ...] = ()  # for the log


def warm_up(session: Session):
    """Compile and allocate everything in steps on random tokens, then restore the model and clear the optimizers."""
    hp, net, world = session.hp, session.model, session.world
    before = {name: value.to("cpu", copy=True) for name, value in net.state_dict().items()}
    micro_steps = hp.batch_rows // session.micro_rows // world.size
    next_step = random_batches(net.config, hp, micro_steps, session.micro_rows, world.device)
    for _ in range(hp.warmup_steps):
        train_step(session, next_step, 0)
    net.load_state_dict(before)
    for optimizer in session.exchange.optimizers:
        optimizer.state.clear()


def random_batches(config: Config, hp: TrainConfig, count: int, micro_rows: int, device: torch.device):
    """A stand-in for loader.next_step, with `count` micro-batches of tokens from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def next_step() -> list[data.Batch]:
        ids = torch.randint(config.vocab_size, (count, micro_rows, hp.seq_len + 1), generator=generator).to(device)
        return [data.Batch(micro[:, :-1], micro[:, 1:], i * micro_rows) for i, micro in enumerate(ids)]

    return next_step


def resume_run(session: Session, loader, saver: Saver) -> Start:
    """Load the latest valid checkpoint, if any, into the model, the optimizers and the loader."""
    hp, world = session.hp, session.world
    session.timer.begin("resuming")
    path, manifest, faults = latest_valid_checkpoint(saver.folder, world)
    if path is None:
        manifest = {"step": 0, "train_time": 0.0}
        notes = [f"{saver.folder} holds no checkpoint, so the run begins again"]
    else:
        agree(world, lambda: settings.check_same_run(manifest, session.model.config, hp, session.recipe, path))
        agree(world, lambda: load_checkpoint(path, manifest, session.exchange))
        loader.load_state_dict(manifest["loader"])
        notes = [f"{fault}; going on from step {manifest['step']} instead" for fault in faults]
        notes += settings.extension(manifest, hp)
    validated = gather_objects(logger.has_evaluation(session.folder, manifest["step"]), world)[0]
    return Start(manifest["step"], manifest["train_time"], validated, tuple(notes))


def train_steps(session: Session, loader, log: Run, saver: Saver, start: Start, run_info: dict):
    """Save, validate and step until the end or a signal; returns step, time, last evaluation (None: interrupted)."""
    hp, world, timer = session.hp, session.world, session.timer
    latest = AsyncHostCopy(dict.fromkeys(("loss", *StepFlags._fields), torch.zeros(())))
    stopping, metrics, train_time = False, {}, start.train_time
    flush_every = 1 if world.device.type == "cpu" else 25  # copying rows to the host waits for the GPU
    session.model.train()
    synchronize(world.device)
    clock = time.perf_counter()
    with contextlib.closing(Progress(hp.num_iterations, hp.batch_tokens, active=world.rank == 0)) as progress:
        for step in range(start.step, hp.num_iterations + 1):
            last = step == hp.num_iterations
            due = last or (hp.val_every and step % hp.val_every == 0)
            validate_now = due and (last or not stopping) and not (step == start.step and start.validated)
            save_due = last or stopping or (hp.checkpoint_every and step % hp.checkpoint_every == 0)
            save_now = save_due and step > start.step
            if validate_now or save_now:
                check_health(latest, step, saver)
                synchronize(world.device)
            if save_now:  # before the evaluation, which may fail
                save_checkpoint(session, loader, log, saver, step, train_time + time.perf_counter() - clock, run_info)
            if validate_now:
                train_time += time.perf_counter() - clock
                progress.pause(f"step {step}/{hp.num_iterations}  evaluating")
                metrics = session.recipe.evaluate(session, step)
                if any(gather_objects(session.signals.received > 0, world)):
                    metrics = None
                if metrics is not None:
                    facts.log_evaluation(session, log, step, train_time, metrics, run_info)
                elif not save_now and step > start.step:
                    save_checkpoint(session, loader, log, saver, step, train_time, run_info)
                synchronize(world.device)
                clock = time.perf_counter()
            if last or stopping or metrics is None:
                return step, train_time, metrics

            began = time.perf_counter()
            flags = StepFlags(session.signals.received > 0, saver.failed)
            row, totals = train_step(session, loader.next_step, step, flags)
            previous, latest = latest, AsyncHostCopy(totals)
            timer.begin("communication")
            stopping = check_health(previous, step, saver)  # a host that is ahead of its GPU waits here
            now = time.perf_counter()
            speed = facts.speed_metrics(session, step + 1, now - began, run_info)
            row |= speed | {"train/lr_scale": session.recipe.lr_scale(step, hp)}
            log.log({"step": step + 1, "train_time": train_time + now - clock, **row, **timer.row()})
            if (step + 1) % flush_every == 0:
                log.flush()
            if step > start.step:
                progress.update(step, previous.read()["ce"], now - began, row["memory/peak_bytes"])


def save_checkpoint(session: Session, loader, log: Run, saver: Saver, step: int, train_time: float, run_info: dict):
    session.timer.begin("saving")
    log.flush()
    state = {"train_time": train_time, "loader": loader.state_dict()}
    saver.save(step, run_info | state, log)


# -----------------------------------------------------------------------------
# Before training: data and compilation

def prepare(config: Config, hp: TrainConfig, recipe: Recipe, folder: Path, resume: bool, fresh: bool, world: World):
    """The data's meta.json and the loader. Raises UserError for a mistake in flags or data."""
    if fresh and logger.is_run(folder):
        world.refuse_restarts()
        logger.refuse_existing(folder)
    if resume:
        settings.check_resumable(folder, config, hp, recipe)
    recipe.check(config, hp, world.size, world.device.type)
    micro_rows = settings.micro_batch_rows(hp.batch_rows, hp, world)
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    say(f"verifying the shards of {hp.data}", world.rank == 0)
    recipe.data.verify(hp.data, local_rank, local_size)  # the ranks of one host share the reading
    loader = recipe.open_loader(config, hp, world, micro_rows)
    batches = recipe.data.validation_batches(hp.data, seq_len=hp.seq_len, rows=1, max_tokens=hp.val_tokens or None)
    if world.rank == 0:
        say(data.describe_run(loader, batches, hp.num_iterations))
    return recipe.data.load_meta(hp.data), loader


def compile_model(net: GPT, hp: TrainConfig, device: torch.device) -> str:
    """Compile block by block, so that gradients are ready during backward; returns a note for the log."""
    if not (device.type == "cuda" if hp.compile is None else hp.compile):
        return "eager"
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return "eager (--compile needs a C++ compiler and found none)"
    torch._dynamo.config.recompile_limit = 64  # graphs: one for each kind of layer, while training and while evaluating
    return net.compile_blocks()


# -----------------------------------------------------------------------------
# Command line

def parse(recipe: Recipe, argv: list[str] | None = None) -> tuple[Config, TrainConfig, argparse.Namespace]:
    """The model's and the run's configuration, and all flags. Allocates nothing, reads no data. Raises UserError.

    Flags change the preset's settings; with --resume and no --preset, those of the run in its folder."""
    early = Parser(prog=recipe.script, add_help=False, parents=[deciding_flags(recipe)])
    early.add_argument("--out_dir", "--out-dir", default=recipe.train_config.out_dir)
    args = early.parse_known_args(argv)[0]
    preset = args.preset or ("speedrun" if torch.cuda.is_available() else "cpu")
    resumed = args.resume and not args.preset
    saved = settings.saved_fields(Path(args.out_dir) / args.experiment_name, recipe) if resumed else {}
    parser = flag_parser(recipe, preset)
    parser.set_defaults(preset=preset, **saved)
    args = parser.parse_args(argv)
    return with_flags(recipe.model_presets[preset], args), with_flags(recipe.presets[preset], args), args


def deciding_flags(recipe: Recipe) -> Parser:
    """Flags on which the defaults of the others depend."""
    parser = Parser(prog=recipe.script, add_help=False)
    parser.add_argument("--preset", choices=list(recipe.presets), metavar="NAME", help="settings of run and model")
    parser.add_argument("--experiment_name", "--experiment-name", type=logger.run_name, default=recipe.name,
                        help="folder below out_dir")  # fmt: skip
    parser.add_switch("resume", "go on from the last checkpoint of this experiment, with its flags")
    return parser


def flag_parser(recipe: Recipe, preset: str) -> Parser:
    """Every flag of a training script; its help shows the values of the preset."""
    script, experiment = recipe.script, f"--experiment_name {recipe.name}"
    calls = (f"python {script} {experiment}", f"python {script} {experiment} --resume",
             f"torchrun --standalone --nproc_per_node=8 {script} {experiment}", f"python {script} --plan")  # fmt: skip
    about = f"Train with {recipe.name}. Defaults are those of --preset {preset}. In a flag, - and _ mean the same."
    first = ("experiment_name", "preset", "data", "num_iterations", "resume")
    parser = Parser(prog=script, description=about, parents=[deciding_flags(recipe)], examples=calls, first=first)
    for sink in logger.SINKS:
        parser.add_switch(sink, f"feed the same numbers to {sink} besides")
    parser.add_switch("enable_profiling", "profile a few steps into profile/ and stop")
    parser.add_switch("plan", "print the model card and what --world_size ranks send, hold and compute")
    parser.add_argument("--world_size", "--world-size", type=rank_count, default=8, help="ranks of the --plan")
    add_flags(parser, recipe.train_config, recipe.presets[preset])
    add_flags(parser, recipe.model_config, recipe.model_presets[preset])
    return parser


def main(recipe: Recipe, argv: list[str] | None = None):
    sys.stdout, sys.stderr = map(LastingStream, (sys.stdout, sys.stderr))  # a run outlives its terminal
    world = World(0, 1, torch.device("cpu"))
    try:
        config, hp, args = parse(recipe, argv)
        if args.plan:
            from tools import cost

            print(cost.model_card(config, hp.seq_len), cost.plan_text(config, hp, recipe, args.world_size), sep="\n\n")
            return
        sinks = {name: logger.sink_module(name) for name in logger.SINKS if vars(args)[name]}  # raises if not installed
        world = distributed.init_distributed(hp.device, hp.collectives_timeout)
        config, hp = agree(world, lambda: settings.resolve(config, hp, recipe, args, world.device))
        folder = Path(hp.out_dir) / args.experiment_name
        resume = agree(world, lambda: settings.is_resumed(folder, args.resume, world))
        resume = any(gather_objects(resume, world))
        train(config, hp, recipe, args.experiment_name, resume, args.enable_profiling, world, list(sinks))
    except UserError as error:
        distributed.end_rank(recipe.script, error, world, known_to_all=isinstance(error, Ended))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


MUON = Recipe(
    "train_muon.py", "muon", MuonConfig, PRESETS, make_optimizers, lr_scale, matrix_state=1,
    newton_schulz=NEWTON_SCHULZ_STEPS, model_config=Config, model_presets=model.PRESETS, check=settings.check,
    data=data, open_loader=open_loader, loss=compute_loss, evaluate=evaluate,
    validation_text=facts.validation_text)  # fmt: skip

if __name__ == "__main__":
    main(MUON)
