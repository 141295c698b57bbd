"""The speedrun: train the model of model.py with Muon on its matrices and AdamW on the rest.

    python train_muon.py --experiment_name muon                                  # one GPU, or a laptop's CPU
    torchrun --standalone --nproc_per_node=8 train_muon.py --experiment_name muon   # 8 GPUs, the same mathematics

The file reads top to bottom: hyperparameters, Muon, slabs and who owns them, schedules, checkpoints, evaluation, one training
step, the loop, the command line. train_adamw.py is the control: it imports `main` from here and brings another Recipe.

A parameter is cut into slabs (one matrix, or some rows of a table). Each slab has one owner among the ranks: its gradient is
summed there, updated there, and the new values are gathered back, so optimizer state exists once in the world. Losses are
divided by the constant number of micro-batches in the global batch, so gradients add up to the same sum at any world size.

Sources: Muon (Jordan et al., kellerjordan.github.io/posts/muon), distributed as in modded-nanogpt records 6 and 24.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

import data
import logger
import model as model_file
from logger import PhaseTimer, Run, RunError
from model import DTYPES, GPT, CheckpointError, Config, ConfigError, Parser, add_flags, slab_view

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
    micro_batch_tokens: int = 48 * 1024  # per rank and forward pass, at most; accumulation fills in the rest
    # evaluation and safety
    val_every: int = 125  # steps; 0 = at the end only
    val_tokens: int = 10_485_760  # 0 = all
    checkpoint_every: int = 0  # steps; 0 = at the end only
    sample_tokens: int = 256  # generated at the end
    warmup_steps: int = 10  # untimed steps on random tokens, undone before the clock starts
    # schedule
    cooldown_frac: float = 0.4  # last part of the run, over which the rates fall linearly ...
    final_lr_scale: float = 0.1  # ... to this share
    window_start: int = 128  # tokens that a long layer sees at first; grows linearly to Config.window_size
    # AdamW for everything that is not a matrix
    embed_lr: float = 0.6
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
        for field in ("num_iterations", "batch_tokens", "seq_len", "micro_batch_tokens", "window_start"):
            check(field, getattr(self, field) >= 1, "at least 1")
        for field in ("val_every", "val_tokens", "checkpoint_every", "sample_tokens", "warmup_steps"):
            check(field, getattr(self, field) >= 0, "at least 0")
        for field in dataclasses.fields(self):
            if field.name.endswith("_lr") or field.name.endswith("decay"):
                check(field.name, getattr(self, field.name) >= 0, "at least 0")
        for field in ("cooldown_frac", "final_lr_scale", "beta1", "beta2"):
            check(field, 0 <= getattr(self, field) <= 1, "between 0 and 1")
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


CPU_RUN = dict(data="data/python", num_iterations=500, batch_tokens=4096, seq_len=512, micro_batch_tokens=2048, val_every=125, val_tokens=2**18,
               warmup_steps=1, window_start=256)  # fmt: skip
SMALL_RUN = dict(num_iterations=3000, batch_tokens=131_072, seq_len=8192, micro_batch_tokens=16_384)

PRESETS = {
    "cpu": Hyperparameters(**CPU_RUN, muon_lr=0.03, momentum_warmup=100),
    "small": Hyperparameters(**SMALL_RUN),
    "speedrun": Hyperparameters(),
}

# -----------------------------------------------------------------------------
# Muon


def newton_schulz(G: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix to each of (..., rows, cols): singular values land in [0.68, 1.21].

    Five steps of the quintic 3.4445 x - 4.7750 x^3 + 2.0315 x^5, whose slope at 0 is steep rather than its fixed point exact.
    A zero matrix stays zero. Returns `dtype`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.reshape(-1, *G.shape[-2:]).to(dtype)
    wide = X.size(-2) <= X.size(-1)
    X = X if wide else X.mT
    X = X / (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return (X if wide else X.mT).reshape(G.shape)


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
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape[-2:], []).append(p)
            for (rows, cols), params in by_shape.items():
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
    rates = {"embed": hp.embed_lr, "value_embed": hp.value_embed_lr, "head": hp.head_lr, "router": hp.router_lr, "scalar": hp.scalar_lr}
    return [dict(params=tensors[kind], base_lr=lr) for kind, lr in rates.items() if tensors.get(kind)]


def adamw(groups: list[dict], hp: Common, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=(hp.beta1, hp.beta2), eps=1e-10, weight_decay=0.0, fused=True, **options)


def make_optimizers(tensors: dict[str, list[Tensor]], hp: Hyperparameters) -> list[torch.optim.Optimizer]:
    """kind -> the slabs this rank owns, to [AdamW, Muon] over those kinds that it owns any of."""
    matrices = [dict(params=tensors[kind], base_lr=hp.muon_lr) for kind in ("matrix", "expert") if tensors.get(kind)]
    others = adamw_groups(tensors, hp)
    muon = [Muon(matrices, weight_decay=hp.weight_decay, ns_dtype=DTYPES[hp.ns_dtype])] if matrices else []
    return ([adamw(others, hp)] if others else []) + muon


# -----------------------------------------------------------------------------
# Schedules: pure functions of the step


def lr_scale(step: int, hp: Common) -> float:
    """1, then linear to final_lr_scale over the last cooldown_frac of the run."""
    left = (hp.num_iterations - step) / max(1, hp.num_iterations) / max(hp.cooldown_frac, 1e-9)
    return 1.0 if left >= 1 else left + (1 - left) * hp.final_lr_scale


def window(step: int, hp: Common, config: Config) -> int:
    """Tokens that a long layer sees, in whole blocks of 128, growing linearly over the run (modded-nanogpt record 13)."""
    now = hp.window_start + (config.window_size - hp.window_start) * step / hp.num_iterations
    return min(config.window_size, -(-int(now) // 128) * 128)


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


# -----------------------------------------------------------------------------
# Slabs and their owners


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device


class Slab(NamedTuple):
    """A piece of a parameter whose identity never depends on the number of ranks."""

    name: str  # blocks.3.ffn.experts.up[5]
    kind: str
    tensor: Tensor  # a view of the parameter, with its gradient in .grad while stepping
    cost: int  # what updating it takes, comparable within a family (matrices, the rest)


TABLE_BLOCKS = 8  # row blocks that an embedding table or the head is cut into


def cut_slabs(model: GPT) -> list[Slab]:
    """Every parameter exactly once: 3-D ones by matrix, tables by blocks of rows, the others whole."""
    slabs, kinds = [], model.parameter_kinds()
    for name, parameter in model.named_parameters():
        kind, p = kinds[name], parameter.detach()
        if kind in ("matrix", "expert"):
            rows, cols = sorted(p.shape[-2:])
            names = [f"{name}[{i}]" for i in range(len(p))] if p.ndim == 3 else [name]
            cost = 10 * rows**2 * (2 * cols + rows)  # FLOPs of newton_schulz
        else:
            edges = [len(p) * i // TABLE_BLOCKS for i in range(TABLE_BLOCKS + 1)]
            names = [f"{name}[{a}:{b}]" for a, b in zip(edges, edges[1:])] if p.ndim == 2 and len(p) >= TABLE_BLOCKS else [name]
            cost = p.numel() // len(names)
        slabs += [Slab(slab_name, kind, slab_view({name: p}, slab_name), cost) for slab_name in names]
    return slabs


def assign_owners(slabs: list[Slab], world_size: int) -> list[int]:
    """The owner of each slab: dearest first, each to the rank with least work so far, matrices and the rest apart."""
    owners, load = [0] * len(slabs), {}
    for i in sorted(range(len(slabs)), key=lambda i: (-slabs[i].cost, slabs[i].name)):
        family = slabs[i].kind in ("matrix", "expert")
        rank = min(range(world_size), key=lambda rank: (load.get((family, rank), 0), rank))
        load[family, rank] = load.get((family, rank), 0) + slabs[i].cost
        owners[i] = rank
    return owners


class Exchange:
    """Moves gradients to the slabs' owners and new values back: one reduce-scatter and one all-gather per step."""

    def __init__(self, model: GPT, world: World):
        self.model, self.world, self.slabs = model, world, cut_slabs(model)
        self.owners = assign_owners(self.slabs, world.size)
        self.owned = [slab for slab, owner in zip(self.slabs, self.owners) if owner == world.rank]
        ends, self.places = [0] * world.size, []  # where each slab lies in its owner's part of the buffer
        for slab, owner in zip(self.slabs, self.owners):
            self.places.append(slice(ends[owner], ends[owner] + slab.tensor.numel()))
            ends[owner] += slab.tensor.numel()
        padded = max(ends) if world.size > 1 else 0  # a single rank needs no buffer
        self.all_parts = torch.zeros(world.size, padded, device=world.device)
        self.my_part = torch.zeros(padded, device=world.device)

    def owned_by_kind(self) -> dict[str, list[Tensor]]:
        tensors = {}
        for slab in self.owned:
            tensors.setdefault(slab.kind, []).append(slab.tensor)
        return tensors

    def reduce_gradients(self):
        """Sum over ranks; leaves each owned slab's gradient in slab.tensor.grad."""
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.model.named_parameters()}
        if self.world.size == 1:
            for slab in self.slabs:
                slab.tensor.grad = slab_view(grads, slab.name)
            return
        for slab, owner, place in zip(self.slabs, self.owners, self.places):
            self.all_parts[owner, place].copy_(slab_view(grads, slab.name).flatten())
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
        reduce_scatter(self.my_part, self.all_parts.flatten())
        for slab, owner, place in zip(self.slabs, self.owners, self.places):
            if owner == self.world.rank:
                slab.tensor.grad = self.my_part[place].view_as(slab.tensor)

    def gather_parameters(self):
        """Hand the owners' new values to every rank, and drop all gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None
        for slab in self.owned:
            slab.tensor.grad = None
        if self.world.size == 1:
            return
        for slab, owner, place in zip(self.slabs, self.owners, self.places):
            if owner == self.world.rank:
                self.my_part[place].copy_(slab.tensor.flatten())
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        all_gather(self.all_parts.flatten(), self.my_part)
        for slab, owner, place in zip(self.slabs, self.owners, self.places):
            if owner != self.world.rank:
                slab.tensor.copy_(self.all_parts[owner, place].view_as(slab.tensor))


# -----------------------------------------------------------------------------
# Checkpoints: a folder per step, each rank's file holds the slabs it owns


def save_checkpoint(folder: Path, step: int, exchange: Exchange, optimizers: list, world: World, facts: dict):
    """Write folder/step_NNNNNN; keep it and the one before. The manifest comes last and the folder is renamed into place.

    facts: what the manifest holds besides the files (model, hyperparameters, loader position, clock ...).
    Raises RunError when the disk is full; the checkpoints that were there stay."""
    target, partial = folder / f"step_{step:06d}", folder / f"step_{step:06d}.partial"
    slabs = {slab.name: {"value": slab.tensor} for slab in exchange.owned}
    for optimizer in optimizers:
        for slab in exchange.owned:
            slabs[slab.name] |= optimizer.state.get(slab.tensor, {})
    if world.rank == 0:
        buffers = dict(exchange.model.named_buffers())
        slabs |= {name: {"value": buffers[name]} for name in exchange.model.state_dict() if name in buffers}
    slabs = {name: {key: value.clone() for key, value in slab.items()} for name, slab in slabs.items()}  # views would save whole storages
    failure, entry = None, {}
    try:
        partial.mkdir(parents=True, exist_ok=True)
        path = partial / f"rank{world.rank}.pt"
        with open(path, "wb+") as file:
            torch.save(slabs, file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            entry = {path.name: {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}}
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        failure = str(error)
    reports = gather_objects((failure, entry), world)
    failures = [failure for failure, _ in reports if failure]
    if world.rank == 0 and not failures:
        manifest = {"step": step, **facts, "files": {name: file for _, entry in reports for name, file in entry.items()}}
        try:
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for old in sorted(folder.glob("step_??????"))[:-2]:
                shutil.rmtree(old)
        except OSError as error:
            failures = [str(error)]
    failures = gather_objects(failures, world)[0]  # nobody goes on before the folder is in place
    if failures:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"the checkpoint of step {step} could not be written to {folder} ({failures[0]}); free some space, then go on with --resume")


def gather_objects(value, world: World) -> list:
    """Every rank's value, on every rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def load_checkpoint(path: Path, exchange: Exchange, optimizers: list, config: Config, hp: Common) -> dict:
    """Put a checkpoint's values and optimizer state in place, at any world size; returns the manifest.

    Raises CheckpointError for damaged files, RunError when it was saved by another configuration."""
    manifest, slabs = model_file.read_checkpoint(path)
    check_same_run(manifest, config, hp, path)
    tensors = {name: p.detach() for name, p in exchange.model.named_parameters()} | dict(exchange.model.named_buffers())
    for name, slab in slabs.items():
        slab_view(tensors, name).copy_(slab["value"])
    owner_of = {tensor: optimizer for optimizer in optimizers for group in optimizer.param_groups for tensor in group["params"]}
    for slab in exchange.owned:
        state = {key: value.to(slab.tensor.device) for key, value in slabs[slab.name].items() if key != "value"}
        if state:
            owner_of[slab.tensor].state[slab.tensor] = state
    return manifest


