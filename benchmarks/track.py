"""Runs that count: short ones to try an idea, full ones for a record, by the rules in records/README.md.

    python benchmarks/track.py short --name dense --seeds 0 1 2 3 -- train_muon.py --pattern D
    python benchmarks/track.py short --name prior --seeds 0 1 2 3 -- my_router.py --router prior
    python benchmarks/track.py compare dense prior
    python benchmarks/track.py curve dense prior
    python benchmarks/track.py short --record --row "MoE Muon" --name "MoE, E=8" --seeds 0 1 -- train_muon.py
    python benchmarks/track.py full --folder records/cpu/2026-11-26_MoE --steps 900 --seeds 0 1 2 3 -- train_muon.py
    python benchmarks/track.py ablate --plan records/cpu/ablations.json --seeds 0 1

short    measures the time of a step with exactly these flags, and takes as many steps as fit into the track's seconds.
         A line with the results goes to logs/short_<track>.jsonl, another --results, or with --record the track's own.
compare  differences seed by seed, as a seed fixes the order of the data; without names, the names that there are.
curve    the same for every length of training (--seconds) that two names have in common, and a picture of it.
full     runs the seeds, re-times row 1 and this row in turns, and writes a record's folder.
ablate   times every change of a plan in turns with its base, and runs each for as many steps as fit into equal seconds.

full and ablate continue where they were cut off. After -- comes any script that ends in train_muon.main(...), and its
flags. Every run is a process of its own, and its last evaluation is its only one. Paths are relative to the root of the
repository."""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import logger  # noqa: E402
import model  # noqa: E402
import settings  # noqa: E402
import train_muon  # noqa: E402
from cli import Parser, UserError, command_line, given_flags, positive, seed_number, whole_number  # noqa: E402
from distributed import World  # noqa: E402
from terminal import say  # noqa: E402
from tools import plots, records, sources  # noqa: E402

OURS = """data device num_iterations val_every val_tokens sample_tokens checkpoint_every routes_tokens out_dir
          experiment_name seed resume enable_profiling plan objective""".split()  # flags that are the track's
LOGS = ROOT / "logs"
TIMED_STEPS = 20  # that a measurement counts, after as many in which experts meet new row counts, and before as many

# ---------------------------------------------------------------------------------------------------------------------
# One run


class FoundMain(BaseException):
    """Ends a script at its call of train_muon.main."""


def find_recipe(script: str, flags: list[str]) -> tuple:
    """The recipe that a script passes to train_muon.main, and its configurations of the model and the run.

    The script runs up to that call, which is left out. Raises UserError if there is no such script or no such call."""
    if script == train_muon.MUON.script:
        return train_muon.MUON, *train_muon.parse(train_muon.MUON, flags)[:2]
    path = ROOT / script
    calls = r"train_muon\.main\(|from train_muon import .*\bmain\b"
    if path.suffix != ".py" or not path.is_file() or not re.search(calls, path.read_text()):
        raise UserError(f"{script} is not a training script below {ROOT}: one that ends in train_muon.main(...)")
    found = []

    def main(recipe: train_muon.Recipe, argv: list[str] | None = None):
        found.append((recipe, *train_muon.parse(recipe, argv)[:2]))  # here, while the script is __main__
        raise FoundMain

    real, argv, paths = train_muon.main, sys.argv, sys.path
    train_muon.main, sys.argv, sys.path = main, [str(path), *flags], [str(path.parent), *sys.path]
    try:
        with contextlib.suppress(FoundMain):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        train_muon.main, sys.argv, sys.path = real, argv, paths
    if not found:
        raise UserError(f"{script} ended before it called train_muon.main(...)")
    return found[0]


