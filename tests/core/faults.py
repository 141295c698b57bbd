"""Faults, injected into real runs of a tiny model, and a table of what came of them.

    python tests/core/faults.py                                   # everything: about twelve minutes on two cores
    python tests/core/faults.py --kills 100 --seed 7              # more kills, at other moments
    python tests/core/faults.py --only dead_rank_1 full_disk      # these rows alone

A run is a process of its own: this file, whose function `worker` first arranges the fault and then trains. What a fault
may cost is time. A run that goes on must end as the uninterrupted one ends, bit for bit; one that cannot go on must say
why in one sentence and leave every checkpoint as it was. Exit status 1 if a row is not ok. test_faults.py runs the same
functions on fewer moments.

Rows about disks mount a tmpfs or an ext4 image of their own, which needs root on Linux; elsewhere they are skipped."""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

FAULT = json.loads(os.environ.get("FAULTS", "{}"))  # what a worker is to suffer, on which rank
STRUCK = FAULT.get("rank", int(os.environ.get("RANK", 0))) == int(os.environ.get("RANK", 0))
HERE = Path(__file__).resolve().parents[2]
ROOT = Path(FAULT["code"]) if STRUCK and "code" in FAULT else HERE
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import checkpoint  # noqa: E402
import data  # noqa: E402
import facts  # noqa: E402
import model  # noqa: E402
import tokenizer  # noqa: E402
import train_muon  # noqa: E402
from cli import UserError  # noqa: E402
from tools import prepare  # noqa: E402

STEPS, EVERY = 60, 4  # of a run, and between its checkpoints
TINY = dict(
    preset="cpu",
    device="cpu",
    n_layer=2,
    n_embd=32,
    n_head=1,
    head_dim=32,
    value_embeds=1,
    num_experts=4,
    mlp_ratio=4.0,
    pattern="M",
    attention="AK",
    ngrams="2",
    ngram_rows=64,
    window="L",
    window_size=64,
    dtype="fp32",
    ns_dtype="fp32",
    seq_len=32,
    batch_tokens=384,
    micro_batch_tokens=192,
    window_start=64,
    num_iterations=STEPS,
    val_every=20,
    val_tokens=0,
    checkpoint_every=EVERY,
    sample_tokens=0,
    warmup_steps=0,
)
PATIENCE = 150  # seconds after which whatever should have happened did not

# -----------------------------------------------------------------------------
# The worker: a rank that suffers


def worker():
    """Write down the process id, arrange the fault, train."""
    (Path(os.environ["FAULTS_PIDS"]) / f"{os.environ.get('RANK', 0)}.{os.getpid()}").touch()
    facts.matmul_rate = lambda device, dtype: 1e11  # measuring it takes as long as the run
    if STRUCK:
        sys.argv += FAULT.get("words", [])
        if "kind" in FAULT:
            SABOTAGE[FAULT["kind"]](FAULT["at"])
    train_muon.main(train_muon.MUON)


def before_step(at: int, act):
    """Call act() when the data of step `at` are asked for."""
    next_step = data.Loader.next_step

    def struck(loader):
        if loader.position == at * loader.batch_rows:
            act()
        return next_step(loader)

    data.Loader.next_step = struck


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


def poison(at: int, act):
    """Call act(parameter) before step `at`, for one matrix of the model."""
    made, init = [], model.GPT.__init__

    def noted(self, *words, **names):
        init(self, *words, **names)
        made.append(self)

    model.GPT.__init__ = noted
    before_step(
        at,
        lambda: act(next(p for net in made for p in net.blocks.parameters() if p.ndim > 1 and p.device.type != "meta")),
    )


def die_at_operation(at: int):
    """kill -9 before the `at`-th time that a file or folder of checkpoints is opened, made, listed, renamed or
    removed."""
    seen = 0

    def count(event, words):
        nonlocal seen
        if (
            event.startswith(("open", "os.", "shutil."))
            and words
            and re.search(r"/checkpoint\b|rank\d+\.pt|manifest\.json", str(words[0]))
        ):
            seen += 1
            if seen == at:
                kill_me()

    sys.addaudithook(count)


SABOTAGE = {
    "die": lambda at: before_step(at, kill_me),
    "die at operation": die_at_operation,
    "sleep": lambda at: before_step(at, lambda: time.sleep(3600)),
    "weight": lambda at: poison(at, lambda p: p.data.fill_(math.nan)),
    "gradient": lambda at: poison(at, lambda p: p.register_hook(lambda grad: grad * math.nan)),
}

# -----------------------------------------------------------------------------
# What is on the disk


class Wrong(AssertionError):
    """A fault did not end as it must."""


class Skipped(Exception):
    """This machine cannot inject the fault."""


def check(fine, otherwise: str):
    if not fine:
        raise Wrong(otherwise)


def write_data(folder: Path, words: list[str]) -> Path:
    """Shards of documents in which four words follow each other at random."""
    encoding, source = tokenizer.get_encoding("bytes"), np.random.default_rng(0)
    document = lambda: np.concatenate(([256], encoding.encode("".join(source.choice(words, 40))))).astype(np.uint16)
    folder.mkdir()
    data.write_shard(folder / "words_train_000001.bin", np.concatenate([document() for _ in range(30)]))
    data.write_shard(folder / "words_val_000000.bin", np.concatenate([document() for _ in range(4)]))
    (folder / "meta.json").write_text(json.dumps(prepare.describe(folder, encoding)))
    return folder