RESUME_FREE = set("data out_dir device compile micro_batch_tokens val_every val_tokens checkpoint_every sample_tokens warmup_steps".split())


def check_same_run(manifest: dict, config: Config, hp: Common, path: Path):
    """A resumed run must be the run that was saved: RunError names the first field that differs."""
    now = dataclasses.asdict(config) | {k: v for k, v in dataclasses.asdict(hp).items() if k not in RESUME_FREE}
    then = manifest["model"] | manifest["hyperparameters"]
    for field, value in now.items():
        if then.get(field) != value:
            was = then.get(field)
            raise RunError(f"{path} was saved with {field} = {was}, not {value}; pass --{field} {was}, or another --experiment_name")


# -----------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model: GPT, step: int, hp: Common, micro_rows: int, token_bytes: Tensor | None, world: World) -> dict[str, float]:
    """val/loss in nats per token over the first val_tokens, and val/bpb in bits per byte of text when the byte lengths are known."""
    model.eval()
    model.set_step(hp.seed, step, window=window(step, hp, model.config))
    totals = torch.zeros(3, dtype=torch.float64, device=world.device)  # nats, tokens, bytes
    batches = data.validation_batches(hp.data, seq_len=hp.seq_len, rows=micro_rows, max_tokens=hp.val_tokens or None, rank=world.rank,
                                      world_size=world.size, vocab_size=model.config.vocab_size, device=world.device)  # fmt: skip
    for batch in batches:
        counts = batch.targets_BT >= 0
        totals[0] += model(batch.inputs_BT, batch.targets_BT).loss.double() * counts.numel()
        totals[1] += counts.sum()
        if token_bytes is not None:
            totals[2] += token_bytes[batch.targets_BT[counts]].sum()
    if world.size > 1:
        dist.all_reduce(totals)
    model.train()
    nats, tokens, nbytes = totals.tolist()
    return {"val/loss": nats / tokens} | ({"val/bpb": nats / nbytes / math.log(2)} if nbytes else {})