class Row:
    """A script and its flags, checked against the track before anything runs.

    Raises UserError for a flag that is the track's to set. What counts for a record must also have the data, the GPU
    and the torch of the track."""

    def __init__(self, track: dict, command: list[str], folder: Path | None = None, is_record: bool = True):
        (script, *flags), folder = command, folder or Path(track["data"])
        for flag in sorted(given_flags(flags) & set(OURS)):
            raise UserError(f"--{flag} is set by the track; after -- leave it out")
        self.track, self.script, self.flags = track, script, [f"--preset={track['preset']}", f"--data={folder}", *flags]
        self.recipe, self.config, self.hp = find_recipe(script, self.flags)
        if is_record:
            check_gpu(track)
        corpus = pinned_corpus(track, ROOT / folder) if is_record else any_corpus(ROOT / folder)
        self.val_tokens, there = track["val_tokens"], corpus.pop("val_tokens", track["val_tokens"])
        if there < self.val_tokens:
            say(f"note: {folder} has {there:,} validation tokens, fewer than the track's {self.val_tokens:,}")
            self.val_tokens = 0  # all
        if self.val_tokens % self.hp.seq_len:
            legal = f"divide the track's {track['val_tokens']} validation tokens"
            raise UserError(f"seq_len is {self.hp.seq_len}; it must {legal}")
        files = sorted({*ROOT.glob("*.py"), ROOT / script})
        source = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        self.facts = {"script": script, "flags": flags, "source_sha256": source} | corpus
        settings = dataclasses.asdict(self.config) | dataclasses.asdict(self.hp)
        text = json.dumps({name: value for name, value in settings.items() if name not in OURS}, sort_keys=True)
        self.settings = hashlib.sha256(text.encode()).hexdigest()  # of presets too, which change

    def run(self, out: Path, name: str, **settings) -> list[dict]:
        """The rows of metrics.jsonl of one run, which writes to out/name. Raises UserError if it fails."""
        settings = dict(device=self.track["device"], val_every=0, sample_tokens=0, checkpoint_every=0, out_dir=out,
                        experiment_name=name) | settings  # fmt: skip
        status = launch([self.script, *self.flags, *as_flags(settings)], self.track.get("threads"))
        if status:
            raise UserError(f"{self.script} ended with status {status}; its error is above")
        shutil.rmtree(out / name / "checkpoint")  # 4 GB with large tables, for each run in the same folder
        return logger.read_run(out / name)["rows"]

    def step_ms(self, out: Path, name: str) -> float:
        """The median milliseconds of a step in the middle of a short run, where every schedule is half way."""
        rows = self.run(out, name, num_iterations=3 * TIMED_STEPS, val_tokens=self.hp.seq_len)
        times = [row["train_time"] for row in rows if "train/loss" in row][TIMED_STEPS : 2 * TIMED_STEPS + 1]
        return 1000 * statistics.median(after - before for before, after in zip(times, times[1:]))

    def result(self, out: Path, seed: int, steps: int) -> dict:
        """The row with the final evaluation of one seed's run, in out/seed<N>."""
        rows = self.run(out, f"seed{seed}", seed=seed, num_iterations=steps, val_tokens=self.val_tokens)
        row, metric = logger.get_final_row(rows, self.track["metric"]), self.track["metric"]
        print(f"seed {seed}: {metric} {row[metric]:.4f} after {steps} steps, {row['train_time']:.1f} s", flush=True)
        return row


def launch(words: list[str], threads: int | None) -> int:
    """Exit status of a training script; its progress and errors go to stderr. threads None: torch's choice."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # for scripts in other folders
    env = os.environ | {"PYTHONPATH": paths} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.DEVNULL).returncode


def as_flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def check_gpu(track: dict):
    """Raises UserError unless this machine has the GPU that the track names, if it names one."""
    wanted, here = track.get("gpu"), torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if wanted not in (None, here):
        raise UserError(f"this track's clock is that of one {wanted}; the GPU here is {here}: choose another --track")


def pinned_corpus(track: dict, folder: Path) -> dict:
    """torch's version and the sha256 of the corpus. Raises UserError unless the folder holds the pinned corpus."""
    version, pins = sources.torch_version(), track["corpus_sha256"]
    pinned = records.find_pinned_corpus(track, version)
    if pinned is None:
        mend = f"run `pip install torch=={list(pins)[-1]}`, or leave out --record"
        raise UserError(f"torch {version} is not pinned for this track ({', '.join(pins)}); {mend}")
    meta = data.load_meta(folder)
    corpus = meta.get("corpus_sha256") or shards_sha256(meta)
    wanted = {"source": track["source"], "encoding": track["encoding"], "max_tokens": None, "split_seed": 0}
    if corpus != pinned or any(meta["request"].get(name) != value for name, value in wanted.items()):
        download = f"{track['download']} && " if "download" in track else ""
        commands = f"{download}{track['prepare']} --out {folder}"
        mend = f"remove it and run `{commands}`; other text serves runs without --record"
        raise UserError(f"{folder} does not hold the corpus pinned for torch {version}, whole; {mend}")
    return {"torch": version, "corpus_sha256": corpus}


def any_corpus(folder: Path) -> dict:
    """torch's version, the sha256 of the corpus and its validation tokens, of any shards."""
    meta = data.load_meta(folder)
    val_tokens = sum(len(tokens) for _, tokens in data.open_split(folder, "val"))
    corpus = meta.get("corpus_sha256") or (shards_sha256(meta) if meta["shards"] else None)
    return {"torch": sources.torch_version(), "corpus_sha256": corpus, "val_tokens": val_tokens}


