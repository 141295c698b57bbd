"""Runs that count: short ones for tuning, full ones for a record, by the rules in records/README.md.

    python benchmarks/track.py short --name "MoE Muon, E=8" --row "MoE Muon" --seeds 0 1 -- train_muon.py --pattern M --num_experts 8
    python benchmarks/track.py full --folder records/cpu/2026-11-26_MoEMuon --steps 900 --seeds 0 1 2 3 -- train_muon.py --pattern M
    python benchmarks/track.py compare "MoE Muon, E=8" "MoE Muon, E=4"
    python benchmarks/track.py curve "dense Muon" "MoE Muon"
    python benchmarks/track.py ablate --plan records/cpu/ablations.json --seeds 0 1

`short` measures the time of a step with exactly these flags, takes as many steps as fit into the track's 60 seconds, and adds a line to
records/cpu/tuning.jsonl. `full` runs the seeds, re-times row 1 and this row in turns, and leaves a record's folder; cut off, the same
command goes on with the seeds that are missing. `compare` takes differences seed by seed, for a seed fixes the order of the data;
`curve` does so for every length of training that both were run with under the name "<name>, <seconds> s", and draws them. `ablate` times every
change that a plan lists in turns with its base, gives each as many steps as fit into the same seconds, and prints what they end at; what is
there it leaves alone, so the same command goes on where it was cut off, and two of them may share the seeds.
Every run is a process of its own, and its last evaluation is its only one. Paths are relative to the root of the repository."""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
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
import train_adamw  # noqa: E402
import train_muon  # noqa: E402
from cli import Parser, UserError, positive  # noqa: E402
from distributed import World  # noqa: E402
from tools import plots, records, sources  # noqa: E402
from zoo.recipes import ZOO_MUON  # noqa: E402

RECIPES = {"train_muon.py": train_muon.MUON, "train_adamw.py": train_adamw.ADAMW, "train_zoo.py": ZOO_MUON}
OURS = """data device num_iterations val_every val_tokens sample_tokens checkpoint_every routes_tokens out_dir experiment_name seed resume
          enable_profiling plan objective""".split()  # flags that are the track's
TIMED_STEPS = 20  # of a run that only measures, and as many before, in which experts still meet new row counts, and after

# ---------------------------------------------------------------------------------------------------------------------
# One run


class Row:
    """A script and its flags, checked against the track before anything runs.

    Raises UserError for a flag that is the track's to set, for data or a GPU other than the track's, and for a torch that is not pinned."""

    def __init__(self, track: dict, command: list[str], folder: Path | None = None):
        (script, *flags), folder = command, folder or Path(track["data"])
        if script not in RECIPES:
            raise UserError(f"{script} is not a script of the track; after -- comes one of {', '.join(RECIPES)} and its flags")
        for flag in {word.split("=")[0].lstrip("-").replace("-", "_") for word in flags if word.startswith("--")} & set(OURS):
            raise UserError(f"--{flag} is set by the track; after -- leave it out")
        self.track, self.script, self.flags = track, script, [f"--preset={track['preset']}", f"--data={folder}", *flags]
        check_gpu(track)
        self.config, self.hp, _ = train_muon.parse(RECIPES[script], self.flags)
        if track["val_tokens"] % self.hp.seq_len:
            raise UserError(f"seq_len is {self.hp.seq_len}; it must divide the track's {track['val_tokens']} validation tokens")
        source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py")))).hexdigest()
        self.facts = {"script": script, "flags": flags, "source_sha256": source} | pinned_corpus(track, ROOT / folder)
        settings = dataclasses.asdict(self.config) | dataclasses.asdict(self.hp)
        text = json.dumps({name: value for name, value in settings.items() if name not in OURS}, sort_keys=True)
        self.settings = hashlib.sha256(text.encode()).hexdigest()  # presets change, and the same flags then mean another run

    def run(self, out: Path, name: str, **settings) -> list[dict]:
        """The rows of metrics.jsonl of one run, which leaves its files in out/name. Raises UserError if it fails."""
        settings = dict(device=self.track["device"], val_every=0, sample_tokens=0, checkpoint_every=0, out_dir=out, experiment_name=name) | settings
        status = launch([self.script, *self.flags, *as_flags(settings)], self.track.get("threads"))
        if status:
            raise UserError(f"{self.script} ended with status {status}; what it said is above")
        return logger.read_run(out / name)["rows"]

    def step_ms(self, out: Path, name: str) -> float:
        """The median milliseconds of a step in the middle of a short run, where every schedule is half way."""
        rows = self.run(out, name, num_iterations=3 * TIMED_STEPS, val_tokens=self.hp.seq_len)
        times = [row["train_time"] for row in rows if "train/loss" in row][TIMED_STEPS : 2 * TIMED_STEPS + 1]
        return 1000 * statistics.median(after - before for before, after in zip(times, times[1:]))

    def result(self, out: Path, seed: int, steps: int) -> dict:
        """The row with the final evaluation of one seed's run, in out/seed<N>."""
        rows = self.run(out, f"seed{seed}", seed=seed, num_iterations=steps, val_tokens=self.track["val_tokens"])
        row = logger.get_final_row(rows, self.track["metric"])
        print(f"seed {seed}: {self.track['metric']} {row[self.track['metric']]:.4f} after {steps} steps, {row['train_time']:.1f} s", flush=True)
        return row


