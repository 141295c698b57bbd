"""Training throughput on this machine's CPU: ours against Hugging Face's Mixtral, a plain nanoGPT, and our dense twin.

    python benchmarks/throughput.py --suite mixtral    # 8 rows of 512, both vocabularies (pip install transformers)
    python benchmarks/throughput.py --suite dense_ratio granularity  # 32 rows of 512
    python benchmarks/throughput.py --shape bytes --contenders moe_adamw nanogpt_bf16 --rounds 2 --steps 1

Every contender lives in a process of its own and waits at a pipe. The parent has one after another run some steps,
round after round, every second round in reverse order, so the machine's drift hits all alike; the bf16 matmul rate
(facts.matmul_rate, the one that MFU is a share of) is measured in the same rounds. A turn's first step is not counted:
it finds the caches, and the memory that it freed last, in other hands. Figures are medians over rounds of a round's
median step; ratios are taken round by round. A step is forward, loss, backward, optimizer step and clearing the
gradients, eager, on random tokens made beforehand. Ours is train_muon.train_step.

  of matmul   active FLOPs of a step / its seconds / the matmul rate. Active FLOPs: 6 per matmul weight that a
              token meets (k of E experts, router and head included, embeddings not) + 12 x keys x channels of causal
              attention
  peak MiB    largest resident size of the process, less its size after the imports
  x floor     the step / the least time that floor.py computes for it on this machine; of ours only

Who the contenders are, and how each is run at its best: contenders.py."""

import argparse
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import facts  # noqa: E402
from benchmarks.contenders import CONTENDERS, CPU, Work  # noqa: E402
from benchmarks.floor import SHAPES, Rates, measure_rates, parts_of, step_floor  # noqa: E402
from cli import Parser, add_flags, command_line, positive  # noqa: E402
from model import DTYPES, Config  # noqa: E402

# -----------------------------------------------------------------------------
# One process per contender


def proc_bytes(path: str, key: str) -> int:
    """A line of /proc in bytes: VmRSS (now), VmHWM (at most so far), MemTotal."""
    return next(1024 * int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(key))


WARMUP = 4  # steps: the first allocates optimizer state, the next ones meet most lengths that a matmul can have


def serve(pipe, name: str, work: Work):
    """In the child: build and warm up; then a number of steps gets their seconds, and 0 the peak memory in bytes and
    the end."""
    try:
        importlib.import_module(CONTENDERS[name].imports)
        most = proc_bytes("/proc/meminfo", "MemTotal") // 2
        resource.setrlimit(
            resource.RLIMIT_AS, (most, most)
        )  # a contender that is too large fails alone, not the machine
        before = proc_bytes("/proc/self/status", "VmRSS")
        step, flops = CONTENDERS[name].build(work)
        for i in range(WARMUP):
            step(i)
        pipe.send(flops)
    except (ImportError, RuntimeError, MemoryError, ValueError) as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    done = WARMUP
    while count := asked(pipe):
        ends = []
        for i in range(
            done, done + count + 1
        ):  # the first finds caches and freed memory as other processes left them: not counted
            step(i)
            ends.append(time.perf_counter())
        done += len(ends)
        pipe.send([end - began for began, end in zip(ends, ends[1:])])
    if count is not None:
        pipe.send(proc_bytes("/proc/self/status", "VmHWM") - before)


def asked(pipe) -> int | None:
    """What the parent wants next; None when it is gone, because another contender failed."""
    try:
        return pipe.recv()
    except EOFError:
        return None


class Runner:
    """The parent's end of a contender. Raises RuntimeError, in one sentence, when it cannot run."""

    def __init__(self, name: str, work: Work):
        self.name, context = name, multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, work), daemon=True)
        self.process.start()
        theirs.close()
        self.flops = self.receive()
        if isinstance(self.flops, str):
            raise RuntimeError(f"{name} does not run: {self.flops}")

    def receive(self):
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"{self.name} does not run: its process ended with status {self.process.exitcode}"
            ) from None

    def ask(self, steps: int):
        self.pipe.send(steps)
        return self.receive()


