"""Ranks, and which of them owns what: rendezvous, process groups, slabs, owners, buckets.

A parameter is cut into slabs, each one matrix or some rows of a table. Each slab has one owner rank, which holds its
optimizer state. Slabs whose gradients are ready at about the same time travel together in a bucket. Owners are
balanced by cost, as in Megatron's layer-wise optimizer, with little padding in each bucket."""

import collections
import ctypes
import heapq
import itertools
import json
import math
import os
import signal
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import model
from cli import UserError, said_by_another
from model import Config, ExpertRanks

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# -----------------------------------------------------------------------------
# Ranks


class World(NamedTuple):
    """This process among the ranks of a run."""

    rank: int
    size: int
    device: torch.device
    expert_parallel: int = 1  # ranks that share the experts; rank r holds part r % expert_parallel
    run_id: str = ""  # prefix of this run's keys in the store
    restarted: bool = False  # by torchrun, after ranks were lost
    groups: dict = {}  # ranks of a bucket -> its process group; absent: all ranks
    expert_group: "dist.ProcessGroup | None" = None  # of the ranks that share the experts with this one

    def with_expert_groups(self, expert_parallel: int, timeout: timedelta) -> "World":
        """This World with the groups of ranks that hold the same experts, and of those that share all of them.

        Every rank creates all groups. The two kinds are apart, as the order of buckets and of token rows may differ
        between ranks."""
        if expert_parallel == 1:
            return self
        every = tuple(range(self.size))
        holding = [every[first::expert_parallel] for first in range(expert_parallel)]
        sharing = [dist.new_group(every[i : i + expert_parallel], timeout=timeout) for i in every[::expert_parallel]]
        groups = {ranks: dist.new_group(ranks, timeout=timeout) for ranks in holding if len(ranks) > 1}
        own = sharing[self.rank // expert_parallel]
        return self._replace(expert_parallel=expert_parallel, groups=groups, expert_group=own)

    @property
    def expert_ranks(self) -> ExpertRanks:
        return ExpertRanks(self.rank % self.expert_parallel, self.expert_parallel, self.expert_group)

    def store(self) -> dist.Store:
        """A connection to the store that all ranks share; each thread needs its own, as a blocking read holds it."""
        return dist.HashStore() if self.size == 1 else dist.PrefixStore(self.run_id, torchrun_store())

    def refuse_restarts(self):
        """Call before refusing the folder of another run: torchrun starts anew, and that start must not resume it."""
        if self.run_id:
            torchrun_store().set("refused", "")


def torchrun_store() -> dist.Store:
    """A connection to torchrun's store, which outlives the ranks that it restarts."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(hours=1))


def init_distributed(device_type: str | None, timeout: timedelta) -> World:
    """This process among those that torchrun started, or alone. None: CUDA if there is a GPU, else the CPU."""
    keep_freed_memory()
    check_rank_variables()
    device = torch.device(device_type or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 0)), torch.cuda.device_count()
        if ranks > gpus:
            raise UserError(f"{ranks} ranks on this host have {gpus} GPUs; pass --nproc_per_node={gpus} to torchrun, "
                            "or --device cpu to the script")  # fmt: skip
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if "RANK" not in os.environ:
        return World(0, 1, device, restarted=restarted)

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        where = f"at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the ranks cannot meet {where} ({str(error).splitlines()[0]}); start them with torchrun, "
                        "with an address of the first host that all others reach") from error  # fmt: skip
    run_id = rendezvous(store, rank, size, timeout)
    dist.init_process_group(backend, store=dist.PrefixStore(run_id, store), rank=rank, world_size=size, timeout=timeout)
    restarted = restarted or not run_id.startswith("1 ")  # of several hosts only one may have restarted
    restarted = restarted and not torchrun_store().check(["refused"])
    return World(rank, size, device, run_id=run_id, restarted=restarted)


def check_rank_variables():
    """Raises UserError unless RANK is not set, or the variables that torchrun sets beside it are there and fit."""
    if "RANK" not in os.environ:
        return
    values = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    numbers = [value for name, value in values.items() if name != "MASTER_ADDR"] + [os.environ.get("LOCAL_RANK", "0")]
    fits = all(values.values()) and all(number.isdecimal() for number in numbers)
    if not fits or not int(values["RANK"]) < int(values["WORLD_SIZE"]) or not int(values["MASTER_PORT"]) < 2**16:
        found = " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
        raise UserError(f"{found} is no place of this process among ranks: torchrun sets RANK, WORLD_SIZE, MASTER_ADDR "
                        "and MASTER_PORT; start with torchrun, or `unset RANK` to train in one process")  # fmt: skip


def end_rank(script: str, error: UserError, world: World, known_to_all: bool):
    """Print the sentence, on rank 0 alone if all ranks know it, and end this process with status 1.

    torchrun then prints a traceback of its own and a summary of all ranks that failed. So those on rank 0's host leave
    the failure to it, and the summary, the end of the output, repeats the sentence."""
    if not dist.is_initialized() and said_by_another():
        sys.exit(1)
    if known_to_all and world.rank > 0:
        dist.barrier()  # until rank 0 has printed: torchrun ends the other ranks once one has failed
        if os.environ.get("GROUP_RANK") == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or it would count as failed before it has ended
            sys.exit(0)
        sys.exit(1)
    sentence = f"{error}" if known_to_all or world.size == 1 else f"rank {world.rank}: {error}"
    print(f"{script}: error: {sentence}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": sentence, "extraInfo": details}}))
    if known_to_all and world.size > 1:
        dist.barrier()
    sys.exit(1)


def rendezvous(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """The id of this attempt, "<number> <hex>", the same on all ranks and new in each attempt.

    torchrun keeps its store over restarts, with the keys of dead ranks, and each host counts its own restarts alone.
    Rank 0 therefore answers every greeting until all ranks have confirmed. Rank 0 raises UserError if one is late."""
    me = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", me)
        store.wait([f"answer/{me}"], timeout)
        run_id = store.get(f"answer/{me}").decode()
        store.set(f"{run_id}/heard/{rank}", "")
        return run_id

    run_id, others, answered = f"{store.add('attempts', 1)} {me}", range(1, size), set()
    deadline = time.monotonic() + timeout.total_seconds()
    while others and not store.check([f"{run_id}/heard/{other}" for other in others]):
        if time.monotonic() > deadline:
            waited = f"{timeout.total_seconds():g} s"
            raise UserError(f"not all {size} ranks came within {waited}; see what ended the others")
        greetings = {store.get(f"hello/{other}").decode() for other in others if store.check([f"hello/{other}"])}
        for greeting in greetings - answered:
            store.set(f"answer/{greeting}", run_id)
            answered.add(greeting)
        time.sleep(0.02)
    return run_id


def memory_bytes(device_type: str) -> int:
    """All memory of this machine, or of the current GPU."""
    if device_type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory():
    """Make malloc keep the memory of freed tensors.

    By default glibc returns blocks above 32 MiB to the kernel after each use. Paging them in again takes a third of an
    MLP's time at 16k tokens of width 1024."""
    malloc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(malloc, "mallopt"):
        for option, size in ((M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1)):
            malloc.mallopt(option, size)


# -----------------------------------------------------------------------------
# Slabs, their owners, and buckets: pure functions of the model and the number of ranks


class Slab(NamedTuple):
    """A part of a parameter; the cut never depends on the number of ranks."""

    name: str  # blocks.3.ffn.experts.up[5]
    kind: str
    numel: int
    cost: int  # of its update, comparable among matrices and among the rest

    @property
    def is_matrix(self) -> bool:
        return self.kind in ("matrix", "expert")

    @property
    def is_rows(self) -> bool:
        """Whether it is an n-gram table: a step touches few of its rows, and those travel alone."""
        return self.kind == "ngram_embed"


def slab_part(name: str) -> tuple[str, int | slice]:
    """A slab's parameter and its part of dimension 0: `a.b` all of it, `a.b[3]` entry 3, `a.b[3:9]` rows 3 to 8."""
    base, _, part = name.rstrip("]").partition("[")
    start, _, stop = part.partition(":")
    return base, int(start) if start and not stop else slice(int(start) if start else None, int(stop) if stop else None)


def slab_view(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The part of a named tensor that a slab covers."""
    base, part = slab_part(name)
    return tensors[base][part]


MAX_ROW_BLOCKS = 64  # of a large table; a small one has 8


def cut_slabs(config: Config) -> list[Slab]:
    """All parameters of the whole model: 3-D ones by matrix, tables by blocks of rows, the others whole."""
    with torch.device("meta"):
        net = model.build(config)
    slabs, kinds = [], net.parameter_kinds()
    for name, p in net.named_parameters():
        if p.numel() == 0:  # the skips of a single layer
            continue
        if kinds[name] in ("matrix", "expert"):
            rows, cols = sorted(p.shape[-2:])
            names = [f"{name}[{i}]" for i in range(len(p))] if p.ndim == 3 else [name]
            cost = 2 * rows**2 * (2 * cols + rows)  # FLOPs of one Newton-Schulz iteration
        elif kinds[name] == "ngram_embed":  # whole: a step touches few of its rows
            names, cost = [name], 0
        else:
            blocks = min(MAX_ROW_BLOCKS, max(8, p.numel() // 2**16))
            edges = [len(p) * i // blocks for i in range(blocks + 1)]
            cut = p.ndim == 2 and len(p) >= blocks
            names = [f"{name}[{a}:{b}]" for a, b in zip(edges, edges[1:])] if cut else [name]
            cost = p.numel() // len(names)
        slabs += [Slab(slab, kinds[name], slab_view({name: p}, slab).numel(), cost) for slab in names]
    return slabs


class Bucket(NamedTuple):
    """Slabs that travel together among `ranks`: in one reduce-scatter and one all-gather, or as the touched rows of a
    table."""

    ranks: tuple[int, ...]
    slabs: tuple[Slab, ...]
    owners: tuple[int, ...]  # the rank that updates each slab

    @property
    def part(self) -> int:
        """Elements of the longest owner's part; the collectives need equal parts, so all are padded to it."""
        lengths = collections.Counter()
        for slab, owner in zip(self.slabs, self.owners):
            lengths[owner] += slab.numel
        return max(lengths.values())

    @property
    def is_rows(self) -> bool:
        return self.slabs[0].is_rows

    @property
    def padding(self) -> float:
        """Padded elements per real one."""
        return self.part * len(self.ranks) / sum(slab.numel for slab in self.slabs) - 1


def bucket_bytes(slabs: list[Slab]) -> int:
    return 4 * sum(slab.numel for slab in slabs)


BACKWARD_ORDER = {"head": 0, "layer_mix": 1, "blocks": 2, "skip_weights": 3, "value_embeds": 4}  # then the embedding


def backward_order(slab: Slab) -> tuple[int, int]:
    """Sort key of slabs by when their gradients are ready: head, mix, blocks from last to first, skips, tables."""
    module, number, *_ = *slab.name.partition("[")[0].split("."), ""
    return BACKWARD_ORDER.get(module, 5), -int(number) if number.isdigit() else 0


MAX_PADDING = 0.25  # of a bucket, before it is closed


def make_buckets(config: Config, world_size: int, expert_parallel: int = 1, bucket_mb: float = 0.0) -> list[Bucket]:
    """All slabs in buckets, in the order in which they leave, with the owner of each slab.

    A bucket closes after a block (or a table) if it has bucket_mb MiB in fp32 and little padding. An expert travels
    among the ranks that hold it: every expert_parallel-th. A slab with one holder does not travel. An n-gram table is
    a bucket of its own, at the end."""

    def holders(slab: Slab) -> tuple[int, ...]:
        if slab.kind != "expert":
            return tuple(range(world_size))
        first = slab_part(slab.name)[1] * expert_parallel // config.num_experts
        return tuple(range(first, world_size, expert_parallel))

    waiting, buckets, work = {}, [], collections.Counter()  # work: (is matrix, rank) -> cost so far

    def close(ranks: tuple[int, ...], max_padding: float):  # unless it has more padding than that
        nonlocal work
        work_after = work.copy()
        bucket = Bucket(ranks, tuple(waiting[ranks]), tuple(assign_owners(waiting[ranks], ranks, work_after)))
        if bucket.padding <= max_padding:
            buckets.append(bucket)
            del waiting[ranks]
            work = work_after

    slabs = sorted(cut_slabs(config), key=backward_order)
    tables = [slab for slab in slabs if slab.is_rows]
    for _, unit in itertools.groupby((slab for slab in slabs if not slab.is_rows), key=backward_order):
        for slab in unit:
            waiting.setdefault(holders(slab), []).append(slab)
        large = [ranks for ranks, slabs in waiting.items() if bucket_bytes(slabs) >= bucket_mb * 2**20]
        for ranks in large:
            if len(ranks) > 1:
                close(ranks, MAX_PADDING)
    for ranks in list(waiting):
        close(ranks, math.inf)
    everyone = tuple(range(world_size))
    return buckets + [Bucket(everyone, (table,), (i % world_size,)) for i, table in enumerate(tables)]


def assign_owners(slabs: list[Slab], ranks: tuple[int, ...], work: collections.Counter) -> list[int]:
    """The owner of each slab: in order of cost, the rank with the least work in all buckets that has room for it.

    Room is the longest part when sizes alone are balanced, so that balancing work adds no padding. Adds to `work`."""
    parts = [0] * len(ranks)
    for numel in sorted((slab.numel for slab in slabs), reverse=True):
        heapq.heapreplace(parts, parts[0] + numel)
    room, owners = dict.fromkeys(ranks, max(parts)), [0] * len(slabs)

    least_work = {family: sorted((work[family, rank], rank) for rank in ranks) for family in (False, True)}  # heaps
    for i in sorted(range(len(slabs)), key=lambda i: (-slabs[i].cost, slabs[i].name)):
        slab, queue, full = slabs[i], least_work[slabs[i].is_matrix], []
        while queue and room[queue[0][1]] < slab.numel:
            full.append(heapq.heappop(queue))
        if queue:
            done, owner = heapq.heappop(queue)
        else:  # no rank has room: the one with the most
            done, owner = full.pop(full.index(max(full, key=lambda entry: room[entry[1]])))
        for entry in (*full, (done + slab.cost, owner)):
            heapq.heappush(queue, entry)
        owners[i] = owner
        work[slab.is_matrix, owner] += slab.cost
        room[owner] -= slab.numel
    return owners