def shards_sha256(meta: dict) -> str:
    """One sha256 for the shards of a folder, from those that its meta.json lists."""
    return hashlib.sha256("".join(shard["sha256"] for shard in meta["shards"]).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Files of results

KEYS = ("name", "seeds")  # of every line


def results_file(args) -> Path:
    """The file of short's lines: the track's own with --record, else --results, else one in logs/."""
    if args.record:
        return ROOT / args.track / "tuning.jsonl"
    return ROOT / args.results if args.results else LOGS / f"short_{Path(args.track).name}.jsonl"


def read_results(args) -> list[dict]:
    """The lines that compare and curve read: the file of results, then the track's own where a name is not in it."""
    mine, listed = (read_tuning(file, *KEYS) for file in (results_file(args), ROOT / args.track / "tuning.jsonl"))
    names = {line["name"] for line in mine}
    return mine if args.record or args.results else mine + [line for line in listed if line["name"] not in names]


def shown(path: Path) -> Path:
    """A path as commands take it: relative to the root of the repository where it is below."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def read_tuning(log: Path, *keys: str) -> list[dict]:
    """The lines of a file of results, [] if there is none. Raises UserError for a line that lacks one of the keys."""
    lines = logger.read_rows(log, numeric=()) if log.exists() else []
    for number, line in enumerate(lines, 1):
        if missing := [key for key in keys if key not in line]:
            raise UserError(f"{log} line {number} is no result, as it lacks {missing[0]!r}; remove it")
    return lines


def append_line(log: Path, name: str, row: Row, steps: int, seeds: list[int], results: list[dict],
                row_name: str | None, step_ms: float | None, budget: float | None = None):  # fmt: skip
    """The results of some seeds of one run. A seed beyond the results failed. budget: seconds that steps fill."""
    line = {"date": today(), "name": name, "row": row_name, "commit": logger.find_commit(ROOT), **row.facts,
            "settings": row.settings, "threads": row.track.get("threads"), "steps": steps, "step_ms": step_ms,
            "budget": budget, "seeds": seeds}  # fmt: skip
    metric = row.track["metric"]
    for key, source in ((metric, metric), ("seconds", "train_time"), ("flops", "train/flops")):
        line[key] = [result[source] for result in results] + [None] * (len(seeds) - len(results))
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")


def today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def by_seed(lines: list[dict], metric: str) -> dict[int, float]:
    """seed -> result of some lines, without runs that failed."""
    return {seed: value for line in lines for seed, value in zip(line["seeds"], line[metric]) if value is not None}


def base_and_length(line: dict) -> tuple[str, float | None]:
    """The name of a line without its length, and the length: seconds at the end of the name, else the budget."""
    match = re.fullmatch(r"(.*), (\d+) s", line["name"])
    return (match[1], float(match[2])) if match else (line["name"], line.get("budget"))


def lines_by_length(lines: list[dict], name: str) -> dict[float | None, list[dict]]:
    """Seconds -> lines, of a name with or without its length. Raises UserError, with the nearest names, if none."""
    exact = [line for line in lines if line["name"] == name]
    base = base_and_length(exact[0])[0] if exact else name
    found = {}
    for line in lines:
        line_base, length = base_and_length(line)
        if line_base == base:
            found.setdefault(length, []).append(line)
    if not found:
        names = list(dict.fromkeys(line["name"] for line in lines))
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
        nearest = f"the nearest: {' '.join(map(shlex.quote, near))}" if near else "there are none: make them with short"
        raise UserError(f"no runs are named {shlex.quote(name)}; {nearest}")
    return found


def check_same_text(a: list[dict], b: list[dict]):
    """Raises UserError where results are of different texts."""
    texts = {line.get("corpus_sha256") for line in a + b if line.get("torch") == a[0].get("torch")}
    if len(texts) > 1:
        raise UserError(f"{a[0]['name']!r} and {b[0]['name']!r} were run on different --data; run one of them again")


# ---------------------------------------------------------------------------------------------------------------------
# short


def short(args):
    track, log = logger.read_json(ROOT / args.track / "track.json"), results_file(args)
    track["threads"] = args.threads or track.get("threads")
    if args.row and not args.record:
        raise UserError("--row names a row of the record's budget; it needs --record")
    row, lines = Row(track, args.command, args.data, args.record), read_tuning(log, *KEYS)
    check_budget(args, track, lines)
    earlier = [line for line in lines if line["name"] == args.name]
    step_ms, steps = None, args.steps or next((line["steps"] for line in earlier), None)
    budget = None if args.steps else args.seconds or track["seconds"]["short"]
    for line in earlier:  # more seeds of the same
        check_same_run(line, row, steps, args, log)
        budget = line.get("budget")
    with tempfile.TemporaryDirectory() as folder:
        if steps is None:
            say(f"timing {3 * TIMED_STEPS} steps")
            step_ms = row.step_ms(Path(folder), "calibration")
            steps = max(1, int(1000 * budget / step_ms))
            print(f"{step_ms:.1f} ms per step: {steps} steps", flush=True)
        results, failure = [], None
        for seed in args.seeds:
            try:
                results.append(row.result(Path(folder), seed, steps))
                ms = 1000 * results[-1]["train_time"] / steps
                if step_ms and not 0.9 < ms / step_ms < 1.1:
                    print(f"note: {ms:.1f} ms per step now, {step_ms:.1f} in the calibration: the machine was busy "
                          "with something else", flush=True)  # fmt: skip
            except UserError as error:  # a loss that is not finite is a result too
                failure = error
                break
    done = args.seeds[: len(results) + bool(failure)]
    append_line(log, args.name, row, steps, done, results, args.row, step_ms, budget)
    print(f"{shown(log)}: {shlex.quote(args.name)}")
    if failure:
        raise failure


def check_budget(args, track: dict, lines: list[dict]):
    """Raises UserError if a row would have more short runs than the rules allow."""
    count = sum(len(line["seeds"]) for line in lines if args.row and line["row"] == args.row) + len(args.seeds)
    if args.row and count > track["tuning_runs"]:
        raise UserError(f"row {args.row!r} would have had {count} short runs; every row has {track['tuning_runs']}")


def check_same_run(line: dict, row: Row, steps: int, args, log: Path):
    """Raises UserError where more seeds of a name would be of another run."""
    same = (line["script"], line["flags"], line["steps"]) == (row.script, row.facts["flags"], steps)
    same_budget = args.seconds is None or line.get("budget") in (None, args.seconds)
    if not same or not same_budget or set(line["seeds"]) & set(args.seeds):
        where = f"{args.name!r} is in {shown(log)} with other flags, or with one of these seeds"
        raise UserError(f"{where}; choose another --name")
    if line["corpus_sha256"] != row.facts["corpus_sha256"]:
        raise UserError(f"{args.name!r} is in {shown(log)} with other --data; choose another --name")
    check_settings(line, row)


def check_settings(line: dict, row: Row):
    """Raises UserError where seeds of one name would be of two settings."""
    if line.get("settings") != row.settings:
        then = f"the presets of commit {line['commit'][:7]}, which have changed since or were not noted"
        raise UserError(f"{line['name']!r} was run with {then}; choose another name")


# ---------------------------------------------------------------------------------------------------------------------
# compare, curve


def compare(args):
    """Print a - b for each seed that both have, their mean, standard error and p, and a picture of the seeds."""
    metric, lines = logger.read_json(ROOT / args.track / "track.json")["metric"], read_results(args)
    if not args.names:
        for name in dict.fromkeys(line["name"] for line in lines):
            count = len(by_seed([line for line in lines if line["name"] == name], metric))
            print(f"{shlex.quote(name)}  # {count} seed{'s' * (count != 1)}")
        return
    a, b = (choose_lines(lines, name) for name in args.names)
    if not a or not b:  # names without their length
        a, b = longest_in_common(lines, args.names)
    check_same_text(a, b)
    lengths = [base_and_length(lines[0])[1] for lines in (a, b)]
    if None not in lengths and lengths[0] != lengths[1]:
        say(f"note: {a[0]['name']!r} had {lengths[0]:g} s, {b[0]['name']!r} {lengths[1]:g} s")
    a_by_seed, b_by_seed = by_seed(a, metric), by_seed(b, metric)
    both = sorted(a_by_seed.keys() & b_by_seed.keys())
    if not both:
        raise UserError(f"{a[0]['name']!r} and {b[0]['name']!r} share no seed; run short with the same --seeds")
    for seed in both:
        print(f"seed {seed}: {a_by_seed[seed]:.4f} - {b_by_seed[seed]:.4f} = {a_by_seed[seed] - b_by_seed[seed]:+.4f}")
    print(seed_picture({a[0]["name"]: a_by_seed, b[0]["name"]: b_by_seed}))
    print(difference(a_by_seed, b_by_seed))


def choose_lines(lines: list[dict], name: str) -> list[dict]:
    return [line for line in lines if line["name"] == name]


def longest_in_common(lines: list[dict], names: list[str]) -> list[list[dict]]:
    """The lines of two names at the greatest length that both have. Raises UserError if there is none."""
    a, b = (lines_by_length(lines, name) for name in names)
    lengths = sorted(a.keys() & b.keys(), key=lambda length: length or 0)
    if not lengths:
        raise UserError(f"{names[0]!r} and {names[1]!r} have no length of training in common; run short again")
    return [a[lengths[-1]], b[lengths[-1]]]


def paired(a: dict[int, float], b: dict[int, float]) -> tuple[float, float, int]:
    """The mean of a - b over the seeds that both have, its standard error, and their number."""
    differences = [a[seed] - b[seed] for seed in a.keys() & b.keys()]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
    return statistics.mean(differences), error, len(differences)


def two_sided_p(mean: float, error: float, n: int) -> float:
    """p-value of a paired t-test: probability of a mean this far from 0 if the true one is 0; nan for one seed."""
    if n < 2:
        return math.nan
    t = abs(mean) / error if error else math.inf * abs(mean) if mean else 0.0
    return 2 * (1 - records.student_t_cdf(t, n - 1))


def difference(a: dict[int, float], b: dict[int, float]) -> str:
    mean, error, n = paired(a, b)
    p = f"p = {two_sided_p(mean, error, n):.2g}" if n > 1 else "no p from one seed"
    return f"mean {mean:+.4f}, standard error {error:.4f}, n = {n}, {p}"


def seed_picture(results: dict[str, dict[int, float]], width: int = 60) -> str:
    """One line per name: each seed's number at the place of its result, | at the mean, and the ends of the scale."""
    values = [value for seeds in results.values() for value in seeds.values()]
    low, high = min(values), max(values)
    place = lambda value: round((width - 1) * (value - low) / (high - low)) if high > low else 0
    margin = max(map(len, results)) + 2
    rows = []
    for name, seeds in results.items():
        marks = [" "] * width
        marks[place(statistics.mean(seeds.values()))] = "|"
        for seed, value in seeds.items():
            marks[place(value)] = str(seed % 10) if marks[place(value)] in " |" else "*"
        rows.append(f"{name:{margin}}{''.join(marks)}".rstrip())
    return "\n".join([*rows, f"{'':{margin}}{low:<{width // 2}.4f}{high:>{width - width // 2}.4f}"])


def curve(args):
    """Print and draw the results of two names after every length of training that both have runs of."""
    folder, metric = ROOT / args.track, logger.read_json(ROOT / args.track / "track.json")["metric"]
    lines = read_results(args)
    by_length = {}
    for name in args.names:
        lengths = lines_by_length(lines, name)
        base, _ = base_and_length(next(iter(lengths.values()))[0])
        by_length[base] = {seconds: some for seconds, some in lengths.items() if seconds is not None}
    ends = {name: {seconds: by_seed(some, metric) for seconds, some in lengths.items()}
            for name, lengths in by_length.items()}  # fmt: skip
    if len(ends) < 2:
        raise UserError(f"{args.names[0]!r} and {args.names[1]!r} are one name; a curve needs two")
    a, b = ends.values()
    both = [seconds for seconds in sorted(a.keys() & b.keys()) if a[seconds].keys() & b[seconds].keys()]
    if not both:
        wanted = " and ".join(map(repr, ends))
        raise UserError(f"{wanted} have no length of training and seed in common; run short with the same --seconds")
    for seconds in both:
        check_same_text(*(lengths[seconds] for lengths in by_length.values()))
        print(f"{seconds:g} s: {' - '.join(ends)}: {difference(a[seconds], b[seconds])}")
    picture = folder / "curve.png" if args.record else results_file(args).with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with plots.open_figure(picture) as figure:
        figure.set_size_inches(8, 4.5)
        ax = figure.subplots()
        for (name, runs), colour in zip(ends.items(), plots.COLOURS):
            values = [list(runs[seconds].values()) for seconds in both]
            ax.plot(both, list(map(statistics.mean, values)), color=colour, label=plots.plain(name))
            for seconds, points in zip(both, values):
                ax.plot([seconds] * len(points), points, "o", color=colour)
        labels = [f"{seconds:g}" for seconds in both]
        ax.set(xscale="log", xticks=both, xticklabels=labels, xlabel="seconds of training, each a run of its own",
               ylabel=metric)  # fmt: skip
        ax.minorticks_off()
        ax.legend()
    print(shown(picture))


# ---------------------------------------------------------------------------------------------------------------------
# ablate

PAIRS = 24  # of steps by which a change is timed against its base


class Stepper:
    """A row's model and optimizers in this process, in the middle of its schedules, to time one step at a time."""

    def __init__(self, row: Row):
        world, recipe, self.number = World(0, 1, torch.device(row.track["device"])), row.recipe, 2 * PAIRS
        given = argparse.Namespace(**dict.fromkeys(given_flags(row.flags)))
        config, hp = settings.resolve(row.config, row.hp, recipe, given, world.device)  # the vocabulary of the data
        hp = dataclasses.replace(hp, num_iterations=4 * PAIRS)
        net, timer = model.build(config).to(world.device).train(), logger.PhaseTimer(world.device.type)
        exchange = train_muon.Exchange(net, world, hp.bucket_mb)
        exchange.attach_optimizers(recipe, hp)
        self.session = train_muon.Session(recipe, hp, net, exchange, timer)
        micro_rows = settings.micro_batch_rows(hp.batch_rows, hp, world)
        self.loader = recipe.open_loader(config, hp, world, micro_rows)

    def milliseconds(self) -> float:
        began = time.perf_counter()
        train_muon.train_step(self.session, self.loader.next_step, self.number)
        self.number += 1
        return 1000 * (time.perf_counter() - began)


def pace(change: Row, base: Row) -> dict:
    """Median milliseconds of the base's steps, and of the change's over the base's, step by step in turns.

    The first third is not counted."""
    steppers = [Stepper(row) for row in (change, base)]
    pairs = []
    for i in range(PAIRS):
        order = (-1) ** i
        pairs.append([stepper.milliseconds() for stepper in steppers[::order]][::order])
    for stepper in steppers:
        stepper.loader.close()
    counted = pairs[PAIRS // 3 :]
    ratio = statistics.median(change_ms / base_ms for change_ms, base_ms in counted)
    return {"base_ms": statistics.median(ms for _, ms in counted), "ratio": ratio}


def ablate(args):
    """A plan is {"name": ..., "groups": [{"title": ..., "base": [script, *flags], "changes": {label: flags}}]}."""
    plan, log = logger.read_json(ROOT / args.plan), (ROOT / args.plan).parent / "tuning.jsonl"
    track = logger.read_json(log.parent / "track.json")
    timing_file = (ROOT / args.plan).with_suffix(".timing.json")
    timing = logger.read_json(timing_file) if timing_file.exists() else {}
    commands, lines = ablation_commands(plan), read_tuning(log, *KEYS)
    is_done = lambda name: all(any(seed in line["seeds"] for line in choose_lines(lines, name)) for seed in args.seeds)
    missing = [name for name in commands if not is_done(name) or name not in timing and name != base_of(name)]
    needed = {*missing, *map(base_of, missing)}
    rows = {name: Row(track, command, args.data) for name, command in commands.items() if name in needed}
    if track.get("threads"):
        torch.set_num_threads(track["threads"])
    for name in (name for name in missing if name not in timing and name != base_of(name)):
        timing[name] = pace(rows[name], rows[base_of(name)])
        write_json(timing_file, timing)
        ratio, base_ms = timing[name]["ratio"], timing[name]["base_ms"]
        print(f"{name}: {ratio:.3f} of its base's {base_ms:.1f} ms per step", flush=True)
    track["threads"] = args.threads or track.get("threads")
    for seed in args.seeds:
        for name in missing:
            row, lines = rows[name], choose_lines(read_tuning(log, *KEYS), name)
            steps = ablation_steps(track, timing, name)
            if any((line["flags"], line["steps"]) != (row.facts["flags"], steps) for line in lines):
                where = f"{name!r} is in {log} with other flags or steps than the plan's"
                raise UserError(f"{where}; choose another name for the plan")
            if any(seed in line["seeds"] for line in lines):
                continue
            for line in lines:
                check_settings(line, row)
            with tempfile.TemporaryDirectory() as folder:
                print(name, flush=True)
                try:
                    results = [row.result(Path(folder), seed, steps)]
                except UserError as error:  # a loss that is not finite is a result too
                    results = []
                    say(f"{name}, seed {seed}: {error}")
                append_line(log, name, row, steps, [seed], results, None, None)
    print(ablation_table(plan, track, timing, read_tuning(log, *KEYS)))


def ablation_commands(plan: dict) -> dict[str, list[str]]:
    """Name in tuning.jsonl -> script and flags; a change is called like its base, and on after a colon."""
    commands = {}
    for group in plan["groups"]:
        base = f"{plan['name']}, {group['title']}"
        commands[base] = group["base"]
        commands |= {f"{base}: {label}": group["base"] + flags for label, flags in group["changes"].items()}
    return commands


def base_of(name: str) -> str:
    """A base is its own."""
    return name.rpartition(": ")[0] or name


def ablation_steps(track: dict, timing: dict, name: str) -> int:
    """As many as fit into the track's short time at the median pace of the base, less what the change costs."""
    base_ms = statistics.median(timed["base_ms"] for other, timed in timing.items() if base_of(other) == base_of(name))
    return int(1000 * track["seconds"]["short"] / (base_ms * timing.get(name, {"ratio": 1})["ratio"]))


def ablation_table(plan: dict, track: dict, timing: dict, lines: list[dict]) -> str:
    """Markdown: time per step over the base's, steps, result, and the paired difference from the base."""
    ends = {name: by_seed(choose_lines(lines, name), track["metric"]) for name in ablation_commands(plan)}
    rows = []
    for group in plan["groups"]:
        base = f"{plan['name']}, {group['title']}"
        rows += ["", f"**{group['title']}**: `{' '.join(group['base'])}`", "",
                 "| change | flags | step / base's | steps | bits per byte | base − change | n |",
                 "|---|---|---|---|---|---|---|"]  # fmt: skip
        for label, flags in {"(base)": [], **group["changes"]}.items():
            name = f"{base}: {label}" if flags else base
            if not ends[name]:
                continue
            gain = "{:+.4f} ± {:.4f}".format(*paired(ends[base], ends[name])) if flags else ""
            cells = [label, f"`{' '.join(flags)}`" if flags else "", f"{timing[name]['ratio']:.3f}" if flags else "1",
                     ablation_steps(track, timing, name), f"{statistics.mean(ends[name].values()):.4f}", gain,
                     len(ends[name])]  # fmt: skip
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows).strip()


# ---------------------------------------------------------------------------------------------------------------------
# full


def full(args):
    folder = ROOT / args.folder
    partial, track_file = folder.with_name(folder.name + ".partial"), folder.parent / "track.json"
    track = logger.read_json(track_file)
    if not re.fullmatch(r"\d{4}-\d\d-\d\d_\w+", folder.name):
        raise UserError(f"{folder.name} does not name a record; call it YYYY-MM-DD_Name")
    if folder.exists():
        raise UserError(f"{folder} already holds a record; choose another --folder")
    if sorted(args.seeds) != list(range(len(args.seeds))) or len(args.seeds) < track["seeds"]:
        legal = f"a record has the seeds 0 to n - 1, and n is at least {track['seeds']}"
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: {legal}")
    row = Row(track, args.command, args.data)
    facts = row.facts | {"steps": args.steps}
    partial.mkdir(exist_ok=True)
    config_file = partial / "config.json"
    begun = logger.read_json(config_file) if config_file.exists() else None
    same_facts = begun and begun["track"] | {"source_sha256": facts["source_sha256"]} == facts
    if begun and not (same_facts and sources_are_those_of(partial)):
        raise UserError(f"{partial} was begun with other flags, sources or torch; go on as it was begun, or remove it")
    for seed in args.seeds:
        if (partial / f"seed{seed}.jsonl").exists():
            print(f"seed {seed} is there")
            continue
        with tempfile.TemporaryDirectory() as out:
            row.result(Path(out), seed, args.steps)
            keep(Path(out) / f"seed{seed}", partial, seed, facts)
    timing_file = partial / "timing.json"
    if track["row_1"] and not timing_file.exists():
        config_1 = logger.read_json(folder.parent / track["row_1"] / "config.json")
        write_json(timing_file, retime(track, row, config_1, args.rounds))
    command = ["python", "benchmarks/track.py", "full", "--folder", f"records/{folder.parent.name}/{folder.name}",
               "--steps", str(args.steps), "--seeds", *map(str, args.seeds), "--", *args.command]  # fmt: skip
    question = "What changed against the row before, and why it helps:"
    text = f"# {folder.name}\n\n{question}\n\n```bash\n{shlex.join(command)}\n```\n"
    (partial / "README.md").write_text(text)
    values = records.read_record(partial, track)["values"]
    os.replace(partial, folder)
    if not track["row_1"]:
        target = round(statistics.mean(values) + track["margin"], 4)
        write_json(track_file, track | {"row_1": folder.name, "target": target})
    print(f"{folder}: mean {statistics.mean(values):.4f} over {len(values)} seeds; write its README.md, then "
          "`python logger.py --records`")  # fmt: skip


def sources_are_those_of(partial: Path) -> bool:
    """Whether the files in the repository's root are those in the logs of the finished seeds."""
    logged = [source for log in partial.glob("seed*.log") for source in records.logged_sources(log)]
    return all((ROOT / name).read_text().rstrip("\n") + "\n" == text for name, text in logged if (ROOT / name).exists())


def keep(run: Path, partial: Path, seed: int, facts: dict):
    """Takes over what a seed's run left; its metrics come last and whole, as they say that the seed is done.

    source_sha256 becomes that of the sources in the log, so that a reader of the record can check it."""
    config = logger.read_json(run / "config.json")
    for name in ("experiment_name", "matmul_flops_per_second"):
        del config[name]
    for name in ("seed", "data", "out_dir"):
        del config["hyperparameters"][name]
    facts = facts | {"source_sha256": records.logged_sources_sha256(run / "run.log")}
    write_json(partial / "config.json", {"track": facts} | config)
    shutil.copy(run / "run.log", partial / f"seed{seed}.log")
    shutil.copy(run / "metrics.jsonl", partial / f"seed{seed}.jsonl.tmp")
    os.replace(partial / f"seed{seed}.jsonl.tmp", partial / f"seed{seed}.jsonl")


def write_json(path: Path, value: dict):
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=2) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def retime(track: dict, row: Row, config_1: dict, rounds: int) -> dict:
    """Milliseconds per step of this row and of row 1, with the present code: short runs in turns.

    Every second round has the other order, so that a change in the machine's speed meets both. A field that is younger
    than row 1 has its default there."""
    script, recorded = config_1["track"]["script"], config_1["model"] | config_1["hyperparameters"]
    recipe, _, _ = find_recipe(script, [])
    fields = [*dataclasses.fields(recipe.model_config), *dataclasses.fields(recipe.train_config)]
    fields = [field for field in fields if field.name not in OURS]
    settings = {field.name: recorded.get(field.name, field.default) for field in fields}
    rows, ms = {"row": row, "row_1": Row(track, [script, *as_flags(settings)], row.hp.data)}, {"row": [], "row_1": []}
    with tempfile.TemporaryDirectory() as out:
        for i in range(rounds):
            for name in list(rows)[:: (-1) ** i]:
                ms[name].append(rows[name].step_ms(Path(out), f"{name}_{i}"))
            print(f"round {i}: {ms['row'][-1]:.1f} ms per step, row 1 {ms['row_1'][-1]:.1f} ms", flush=True)
    medians = {name: statistics.median(values) for name, values in ms.items()}
    return medians | {"rounds": list(zip(ms["row"], ms["row_1"])), "steps_per_round": TIMED_STEPS, "date": today(),
                      "commit": logger.find_commit(ROOT)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def at_least_two(text: str) -> int:
    """Rounds: one alone has no spread."""
    return whole_number(text, 2)


def parse(argv: list[str]):
    """argv up to `--` as flags of ours; what follows, a script and its flags, as `command`."""
    ours, theirs = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    calls, about = __doc__.split("\n\n")[1:3]
    parser = Parser(prog="track.py", description=about, examples=tuple(map(str.strip, calls.splitlines())))
    actions = parser.add_subparsers(dest="action", required=True)
    add = {function: actions.add_parser(function.__name__) for function in (short, full, compare, curve, ablate)}
    for function in (short, compare, curve):
        flag = add[function].add_argument
        flag("--track", type=Path, default="records/cpu", help="the folder with its track.json")
        flag("--results", type=Path, metavar="FILE", help="lines of short runs (default logs/short_<track>.jsonl)")
        flag("--record", action="store_true", help="the track's own tuning.jsonl instead, which a record is judged by")
    for function in (short, full, ablate):
        flag = add[function].add_argument
        flag("--seeds", type=seed_number, nargs="+", required=True, help="each is a run")
        flag("--data", type=Path, help="the folder of shards (default: that of track.json); your own text in short")
    flag = add[short].add_argument
    flag("--name", required=True, help="of the line of results, for compare and curve")
    flag("--row", help="with --record: the row of the table whose tuning budget these runs use up")
    flag("--steps", type=positive, help="instead of as many as fit")
    flag("--seconds", type=float, help="instead of the track's")
    for function in (short, ablate):
        add[function].add_argument("--threads", type=positive, help="instead of the track's; 1 for runs side by side")
    add[ablate].add_argument("--plan", type=Path, required=True, help="a JSON file beside the track's track.json")
    flag = add[full].add_argument
    flag("--folder", type=Path, required=True, help="records/<track>/YYYY-MM-DD_Name")
    flag("--steps", type=positive, required=True, help="of every seed")
    flag("--rounds", type=at_least_two, default=6, help="in which row 1 and this row are timed in turns")
    add[compare].add_argument("names", nargs="*", help="two, as compare prints them without names")
    add[curve].add_argument("names", nargs=2, help="with or without the seconds at their end")
    args = parser.parse_args(ours)
    if (args.action in ("compare", "curve", "ablate")) == bool(theirs):
        parser.error("after -- come a script and its flags, except for compare, curve and ablate")
    if args.action == "compare" and len(args.names) not in (0, 2):
        parser.error("compare takes two names, or none to print those that there are")
    if "record" in args and args.record and args.results:
        parser.error("--record is the track's own file of results; leave out --results")
    args.function, args.command = {function.__name__: function for function in add}[args.action], theirs
    return args


@command_line("track.py")
def main():
    args = parse(sys.argv[1:])
    args.function(args)


if __name__ == "__main__":
    main()
