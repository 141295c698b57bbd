"""records/: the table of docs/results.md agrees with the logs, broken records are refused, benchmarks/track.py keeps
the rules.

pytest tests/tools/test_records.py
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import arithmetic  # noqa: E402
import domains  # noqa: E402
from test_train import TINY_MODEL, WORDS, call, write_data  # noqa: E402

import facts  # noqa: E402
import logger  # noqa: E402
import train_adamw  # noqa: E402
import train_muon  # noqa: E402
from benchmarks import track  # noqa: E402
from cli import UserError  # noqa: E402
from tools import prepare, sources  # noqa: E402
from tools.records import (  # noqa: E402
    ANY_TORCH,
    confidence_half_width,
    find_tracks,
    format_history,
    plot_history,
    read_history,
    read_record,
    student_t_cdf,
    t_test_below,
)
from zoo.recipes import ZOO_MUON  # noqa: E402

# -----------------------------------------------------------------------------
# Statistics

T_975 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 7: 2.3646, 30: 2.0423}  # 97.5% quantiles of Student's t


def below(t: float, dof: int) -> float:
    """P(T <= t) by Simpson's rule over the density, with T = sqrt(dof) tan(u): independent of tools/records.py."""
    scale = math.gamma((dof + 1) / 2) / math.gamma(dof / 2) / math.sqrt(math.pi)
    end, n = math.atan(t / math.sqrt(dof)), 2000
    h = (end + math.pi / 2) / n
    heights = [math.cos(-math.pi / 2 + i * h) ** (dof - 1) for i in range(n + 1)]
    return scale * h / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))


def t_test(values, target):
    return below((mean(values) - target) / (stdev(values) / math.sqrt(len(values))), len(values) - 1)


def test_student_t_has_known_quantiles_and_tails():
    for dof, t in T_975.items():
        assert student_t_cdf(t, dof) == pytest.approx(0.975, abs=1e-5) and student_t_cdf(-t, dof) == pytest.approx(
            0.025, abs=1e-5
        )
    for dof in (1, 2, 3, 4, 9, 31):
        for t in (-20.0, -4.54, -1.0, 0.0, 0.3, 6.0):
            assert student_t_cdf(t, dof) == pytest.approx(below(t, dof), rel=1e-6, abs=1e-12)
    assert confidence_half_width([1.0, 2.0, 3.0, 4.0]) == pytest.approx(T_975[3] * stdev([1, 2, 3, 4]) / 2, rel=1e-4)
    assert t_test_below([1.0, 1.0], 2.0) == 0 and t_test_below([1.0, 1.0], 0.5) == 1


def test_student_t_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for values in ([1.2, 1.21, 1.19, 1.25], [1.31, 1.3], [0.9, 1.1, 1.3, 1.2, 1.0]):
        for target in (1.0, 1.22, 1.4):
            assert t_test_below(values, target) == pytest.approx(
                stats.ttest_1samp(values, target, alternative="less").pvalue, rel=1e-9
            )
        low, high = stats.t.interval(0.95, len(values) - 1, mean(values), stats.sem(values))
        assert 2 * confidence_half_width(values) == pytest.approx(high - low, rel=1e-9)


# -----------------------------------------------------------------------------
# The table against the logs


def check_table(text: str, root: Path):
    """Recomputes every cell of `python logger.py --records` from the folders that its rows link to."""
    for name, target, table in re.findall(r"\*\*Track `(\w+)`\*\*: \S+ of at most (\S+) .*\n\n((?:\|.*\n?)+)", text):
        rules = json.loads((root / f"records/{name}/track.json").read_text())
        rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()[2:]]
        folders = [root / re.fullmatch(r"\[(.*)\]\((.*/\1)\)", row[1])[2] for row in rows]
        assert [folder.name for folder in folders] == [rules["row_1"], *(folder.name for folder in folders[1:])]
        assert sorted(folders) == sorted(path.parent for path in (root / "records" / name).glob("*/config.json"))
        ends, targets = {}, []
        for number, (row, folder) in enumerate(zip(rows, folders), start=1):
            seeds = range(len(list(folder.glob("seed*.jsonl"))))
            runs = [
                [json.loads(line) for line in (folder / f"seed{seed}.jsonl").read_text().splitlines()] for seed in seeds
            ]
            finals = [[line for line in run if rules["metric"] in line][-1] for run in runs]
            for seed, final in enumerate(finals):
                assert f"val_bpb:{final[rules['metric']]:.4f}" in (folder / f"seed{seed}.log").read_text()
            values, seconds = [final[rules["metric"]] for final in finals], [final["train_time"] for final in finals]
            ends[number] = finals[0]
            targets = targets or [f"{mean(values) + rules['margin']:.4f}"]
            dof, ratio = len(values) - 1, "1"
            if number > 1:
                timing = json.loads((folder / "timing.json").read_text())
                rounds = [a / b for a, b in timing["rounds"]]
                factor, t = finals[0]["step"] / ends[1]["step"], quantile(len(rounds) - 1)
                half_width = factor * t * stdev(rounds) / math.sqrt(len(rounds))
                ratio = f"{factor * timing['row'] / timing['row_1']:.3f} ± {half_width:.3f}"
            counts = json.loads((folder / "config.json").read_text())["parameters"]
            tables = sum(counts[kind] for kind in ("embed", "ngram_embed", "value_embed"))
            assert row == [
                str(number),
                row[1],
                f"{counts['total'] / 1e6:.2f}M ({tables / 1e6:.2f}M)",
                f"{finals[0]['step']:,}",
                f"{mean(seconds):,.1f} ± {quantile(dof) * stdev(seconds) / math.sqrt(len(seconds)):.1f}",
                ratio,
                f"{finals[0]['train/flops'] / 1e12:,.2f}",
                f"{mean(values):.4f} ± {stdev(values):.4f}",
                str(len(values)),
                f"{t_test(values, rules['target']):.1e}",
            ]
            assert len({final["step"] for final in finals}) == 1 and len(values) >= rules["seeds"]
            assert number == 1 or t_test(values, rules["target"]) < rules["p"]
        assert [target] == targets == [f"{rules['target']:.4f}"]


