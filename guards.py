"""Guards of a run: ranks that agree and stop together, signals, and a watchdog that reports stuck ranks.

A mistake on one rank (UserError) ends every rank; rank 0 prints its one sentence."""

import json
import math
import os
import signal
import socket
import sys
import threading
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cli import UserError
from distributed import World
from logger import PhaseTimer


class Ended(UserError):
    """A mistake that is known to all ranks; rank 0 prints it."""


# -----------------------------------------------------------------------------
# Agreement


def gather_objects(value, world: World) -> list:
    """Every rank's value, on every rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def agree(world: World, prepare):
    """Result of prepare() on this rank. Raises Ended on all ranks if it raised UserError on one."""
    result, mistake = None, None
    try:
        result = prepare()
    except UserError as error:
        if world.size == 1:
            raise
        mistake = f"{error} (on {socket.gethostname()})"
    for rank, theirs in enumerate(gather_objects(mistake, world)):
        if theirs:
            raise Ended(f"rank {rank}: {theirs}")
    return result


def agree_on(facts: dict, world: World):
    """Raises Ended if a fact differs between ranks; the error names the first such fact."""
    everyone = gather_objects(facts, world)
    for rank, theirs in enumerate(everyone):
        for name in sorted(everyone[0].keys() | theirs.keys()):
            here, there = everyone[0].get(name, "nothing"), theirs.get(name, "nothing")
            if here != there:
                raise Ended(f"the ranks differ: {name} is {there} on rank {rank} and {here} on rank 0; "
                            "start all of them with the same flags, data and code")  # fmt: skip


# -----------------------------------------------------------------------------
# Signals and flags


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP as requests for a checkpoint and an end.

    On one rank a further signal ends the run at once; repeats within REPEATS seconds count as one. With several ranks
    torchrun repeats signals by itself, so further ones are ignored."""

    REPEATS = 2.0

    def __init__(self, world: World):
        self.world, self.received, self.first_at, self.before = world, 0, 0.0, {}

    def note(self, number, frame):
        if not self.received:
            self.received, self.first_at = number, time.monotonic()
            if self.world.rank == 0:
                again = f"; Ctrl-C again after {self.REPEATS:g} s ends without one" if self.world.size == 1 else ""
                print(f"\nstopping: saving a checkpoint{again}", file=sys.stderr, flush=True)
        elif self.world.size == 1 and time.monotonic() - self.first_at > self.REPEATS:
            os._exit(128 + number)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            numbers = (signal.SIGTERM, signal.SIGINT, *([] if nohup else [signal.SIGHUP]))
            self.before = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.received else handler)  # a repeat must not kill the exit


class StepFlags(NamedTuple):
    """Requests of one rank. They are summed over ranks in each step, so that all ranks act in the same step."""

    stop: bool = False  # a signal was received
    disk: bool = False  # a checkpoint could not be written


class AsyncHostCopy:
    """0-d tensors by name, on the host. Read one step later, the copy costs no wait for the GPU."""

    def __init__(self, values: dict[str, Tensor]):
        self.names, stacked = list(values), torch.stack(list(values.values()))
        self.host = stacked.to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if stacked.is_cuda else None
        if self.copied:
            self.copied.record()

    def read(self) -> dict[str, float]:
        if self.copied:
            self.copied.synchronize()
        return dict(zip(self.names, self.host.tolist()))


OTHER_RATES = "lower the learning rates and start again under another --experiment_name"


def check_health(totals: AsyncHostCopy, step: int, saver) -> bool:
    """Whether a rank received a signal. `totals`: loss, its parts and StepFlags of a step; `saver`: checkpoint.Saver.

    Raises Ended, which names the part, if the loss is not finite; and the error of a checkpoint that failed."""
    values = totals.read()
    if not math.isfinite(values["loss"]):
        saver.join()
        parts = [f"{name} is {value}" for name, value in values.items() if name != "loss" and not math.isfinite(value)]
        what = f"the loss of step {step} is {values['loss']} ({', '.join(parts) or 'its parts are finite'})"
        raise Ended(f"{what}; {saver.describe_last_good()}; {OTHER_RATES}")
    if values["disk"]:
        saver.wait()
    return values["stop"] > 0