# -----------------------------------------------------------------------------
# One training step


@contextlib.contextmanager
def phase(timer: PhaseTimer, name: str):
    """A named part of the step, in the metrics and in a profiler's trace."""
    with record_function(name):
        yield
    timer.mark(name)


def train_step(model: GPT, exchange: Exchange, optimizers: list, next_step, step: int, hp: Common, recipe: Recipe,
               timer: PhaseTimer) -> dict[str, Tensor]:  # fmt: skip
    """One optimizer step over the global batch; returns the global batch's statistics as tensors on the device.

    next_step() gives this rank's micro-batches. Router counts travel with the losses in the one small all-reduce."""
    world = exchange.world
    timer.start()
    with phase(timer, "data"):
        batches = next_step()
    share = 1 / (len(batches) * world.size)  # of the global batch that one micro-batch is: a constant, so gradients add
    scalars, counts_LE = torch.zeros(4, dtype=torch.float64, device=world.device), 0
    for batch in batches:
        with phase(timer, "forward"):
            model.set_step(hp.seed, step, batch.first_row * hp.seq_len, window(step, hp, model.config))
            _, loss, stats = model(batch.inputs_BT, batch.targets_BT)
            scalars += share * torch.stack([stats[key].detach() for key in ("ce", "balance_loss", "z_loss", "entropy")])
            counts_LE = counts_LE + stats["counts_LE"]
        with phase(timer, "backward"):
            (loss * share).backward()
    with phase(timer, "communication"):
        if world.size > 1:
            numbers = torch.cat([scalars, counts_LE.flatten().double()])
            dist.all_reduce(numbers)
            scalars, counts_LE = numbers[:4], numbers[4:].view_as(counts_LE).long()
        exchange.reduce_gradients()
    with phase(timer, "optimizer"):
        recipe.set_rates(optimizers, step, hp)
        for optimizer in optimizers:
            optimizer.step()
        model.balance(counts_LE)
    with phase(timer, "communication"):
        exchange.gather_parameters()
    ce, balance_loss, z_loss, entropy = scalars.unbind()
    row = {"train/loss": ce}
    if len(counts_LE):
        load_LE = counts_LE / counts_LE.sum(-1, keepdim=True)
        row |= {"train/balance_loss": balance_loss, "train/z_loss": z_loss, "moe/router_entropy": entropy, "moe/load": load_LE,
                "moe/load_max_over_mean": (load_LE.amax(-1) * load_LE.size(-1)).mean()}  # fmt: skip
    return row