# -----------------------------------------------------------------------------
# A race of contenders over one shape


class Race(NamedTuple):
    """What was measured, by contender."""

    tokens: int  # per step
    matmul: list[float]  # FLOP/s, of each round
    seconds: dict[str, list[float]]  # the median step of each round
    flops: dict[str, float]  # active, per token
    memory: dict[str, float]  # bytes, at most
    floors: dict[str, float]  # seconds, of ours
    failed: list[str]
    load: float  # of the machine before the race: what others were running

    def step(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Of step times."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[other]))

    def share(self, name: str) -> float:
        """Of the matmul rate."""
        return statistics.median(
            self.tokens * self.flops[name] / s / rate for s, rate in zip(self.seconds[name], self.matmul)
        )

    def fastest(self, start: str) -> str:
        return min((name for name in self.seconds if name.startswith(start)), key=self.step)

    def at_the_floor(self) -> "Race":
        """The same race if ours ran at their floors; memory has none."""
        seconds = {name: [self.floors.get(name, s) for s in values] for name, values in self.seconds.items()}
        return self._replace(seconds=seconds, memory=dict.fromkeys(self.memory, math.nan))


def race(names: list[str], work: Work, rounds: int, steps: int) -> tuple[Race, Rates]:
    """Raises RuntimeError when a contender of ours does not run; of the others it is noted."""
    floored = {
        name: (CONTENDERS[name].shape(work.config), work.tokens, work.seq_len, CONTENDERS[name].optimizer)
        for name in names
        if CONTENDERS[name].shape
    }
    gemms = [gemm for step in floored.values() for part in parts_of(*step) for gemm in part.gemms]
    measure = lambda: measure_rates(DTYPES[work.config.dtype], gemms)
    load, rates = os.getloadavg()[0], measure()
    runners, failed = {}, []
    for name in names:
        try:
            runners[name] = Runner(name, work)
        except RuntimeError as error:
            if name in floored:
                raise
            failed.append(str(error))
    seconds, matmul = {name: [] for name in runners}, []
    for i in range(rounds):
        rates = measure().or_better(rates)  # the floor's rates are the best seen: a busy moment must not raise a floor
        matmul.append(facts.matmul_rate(CPU, work.config.dtype))
        for name in list(runners)[:: (1, -1)[i % 2]]:
            seconds[name].append(statistics.median(runners[name].ask(steps)))
    floors = {name: step_floor(*step, rates) for name, step in floored.items()}
    flops, memory = (
        {name: runner.flops for name, runner in runners.items()},
        {name: runner.ask(0) for name, runner in runners.items()},
    )
    return Race(work.tokens, matmul, seconds, flops, memory, floors, failed, load), rates


def table(race: Race) -> str:
    lines = [
        f"matmul rate {statistics.median(race.matmul) / 1e9:,.0f} GFLOP/s; {race.tokens:,} tokens per step, "
        f"{len(race.matmul)} rounds, "
        f"load average {race.load:.1f} before the first",
        f"{'contender':<21}{'tokens/s':>10}{'ms/step':>10}{'MFLOP/token':>13}"
        f"{'of matmul':>11}{'peak MiB':>10}{'x Mixtral':>11}{'x dense':>9}"
        f"{'x floor':>9}",
    ]
    for name in sorted(race.seconds, key=race.step):
        twin = "dense_muon" if name.endswith("muon") else "dense_adamw"
        mixtral = min((other for other in race.seconds if other.startswith("mixtral_")), key=race.step, default=None)
        speeds = (f"{race.ratio(other, name):.2f}" if other in race.seconds else "-" for other in (mixtral, twin))
        over = f"{race.step(name) / race.floors[name]:.2f}" if name in race.floors else "-"
        lines.append(
            "{:<21}{:>10,.0f}{:>10.1f}{:>13.1f}{:>11.1%}{:>10,.0f}{:>11}{:>9}{:>9}".format(
                name,
                race.tokens / race.step(name),
                1000 * race.step(name),
                race.flops[name] / 1e6,
                race.share(name),
                race.memory[name] / 2**20,
                *speeds,
                over,
            )
        )
    return "\n".join(lines + race.failed)


# -----------------------------------------------------------------------------
# Suites and their targets


class Target(NamedTuple):
    shapes: str  # keys of SHAPES
    what: str
    figure: callable  # of a race; KeyError or ValueError where it lacks a contender
    sense: str  # a key of SENSES
    bounds: tuple = ()  # the target, the stretch; none: only reported


SENSES = {">=": 1, "<=": -1}  # -> the power of a figure that grows with speed


class Suite(NamedTuple):
    rows: int
    contenders: str
    targets: list[Target]


SUITES = {  # all contenders of a suite are in memory at once: about 16 GiB
    "mixtral": Suite(
        8,
        "moe_adamw moe_muon dense_adamw dense_muon mixtral_eager mixtral_batched_mm mixtral_grouped_mm nanogpt_bf16",
        [
            Target(
                "gpt2 bytes",
                "speed over the fastest Mixtral's",
                lambda r: r.ratio(r.fastest("mixtral_"), "moe_adamw"),
                ">=",
                (2, 3),
            ),
            Target("gpt2", "share of the matmul rate", lambda r: r.share("moe_adamw"), ">=", (0.45, 0.6)),
            Target(
                "gpt2",
                "peak memory over that Mixtral's",
                lambda r: r.memory["moe_adamw"] / r.memory[r.fastest("mixtral_")],
                "<=",
                (1 / 3,),
            ),
            Target(
                "gpt2 bytes",
                "dense twin's speed over nanoGPT's",
                lambda r: r.ratio(r.fastest("nanogpt_"), "dense_adamw"),
                ">=",
                (1,),
            ),
        ],
    ),
    "like_for_like": Suite(
        8,
        "moe_adamw dense_adamw autocast_mixtral equal_flops_mixtral nanogpt_autocast",
        [
            Target(
                "gpt2 bytes",
                "speed over Mixtral's with fp32 weights",
                lambda r: r.ratio("autocast_mixtral", "moe_adamw"),
                ">=",
            ),
            Target(
                "gpt2 bytes",
                "speed over Mixtral's at equal FLOPs",
                lambda r: r.ratio("equal_flops_mixtral", "moe_adamw"),
                ">=",
            ),
        ],
    ),
    "dense_ratio": Suite(
        32,
        "moe_adamw dense_adamw moe_muon dense_muon",
        [
            Target(
                "gpt2 bytes", "MoE / dense step, AdamW", lambda r: r.ratio("moe_adamw", "dense_adamw"), "<=", (1.1,)
            ),
            Target("gpt2", "MoE / dense step, Muon", lambda r: r.ratio("moe_muon", "dense_muon"), "<=", (1.1,)),
            Target("bytes", "MoE / dense step, Muon", lambda r: r.ratio("moe_muon", "dense_muon"), "<=", (1.2,)),
        ],
    ),
    "granularity": Suite(
        32,
        "moe_adamw more_adamw finer_adamw",
        [
            Target(
                "gpt2 bytes",
                "64 / 8 experts of one width, AdamW",
                lambda r: r.ratio("more_adamw", "moe_adamw"),
                "<=",
                (1.25,),
            ),
            Target(
                "gpt2 bytes", "64 finer experts, top-16 / 8, AdamW", lambda r: r.ratio("finer_adamw", "moe_adamw"), "<="
            ),
        ],
    ),
    "granularity_muon": Suite(
        32,
        "moe_muon more_muon finer_muon",
        [
            Target("gpt2 bytes", "64 / 8 experts of one width, Muon", lambda r: r.ratio("more_muon", "moe_muon"), "<="),
            Target(
                "gpt2 bytes", "64 finer experts, top-16 / 8, Muon", lambda r: r.ratio("finer_muon", "moe_muon"), "<="
            ),
        ],
    ),
}


def judge(targets: list[Target], shape: str, race: Race) -> list[dict]:
    """One row per bound of each target that this race has the contenders for; `floors`: how many floors the bound
    allows a step to take."""
    rows = []
    for target in (target for target in targets if shape in target.shapes.split()):
        try:
            figure, ideal = target.figure(race), target.figure(race.at_the_floor())
        except (KeyError, ValueError):
            continue
        power = SENSES[target.sense]
        for bound in target.bounds or (math.nan,):
            met = "" if math.isnan(bound) else "met" if figure**power >= bound**power else "missed"
            rows.append(
                dict(
                    what=target.what,
                    sense=target.sense,
                    bound=bound,
                    figure=figure,
                    met=met,
                    ideal=ideal,
                    floors=(ideal / bound) ** power,
                )
            )
    return rows


def judgement(rows: list[dict]) -> str:
    number = lambda x: "-" if math.isnan(x) else f"{x:.3f}"
    lines = [f"{'target':<40}{'bound':>10}{'measured':>10}{'':>8}{'at the floor':>14}{'bound in floors':>17}"] * bool(
        rows
    )
    for r in rows:
        lines.append(
            f"{r['what']:<40}{r['sense'] + ' ' + number(r['bound']):>10}{number(r['figure']):>10}"
            f"{r['met']:>8}{number(r['ideal']):>14}"
            f"{number(r['floors']):>17}"
        )
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags -> their values; `configs`: shape -> its Config with the given fields changed. Raises UserError."""
    parser = Parser(
        prog="throughput.py",
        description="Tokens/s, share of the matmul rate and memory, against Mixtral, nanoGPT and the dense twin.",
    )
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), default=["mixtral"])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["gpt2", "bytes"])
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=list(CONTENDERS),
        metavar="NAME",
        help=f"instead of the suite's: {', '.join(CONTENDERS)}",
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=2, help="of each contender in a round")
    parser.add_argument("--seq_len", "--seq-len", type=positive, default=512)
    parser.add_argument("--rows", type=positive, help="of each step; default: the suite's")
    parser.add_argument(
        "--micro_batch_tokens",
        "--micro-batch-tokens",
        type=positive,
        help="of one forward pass of ours; default: all of a step",
    )
    parser.add_argument("--json", type=Path, help="write everything measured there")
    add_flags(parser, Config)
    args = parser.parse_args(argv)
    given = {"window_size": args.seq_len} | {
        field.name: getattr(args, field.name) for field in dataclasses.fields(Config) if field.name in args
    }
    args.configs = {shape: dataclasses.replace(SHAPES[shape], **given) for shape in args.shape}
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"argument --json: there is no folder {args.json.absolute().parent}")
    return args


@command_line("throughput.py", RuntimeError)
def main():
    args, written = parse(), []
    for name, (shape, config) in ((name, item) for name in args.suite for item in args.configs.items()):
        suite = SUITES[name]
        tokens = (args.rows or suite.rows) * args.seq_len
        work = Work(config, tokens, args.seq_len, args.micro_batch_tokens or tokens)
        measured, rates = race(args.contenders or suite.contenders.split(), work, args.rounds, args.steps)
        rows = judge(suite.targets, shape, measured)
        print(
            f"\n{name}, {shape}: vocabulary {config.vocab_size}\n{table(measured)}\n\n{judgement(rows)}", flush=True
        )
        written.append(
            dict(
                suite=name,
                shape=shape,
                config=dataclasses.asdict(config),
                race=measured._asdict(),
                targets=rows,
                torch=torch.__version__,
                threads=torch.get_num_threads(),
                best_matmul=rates.matmul,
            )
        )
    if args.json:
        args.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