@functools.cache
def quantile(dof: int) -> float:
    """97.5% of T lie below it: Newton's method on below()."""
    t = 2.0
    for _ in range(60):
        density = (
            math.gamma((dof + 1) / 2)
            / math.gamma(dof / 2)
            / math.sqrt(math.pi * dof)
            * (1 + t * t / dof) ** (-(dof + 1) / 2)
        )
        t += (0.975 - below(t, dof)) / density
    return t


def printed(root: Path) -> str:
    done = subprocess.run([sys.executable, ROOT / "logger.py", "--records"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_table_of_results_is_that_of_the_logs():
    page = (ROOT / "docs/results.md").read_text()
    between = re.search(r"<!-- records -->\n(.*?)\n<!-- end of records -->", page, re.S)[1]
    between = between.replace("](../records/", "](records/")
    message = "put the output of `python logger.py --records` between the markers of docs/results.md"
    assert between == printed(ROOT), message + ", with ../ before its links"
    check_table(between, ROOT)


def test_the_readme_has_row_1_and_the_newest_two_rows_of_track_cpu():
    readme = (ROOT / "README.md").read_text()
    shown = re.findall(r"^\| \d+ \| .*", readme[readme.index("## Records") :], re.M)
    rows = re.findall(r"^\| \d+ \| .*", format_history(Path("records/cpu"), *read_history(ROOT / "records/cpu")), re.M)
    assert shown == [rows[0], *rows[-2:]]


RULES = json.loads((ROOT / "records/cpu/track.json").read_text())


def plant(folder: Path, values, seconds, steps: int, timing=None, commit="9c1f"):
    """A record whose runs logged just enough, of torch 2.13.0."""
    folder.mkdir()
    (folder / "README.md").write_text("# A record\n")
    source = f"import torch  # {commit}\n"
    facts = {"script": "train_zoo.py", "flags": ["--objective", "next", "--muon_lr=.04"], "steps": steps,
             "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
             "corpus_sha256": RULES["corpus_sha256"]["2.13.0"]}  # fmt: skip
    settings = {"num_iterations": steps, "val_tokens": RULES["val_tokens"], "batch_tokens": 4500, "muon_lr": 0.04}
    parameters = {"embed": 20_000, "ngram_embed": 500_000, "value_embed": 30_000, "matrix": 100_000, "total": 650_000}
    config = {"track": facts, "encoding": "bytes", "model": {"objective": "next"}, "hyperparameters": settings,
              "parameters": parameters,
              "flops_per_token": 1e7}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for seed, (value, second) in enumerate(zip(values, seconds)):
        rows = [
            {"step": step, "train_time": step * second / steps, "train/flops": step * 4.5e10, "train/loss": 2 + seed / 1e6}
            for step in range(1, steps + 1)
        ]
        rows += [
            {
                "step": steps,
                "train_time": second,
                "train/flops": steps * 4.5e10,
                "val/loss": value / 2,
                "val/bpb": value,
            },
            {"step": steps, "event": "end"},
        ]
        (folder / f"seed{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = "python train_zoo.py --preset=cpu --data=data/python --objective next --muon_lr=.04 --device=cpu"
        command += f" --val_every=0 --sample_tokens=0 --checkpoint_every=0 --out_dir=/tmp --experiment_name=seed{seed}"
        command += f" --seed={seed} --num_iterations={steps} --val_tokens={RULES['val_tokens']}"
        (folder / f"seed{seed}.log").write_text(
            f"{'-' * 100}\ntrain_zoo.py\n{'-' * 100}\n{source}{'=' * 100}\ncommand   {command}\n"
            f"torch     2.13.0+cpu\nthreads   2\ngpu       none\n{'=' * 100}\n"
            f"step:{steps}/{steps} val_loss:1.00000 train_time:{second:.3f}s step_avg:1.00ms val_bpb:{value:.4f}\n"
        )
    if timing:
        (folder / "timing.json").write_text(json.dumps(timing))


@pytest.fixture
def planted(tmp_path):
    """root/records/cpu with three rows, of which row 1 is not the first by name."""
    folder = tmp_path / "records/cpu"
    folder.mkdir(parents=True)
    (folder / "track.json").write_text(json.dumps(RULES | {"target": 1.435, "row_1": "2026-01-02_DenseAdamW"}))
    plant(folder / "2026-01-02_DenseAdamW", [1.42, 1.43, 1.421, 1.429], [601.2, 603.4, 599.8, 600.5], 1200)
    plant(
        folder / "2026-01-02_DenseMuon",
        [1.419, 1.42, 1.421, 1.4188, 1.4191],
        [280.9, 283.0, 281.7, 282.2, 280.1],
        540,
        {"row": 517.0, "row_1": 498.25, "rounds": [[516, 498], [517, 499], [518.5, 498.5], [517, 495]]},
    )
    plant(
        folder / "2026-01-01_MoEMuon",
        [1.4177, 1.4202, 1.4181, 1.4192],
        [220.1, 219.4, 221.6, 220.2],
        400,
        {"row": 548.0, "row_1": 501.0, "rounds": [[548, 502], [549, 501], [547, 498]]},
    )
    return tmp_path


def test_planted_records_make_the_known_table(planted):
    text = printed(planted)
    check_table(text, planted)
    assert text.splitlines()[0] == "**Track `cpu`**: val/bpb of at most 1.4350 (row 1's mean + 0.01)."
    names = ("2026-01-02_DenseAdamW", "2026-01-01_MoEMuon", "2026-01-02_DenseMuon")
    adamw, moe, dense = (f"[{name}](records/cpu/{name})" for name in names)
    assert text.splitlines()[4:] == [  # the numbers are scipy's: t.ppf, sem, ttest_1samp
        f"| 1 | {adamw} | 0.65M (0.55M) | 1,200 | 601.2 ± 2.5 | 1 | 54.00 | 1.4250 ± 0.0052 | 4 | 1.6e-02 |",
        f"| 2 | {moe} | 0.65M (0.55M) | 400 | 220.3 ± 1.5 | 0.365 ± 0.003 | 18.00 | 1.4188 ± 0.0011 | 4 | 4.6e-05 |",
        f"| 3 | {dense} | 0.65M (0.55M) | 540 | 281.6 ± 1.4 | 0.467 ± 0.003 | 24.30 | 1.4196 ± 0.0009 | 5 | 1.5e-06 |",
    ]


def test_the_picture_has_every_record_s_curve_and_end(planted):
    printed(planted)
    assert (planted / "records/cpu/history.png").read_bytes().startswith(b"\x89PNG")
    figure = Figure()
    track, records = read_history(planted / "records/cpu")
    plot_history(figure, track["target"], records)
    [ax] = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "1  2026-01-02_DenseAdamW: 601 s",
        "2  2026-01-01_MoEMuon: 220 s",
        "3  2026-01-02_DenseMuon: 282 s",
        "target 1.4350",
    ]
    lines = [line.get_xydata() for line in ax.lines]
    for (curve, end), record in zip(zip(lines[::2], lines[1::2]), records):
        assert end.tolist() == [[mean(record["seconds"]), mean(record["values"])]]
        assert curve[:, 1] == pytest.approx(4.0, abs=1e-4)  # 2 nats, 2 bits each
        assert 0 < curve[0, 0] < curve[-1, 0] <= mean(record["seconds"]) and len(curve) == 60  # bins
    assert set(lines[-1][:, 1]) == {1.435}


@pytest.mark.parametrize("file, setting", (("docs/results.md", "momentum 0.8, "), ("records/cpu/NEGATIVE.md", "")))
def test_a_curve_s_table_is_that_of_the_runs(file, setting):
    """Means over the seeds that both rows have; the error is that of the mean of their differences."""
    table, runs = r"^\| ([\d,]+) s \| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+)(?: ± ([\d.]+))? \| (\d+) \|$", {}
    rows = re.findall(table, (ROOT / file).read_text(), re.M)
    for line in lines_of(ROOT / "records/cpu"):
        runs.setdefault(line["name"], {}).update(zip(line["seeds"], line["val/bpb"]))
    found = [
        re.fullmatch(rf"dense Muon, {setting}(\d+) s", name) for name in runs if name.replace("dense", "MoE") in runs
    ]
    lengths = [int(name[1]) for name in found if name]
    assert lengths and [int(row[0].replace(",", "")) for row in rows] == sorted(lengths)
    for length, (_, *cells) in zip(sorted(lengths), rows):
        dense, moe = (runs[f"{name} Muon, {setting}{length} s"] for name in ("dense", "MoE"))
        seeds = dense.keys() & moe.keys()
        differences = [dense[seed] - moe[seed] for seed in seeds]
        error = f"{stdev(differences) / len(seeds) ** 0.5:.4f}" if len(seeds) > 1 else ""
        means = [f"{mean(values[seed] for seed in seeds):.4f}" for values in (dense, moe)]
        assert cells == [*means, f"{mean(differences):+.4f}", error, str(len(seeds))]


def test_every_digit_of_the_table_is_checked(planted):
    text = printed(planted)
    head = text.index("of at most")
    places = [place for place in range(head, len(text)) if text[place].isdigit()
              and not text[:place].endswith(("row ", "mean + ", "mean + 0.", "mean + 0.0"))]  # fmt: skip
    assert len(places) > 150
    for place in places:
        changed = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        with pytest.raises((AssertionError, TypeError, OSError, IndexError)):
            check_table(changed, planted)


def edit(name: str, old: str, new: str):
    def change(folder: Path):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


BROKEN = {  # name -> (damage to a record, error message)
    "no log": (lambda folder: (folder / "seed1.log").unlink(), r"MoEMuon: seed1\.log is missing"),
    "a seed left out": (
        lambda folder: [(folder / f"seed0.{kind}").unlink() for kind in ("log", "jsonl")],
        r"seed0\.log is missing",
    ),
    "no timing": (lambda folder: (folder / "timing.json").unlink(), r"timing\.json is missing"),
    "no readme": (lambda folder: (folder / "README.md").unlink(), r"README\.md is missing"),
    "few seeds": (
        lambda folder: [(folder / f"seed3.{kind}").unlink() for kind in ("log", "jsonl")],
        "it has 3 seeds, the track requires 4",
    ),
    "other step": (
        lambda folder: [
            edit("seed2.jsonl", '"step": 400', '"step": 390')(folder),
            edit("seed2.log", "step:400/", "step:390/")(folder),
        ],
        r"seed2\.jsonl: it was evaluated at steps 390, the rules allow 400 alone",
    ),  # fmt: skip
    "other source": (edit("seed3.log", "9c1f", "9c2f"), "the logs of its seeds hold different sources"),
    "other corpus": (
        edit("config.json", "02e0de8d", "12e0de8d"),
        r"seed0\.log: its corpus is not the one pinned for torch 2\.13\.0",
    ),
    "other torch": (
        edit("seed1.log", "2.13.0+cpu", "2.12.0"),
        r"seed1\.log: its corpus is not the one pinned for torch 2\.12\.0",
    ),
    "more threads": (edit("seed1.log", "threads   2", "threads   16"), "threads is 16, in the track 2"),
    "less validation": (edit("config.json", "262144", "65536"), "val_tokens is 65536, in the track 262144"),
    "null": (edit("seed1.jsonl", "1.4202", "null"), r"seed1\.jsonl: the run did not end with a finite val/bpb"),
    "NaN": (edit("seed1.jsonl", "1.4202", "NaN"), r"seed1\.jsonl: the run did not end with a finite val/bpb"),
    "an edited result": (
        edit("seed1.jsonl", "1.4202", "1.4102"),
        r"seed1\.log: its val/bpb at step 400 is not that of seed1\.jsonl",
    ),
    "not significant": (
        lambda folder: [edit("seed0.jsonl", "1.4177", "1.4577")(folder), edit("seed0.log", "1.4177", "1.4577")(folder)],
        r"p against the target 1\.435 is 0\.2.*, not below 0\.01",
    ),  # fmt: skip
    "one seed as all": (
        lambda folder: [shutil.copy(folder / f"seed0.{kind}", folder / f"seed{seed}.{kind}")
                        for seed in (1, 2, 3) for kind in ("log", "jsonl")],
        r"seed1\.log: its command has --seed 0, the record 1"),
    "one seed as another": (
        lambda folder: [shutil.copy(folder / "seed0.jsonl", folder / "seed1.jsonl"),
                        edit("seed1.log", "1.4202", "1.4177")(folder), edit("seed1.log", "219.4", "220.1")(folder)],
        "two of its seeds have the same training losses"),
    "another evaluation": (
        edit("seed1.jsonl", '{"step": 51,', '{"step": 50, "val/bpb": 1.5, "val/loss": 0.7}\n{"step": 51,'),
        r"seed1\.jsonl: it was evaluated at steps 50, 400, the rules allow 400 alone"),
    "evaluations on the way": (edit("seed1.log", "--val_every=0", "--val_every=50"), "has --val_every 50, the record 0"),
    "a step left out": (
        lambda folder: (folder / "seed1.jsonl").write_text(
            "".join(line for line in (folder / "seed1.jsonl").open() if '"step": 50,' not in line)),
        r"seed1\.jsonl: its training rows are not those of steps 1 to 400, each once"),
    "another objective": (
        lambda folder: [edit("config.json", '"next"', '"masked"')(folder)] + [
            edit(f"seed{seed}.log", "--objective next", "--objective masked")(folder) for seed in range(4)],
        r"config\.json: objective is masked, and the score is that of a model of the next token"),
    "a hidden objective": (
        edit("seed2.log", "--objective next", "--objective masked"),
        r"seed2\.log: its command has --objective masked, the record next"),
    "other settings": (edit("config.json", '"muon_lr": 0.04', '"muon_lr": 0.05'), "muon_lr is 0.05, its flag says .04"),
    "another script": (edit("seed2.log", "python train_zoo", "python train_muon"), "runs train_muon.py, in config.json"),
    "another flag": (edit("seed2.log", "--device=cpu", "--device=cpu --resume"), "has --resume None, the record not"),
    "no source hash": (
        lambda folder: (folder / "config.json").write_text(re.sub(
            r'("source_sha256": ")\w+', r"\g<1>" + "0" * 64, (folder / "config.json").read_text())),
        r"config\.json: source_sha256 is not that of the sources in the logs"),
    "edited sources": (
        lambda folder: [edit(f"seed{seed}.log", "9c1f", "9c2f")(folder) for seed in range(4)],
        r"config\.json: source_sha256 is not that of the sources in the logs"),
    "fewer FLOPs": (edit("config.json", '"flops_per_token": 1', '"flops_per_token": 2'), "train/flops is not"),
    "less time": (edit("seed1.jsonl", '"train_time": 219.4, "train/flops": 18000000000000.0, "val', '"train_time": 119.4, "train/flops": 18000000000000.0, "val'),
                  r"seed1\.jsonl: its clock runs backwards"),
    "a faster timing": (edit("timing.json", '"row": 548.0', '"row": 448.0'), "row and row_1 are not the medians"),
    "another form": (edit("timing.json", '"row_1"', '"row_2"'), "holds a file of another form .*row_1"),
    "no JSON": (edit("config.json", "{", "["), r"config\.json is no JSON"),
}


def test_a_track_may_name_its_gpu_and_a_corpus_for_any_torch(planted):
    """As records/h200 does; every log must name that GPU."""
    rules, folder = planted / "records/cpu/track.json", planted / "records/cpu/2026-01-01_MoEMuon"
    track_rules = json.loads(rules.read_text())
    del track_rules["threads"]
    pins = {ANY_TORCH: track_rules["corpus_sha256"]["2.13.0"]}
    track_rules |= {"gpu": "NVIDIA H200", "corpus_sha256": pins}
    with pytest.raises(UserError, match="gpu is none, in the track NVIDIA H200"):
        read_record(folder, track_rules)
    for log in folder.glob("seed*.log"):
        edit(log.name, "gpu       none", "gpu       NVIDIA H200")(folder)
    assert read_record(folder, track_rules)["p"] < 0.01
    with pytest.raises(UserError, match="not the one pinned for torch 2.13.0"):
        read_record(folder, track_rules | {"corpus_sha256": {ANY_TORCH: "f" * 64}})


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_record_is_named(planted, what):
    damage, message = BROKEN[what]
    damage(planted / "records/cpu/2026-01-01_MoEMuon")
    with pytest.raises(UserError, match=message) as stopped:
        [read_history(folder) for folder in find_tracks(planted / "records")]
    assert "2026-01-01_MoEMuon" in str(stopped.value) and "\n" not in str(stopped.value)


def test_a_target_that_moved_and_an_unknown_track_are_errors(planted):
    edit("track.json", "1.435", "1.436")(planted / "records/cpu")
    with pytest.raises(UserError, match=r"target is 1\.436, row 1's mean \+ 0\.01 is 1\.435"):
        [read_history(folder) for folder in find_tracks(planted / "records")]
    done = subprocess.run(
        [sys.executable, ROOT / "logger.py", "--records", "--track", "gpu"], cwd=planted, capture_output=True, text=True
    )
    assert (
        done.returncode != 0
        and done.stderr.startswith("error: no track 'gpu' below records")
        and done.stderr.count("\n") == 1
    )


def test_the_track_agrees_with_data_and_rules():
    assert RULES["corpus_sha256"] == sources.TORCH_CORPUS
    assert train_muon.PRESETS["cpu"].val_tokens == RULES["val_tokens"]
    rules = (ROOT / "records/README.md").read_text()
    for words in (
        f"{RULES['val_tokens']:,} tokens",
        f"plus {RULES['margin']}",
        f"p < {RULES['p']}",
        f"At least {RULES['seeds']} seeds",
        f"{RULES['tuning_runs']} short runs",
        f"{RULES['seconds']['short']} seconds",
        f"{RULES['seconds']['full']} seconds",
    ):
        assert words in rules
    parsers = {"data.py": prepare.parse, "benchmarks/track.py": track.parse, "logger.py": logger.parse}
    for line in re.search(r"```bash\n(.*?)```", rules, re.S)[1].splitlines():
        _, script, *words = shlex.split(line)
        parsers[script](words)


# -----------------------------------------------------------------------------
# The runner, on tiny runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Shards that pass for the pinned corpus of this torch; a tiny track pins their sha256."""
    folder = write_data(tmp_path_factory.mktemp("data") / "python", WORDS["greek"])
    meta_file = Path(folder) / "meta.json"
    request = {"source": "python", "encoding": "bytes", "max_tokens": None, "split_seed": 0}
    meta_file.write_text(
        json.dumps(json.loads(meta_file.read_text()) | {"request": request, "corpus_sha256": "a" * 64})
    )
    return folder


@pytest.fixture
def tiny(tmp_path, corpus, monkeypatch):
    """(folder of a track of two seeds on one thread, command lines of its runs with threads=<n> at the end).
    The runs are made in this process."""
    folder, launched = tmp_path / "records/tiny", []
    folder.mkdir(parents=True)
    pinned = {sources.torch_version(): "a" * 64}
    rules = RULES | dict(row_1=None, target=None, seeds=2, threads=1, val_tokens=128, margin=1.0, corpus_sha256=pinned)
    (folder / "track.json").write_text(json.dumps(rules))

    def launch(words, threads):
        launched.append([*words, f"threads={threads}"])
        monkeypatch.setattr(sys, "orig_argv", ["python", *map(str, words)])  # the command in run.log
        recipe, _, _ = track.find_recipe(words[0], words[1:])
        status, _, err = call(lambda: train_muon.main(recipe), words[1:])
        print(err, file=sys.stderr)
        return status

    monkeypatch.setattr(track, "launch", launch)
    monkeypatch.setattr(facts, "matmul_rate", lambda device, dtype: 1e11)
    return folder, launched


def tiny_command(corpus, script="train_muon.py", **flags):
    run = dict(seq_len=32, batch_tokens=384, micro_batch_tokens=384, window_start=64, warmup_steps=0)
    return [
        "--data",
        corpus,
        "--",
        script,
        *(f"--{name}={value}" for name, value in (TINY_MODEL | run | flags).items()),
    ]


def run_track(*words) -> tuple[int, str, str]:
    return call(track.main, words)


def refused(*words) -> str:
    """The one sentence of a command that must fail."""
    status, _, err = run_track(*words)
    said = err.strip().splitlines()[-1]
    assert status != 0 and said.startswith("track.py: error: ") and "Traceback" not in err, (status, err)
    return said


def lines_of(folder):
    return [json.loads(line) for line in (folder / "tuning.jsonl").read_text().splitlines()]


def test_the_curve_pairs_seeds_at_every_length_that_both_rows_have(tiny):
    folder, _ = tiny
    ends = [
        ("A, 60 s", [0, 1], [1.5, 1.6]),
        ("B, 60 s", [1, 0], [1.65, 1.52]),
        ("A, 180 s", [0, 1], [1.2, 1.3]),
        ("B, 180 s", [0], [1.1]),
        ("B, 180 s", [1], [None]),
        ("A, 600 s", [0], [1.0]),
        ("B, 600 s", [1], [0.9]),
        ("A", [0], [9.0]),
    ]
    lines = [json.dumps({"name": name, "seeds": seeds, "val/bpb": values}) + "\n" for name, seeds, values in ends]
    (folder / "tuning.jsonl").write_text("".join(lines))
    status, out, err = run_track("curve", "--record", "--track", folder, "A", "B")
    assert status == 0, err
    assert out.splitlines() == [
        "60 s: A - B: mean -0.0350, standard error 0.0150, n = 2, p = 0.26",
        "180 s: A - B: mean +0.1000, standard error nan, n = 1, no p from one seed",
        str(folder / "curve.png"),
    ]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "no runs are named C" in refused("curve", "--track", folder, "A", "C")


@pytest.mark.slow
def test_short_runs_fill_their_seconds_and_are_compared_in_pairs(tiny, corpus):
    folder, launched = tiny
    short = lambda name, *words: ("short", "--record", "--track", folder, "--name", name, "--seeds", *words)
    status, _, err = run_track(*short("MoE", 0, 1, "--row", "MoE Muon", "--seconds", 0.2), *tiny_command(corpus))
    assert status == 0, err
    line = lines_of(folder)[0]
    assert line["steps"] == int(200 / line["step_ms"]) and len(launched) == 3
    assert (line["name"], line["row"], line["script"], line["seeds"]) == ("MoE", "MoE Muon", "train_muon.py", [0, 1])
    assert 0.02 < line["seconds"][0] < 2 and len(set(line["val/bpb"])) == 2 and line["torch"] == sources.torch_version()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", line["date"]) and re.match(r"[0-9a-f]{40}|not available", line["commit"])
    # more seeds of the same name take the same steps; a dense twin
    assert run_track(*short("MoE", 2), *tiny_command(corpus))[0] == 0
    dense = tiny_command(corpus, "train_adamw.py", pattern="D")
    assert run_track(*short("dense", 0, 2, 3, "--steps", 3, "--threads", 3), *dense)[0] == 0
    lines = lines_of(folder)
    assert [line["threads"] for line in lines] == [1, 1, 3] and [words[-1] for words in launched[-4:]] == [
        "threads=1",
        *["threads=3"] * 3,
    ]
    assert lines[1]["steps"] == line["steps"] and lines[2]["steps"] == 3 and lines[2]["step_ms"] is None
    status, out, _ = run_track("compare", "--record", "--track", folder, "MoE", "dense")
    differences = [line["val/bpb"][0] - lines[2]["val/bpb"][0], lines[1]["val/bpb"][0] - lines[2]["val/bpb"][1]]
    error = abs(differences[0] - differences[1]) / 2
    last = out.splitlines()[-1]
    assert status == 0 and last.startswith(f"mean {mean(differences):+.4f}, standard error {error:.4f}, n = 2, p = ")
    assert "no runs are named sparse" in refused("compare", "--record", "--track", folder, "MoE", "sparse")
    assert "with other flags, or with one of these seeds" in refused(*short("MoE", 1), *tiny_command(corpus))
    log = folder / "tuning.jsonl"
    log.write_text(log.read_text().replace(lines[0]["settings"], "0" * 64))  # as if a preset had been another one
    assert "which have changed since" in refused(*short("MoE", 5), *tiny_command(corpus))
    assert "13 short runs" in refused(*short("x", *range(11), "--row", "MoE Muon"), *tiny_command(corpus))
    # a run that diverges is listed too
    wild = tiny_command(corpus, "train_adamw.py", embed_lr=1e29, router_lr=1e29, lr_warmup=0)
    assert "ended with status 1" in refused(*short("wild", 0, 1, "--steps", 9), *wild)
    assert lines_of(folder)[3]["val/bpb"] == [None] and lines_of(folder)[3]["seeds"] == [0]


@pytest.mark.slow
def test_full_records_from_the_first_row_to_the_table(tiny, corpus, monkeypatch):
    folder, launched = tiny
    first, second = folder / "2026-01-01_Dense", folder / "2026-01-02_MoE"
    full = lambda folder, *words, steps=4: (
        "full",
        "--folder",
        folder,
        "--steps",
        steps,
        "--seeds",
        0,
        1,
        "--rounds",
        2,
        *words,
    )
    dense = tiny_command(corpus, "train_adamw.py", pattern="D")
    status, _, err = run_track(*full(first, *dense))
    assert status == 0, err
    assert sorted(path.name for path in first.iterdir()) == [
        "README.md",
        "config.json",
        "seed0.jsonl",
        "seed0.log",
        "seed1.jsonl",
        "seed1.log",
    ]
    config = json.loads((first / "config.json").read_text())
    assert (
        config["track"]["script"] == "train_adamw.py"
        and config["model"]["pattern"] == "D"
        and "seed" not in config["hyperparameters"]
    )
    rules = json.loads((folder / "track.json").read_text())
    assert rules["row_1"] == first.name and len(launched) == 2
    # the second row is cut off in its second seed, and goes on; in between, other flags are refused
    real = track.launch
    monkeypatch.setattr(track, "launch", lambda words, threads: 1 if "--seed=1" in words else real(words, threads))
    assert "status 1" in refused(*full(second, *tiny_command(corpus)))
    assert not second.exists()
    monkeypatch.setattr(track, "launch", real)
    assert "begun with other flags" in refused(*full(second, *tiny_command(corpus), steps=5))
    before = (folder / "2026-01-02_MoE.partial/seed0.log").read_bytes()
    launched.clear()
    status, _, err = run_track(*full(second, *tiny_command(corpus)))
    assert status == 0, err
    assert (second / "seed0.log").read_bytes() == before and not (folder / "2026-01-02_MoE.partial").exists()
    scripts = [words[0] for words in launched]
    assert scripts == ["train_muon.py"] + ["train_muon.py", "train_adamw.py", "train_adamw.py", "train_muon.py"], (
        "one seed, then rounds in turns"
    )
    assert "--pattern=D" in launched[2] and "--num_iterations=4" not in launched[2]
    assert (
        f"full --folder records/tiny/{second.name} --steps 4 --seeds 0 1 -- train_muon.py --n_layer=2"
        in (second / "README.md").read_text()
    )
    assert corpus not in "".join((second / name).read_text() for name in ("README.md", "config.json", "timing.json")), (
        "a path of this machine"
    )
    timing = json.loads((second / "timing.json").read_text())
    assert len(timing["rounds"]) == 2 and min(timing["row"], timing["row_1"]) > 0
    check_table(printed(folder.parents[1]), folder.parents[1])
    assert "already holds a record" in refused(*full(second, *tiny_command(corpus)))


def test_a_record_begun_with_other_sources_is_not_continued(tmp_path):
    rule, text = "-" * 100, (ROOT / "cli.py").read_text()
    for body, same in ((text, True), (text.replace("import", "export"), False)):
        log = f"{rule}\ncli.py\n{rule}\n{body}{rule}\nelsewhere.py\n{rule}\nx = 1\n{'=' * 100}\n"
        (tmp_path / "seed0.log").write_text(log)
        assert track.sources_are_those_of(tmp_path) == same


def test_what_the_track_does_not_allow_is_refused(tiny, corpus, tmp_path, monkeypatch):
    folder, launched = tiny
    short = lambda *command, seeds=(0,): refused(
        "short", "--record", "--track", folder, "--name", "x", "--seeds", *seeds, *command
    )
    full = lambda name, *seeds: refused(
        "full", "--folder", folder / name, "--steps", 3, "--seeds", *seeds, *tiny_command(corpus)
    )
    assert "--val_tokens is set by the track" in short(*tiny_command(corpus), "--val-tokens", 64)
    assert "--data is set by the track" in short(*tiny_command(corpus, data=corpus))
    assert "not a training script" in short("--", "model.py")
    assert "seq_len is 96" in short(*tiny_command(corpus, seq_len=96))
    assert "pattern is 'X'" in short(*tiny_command(corpus, pattern="X"))
    assert "YYYY-MM-DD_Name" in full("MoE", 0, 1)
    assert "n is at least 2" in full("2026-01-01_MoE", 0) and "0 to n - 1" in full("2026-01-01_MoE", 0, 2)
    part = shutil.copytree(corpus, tmp_path / "part")
    edit("meta.json", '"max_tokens": null', '"max_tokens": 9999')(part)
    assert "does not hold the corpus pinned for torch" in short(*tiny_command(part)) and "python data.py" in short(
        *tiny_command(part)
    )
    edit("meta.json", "a" * 64, "b" * 64)(Path(shutil.copytree(corpus, tmp_path / "other")))
    assert "does not hold the corpus" in short(*tiny_command(tmp_path / "other"))
    rules = json.loads((folder / "track.json").read_text())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (folder / "track.json").write_text(json.dumps(rules | {"gpu": "NVIDIA H200"}))
    assert "this track's clock is that of one NVIDIA H200; the GPU here is none" in short(*tiny_command(corpus))
    (folder / "track.json").write_text(json.dumps(rules))
    monkeypatch.setattr(sources, "torch_version", lambda: "9.9.9")
    assert re.search(r"torch 9\.9\.9 is not pinned for this track .*pip install torch==", short(*tiny_command(corpus)))
    assert not launched and not list(folder.glob("*/"))
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(SystemExit):
        track.parse(["short", "--name", "x", "--seeds", "0"])


@pytest.mark.slow
def test_the_script_runs_as_one_types_it(tmp_path, corpus):
    """Processes of its own, from another directory than the repository's."""
    pinned = {sources.torch_version(): "a" * 64}
    (tmp_path / "track.json").write_text(json.dumps(RULES | dict(val_tokens=128, threads=1, corpus_sha256=pinned)))
    words = [
        "short",
        "--record",
        "--track",
        tmp_path,
        "--name",
        "MoE",
        "--seeds",
        5,
        "--steps",
        2,
        *tiny_command(corpus),
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/track.py", *map(str, words)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^seed 5: val/bpb \d\.\d{4} after 2 steps", done.stdout, re.M)
    assert lines_of(tmp_path)[0]["seeds"] == [5]


def test_a_corpus_of_files_is_pinned_by_its_shards(tmp_path, corpus):
    """Whatever torch is installed; another text, another pin."""
    folder = Path(shutil.copytree(corpus, tmp_path / "files"))
    meta = json.loads((folder / "meta.json").read_text())
    del meta["corpus_sha256"]  # which only the source of torch has
    (folder / "meta.json").write_text(json.dumps(meta))
    pin = track.shards_sha256(meta)
    rules = dict(
        source="python",
        encoding="bytes",
        prepare="python data.py --source files --path x.txt",
        corpus_sha256={ANY_TORCH: pin},
    )
    assert track.pinned_corpus(rules, folder)["corpus_sha256"] == pin
    meta["shards"][0]["sha256"] = "0" * 64
    assert track.shards_sha256(meta) != pin
    other = rules | {"corpus_sha256": {ANY_TORCH: "f" * 64}}
    with pytest.raises(UserError, match="run `python data.py --source files --path x.txt --out"):
        track.pinned_corpus(other, folder)
    with pytest.raises(UserError, match="run `python -m pip download x && python data.py"):
        track.pinned_corpus(other | {"download": "python -m pip download x"}, folder)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in (ROOT / "records").glob("*/track.json")))