def launch(words: list[str], threads: int | None) -> int:
    """Exit status of a script of ours; what it prints goes to its run.log, what it complains of to our stderr. threads None: torch's choice."""
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.DEVNULL).returncode


def as_flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def check_gpu(track: dict):
    """Raises UserError unless this machine has the GPU that the track names, if it names one."""
    wanted, here = track.get("gpu"), torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if wanted not in (None, here):
        raise UserError(f"this track's clock is that of one {wanted}; the GPU here is {here}: choose another --track")


def pinned_corpus(track: dict, folder: Path) -> dict:
    """torch's version and the sha256 of the corpus. Raises UserError unless the folder holds all of the pinned corpus and nothing else."""
    version, pins = sources.torch_version(), track["corpus_sha256"]
    pinned = records.find_pinned_corpus(track, version)
    if pinned is None:
        raise UserError(f"torch {version} is not pinned for this track ({', '.join(pins)}); run `pip install torch=={list(pins)[-1]}`")
    meta = data.load_meta(folder)
    corpus = meta.get("corpus_sha256") or shards_sha256(meta)
    wanted = {"source": track["source"], "encoding": track["encoding"], "max_tokens": None, "split_seed": 0}
    if corpus != pinned or wanted.items() - meta["request"].items():
        raise UserError(f"{folder} does not hold the corpus pinned for torch {version}, whole; remove it and run `{track['prepare']} --out {folder}`")
    return {"torch": version, "corpus_sha256": corpus}