# -----------------------------------------------------------------------------
# Training


def train(config: Config, hp: Common, recipe: Recipe, experiment_name: str, resume: bool, enable_profiling: bool, world: World):
    """Train to hp.num_iterations; leaves run.log, metrics.jsonl, config.json and checkpoint/ in out_dir/experiment_name."""
    device, folder = world.device, Path(hp.out_dir) / experiment_name
    if resume and not folder.exists():
        raise RunError(f"there is no {folder} to resume; start the run without --resume, or correct --experiment_name or --out_dir")
    if not (resume or enable_profiling):
        logger.refuse_existing(folder)  # before anything is allocated
    meta = data.load_meta(hp.data)
    token_bytes = None if meta["token_bytes"] is None else torch.tensor(meta["token_bytes"], device=device)

    # ---- the batch: rows of seq_len tokens, the same global batch at any world size
    rows = hp.batch_tokens // hp.seq_len
    micro_rows = micro_batch_rows(rows, hp, world)
    loader = data.Loader(hp.data, seq_len=hp.seq_len, batch_rows=rows, micro_rows=micro_rows, rank=world.rank, world_size=world.size,
                         seed=hp.seed, vocab_size=config.vocab_size, device=device)  # fmt: skip

    # ---- the model and its optimizers
    model = GPT(config).init_weights(hp.seed).to(device)
    exchange = Exchange(model, world)
    optimizers = recipe.make_optimizers(exchange.owned_by_kind(), hp)
    check_cover(exchange, optimizers)
    compile_note = compile_model(model, hp, device)

    # ---- warm up: compile and allocate everything on random tokens, then put the model back
    before, timer = {name: value.clone() for name, value in model.state_dict().items()}, PhaseTimer(device.type)
    random_step = random_batches(config, hp, rows // micro_rows // world.size, micro_rows, device)
    for _ in range(hp.warmup_steps):
        train_step(model, exchange, optimizers, random_step, 0, hp, recipe, timer)
    model.load_state_dict(before)
    for optimizer in optimizers:
        optimizer.state.clear()
    if enable_profiling:
        one_step = lambda step: train_step(model, exchange, optimizers, loader.next_step, step, hp, recipe, timer)
        return profile(folder / "profile", one_step, config, hp, world)

    # ---- where a resumed run goes on
    start, train_time, resume_step = 0, 0.0, None
    if resume:
        resume_step = -1  # a run that left no checkpoint starts over
        if list((folder / "checkpoint").glob("step_??????/manifest.json")):
            path = model_file.latest_checkpoint(folder / "checkpoint")
            manifest = load_checkpoint(path, exchange, optimizers, config, hp)
            loader.load_state_dict(manifest["loader"])
            start, train_time, resume_step = manifest["step"], manifest["train_time"], manifest["step"]
            if start == hp.num_iterations:
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
    here = Path(__file__).parent
    sources = [here / name for name in ("train_muon.py", "train_adamw.py", "model.py", "data.py", "logger.py")]
    run = Run(hp.out_dir, experiment_name, config=facts, sources=sources, resume_step=resume_step, active=world.rank == 0)
    run.print(f"{recipe.name}: {parameters['total']:,} parameters, {parameters['active']:,} active; {rows} rows x {hp.seq_len} tokens per step, "
              f"{micro_rows} rows at a time on {world.size} x {device.type}; activations {config.dtype}; {compile_note}")  # fmt: skip
    bar = progress_bar(hp.num_iterations, start, world)
    finite = torch.ones((), dtype=torch.bool, device=device)
    look_every = 1 if device.type == "cpu" else 25  # looking at a value makes a GPU wait

    # ---- the loop: validate, checkpoint, step
    model.train()
    synchronize(device)
    clock = time.perf_counter()
    for step in range(start, hp.num_iterations + 1):
        last = step == hp.num_iterations
        validate_now = last or (hp.val_every and step % hp.val_every == 0)
        save_now = last or (hp.checkpoint_every and step and step % hp.checkpoint_every == 0)
        if (validate_now or save_now or step % look_every == 0) and not finite:
            raise RunError(f"the loss is no longer finite at step {step}; lower the learning rates and start again under another --experiment_name")
        if validate_now and step != resume_step:
            synchronize(device)
            train_time += time.perf_counter() - clock
            values = evaluate(model, step, hp, micro_rows, token_bytes, world)
            run.log({"step": step, "train_time": train_time, "train/flops": step * hp.batch_tokens * per_token, **values})
            run.flush()
            line = f"step:{step}/{hp.num_iterations} val_loss:{values['val/loss']:.5f} train_time:{train_time:.3f}s"
            line += f" step_avg:{1000 * train_time / max(step, 1):.2f}ms"
            run.print(line + (f" val_bpb:{values['val/bpb']:.4f}" if "val/bpb" in values else ""))
            synchronize(device)
            clock = time.perf_counter()
        if save_now and step != resume_step:
            synchronize(device)
            train_time += time.perf_counter() - clock
            saved = facts | {"train_time": train_time, "loader": loader.state_dict()}
            save_checkpoint(folder / "checkpoint", step, exchange, optimizers, world, saved)
            clock = time.perf_counter()
        if last:
            break
        began = time.perf_counter()
        row = train_step(model, exchange, optimizers, loader.next_step, step, hp, recipe, timer)
        finite &= row["train/loss"].isfinite()
        now = time.perf_counter()
        speed = hp.batch_tokens / (now - began)
        run.log({"step": step + 1, "train_time": train_time + now - clock, **row, "train/tok_per_sec": speed, "train/mfu": speed * per_token / peak,
                 "train/lr_scale": lr_scale(step, hp), "train/flops": (step + 1) * hp.batch_tokens * per_token, **timer.row()})  # fmt: skip
        if (step + 1) % look_every == 0:
            run.flush()
        bar.update()

    # ---- the end: what was reached, beside what compressors need, and a sample
    bar.close()
    loader.close()
    peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_resident_bytes()
    end = {"step": hp.num_iterations, "event": "end", "memory/peak_bytes": peak_bytes}
    run.print(f"peak memory: {peak_bytes / 2**20:,.0f} MiB")
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
                run.print(sample(model, encoding, hp, device))
    run.log(end)
    run.close()


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
    assert sorted(grouped) == sorted(id(slab.tensor) for slab in exchange.owned), "the optimizers' groups do not cover the parameters exactly once"


def compile_model(model: GPT, hp: Common, device: torch.device) -> str:
    """Compile block by block, so that gradients are ready during backward, and say what was done."""
    if not (device.type == "cuda" if hp.compile is None else hp.compile):
        return "eager"
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "eager (--compile needs a C++ compiler and found none)"
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False)
    model.chunk_nll = torch.compile(model.chunk_nll, dynamic=False)
    return "compiled"