def test_every_track_s_commands_are_those_of_its_files(name):
    """track.json says which preset, device and data its runs take; the command that makes the data parses."""
    rules = json.loads((ROOT / "records" / name / "track.json").read_text())
    hp = train_muon.PRESETS[rules["preset"]]
    assert rules["device"] in ("cpu", "cuda") and rules["val_tokens"] % hp.seq_len == 0
    args = prepare.parse(shlex.split(rules["prepare"])[2:])
    assert (args.source, args.encoding) == (rules["source"], rules["encoding"])
    for word in rules.get("download", "").split():
        assert not word.startswith("records/") or (ROOT / word).is_file()
    assert (
        rules["data"] == (args.out or f"data/{args.source}")
        or f"--out {rules['data']}" in (ROOT / f"records/{name}/README.md").read_text()
    )


def test_every_recipe_is_on_the_track():
    scripts = {"train_muon.py": train_muon.MUON, "train_adamw.py": train_adamw.ADAMW, "train_zoo.py": ZOO_MUON}
    for script, recipe in scripts.items():
        assert track.find_recipe(script, [])[0].script == recipe.script
    settings = (*dataclasses.fields(ZOO_MUON.train_config), *dataclasses.fields(ZOO_MUON.model_config))
    fields = {field.name for field in settings} | {"resume", "enable_profiling", "plan", "experiment_name"}
    assert set(track.OURS) <= fields