# -----------------------------------------------------------------------------
# Watchdog


class Watchdog:
    """A thread that writes a heartbeat with this rank's place in the step to the store, and reports stuck ranks.

    After stuck_after seconds without progress here, the run ends with the names of the silent ranks, else of the busy
    ones. When a collective fails because a peer is gone, the silent ranks are reported at once."""

    BEAT = 1.0  # seconds

    def __init__(self, world: World, timer: PhaseTimer, stuck_after: float):
        self.world, self.timer, self.stuck_after = world, timer, stuck_after
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self):
        self.store = self.world.store()
        if self.world.size > 1:
            self.thread.start()
        return self

    def __exit__(self, kind, error, trace):
        lost_peer = isinstance(error, RuntimeError) and not isinstance(error, UserError)  # raised by collectives
        silent = {}
        if self.world.size > 1 and lost_peer:
            try:
                silent = self.silent_ranks()
            except RuntimeError as lost_store:
                self.exit_without_store(lost_store)
        self.closed.set()
        if self.world.size > 1:
            self.thread.join(2 * self.BEAT)  # a thread inside torch at the end of its process spoils the exit status
        if silent:
            self.report(f"{self.describe(silent)} no longer there")
            raise SystemExit(1) from error

    def run(self):
        try:
            self.write_beat()
            while not self.closed.wait(self.BEAT):
                self.write_beat()
                if self.is_stuck():
                    self.report_stuck_ranks()
        except RuntimeError as error:
            if not self.closed.is_set():
                self.exit_without_store(error)

    def is_stuck(self) -> bool:
        return time.monotonic() - self.timer.place[1] > self.stuck_after

    def write_beat(self):
        beat = [time.monotonic(), self.timer.place[0], f"{socket.gethostname()}, pid {os.getpid()}"]
        self.store.set(f"beat/{self.world.rank}", json.dumps(beat))

    def read_beats(self) -> dict[int, list]:
        ranks = [rank for rank in range(self.world.size) if self.store.check([f"beat/{rank}"])]
        return {rank: json.loads(self.store.get(f"beat/{rank}")) for rank in ranks}

    def silent_ranks(self) -> dict[int, list]:
        """rank -> its last beat, of the ranks without a new one in three beats' time."""
        before = self.read_beats()
        for _ in range(4):
            time.sleep(self.BEAT)
            self.write_beat()  # or this rank would be silent to the others
        now = self.read_beats()
        others = (rank for rank in range(self.world.size) if rank != self.world.rank)
        silent = [rank for rank in others if now.get(rank) == before.get(rank)]
        return {rank: now.get(rank, [0, "the start", "unknown host"]) for rank in silent}

    def report_stuck_ranks(self):
        silent = self.silent_ranks()
        busy = {rank: beat for rank, beat in self.read_beats().items() if not beat[1].endswith("communication")}
        if not self.is_stuck():  # there was progress meanwhile
            return
        waited = f"after {self.stuck_after:g} s without progress"
        if silent:
            self.report(f"{self.describe(silent)} no longer there, {waited}")
        elif busy:
            self.report(f"{self.describe(busy)} stuck, {waited}")
        else:
            self.report(f"all ranks wait for one another, {waited}: the network between them may have failed")
        os._exit(1)  # the training thread may be inside a collective that never returns

    def describe(self, ranks: dict[int, list]) -> str:
        names = ", ".join(f"rank {rank} ({host}; {place})" for rank, (_, place, host) in ranks.items())
        return names + (" is" if len(ranks) == 1 else " are")

    def report(self, message: str):
        """Print the message on the first rank that reports one; the others wait for it to do so."""
        if self.store.add("told", 1) == 1:
            print(f"\nerror: {message}; go on from the last checkpoint with --resume", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * self.BEAT)

    def exit_without_store(self, error: RuntimeError):
        """End a process whose torchrun is gone: nothing would restart it, and a second run could write beside it."""
        rank, reason = self.world.rank, str(error).splitlines()[0]
        print(f"\nerror: rank {rank} ends, for the store of torchrun is gone ({reason})", file=sys.stderr, flush=True)
        os._exit(1)