def random_batches(config: Config, hp: Common, count: int, micro_rows: int, device: torch.device):
    """A stand-in for loader.next_step whose tokens come from a fixed seed."""
    generator = torch.Generator().manual_seed(0)

    def next_step() -> list[data.Batch]:
        ids = torch.randint(config.vocab_size, (count, micro_rows, hp.seq_len + 1), generator=generator).to(device)
        return [data.Batch(micro[:, :-1], micro[:, 1:], i * micro_rows) for i, micro in enumerate(ids)]

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


def peak_resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def progress_bar(total: int, start: int, world: World):
    """A tqdm bar on rank 0; without tqdm installed the lines at each evaluation are all there is."""
    try:
        from tqdm import tqdm
    except ImportError:
        return argparse.Namespace(update=lambda: None, close=lambda: None)
    return tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=world.rank != 0, smoothing=0.1)


def compressors(encoding: data.Encoding, hp: Common) -> dict[str, float]:
    """Bits per byte that gzip and xz need for the text that evaluate() predicts, up to its first ten million tokens."""
    most = min(hp.val_tokens or data.COMPRESSED_BYTES, data.COMPRESSED_BYTES)
    batches = data.validation_batches(hp.data, seq_len=hp.seq_len, rows=1, max_tokens=max(most, hp.seq_len))
    return data.compressed_bpb(encoding.decode_bytes(torch.cat([batch.targets_BT[batch.targets_BT >= 0] for batch in batches])))