def rows_of(run: Path) -> list[dict]:
    """The whole lines of metrics.jsonl, which may be being written."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def last_step(run: Path) -> int:
    return max((row["step"] for row in rows_of(run)), default=0)


def continuations(run: Path) -> list[int]:
    """The steps from which a run went on."""
    log = run / "run.log"
    return (
        [int(step) for step in re.findall(r"^the run continues from step (-?\d+)", log.read_text(), re.M)]
        if log.exists()
        else []
    )


def newest(run: Path) -> int:
    """The step of the newest checkpoint, which must be sound; 0 without one."""
    for path in checkpoint.checkpoints(run / "checkpoint")[:1]:
        return checkpoint.verified_manifest(path)["step"]
    return 0


def half_done(run: Path) -> bool:
    """Is a checkpoint being written, or an old one being removed?"""
    folders = list((run / "checkpoint").glob("step_*"))
    return len(folders) > 2 or any(not (folder / "manifest.json").exists() or folder.suffix for folder in folders)


TIMED = ("train_time", "time/", "train/tok_per_sec", "train/mfu", "memory/")


def untimed(run: Path) -> list[dict]:
    """The rows up to the last step, without what a clock or the machine puts in."""
    rows = [
        row for row in rows_of(run) if row.get("event") != "end"
    ]  # a run killed after its last checkpoint has nothing left to do
    return [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """`slab/key` -> tensor of the newest checkpoint: parameters, buffers and optimizer state."""
    slabs = checkpoint.read_checkpoint(checkpoint.latest_checkpoint(run / "checkpoint"))[1]
    return {f"{name}/{key}": tensor for name, slab in slabs.items() for key, tensor in slab.items()}


@functools.cache
def end_of(straight: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The rows and tensors of an uninterrupted run."""
    return untimed(straight), state_of(straight)


def check_equal(run: Path, straight: Path):
    """Both runs have the same rows and end with the same tensors, bit for bit."""
    rows, (expected, wanted) = untimed(run), end_of(straight)
    check(
        rows == expected,
        f"{len(rows)} rows where {len(expected)} were expected, or others: "
        f"{next(((a, b) for a, b in zip(rows, expected) if a != b), 'the shorter one ends first')}",
    )
    state = state_of(run)
    other = [name for name in wanted if name not in state or not torch.equal(state[name], wanted[name])]
    check(
        state.keys() == wanted.keys() and not other,
        f"the last checkpoint differs in {other[:3]} and {len(other)} tensors in all",
    )


def check_finite(run: Path):
    for path in checkpoint.checkpoints(run / "checkpoint"):
        for name, slab in checkpoint.read_checkpoint(path)[1].items():
            check(
                all(value.isfinite().all() for value in slab.values()),
                f"{path.name} holds a value of {name} that is not finite",
            )


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -----------------------------------------------------------------------------
# Jobs