# -----------------------------------------------------------------------------
# Tables of ablations


@pytest.mark.parametrize("plan", ("ablations", "depths"))
def test_the_tables_of_ablations_are_what_was_measured(plan):
    """ABLATIONS.md holds the table of the plan, its timing and tuning.jsonl; each change has two seeds or more."""
    folder = ROOT / "records/cpu"
    listed, track_file, timing = (
        logger.read_json(folder / name) for name in (f"{plan}.json", "track.json", f"{plan}.timing.json")
    )
    lines = track.read_tuning(folder / "tuning.jsonl")
    table = track.ablation_table(listed, track_file, timing, lines)
    assert table in (folder / "ABLATIONS.md").read_text()
    seeds = {
        name: sum(len(line["seeds"]) for line in lines if line["name"] == name)
        for name in track.ablation_commands(listed)
    }
    assert min(seeds.values()) >= 2, seeds


def test_equal_seconds_are_as_many_steps_as_a_change_is_cheaper():
    track_file = {"seconds": {"short": 60}, "metric": "val/bpb"}
    timing = {
        "p, g: a": {"base_ms": 300.0, "ratio": 1.5},
        "p, g: b": {"base_ms": 310.0, "ratio": 0.5},
        "p, h: a": {"base_ms": 100.0, "ratio": 1.0},
    }
    assert [track.ablation_steps(track_file, timing, name) for name in ("p, g", "p, g: a", "p, g: b")] == [
        196,
        131,
        393,
    ]
    plan = {"name": "p", "groups": [{"title": "g", "base": ["train_muon.py"], "changes": {"a": ["--x", "1"]}}]}
    assert track.ablation_commands(plan) == {"p, g": ["train_muon.py"], "p, g: a": ["train_muon.py", "--x", "1"]}
    lines = [{"name": name, "seeds": [seed], "val/bpb": [value]} for name, seed, value in (
        ("p, g", 0, 1.3), ("p, g", 1, 1.2), ("p, g: a", 0, 1.25), ("p, g: a", 1, 1.19))]  # fmt: skip
    row = track.ablation_table(plan, track_file, timing, lines).splitlines()[-1]
    assert row == "| a | `--x 1` | 1.500 | 131 | 1.2200 | +0.0300 ± 0.0200 | 2 |"


@pytest.mark.parametrize("name, tables", [("arithmetic", arithmetic.tables), ("domains", domains.tables)])
def test_tables_of_experiments_are_those_of_their_runs(name, tables):
    """The README holds what the runs' lines give."""
    folder = ROOT / "records" / name
    lines = track.read_tuning(folder / "results.jsonl")
    assert len(lines) > 10
    for table in tables(lines).split("\n\n"):
        assert table in (folder / "README.md").read_text()