def shards_sha256(meta: dict) -> str:
    """One sha256 for the shards of a folder, from those that its meta.json lists."""
    return hashlib.sha256("".join(shard["sha256"] for shard in meta["shards"]).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# short, compare


def short(args):
    track, log = logger.read_json(ROOT / args.track / "track.json"), ROOT / args.track / "tuning.jsonl"
    track["threads"] = args.threads or track.get("threads")
    row, lines = Row(track, args.command, args.data), read_tuning(log)
    earlier = [line for line in lines if line["name"] == args.name]
    asked = sum(len(line["seeds"]) for line in lines if args.row and line["row"] == args.row) + len(args.seeds)
    if args.row and asked > track["tuning_runs"]:
        raise UserError(f"row {args.row!r} would have had {asked} short runs; every row has {track['tuning_runs']}")
    step_ms, steps = None, args.steps or next((line["steps"] for line in earlier), None)
    for line in earlier:  # more seeds of the same
        if (line["script"], line["flags"], line["steps"]) != (row.script, row.facts["flags"], steps) or set(line["seeds"]) & set(args.seeds):
            raise UserError(f"{args.name!r} is in {log} with other flags, or with one of these seeds; choose another --name")
        check_settings(line, row)
    with tempfile.TemporaryDirectory() as folder:
        if steps is None:
            step_ms = row.step_ms(Path(folder), "calibration")
            steps = max(1, int(1000 * (args.seconds or track["seconds"]["short"]) / step_ms))
            print(f"{step_ms:.1f} ms per step: {steps} steps", flush=True)
        results, failure = [], None
        for seed in args.seeds:
            try:
                results.append(row.result(Path(folder), seed, steps))
                ms = 1000 * results[-1]["train_time"] / steps
                if step_ms and not 0.9 < ms / step_ms < 1.1:
                    print(f"note: {ms:.1f} ms per step now, {step_ms:.1f} in the calibration: the machine was busy with something else", flush=True)
            except UserError as error:  # a loss that is not finite is a result too
                failure = error
                break
    append_line(log, args.name, row, steps, args.seeds[: len(results) + bool(failure)], results, row_name=args.row, step_ms=step_ms)
    if failure:
        raise failure


def check_settings(line: dict, row: Row):
    """Raises UserError where seeds of one name would be of two settings."""
    if line.get("settings") != row.settings:
        then = f"the presets of commit {line['commit'][:7]}, which have changed since or were not noted"
        raise UserError(f"{line['name']!r} was run with {then}; choose another name")


def append_line(log: Path, name: str, row: Row, steps: int, seeds: list[int], results: list[dict], row_name: str | None, step_ms: float | None):
    """What some seeds of one run ended at. A seed beyond the results failed."""
    line = {"date": today(), "name": name, "row": row_name, "commit": logger.find_commit(ROOT), **row.facts, "settings": row.settings,
            "threads": row.track["threads"], "steps": steps, "step_ms": step_ms, "seeds": seeds}  # fmt: skip
    for key, name in ((row.track["metric"], row.track["metric"]), ("seconds", "train_time"), ("flops", "train/flops")):
        line[key] = [result[name] for result in results] + [None] * (len(seeds) - len(results))
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")


def today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def read_tuning(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def compare(args):
    """Prints the mean of a - b over the seeds that both have, and its standard error."""
    metric, log = logger.read_json(ROOT / args.track / "track.json")["metric"], ROOT / args.track / "tuning.jsonl"
    lines = read_tuning(log)
    a, b = (by_seed([line for line in lines if line["name"] == name], metric) for name in args.names)
    if not a.keys() & b.keys():
        raise UserError(f"{args.names[0]!r} and {args.names[1]!r} share no seed in {log}, which holds: {', '.join({x['name']: 0 for x in lines})}")
    for seed in sorted(a.keys() & b.keys()):
        print(f"seed {seed}: {a[seed]:.4f} - {b[seed]:.4f} = {a[seed] - b[seed]:+.4f}")
    print(difference(a, b))


def by_seed(lines: list[dict], metric: str) -> dict[int, float]:
    """What the runs of some lines ended at, without those that failed."""
    return {seed: value for line in lines for seed, value in zip(line["seeds"], line[metric]) if value is not None}


def paired(a: dict[int, float], b: dict[int, float]) -> tuple[float, float, int]:
    """The mean of a - b over the seeds that both have, its standard error, and their number."""
    differences = [a[seed] - b[seed] for seed in a.keys() & b.keys()]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.nan
    return statistics.mean(differences), error, len(differences)


def difference(a: dict[int, float], b: dict[int, float]) -> str:
    return "mean {:+.4f}, standard error {:.4f}, n = {}".format(*paired(a, b))


def curve(args):
    """Prints and draws what two rows end at after every length of training that both have runs of."""
    folder, metric = ROOT / args.track, logger.read_json(ROOT / args.track / "track.json")["metric"]
    ends = {name: {} for name in args.names}  # row -> seconds -> seed -> bits per byte
    for line in read_tuning(folder / "tuning.jsonl"):
        name, _, length = line["name"].rpartition(", ")
        if name in ends and re.fullmatch(r"\d+ s", length):
            ends[name].setdefault(int(length[:-2]), {}).update(by_seed([line], metric))
    a, b = ends.values()
    both = [seconds for seconds in sorted(a.keys() & b.keys()) if a[seconds].keys() & b[seconds].keys()]
    if not both:
        wanted = " and ".join(f'"{name}, <seconds> s"' for name in args.names)
        raise UserError(f"no runs named {wanted} have a length and a seed in common; make them with short")
    for seconds in both:
        print(f"{seconds} s: {' - '.join(args.names)}: {difference(a[seconds], b[seconds])}")
    with plots.open_figure(folder / "curve.png") as figure:
        figure.set_size_inches(8, 4.5)
        ax = figure.subplots()
        for (name, runs), colour in zip(ends.items(), plots.COLOURS):
            values = [list(runs[seconds].values()) for seconds in both]
            ax.plot(both, list(map(statistics.mean, values)), color=colour, label=name)
            for seconds, points in zip(both, values):
                ax.plot([seconds] * len(points), points, "o", color=colour)
        ax.set(xscale="log", xticks=both, xticklabels=both, xlabel="seconds of training, a run of its own for each", ylabel=metric)
        ax.minorticks_off()
        ax.legend()
    print(folder / "curve.png")


# ---------------------------------------------------------------------------------------------------------------------
# ablate

PAIRS = 24  # of steps by which a change is timed against its base


class Stepper:
    """A row's model and optimizers in this process, in the middle of its schedules, to time one step at a time."""

    def __init__(self, row: Row):
        config, hp = row.config, dataclasses.replace(row.hp, num_iterations=4 * PAIRS)
        world, recipe, self.number = World(0, 1, torch.device(row.track["device"])), RECIPES[row.script], 2 * PAIRS
        net, timer = model.build(config).to(world.device).train(), logger.PhaseTimer(world.device.type)
        exchange = train_muon.Exchange(net, world, hp.bucket_mb)
        exchange.attach_optimizers(recipe, hp)
        self.session = train_muon.Session(recipe, hp, net, exchange, timer)
        micro_rows = train_muon.micro_batch_rows(hp.batch_tokens // hp.seq_len, hp, world)
        self.loader = recipe.open_loader(config, hp, world, micro_rows)

    def milliseconds(self) -> float:
        began = time.perf_counter()
        train_muon.train_step(self.session, self.loader.next_step, self.number)
        self.number += 1
        return 1000 * (time.perf_counter() - began)


def pace(change: Row, base: Row) -> dict:
    """Median milliseconds of the base's steps, and of the change's over the base's, step by step in turns; the first third is not counted."""
    steppers = [Stepper(row) for row in (change, base)]
    pairs = [[stepper.milliseconds() for stepper in steppers[:: (-1) ** i]][:: (-1) ** i] for i in range(PAIRS)][PAIRS // 3 :]
    for stepper in steppers:
        stepper.loader.close()
    return {"base_ms": statistics.median(ms for _, ms in pairs), "ratio": statistics.median(mine / ms for mine, ms in pairs)}


def ablate(args):
    """A plan is {"name": ..., "groups": [{"title": ..., "base": [script, *flags], "changes": {label: flags}}]}."""
    plan, log = logger.read_json(ROOT / args.plan), (ROOT / args.plan).parent / "tuning.jsonl"
    track = logger.read_json(log.parent / "track.json")
    timing_file = (ROOT / args.plan).with_suffix(".timing.json")
    timing = logger.read_json(timing_file) if timing_file.exists() else {}
    commands = ablation_commands(plan)
    rows = {name: Row(track, command, args.data) for name, command in commands.items()}
    torch.set_num_threads(track["threads"])
    for name in (name for name in commands if name not in timing and name != base_of(name)):
        timing[name] = pace(rows[name], rows[base_of(name)])
        write_json(timing_file, timing)
        print(f"{name}: {timing[name]['ratio']:.3f} of its base's {timing[name]['base_ms']:.1f} ms per step", flush=True)
    track["threads"] = args.threads or track["threads"]
    for seed in args.seeds:
        for name, row in rows.items():
            lines = [line for line in read_tuning(log) if line["name"] == name]
            steps = ablation_steps(track, timing, name)
            if any((line["flags"], line["steps"]) != (row.facts["flags"], steps) for line in lines):
                raise UserError(f"{name!r} is in {log} with other flags or steps than the plan's; choose another name for the plan")
            if any(seed in line["seeds"] for line in lines):
                continue
            for line in lines:
                check_settings(line, row)
            with tempfile.TemporaryDirectory() as folder:
                print(name, flush=True)
                append_line(log, name, row, steps, [seed], [row.result(Path(folder), seed, steps)], None, None)
    print(ablation_table(plan, track, timing, read_tuning(log)))


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
    """Markdown: each change's time per step over its base's, its steps, what it ends at, and by how much that is below its base, seed by seed."""
    rows, ends = [], {name: by_seed([line for line in lines if line["name"] == name], track["metric"]) for name in ablation_commands(plan)}
    for group in plan["groups"]:
        base = f"{plan['name']}, {group['title']}"
        rows += ["", f"**{group['title']}**: `{' '.join(group['base'])}`", "",
                 "| change | flags | step / base's | steps | bits per byte | base − change | n |", "|---|---|---|---|---|---|---|"]  # fmt: skip
        for label, flags in {"(base)": [], **group["changes"]}.items():
            name = f"{base}: {label}" if flags else base
            if not ends[name]:
                continue
            gain = "{:+.4f} ± {:.4f}".format(*paired(ends[base], ends[name])) if flags else ""
            cells = [label, f"`{' '.join(flags)}`" if flags else "", f"{timing[name]['ratio']:.3f}" if flags else "1",
                     ablation_steps(track, timing, name), f"{statistics.mean(ends[name].values()):.4f}", gain, len(ends[name])]  # fmt: skip
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
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: a record has the seeds 0 to n - 1, and n is at least {track['seeds']}")
    row = Row(track, args.command, args.data)
    facts = row.facts | {"steps": args.steps}
    partial.mkdir(exist_ok=True)
    config_file = partial / "config.json"
    begun = logger.read_json(config_file) if config_file.exists() else None
    if begun and begun["track"] != facts:
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
        write_json(timing_file, retime(track, row, logger.read_json(folder.parent / track["row_1"] / "config.json"), args.rounds))
    command = ["python", "benchmarks/track.py", "full", "--folder", f"records/{folder.parent.name}/{folder.name}", "--steps", str(args.steps),
               "--seeds", *map(str, args.seeds), "--", *args.command]  # fmt: skip
    template = f"# {folder.name}\n\nWhat changed against the row before, and why it helps:\n\n```bash\n{shlex.join(command)}\n```\n"
    (partial / "README.md").write_text(template)
    values = records.read_record(partial, track)["values"]
    os.replace(partial, folder)
    if not track["row_1"]:
        target = round(statistics.mean(values) + track["margin"], 4)
        write_json(track_file, track | {"row_1": folder.name, "target": target})
    print(f"{folder}: mean {statistics.mean(values):.4f} over {len(values)} seeds; write its README.md, then `python logger.py --records`")


def keep(run: Path, partial: Path, seed: int, facts: dict):
    """Takes over what a seed's run left; its metrics come last and whole, as they say that the seed is done."""
    config = logger.read_json(run / "config.json")
    for name in ("experiment_name", "matmul_flops_per_second"):
        del config[name]
    for name in ("seed", "data", "out_dir"):
        del config["hyperparameters"][name]
    write_json(partial / "config.json", {"track": facts} | config)
    shutil.copy(run / "run.log", partial / f"seed{seed}.log")
    shutil.copy(run / "metrics.jsonl", partial / f"seed{seed}.jsonl.tmp")
    os.replace(partial / f"seed{seed}.jsonl.tmp", partial / f"seed{seed}.jsonl")


def write_json(path: Path, value: dict):
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=2) + "\n")
    os.replace(path.with_suffix(".tmp"), path)


def retime(track: dict, row: Row, config_1: dict, rounds: int) -> dict:
    """Milliseconds per step of this row and of row 1, with the present code: short runs in turns, every second round in the other order,
    so that a machine that slows down or speeds up does so for both. A field that is younger than row 1 has its default there."""
    script, recorded = config_1["track"]["script"], config_1["model"] | config_1["hyperparameters"]
    fields = [field for cls in (model.Config, RECIPES[script].train_config) for field in dataclasses.fields(cls) if field.name not in OURS]
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
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is not at least 2")
    return number


def parse(argv: list[str]):
    """argv up to `--` as flags of ours; what follows, a script and its flags, as `command`."""
    ours, theirs = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = Parser(prog="track.py", description="Short runs, full records and paired comparisons of a track.")
    actions = parser.add_subparsers(dest="action", required=True)
    add = {function: actions.add_parser(function.__name__) for function in (short, full, compare, curve, ablate)}
    for function in (short, compare, curve):
        add[function].add_argument("--track", type=Path, default="records/cpu", help="the folder with its track.json")
    for function in (short, full, ablate):
        add[function].add_argument("--seeds", type=int, nargs="+", required=True)
        add[function].add_argument("--data", type=Path, help="the folder of the track's shards (default: where track.json says)")
    add[short].add_argument("--name", required=True, help="of the line in tuning.jsonl")
    add[short].add_argument("--row", help="the row of the table whose tuning budget these runs use up")
    add[short].add_argument("--steps", type=positive, help="instead of as many as fit")
    add[short].add_argument("--seconds", type=float, help="instead of the track's")
    for function in (short, ablate):
        add[function].add_argument("--threads", type=positive, help="instead of the track's; with one each, runs fit side by side")
    add[ablate].add_argument("--plan", type=Path, required=True, help="a JSON file beside the track's track.json")
    add[full].add_argument("--folder", type=Path, required=True, help="records/<track>/YYYY-MM-DD_Name")
    add[full].add_argument("--steps", type=positive, required=True)
    add[full].add_argument("--rounds", type=at_least_two, default=6, help="in which row 1 and this row are timed in turns")
    for function in (compare, curve):
        add[function].add_argument("names", nargs=2)
    args = parser.parse_args(ours)
    if (args.action in ("compare", "curve", "ablate")) == bool(theirs):
        parser.error("after -- come a script and its flags, except for compare, curve and ablate")
    args.function, args.command = {function.__name__: function for function in add}[args.action], theirs
    return args


def main():
    args = parse(sys.argv[1:])
    try:
        args.function(args)
    except (UserError, OSError) as error:
        sys.exit(f"track.py: error: {error}")


if __name__ == "__main__":
    main()