def sample(model: GPT, encoding: data.Encoding, hp: Common, device: torch.device) -> str:
    """The beginning of the validation text, a mark, and how the model goes on."""
    prompt = next(data.validation_batches(hp.data, seq_len=min(32, hp.seq_len), rows=1, device=device)).inputs_BT
    ids = model.generate(prompt, hp.sample_tokens, temperature=0.8, seed=hp.seed)[0].tolist()
    length = prompt.size(1)
    return f"{'-' * 30} sample\n{encoding.decode(ids[:length])}|>{encoding.decode(ids[length:])}\n{'-' * 37}"


# -----------------------------------------------------------------------------
# Profiling


def profile(folder: Path, step_function, config: Config, hp: Common, world: World):
    """Three steady steps under torch.profiler: trace.json for Perfetto or chrome://tracing, summary.txt with the top ten operators."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    folder.mkdir(parents=True, exist_ok=True)
    cuda, waits, steps = world.device.type == "cuda", 2, 3
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
    phases = {e.key: e.cpu_time_total / 1e6 / steps for e in events if e.key in ("data", "forward", "backward", "communication", "optimizer")}
    rate = hp.batch_tokens * model_file.flops_per_token(config, hp.seq_len) / seconds
    peak_bytes = torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    lines = [
        f"{seconds * 1000:.1f} ms per step under the profiler, {hp.batch_tokens / seconds:,.0f} tokens/s",
        f"MFU {100 * rate / world.size / matmul_rate(world.device, config.dtype):.1f}% on active parameters",
        f"peak memory {peak_bytes / 2**20:,.0f} MiB",
        "share of the step: " + ", ".join(f"{name} {100 * t / sum(phases.values()):.1f}%" for name, t in phases.items()),
        events.table(sort_by=order, row_limit=10, max_name_column_width=45),
        f"trace: {folder / 'trace.json'} (open it in https://ui.perfetto.dev or chrome://tracing)",
    ]
    (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


# -----------------------------------------------------------------------------
# Command line


def parse(recipe: Recipe, argv: list[str] | None = None) -> tuple[Config, Common, argparse.Namespace]:
    """Flags -> configuration, hyperparameters, and the flags that belong to neither. Nothing is allocated yet.

    The vocabulary is the data folder's unless a flag says otherwise. Raises ConfigError, DataError."""
    parser = Parser(prog=f"train_{recipe.name}.py", description=f"Train with {recipe.name}; every field of Config and Hyperparameters is a flag.")
    parser.add_argument("--experiment_name", "--experiment-name", default=recipe.name, help="folder below out_dir")
    parser.add_argument("--preset", choices=list(recipe.presets), help="default: speedrun with CUDA, cpu without")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of this experiment")
    parser.add_argument("--enable_profiling", "--enable-profiling", action="store_true", help="profile a few steps into profile/ and stop")
    add_flags(parser, recipe.hyperparameters)
    add_flags(parser, Config)
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


def main(recipe: Recipe):
    distributed = "RANK" in os.environ
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        config, hp, args = parse(recipe)
        device = torch.device(hp.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        config = fit_to_data_and_machine(config, hp, args, device)
        if distributed:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and (Path(hp.out_dir) / args.experiment_name).exists()
        train(config, hp, recipe, args.experiment_name, args.resume or restarted, args.enable_profiling, World(rank, size, device))
    except (ConfigError, CheckpointError, data.DataError, RunError) as error:
        sys.exit(f"train_{recipe.name}.py: error: {error}" if rank == 0 else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


MUON = Recipe("muon", Hyperparameters, PRESETS, make_optimizers, set_rates)

if __name__ == "__main__":
    main(MUON)