def command_line(**values) -> list[str]:
    return [
        word
        for name, value in values.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def one_sentence(text: str) -> str:
    """The only line of an output in which our code speaks of an error; torchrun may add its own noise, but not we a
    traceback."""
    said = re.findall(r"(?:train_muon\.py: |\b)error: [^\r\n]*", text)
    check(len(said) == 1, f"{len(said)} sentences instead of one: {said}")
    check(re.search(r"(^|[\r\n])" + re.escape(said[0]), text), f"the sentence does not begin a line: {said[0]}")
    check(not traceback_of_ours(text), f"a traceback beside the sentence: {said[0]}")
    return said[0].partition("error: ")[2]


def traceback_of_ours(text: str) -> bool:
    return re.search(rf'File "{re.escape(str(HERE))}/[^"]*\.py"', text) is not None


class Job:
    """A run in progress: one process, or torchrun and its ranks. `with` leaves nothing of it alive."""

    def __init__(self, lab: "Lab", out: Path, ranks: int = 1, restarts: int = 0, fault: dict | None = None, **values):
        self.run = out / "muon"
        self.pids = Path(tempfile.mkdtemp(prefix="pids_", dir=lab.folder))
        self.output = self.pids.with_suffix(".txt")
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            f"--max-restarts={restarts}",
        ]
        words = [
            *(torchrun if ranks > 1 else []),
            __file__,
            *command_line(**TINY | {"data": lab.data, "out_dir": out} | values),
        ]
        ours = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RANK", "WORLD", "LOCAL_", "MASTER_", "TORCHELASTIC"))
        }
        ours |= {"OMP_NUM_THREADS": "1", "FAULTS": json.dumps(fault or {}), "FAULTS_PIDS": str(self.pids)}
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words], stdout=file, stderr=file, env=ours, cwd=lab.folder, start_new_session=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill_all()
        self.process.wait()
        self.kill_all()  # workers that torchrun has started meanwhile
        shutil.rmtree(self.pids)  # one that comes only now ends, as it cannot write down its id

    @property
    def workers(self) -> dict[int, int]:
        """rank -> process id, of the latest restart."""
        files = sorted(self.pids.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return {int(rank): int(pid) for rank, _, pid in (file.name.partition(".") for file in files)}

    def kill(self, rank: int, number: int = signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.workers[rank], number)

    def kill_all(self):
        """torchrun and its ranks at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self.workers.values():
            if alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def until(self, condition) -> bool:
        """Wait for condition(); False if the run ended without it."""
        began = time.monotonic()
        while not condition():
            if self.process.poll() is not None:
                return condition()
            check(time.monotonic() - began < PATIENCE, f"nothing came in {PATIENCE} s: {self.tail}")
            time.sleep(0.001)
        return True

    def until_step(self, step: int):
        """Wait until this many steps are in the log."""
        check(self.until(lambda: last_step(self.run) >= step), f"the run ended before step {step}: {self.tail}")

    def wait(self, seconds: float) -> bool:
        """Sleep, but no longer than the run lives; is it still there?"""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is None

    def end(self) -> int:
        """Wait for the end of all processes; the exit status."""
        check(not self.wait(PATIENCE), f"still running after {PATIENCE} s: {self.tail}")
        began = time.monotonic()
        while any(map(alive, self.workers.values())):
            check(time.monotonic() - began < PATIENCE, f"a rank outlives torchrun: {self.tail}")
            time.sleep(0.01)
        return self.process.returncode

    def succeed(self):
        status = self.end()
        check(status == 0 and not traceback_of_ours(self.text), f"exit status {status}: {self.tail}")

    def fail(self) -> str:
        """The sentence with which the run ends; it must fail."""
        status = self.end()
        check(status != 0, f"exit status 0: {self.tail}")
        try:
            return one_sentence(self.text)
        except Wrong as error:
            raise Wrong(f"{error}\n{self.tail}") from None

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def tail(self) -> str:
        """The last lines, without the progress bar and what torchrun adds at the end."""
        text = self.text.partition('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
        lines = [line for line in re.split(r"[\r\n]+", text) if line.strip() and not line.endswith("step/s]")]
        return "\n".join(["the output ends with", *lines[-60:]])


def alive(pid: int) -> bool:
    """Is this still a worker? Where there is /proc, not a process that has got its number since, nor one that is dead
    but not buried."""
    try:
        if Path("/proc/self").exists():
            return Path(__file__).name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        os.kill(pid, 0)
    except OSError:
        return False
    return True


class Straight(NamedTuple):
    """An uninterrupted run."""

    run: Path
    startup: float  # seconds to its first step
    training: float  # seconds from there to the end


class Lab:
    """A temporary folder with data, in which the uninterrupted runs happen once."""

    def __init__(self, seed: int = 0, kills: int = 30):
        self.kills, self.random = kills, random.Random(seed)
        self.folder = Path(tempfile.mkdtemp(prefix="faults_"))
        self.data = write_data(self.folder / "greek", ["alpha ", "beta ", "gamma ", "delta "])
        self.straight, self.interrupted = functools.cache(self.straight), functools.cache(self.interrupted)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        shutil.rmtree(self.folder, ignore_errors=True)

    def out(self) -> Path:
        """An out_dir that does not exist yet."""
        return Path(tempfile.mkdtemp(prefix="out_", dir=self.folder)) / "logs"

    def straight(self, ranks: int = 1) -> Straight:
        began = time.monotonic()
        with Job(self, self.out(), ranks) as job:
            job.until_step(1)
            startup = time.monotonic() - began
            job.succeed()
        return Straight(job.run, startup, time.monotonic() - began - startup)

    def interrupted(self, ranks: int = 1) -> Path:
        """The out_dir of a run that died in its last step, with checkpoints at 52 and 56."""
        out = self.out()
        with Job(self, out, ranks, fault={"kind": "die", "at": STEPS - 1, "rank": 0}) as job:
            check(
                job.end() != 0 and newest(job.run) == STEPS - EVERY,
                f"it did not die in step {STEPS}, or too early: {job.tail}",
            )
        return out

    def copy_of_interrupted(self, ranks: int = 1) -> Path:
        return Path(shutil.copytree(self.interrupted(ranks), self.out()))

    def resume(self, out: Path, ranks: int = 1):
        """Go on, to the end of an uninterrupted run."""
        with Job(self, out, ranks, resume=True) as job:
            job.succeed()
            check_equal(job.run, self.straight(ranks).run)

    def here(self, out: Path, fault: dict | None = None, **values) -> tuple[int, str]:
        """The exit status and output of a run in this process, for faults that do not kill; an import of torch takes
        longer than they."""
        said, argv, rate = io.StringIO(), sys.argv, facts.matmul_rate
        whole = data.Loader.next_step, model.GPT.__init__
        if fault:
            SABOTAGE[fault["kind"]](fault["at"])
        sys.argv = ["train_muon.py", *command_line(**TINY | {"data": self.data, "out_dir": out} | values)]
        facts.matmul_rate = lambda device, dtype: 1e11
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                train_muon.main(train_muon.MUON)
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            said.write(f"\n{stop.code}" if isinstance(stop.code, str) else "")
        except Exception as error:
            status = 1
            said.write(f"\n{traceback.format_exc()}")
            frames = [
                f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
            ]
            raise Wrong(f"{type(error).__name__}: {error} (in {' > '.join(frames[-4:])})\n{said.getvalue()}") from None
        finally:
            sys.argv, facts.matmul_rate = argv, rate
            data.Loader.next_step, model.GPT.__init__ = whole
        return status, said.getvalue()


# -----------------------------------------------------------------------------
# Rows: kill -9


AIMS = (
    "time",
    "saving",
    "time",
    "operation",
    "startup",
    "saving",
    "operation",
    "time",
)  # half of them at a checkpoint being written


def kills(lab: Lab, ranks: int, count: int) -> str:
    """Runs that are killed up to six times each, until so many kills have happened; all of them end as if nothing
    had."""
    straight, tally = lab.straight(ranks), {"kills": 0, "runs": 0, "half": 0, "lost": 0}
    while tally["kills"] < count:
        out, before = lab.out(), tally["kills"]
        tally["runs"] += 1
        while tally["kills"] < min(count, before + 6) and one_kill(
            lab, out, ranks, AIMS[tally["kills"] % len(AIMS)], straight, tally
        ):
            pass
        if newest(out / "muon") < STEPS or not last_step(out / "muon"):
            with Job(lab, out, ranks, **{"resume": True} if (out / "muon").exists() else {}) as job:
                job.succeed()
        check_equal(out / "muon", straight.run)
    writing = f"{tally['half']} while a checkpoint was written or removed"
    return f"{tally['kills']} kills of {tally['runs']} runs, {writing}; {tally['lost']} steps repeated"


def one_kill(lab: Lab, out: Path, ranks: int, aim: str, straight: Straight, tally: dict) -> bool:
    """Start a run or let it go on, kill it at one moment, and look at what is left; False if it was faster."""
    dice, run = lab.random, out / "muon"
    there, was, known = run.exists(), newest(run), len(continuations(run))
    saves, left, victim, fault = (
        max(1, (STEPS - was) // EVERY),
        (STEPS - was) / STEPS,
        dice.choice([*range(ranks), "all"]),
        None,
    )
    if aim == "operation":
        rank = dice.randrange(ranks)
        fault = {"kind": "die at operation", "at": dice.randint(1, saves * (2 if rank else 10)), "rank": rank}
    with Job(lab, out, ranks, fault=fault, **{"resume": True} if there else {}) as job:
        if aim == "startup":
            job.wait(dice.uniform(0, straight.startup))
        elif aim == "time":
            job.until(lambda: len(continuations(run)) > known if there else last_step(run))
            job.wait(dice.uniform(0, straight.training * left))
        elif aim == "saving":
            for _ in range(dice.randint(1, min(6, saves))):
                job.until(lambda: any((run / "checkpoint").glob("*.partial")))
                job.wait(dice.uniform(0, 0.02))
        if aim == "operation" or job.process.poll() is not None:
            pass  # it kills itself, or was faster
        elif victim == "all" or victim not in job.workers:
            job.kill_all()
        else:
            job.kill(victim)
        status = job.end()
        died = status == -signal.SIGKILL or (ranks > 1 and "exitcode: -9" in job.text)
        check(status == 0 or died, f"aimed at {aim}, exit status {status}: {job.tail}")
    steps = continuations(run)[known:]
    check(
        all(max(step, 0) == was for step in steps),
        f"went on from step {steps}, with a checkpoint of step {was} on the disk",
    )
    if status != 0:
        reached = last_step(run)
        check(
            newest(run) >= (reached - 1) // EVERY * EVERY - EVERY,
            f"after step {reached} the newest checkpoint is of step {newest(run)}",
        )
        tally["kills"] += 1
        tally["half"] += half_done(run)
        tally["lost"] += reached - newest(run)
    return status != 0


def torchrun_restarts(lab: Lab, victims: tuple[int, ...]) -> str:
    """torchrun alone brings a run to its end, whose ranks are killed one after the other."""
    with Job(lab, lab.out(), 2, restarts=3) as job:
        for i, victim in enumerate(victims):
            job.until(lambda: len(continuations(job.run)) == i and newest(job.run) >= 16 * (i + 1))
            job.wait(lab.random.uniform(0, 0.1))
            job.kill(victim)
        job.succeed()
        steps = continuations(job.run)
        check(len(steps) == len(victims), f"went on {len(steps)} times, after {len(victims)} kills: {job.tail}")
        check_equal(job.run, lab.straight(2).run)
    return f"went on by itself from steps {steps}"


# -----------------------------------------------------------------------------
# Rows: signals, dead and stuck ranks


def signalled(lab: Lab, ranks: int, number: int, rank: int | None = None) -> str:
    """SIGTERM or SIGINT to the process or to torchrun, or to one rank alone."""
    out = lab.out()
    with Job(lab, out, ranks) as job:
        job.until_step(10)
        job.kill(rank, number) if rank is not None else job.process.send_signal(number)
        status, text = job.end(), job.text
        check(status == 128 + number if ranks == 1 else status != 0, f"exit status {status}: {job.tail}")
        said = re.findall(r"stopped by a signal after step (\d+); the checkpoint is (\S+); go on with --resume", text)
        check(len(said) == 1 and not traceback_of_ours(text) and "error: " not in text, f"it said {said}: {job.tail}")
        step = int(said[0][0])
        check(
            newest(job.run) == step == last_step(job.run) and f"step_{step:06d}" in said[0][1],
            f"stopped after step {last_step(job.run)}, the newest checkpoint is of step {newest(job.run)}, it said {said}",
        )
    lab.resume(out, ranks)
    check(continuations(job.run) == [step], f"went on from {continuations(job.run)} instead of {step}")
    return f"exit status {status}, checkpoint at step {step} where it stopped; resumed"


def dead_rank(lab: Lab, victim: int, resumed: bool = True) -> str:
    """kill -9 of one of two ranks; the other one must say so."""
    out = lab.out()
    with Job(lab, out, 2) as job:
        job.until_step(10)
        job.kill(victim)
        said = job.fail()
        check(f"rank {victim} " in said, said)
    if resumed:
        lab.resume(out, 2)
    return said.partition("; the last")[0] + "; resumed" * resumed


def dead_torchrun(lab: Lab) -> str:
    """kill -9 of torchrun alone: its ranks may not go on, as nobody would know of them and start the run once more."""
    out = lab.out()
    with Job(lab, out, 2) as job:
        job.until_step(10)
        job.process.kill()
        job.end()
        said = re.findall(r"\berror: [^\r\n]*", job.text)
        check(
            len(said) <= 2 and all("torchrun" in words for words in said) and not traceback_of_ours(job.text),
            f"it said {said}: {job.tail}",
        )
        step = newest(job.run)
    lab.resume(out, 2)
    return f"the ranks ended, with a checkpoint of step {step}: {said[0] if said else 'without a word'}; resumed"


def stopped_rank(lab: Lab, victim: int, patient: bool = True) -> str:
    """SIGSTOP of one of two ranks. torchrun gives a rank 30 s to end, which a stopped one uses up, unless we are not
    patient."""
    with Job(lab, lab.out(), 2, stuck_after=5) as job:
        job.until_step(10)
        job.kill(victim, signal.SIGSTOP)
        if not patient:
            job.until(lambda: "error: " in job.text)
            job.kill(victim)
        said = job.fail()
    check(f"rank {victim} " in said and f"rank {1 - victim} " not in said, said)
    return said.partition("; the last")[0]


def sleeping_rank(lab: Lab, victim: int) -> str:
    """One of two ranks sleeps in its loader for an hour."""
    with Job(lab, lab.out(), 2, stuck_after=5, fault={"kind": "sleep", "at": 12, "rank": victim}) as job:
        said = job.fail()
    check(f"rank {victim} " in said and f"rank {1 - victim} " not in said and "step 12, data" in said, said)
    return said.partition("; the last")[0]


# -----------------------------------------------------------------------------
# Rows: values that are not finite, ranks that differ


def not_finite(lab: Lab, ranks: int, fault: dict | None = None, within: int = 20, **values) -> str:
    """The run stops, names the step and the last good checkpoint, and saves nothing that is not finite."""
    out = lab.out()
    run = out / "muon"
    if ranks == 1:
        status, text = lab.here(out, fault, **values)
        check(status != 0, "it went on to the end")
        said = one_sentence(text)
    else:
        with Job(lab, out, ranks, fault=fault, **values) as job:
            said = job.fail()
    good = [path.name for path in checkpoint.checkpoints(run / "checkpoint")[:1]]
    check(re.search(r"\bstep \d+", said) and last_step(run) <= within, f"after step {last_step(run)} it said: {said}")
    check(
        (good[0] in said if good else "no checkpoint" in said),
        f"it does not say that {good or 'nothing'} is good: {said}",
    )
    check_finite(run)
    check(not list((run / "checkpoint").glob("*.partial")), "a half-written checkpoint is left")
    return said.replace(str(run), "...")


def ranks_differ(lab: Lab, name: str, **fault) -> str:
    """Rank 1 has another flag, other data or other code: nothing is begun."""
    out = lab.out()
    with Job(lab, out, 2, fault={"rank": 1, **fault}) as job:
        said = job.fail()
    check(name in said and "rank 1" in said and "differ" in said, said)
    check(not out.exists(), f"it wrote {list(out.rglob('*'))[:3]}")
    return said.partition(";")[0]


def other_data(lab: Lab) -> str:
    folder = lab.folder / "birds"
    return ranks_differ(
        lab,
        "shard",
        words=["--data", str(folder if folder.exists() else write_data(folder, ["wren ", "owl ", "swift ", "kite "]))],
    )


def other_code(lab: Lab) -> str:
    folder = Path(tempfile.mkdtemp(prefix="code_", dir=lab.folder))
    for path in HERE.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(HERE / "tools", folder / "tools")
    with open(folder / "model.py", "a") as file:
        file.write("# a remark\n")
    return ranks_differ(lab, "model.py", code=str(folder))


def other_path(lab: Lab) -> str:
    """The same data in another place are the same data."""
    words = ["--data", shutil.copytree(lab.data, lab.out())]
    with Job(lab, lab.out(), 2, fault={"rank": 1, "words": list(map(str, words))}) as job:
        job.succeed()
    check_equal(job.run, lab.straight(2).run)
    return "trained"


# -----------------------------------------------------------------------------
# Rows: disks


def root(*words) -> bool:
    """Run a command that needs root; did it succeed? Raises Skipped where there is no such command."""
    try:
        return subprocess.run([*map(str, words)], capture_output=True, timeout=60).returncode == 0
    except OSError as error:
        raise Skipped(str(error)) from None


@contextlib.contextmanager
def mounted(lab: Lab, *words):
    """A folder where mount puts what the words say."""
    folder = Path(tempfile.mkdtemp(prefix="disk_", dir=lab.folder))
    if not root("mount", *words, folder):
        raise Skipped(f"no right to mount here: {' '.join(map(str, words))}")
    try:
        yield folder
    finally:
        root("umount", "-l", folder)


def tmpfs(size: int) -> list[str]:
    return ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]


def full_disk(lab: Lab, ranks: int, rooms: tuple[float, ...]) -> str:
    """A disk with room for the log and for so many checkpoints, where three are needed; with more room the run goes
    on."""
    straight, told = lab.straight(ranks).run, []
    needed = sum(map(len, contents(checkpoint.latest_checkpoint(straight / "checkpoint")).values()))
    log = sum(len(text) for path, text in contents(straight).items() if path.parent == straight)
    for room in rooms:
        with mounted(lab, *tmpfs(int(log + room * needed))) as folder:
            out = folder / "logs"
            with Job(lab, out, ranks) as job:
                said = job.fail()
            check(str(job.run) in said and re.search("space|written", said), said)
            sound = [
                checkpoint.verified_manifest(path)["step"] for path in checkpoint.checkpoints(job.run / "checkpoint")
            ]
            told.append(f"room for {room:g}: stopped at step {last_step(job.run)} with {sound or 'nothing'} saved")
            check(root("mount", "-o", f"remount,size={2**26}", folder), "the disk cannot be made larger")
            lab.resume(out, ranks)
            check(
                max(continuations(job.run)[-1], 0) == max(sound, default=0),
                f"went on from {continuations(job.run)}, saved were {sound}",
            )
    return "; ".join(told) + "; resumed"


def read_only(lab: Lab) -> str:
    """A folder that cannot be written to, for a new run and for one that would go on."""
    with mounted(lab, *tmpfs(2**26)) as folder:
        shutil.copytree(lab.interrupted(), folder / "logs")
        check(root("mount", "-o", "remount,ro", folder), "the disk cannot be made read-only")
        before = contents(folder)
        for values in ({"experiment_name": "new"}, {"resume": True}):
            status, text = lab.here(folder / "logs", **values)
            said = one_sentence(text)
            check(status != 0 and "Read-only" in said and str(folder) in said, said)
        check(contents(folder) == before, "something was written to a read-only disk")
    return said.replace(str(folder), "...").partition(";")[0]


def broken_disk(lab: Lab) -> str:
    """A disk that takes no more writes in the middle of a run, and keeps only what had been brought onto it: ext4 after
    an error."""
    image = Path(tempfile.mkdtemp(prefix="image_", dir=lab.folder)) / "ext4"
    with open(image, "wb") as file:
        file.truncate(2**26)
    if not root("mkfs.ext4", "-q", "-F", image):
        raise Skipped("mkfs.ext4 fails here")
    with mounted(lab, "-o", "loop", image) as folder:
        with Job(lab, folder / "logs") as job:
            job.until_step(18)
            check(root("mount", "-o", "remount,abort", folder), "the disk cannot be broken")
            said = job.fail()
        check("Read-only" in said and str(folder) in said, said)
        said, reached = said.replace(str(folder), "...").partition(";")[0], last_step(job.run)
        check(root("umount", folder), "the broken disk is still in use")
    with mounted(lab, "-o", "loop", image) as folder:
        there = newest(folder / "logs/muon")
        check(
            there >= reached - 3 * EVERY, f"after step {reached} the newest checkpoint on the disk is of step {there}"
        )
        lab.resume(folder / "logs")
    return f"{said}; step {reached} was reached, checkpoint {there} had come onto the disk; resumed"


# -----------------------------------------------------------------------------
# Rows: damaged files


def rewrite(path: Path, change):
    """change(bytearray) in place."""
    contents = bytearray(path.read_bytes())
    change(contents)
    path.write_bytes(contents)


def flip(contents: bytearray, dice: random.Random, first: int = 0, end: int | None = None):
    """One random bit."""
    contents[dice.randrange(first, end or len(contents))] ^= 1 << dice.randrange(8)


def another_digit(contents: bytearray, dice: random.Random):
    """A number that is another one: still JSON."""
    at = dice.choice([match.start() for match in re.finditer(rb"(?<=[ \[.\d])\d", contents)])
    contents[at] = dice.choice([digit for digit in b"123456789" if digit != contents[at]])


def another_letter(contents: bytearray, dice: random.Random):
    """A name that is another one: still JSON."""
    contents[dice.choice([match.start() for match in re.finditer(rb"[a-z_]", contents)])] = ord("q")


def another_position(contents: bytearray, dice: random.Random):
    """The data would go on elsewhere."""
    contents[:] = re.sub(rb'("position": )\d+', rb"\g<1>%d" % (12 * dice.randrange(1, 40)), contents)


OTHER_JSON = ["[]", "null", "7", "{}", '{"files": {}}', '{"files": []}']
CHECKPOINT_DAMAGE = {
    "cut short": lambda folder, dice: os.truncate(
        folder / "rank0.pt", dice.randrange((folder / "rank0.pt").stat().st_size)
    ),
    "longer": lambda folder, dice: rewrite(
        folder / "rank0.pt", lambda contents: contents.extend(dice.randbytes(dice.randint(1, 4096)))
    ),
    "a bit flipped": lambda folder, dice: rewrite(folder / "rank0.pt", lambda contents: flip(contents, dice)),
    "missing": lambda folder, dice: (folder / "rank0.pt").unlink(),
    "empty": lambda folder, dice: (folder / "rank0.pt").write_bytes(b""),
    "a block of zeros": lambda folder, dice: rewrite(
        folder / "rank0.pt", lambda contents: contents.__setitem__(slice(4096, 8192), bytes(4096))
    ),
}
MANIFEST_DAMAGE = {
    "cut short": lambda folder, dice: os.truncate(
        folder / "manifest.json", dice.randrange((folder / "manifest.json").stat().st_size)
    ),
    "a bit flipped": lambda folder, dice: rewrite(folder / "manifest.json", lambda contents: flip(contents, dice)),
    "another digit": lambda folder, dice: rewrite(
        folder / "manifest.json", lambda contents: another_digit(contents, dice)
    ),
    "another letter": lambda folder, dice: rewrite(
        folder / "manifest.json", lambda contents: another_letter(contents, dice)
    ),
    "noise": lambda folder, dice: (folder / "manifest.json").write_bytes(dice.randbytes(500)),
    "another position": lambda folder, dice: rewrite(
        folder / "manifest.json", lambda contents: another_position(contents, dice)
    ),
    "other JSON": lambda folder, dice: (folder / "manifest.json").write_text(dice.choice(OTHER_JSON)),
    "missing": lambda folder, dice: (folder / "manifest.json").unlink(),
}


def parsed(path: Path):
    """What a JSON file says; None if it says nothing."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_bytes())


def check_none(wrong: dict[str, str], count: int):
    names = " // ".join(name[:160] for name in wrong)
    check(not wrong, f"{len(wrong)} kinds of wrong ends among {count}: {names}\n" + "\n\n".join(wrong.values()))


def damaged(lab: Lab, damages: dict, count: int) -> str:
    """The newest checkpoint of an interrupted run is damaged in many ways: the one before serves, and it is said."""
    wrong = {}
    for i in range(count):
        kind = list(damages)[i % len(damages)]
        out = lab.copy_of_interrupted()
        folder = out / "muon/checkpoint" / f"step_{STEPS - EVERY:06d}"
        files, manifest = contents(folder), parsed(folder / "manifest.json")
        damages[kind](folder, lab.random)
        manifest_changed = parsed(folder / "manifest.json") != manifest
        if not manifest_changed and contents(folder).get(folder / "rank0.pt") == files[folder / "rank0.pt"]:
            continue  # another blank
        try:
            status, text = lab.here(out, resume=True)
            check(status == 0, f"exit status {status}: {text[-500:]}")
            check_equal(out / "muon", lab.straight().run)
            said = f"going on from step {STEPS - 2 * EVERY} instead" in text and folder.name in text
            check(said, f"it does not say that {folder.name} is damaged")
        except Wrong as error:
            wrong.setdefault(f"{kind}: {str(error).splitlines()[0]}", str(error))
        shutil.rmtree(out)
    check_none(wrong, count)
    return f"{count} of {count} went on from the one before and said so"


def all_damaged(lab: Lab, count: int) -> str:
    """Both checkpoints are damaged: one sentence, and nothing is lost that a person could still mend."""
    blatant = ("cut short", "noise", "other JSON", "missing")  # the others may change nothing
    wrong, every = {}, CHECKPOINT_DAMAGE | {f"manifest {name}": MANIFEST_DAMAGE[name] for name in blatant}
    for i in range(count):
        out = lab.copy_of_interrupted()
        kinds = (
            [list(every)[i % len(every)]] * 2 if i < len(every) else [lab.random.choice(list(every)) for _ in range(2)]
        )
        for kind, step in zip(kinds, (STEPS - 2 * EVERY, STEPS - EVERY)):
            every[kind](out / "muon/checkpoint" / f"step_{step:06d}", lab.random)
        before = contents(out)
        try:
            status, text = lab.here(out, resume=True)
            check(status != 0, f"it went on; {continuations(out / 'muon')}")
            said = one_sentence(text)
            check(f"step_{STEPS - EVERY:06d}" in said and f"step_{STEPS - 2 * EVERY:06d}" in said, said)
            check(contents(out) == before, "files were changed")
        except Wrong as error:
            wrong.setdefault(f"{' + '.join(kinds)}: {str(error).splitlines()[0]}", str(error))
        shutil.rmtree(out)
    check_none(wrong, count)
    return f"{count} of {count}: one sentence that names both, nothing changed"


def lost_rank_file(lab: Lab) -> str:
    """Two ranks, and the file of the second one is gone."""
    out = lab.copy_of_interrupted(2)
    (out / f"muon/checkpoint/step_{STEPS - EVERY:06d}/rank1.pt").unlink()
    lab.resume(out, 2)
    steps, text = continuations(out / "muon"), (out / "muon/run.log").read_text()
    check(steps == [STEPS - 2 * EVERY] and "rank1.pt is missing" in text, f"went on from {steps}")
    return f"went on from step {steps[0]} and said so"


def shard_damage(contents: bytearray, dice: random.Random):
    """A random change of a shard's header, mostly where it counts, or of its length."""
    kind = dice.randrange(6)
    if kind < 4:
        for _ in range(dice.randint(1, 4)):
            contents[dice.randrange(12 if kind < 2 else data.HEADER_BYTES)] = dice.randrange(256)
    elif kind == 4:
        del contents[dice.randrange(len(contents)) :]
    else:
        contents.extend(dice.randbytes(dice.randint(1, 4096)))


def damaged_headers(lab: Lab, count: int) -> str:
    """read_shard refuses a damaged shard in one sentence or returns what was in it: never other tokens."""
    whole = (lab.data / "words_train_000001.bin").read_bytes()
    tokens, path, refused = (
        np.frombuffer(whole, "<u2", offset=data.HEADER_BYTES),
        lab.folder / "damaged_train_000001.bin",
        0,
    )
    for _ in range(count):
        changed = bytearray(whole)
        shard_damage(changed, lab.random)
        path.write_bytes(changed)
        try:
            found = data.read_shard(path)
        except UserError as error:
            check("\n" not in str(error) and str(path) in str(error), f"not a sentence about {path}: {error}")
            refused += 1
        else:
            check(
                np.array_equal(found, tokens),
                f"other tokens from a header of {bytes(changed[:16]).hex()} and {len(changed)} bytes",
            )
    path.unlink()
    return f"{refused} refused, {count - refused} with the right tokens (a field that means nothing)"


def damaged_tokens(lab: Lab, count: int) -> str:
    """A flipped bit in a shard: meta.json knows its sha256."""
    for i in range(count):
        folder, out = Path(shutil.copytree(lab.data, lab.out())), lab.out()
        path = sorted(folder.glob("*.bin"))[i % 2]
        rewrite(path, lambda contents: flip(contents, lab.random, data.HEADER_BYTES))
        status, text = lab.here(out, data=folder)
        said = one_sentence(text)
        check(status != 0 and path.name in said and "sha256" in said and not out.exists(), said)
    return said.replace(str(folder), "...").partition(":")[0]


# -----------------------------------------------------------------------------
# The table


class Row(NamedTuple):
    run: callable  # (lab) -> what happened; raises Wrong or Skipped
    expected: str


EXACTLY = "goes on from the newest checkpoint and ends bit for bit as without the fault"
STOPS = "a checkpoint at the step where it stops, status 128 + signal (torchrun: not 0); resumes exactly"
NAMES = "ends; one sentence names the rank"
NAN = "stops; one sentence with the step and the last good checkpoint; saves nothing that is not finite"
NOT_BEGUN = "one sentence names the difference; nothing is written"
ROOM = "one sentence, old checkpoints sound; with room it resumes exactly"
BEFORE = "goes on from the checkpoint before, says so, ends exactly"
ROWS = {
    "kill_9_one_process": Row(lambda lab: kills(lab, 1, lab.kills - lab.kills // 4), EXACTLY),
    "kill_9_two_ranks": Row(lambda lab: kills(lab, 2, lab.kills // 4), EXACTLY),
    "torchrun_restarts": Row(
        lambda lab: torchrun_restarts(lab, (1, 0)), "goes on by itself and ends bit for bit as without the fault"
    ),
    "sigterm": Row(lambda lab: signalled(lab, 1, signal.SIGTERM), STOPS),
    "sigint": Row(lambda lab: signalled(lab, 1, signal.SIGINT), STOPS),
    "sigterm_torchrun": Row(lambda lab: signalled(lab, 2, signal.SIGTERM), STOPS),
    "sigint_torchrun": Row(lambda lab: signalled(lab, 2, signal.SIGINT), STOPS),
    "sigterm_rank_0": Row(lambda lab: signalled(lab, 2, signal.SIGTERM, 0), STOPS),
    "sigterm_rank_1": Row(lambda lab: signalled(lab, 2, signal.SIGTERM, 1), STOPS),
    "dead_rank_0": Row(lambda lab: dead_rank(lab, 0), NAMES),
    "dead_rank_1": Row(lambda lab: dead_rank(lab, 1), NAMES),
    "dead_torchrun": Row(dead_torchrun, "its ranks end, too; resumes exactly"),
    "stopped_rank_0": Row(lambda lab: stopped_rank(lab, 0), NAMES),
    "stopped_rank_1": Row(lambda lab: stopped_rank(lab, 1), NAMES),
    "sleeping_rank_0": Row(lambda lab: sleeping_rank(lab, 0), NAMES),
    "sleeping_rank_1": Row(lambda lab: sleeping_rank(lab, 1), NAMES),
    "nan_loss": Row(lambda lab: not_finite(lab, 1, {"kind": "weight", "at": 9}), NAN),
    "nan_gradient": Row(lambda lab: not_finite(lab, 1, {"kind": "gradient", "at": 9}), NAN),
    "nan_gradient_before_saving": Row(lambda lab: not_finite(lab, 1, {"kind": "gradient", "at": 3 * EVERY - 1}), NAN),
    "nan_gradient_in_the_last_step": Row(
        lambda lab: not_finite(lab, 1, {"kind": "gradient", "at": STEPS - 1}, STEPS), NAN
    ),
    "nan_gradient_on_one_rank": Row(lambda lab: not_finite(lab, 2, {"kind": "gradient", "at": 9, "rank": 1}), NAN),
    "absurd_rates": Row(lambda lab: not_finite(lab, 1, embed_lr=1e29, router_lr=1e29), NAN),
    "ranks_differ_in_seed": Row(lambda lab: ranks_differ(lab, "--seed", words=["--seed", "5"]), NOT_BEGUN),
    "ranks_differ_in_rate": Row(lambda lab: ranks_differ(lab, "--muon_lr", words=["--muon_lr", "0.1"]), NOT_BEGUN),
    "ranks_differ_in_profiling": Row(
        lambda lab: ranks_differ(lab, "enable_profiling", words=["--enable_profiling"]), NOT_BEGUN
    ),
    "ranks_differ_in_data": Row(other_data, NOT_BEGUN),
    "ranks_differ_in_code": Row(other_code, NOT_BEGUN),
    "ranks_differ_in_path": Row(other_path, "trains: the same data are the same"),
    "full_disk": Row(lambda lab: full_disk(lab, 1, (-0.2, 0.6, 1.5, 2.5, 2.9)), ROOM),
    "full_disk_two_ranks": Row(lambda lab: full_disk(lab, 2, (1.5, 2.5)), ROOM),
    "read_only": Row(read_only, "one sentence, nothing written"),
    "broken_disk": Row(broken_disk, "one sentence, old checkpoints sound; mended it resumes exactly"),
    "damaged_checkpoint": Row(lambda lab: damaged(lab, CHECKPOINT_DAMAGE, 18), BEFORE),
    "damaged_manifest": Row(lambda lab: damaged(lab, MANIFEST_DAMAGE, 32), BEFORE),
    "lost_rank_file": Row(lost_rank_file, BEFORE),
    "all_checkpoints_damaged": Row(lambda lab: all_damaged(lab, 20), "one sentence that names both; nothing changes"),
    "damaged_headers": Row(lambda lab: damaged_headers(lab, 200), "one sentence, or the right tokens"),
    "damaged_tokens": Row(lambda lab: damaged_tokens(lab, 10), "one sentence, nothing written"),
}


def main():
    parser = argparse.ArgumentParser(
        description="Inject faults into runs of a tiny model and print what came of them.", allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=30, help="kill -9 so many times (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the damage (default 0)")
    parser.add_argument(
        "--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME", help=f"some of: {', '.join(ROWS)}"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that everything is cleaned up
    bad = []
    print("fault | what happened | expected | ok | seconds", flush=True)
    with Lab(args.seed, args.kills) as lab:
        for name in args.only:
            began, details = time.monotonic(), ""
            try:
                happened, ok = ROWS[name].run(lab), "ok"
            except Skipped as error:
                happened, ok = str(error), "skipped"
            except Exception as error:
                kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
                happened, _, details = f"{kind}{error}".partition("\n")
                details, ok = details if kind == "" else traceback.format_exc(), "NOT OK"
                bad.append(name)
            print(f"{name} | {happened} | {ROWS[name].expected} | {ok} | {time.monotonic() - began:.0f}", flush=True)
            if details:
                print("    " + details.rstrip().replace("\n", "\n    "), flush=True)
    print(
        f"{len(args.only) - len(bad)} of {len(args.only)} as expected" + (f"; not ok: {' '.join(bad)}" if bad else "")
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    worker() if "FAULTS" in os.environ else main()
