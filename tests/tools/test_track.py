"""benchmarks/track.py for a researcher: any training script, any text, a file of one's own, p and a picture.

CPU, no network, about a minute: `pytest tests/tools/test_track.py`."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_records import RULES, corpus, lines_of, refused, run_track, tiny, tiny_command  # noqa: F401  (fixtures)

import data
import model
import train_muon
from benchmarks import track
from cli import UserError
from tools import prepare, sources

ROOT = Path(__file__).resolve().parents[2]

PAGES = [ROOT / "README.md", ROOT / "docs/extending.md"]
BLOCK = re.compile(r"```python file: (\w+\.py)\n(.*?)^```", re.M | re.S)
SHOWN = {name: body for page in PAGES for name, body in BLOCK.findall(page.read_text())}  # scripts of the documentation
OPTIMIZER = '''
from dataclasses import dataclass
import train_muon
from train_muon import main

@dataclass(frozen=True, kw_only=True)
class SignConfig(train_muon.MuonConfig):
    # signs
    sharpness: float = 2.0  # of the sign

presets = {name: SignConfig(**vars(preset)) for name, preset in train_muon.PRESETS.items()}
if __name__ == "__main__":
    main(train_muon.MUON._replace(name="sign", train_config=SignConfig, presets=presets))
'''


@pytest.fixture
def scripts(tmp_path):
    """Training scripts of a user, in a folder of their own."""
    for name, body in SHOWN.items():
        (tmp_path / name).write_text(body)
    (tmp_path / "my_optimizer.py").write_text(OPTIMIZER)
    (tmp_path / "no_training.py").write_text("print('hello')\n")
    (tmp_path / "early.py").write_text("import train_muon\nif False:\n    train_muon.main(train_muon.MUON)\n")
    return tmp_path


def short(folder, name, *words):
    return ("short", "--track", folder, "--results", folder / "mine.jsonl", "--name", name, "--seeds", *words)


def mine(folder):
    return track.read_tuning(folder / "mine.jsonl")


# -----------------------------------------------------------------------------
# Scripts


def test_the_recipe_is_the_one_that_a_script_passes_to_main(scripts, monkeypatch):
    monkeypatch.setattr(model, "ROUTERS", dict(model.ROUTERS))  # my_router.py adds an entry
    recipe, config, _ = track.find_recipe(str(scripts / "my_router.py"), ["--router", "prior"])
    assert recipe.name == "muon" and config.router == "prior"
    assert track.find_recipe(str(scripts / "train_lion.py"), [])[0].name == "lion"
    recipe, _, hp = track.find_recipe(str(scripts / "my_optimizer.py"), ["--sharpness=3"])
    assert recipe.name == "sign" and hp.sharpness == 3.0
    recipe, config, _ = track.find_recipe("train_zoo.py", ["--optimizer", "adamw", "--experts", "mlp*3,zero"])
    assert recipe.name == "adamw" and config.num_experts == 4, "the flags are those that the script passes on"
    assert train_muon.main.__module__ == "train_muon", "main is as it was"


def test_a_script_that_does_not_train_is_refused_in_one_sentence(tiny, scripts, capsys):
    folder, launched = tiny
    for script in ("model.py", "absent.py", scripts / "no_training.py"):
        assert "is not a training script" in refused(*short(folder, "x", 0), "--", script)
    assert "hello" not in capsys.readouterr().out, "it was not run"
    assert "ended before it called train_muon.main" in refused(*short(folder, "x", 0), "--", scripts / "early.py")
    assert "unrecognized" in run_track(*short(folder, "x", 0), "--", scripts / "my_optimizer.py", "--no_such=1")[2]
    assert not launched


@pytest.mark.slow
def test_scripts_of_a_user_run_in_processes_of_their_own(tmp_path, corpus, scripts):
    pinned = {sources.torch_version(): "a" * 64}
    (tmp_path / "track.json").write_text(json.dumps(RULES | dict(val_tokens=128, threads=1, corpus_sha256=pinned)))
    words = short(tmp_path, "prior", 5, "--steps", 2)
    command = tiny_command(corpus, str(scripts / "my_router.py"), router="prior")
    done = subprocess.run([sys.executable, ROOT / "benchmarks/track.py", *map(str, [*words, *command])], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = mine(tmp_path)[0]
    assert line["script"] == str(scripts / "my_router.py") and line["seeds"] == [5]
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'mine.jsonl'}: prior"


def test_the_hash_of_the_sources_covers_the_script(tiny, corpus, scripts):
    rules = json.loads((tiny[0] / "track.json").read_text())
    command = [str(scripts / "my_optimizer.py"), "--seq_len=32", "--batch_tokens=64"]
    row = lambda: track.Row(rules, command, Path(corpus), is_record=False).facts
    before = row()["source_sha256"]
    (scripts / "my_optimizer.py").write_text(OPTIMIZER + "\n# a change\n")
    assert row()["source_sha256"] != before


# -----------------------------------------------------------------------------
# Files of results


def test_results_go_to_a_file_of_the_user_unless_a_record_is_meant(tiny, corpus, tmp_path, monkeypatch):
    folder, _ = tiny
    monkeypatch.setattr(track, "LOGS", tmp_path / "logs")
    words = ("short", "--track", folder, "--name", "A", "--seeds", 0, "--steps", 2)
    status, out, err = run_track(*words, *tiny_command(corpus))
    assert status == 0 and out.splitlines()[-1] == f"{tmp_path}/logs/short_tiny.jsonl: A", err
    assert track.shown(ROOT / "logs/x.jsonl") == Path("logs/x.jsonl")
    assert (tmp_path / "logs/short_tiny.jsonl").exists() and not (folder / "tuning.jsonl").exists()
    status, out, _ = run_track(*words, "--record", *tiny_command(corpus))
    assert status == 0 and out.splitlines()[-1].endswith("tuning.jsonl: A") and len(lines_of(folder)) == 1
    assert "--row names a row of the record's budget" in refused(*words, "--row", "MoE Muon", *tiny_command(corpus))
    both = (*words, "--record", "--results", "x", *tiny_command(corpus))
    assert "--record is the track's own file" in run_track(*both)[2]


def write_lines(file: Path, ends, **more):
    lines = [{"name": name, "seeds": seeds, "val/bpb": values} | more for name, seeds, values in ends]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


ENDS = [("A, 60 s", [0, 1, 2], [1.50, 1.60, 1.55]), ("B, 60 s", [0, 1, 2], [1.52, 1.65, 1.58]),
        ("A, 180 s", [0, 1], [1.2, 1.3]), ("B, 180 s", [0, 1], [1.1, 1.1]),
        ("dense, it's mine", [0, 1], [1.4, 1.5])]  # fmt: skip


def test_names_are_taken_as_printed(tiny):
    """Every name that compare prints is one that compare and curve take, quotes and all."""
    folder, _ = tiny
    write_lines(folder / "mine.jsonl", ENDS)
    where = ("--track", folder, "--results", folder / "mine.jsonl")
    status, out, _ = run_track("compare", *where)
    printed = [shlex.split(line, comments=True)[0] for line in out.splitlines()]
    assert status == 0 and printed == [name for name, _, _ in ENDS] and out.splitlines()[0].endswith("# 3 seeds")
    for name in printed:
        assert run_track("compare", *where, name, printed[0])[0] == 0
    for names in (("A", "B"), ("A, 60 s", "B"), ("A, 60 s", "B, 180 s")):
        status, out, err = run_track("curve", *where, *names)
        assert status == 0 and [line[: line.index(" s:")] for line in out.splitlines()[:-1]] == ["60", "180"], err
    status, out, _ = run_track("compare", *where, "A", "B")  # at the greatest length that both have
    assert status == 0 and out.splitlines()[0] == "seed 0: 1.2000 - 1.1000 = +0.1000"
    assert refused("compare", *where, "A, 61 s", "B").endswith("""; the nearest: 'A, 60 s' 'A, 180 s' 'B, 60 s'""")
    assert "compare takes two names" in run_track("compare", *where, "A")[2]
    assert "are one name" in refused("curve", *where, "A", "A, 60 s")


def test_names_of_the_track_can_be_compared_with_those_of_the_user(tiny, tmp_path, monkeypatch):
    folder, _ = tiny
    monkeypatch.setattr(track, "LOGS", tmp_path / "logs")
    (tmp_path / "logs").mkdir()
    write_lines(folder / "tuning.jsonl", [("theirs", [0, 1], [1.0, 1.1]), ("both", [0, 1], [5.0, 5.0])])
    write_lines(tmp_path / "logs/short_tiny.jsonl", [("both", [0, 1], [0.9, 1.05])])
    status, out, err = run_track("compare", "--track", folder, "theirs", "both")
    assert status == 0 and "seed 0: 1.0000 - 0.9000 = +0.1000" in out, err
    assert "5.0000" in run_track("compare", "--record", "--track", folder, "theirs", "both")[1]


@pytest.mark.slow
def test_a_length_may_be_given_as_seconds_instead_of_in_the_name(tiny, corpus):
    folder, _ = tiny
    for name, pattern in (("A", "M"), ("B", "D")):
        words = short(folder, name, 0, 1, "--seconds", 0.2)
        assert run_track(*words, *tiny_command(corpus, pattern=pattern))[0] == 0
    assert {line["budget"] for line in mine(folder)} == {0.2}
    status, out, err = run_track("curve", "--track", folder, "--results", folder / "mine.jsonl", "A", "B")
    assert status == 0 and out.startswith("0.2 s: A - B: mean "), err
    assert (folder / "mine.png").exists() and not (folder / "curve.png").exists()
    assert "with other flags" in refused(*short(folder, "A", 2, "--seconds", 3), *tiny_command(corpus))


# -----------------------------------------------------------------------------
# p, and the picture


def test_p_is_that_of_a_paired_t_test():
    """By the closed forms of Student's t: 2 degrees of freedom, and 1."""
    a, b = {0: 1.0, 1: 1.1, 2: 1.3}, {0: 0.9, 1: 1.05, 2: 1.15}
    mean, error, n = track.paired(a, b)
    t = mean / error
    assert track.two_sided_p(mean, error, n) == pytest.approx(1 - t / (2 + t * t) ** 0.5)
    assert track.two_sided_p(-mean, error, n) == track.two_sided_p(mean, error, n)
    assert track.two_sided_p(1.0, 1.0, 2) == pytest.approx(0.5)
    assert track.two_sided_p(0.0, 0.0, 3) == 1.0 and track.two_sided_p(0.1, 0.0, 3) == 0.0
    assert track.difference(a, b).endswith(f"n = 3, p = {1 - t / (2 + t * t) ** 0.5:.2g}")
    assert track.difference({0: 1.0}, {0: 1.1}).endswith("no p from one seed")
    scipy = pytest.importorskip("scipy.stats")
    theirs = scipy.ttest_rel(list(a.values()), list(b.values())).pvalue
    assert track.two_sided_p(mean, error, n) == pytest.approx(theirs)


def test_the_picture_has_every_seed_at_its_place():
    rows = track.seed_picture({"A": {0: 1.0, 1: 1.5}, "long": {0: 2.0, 11: 1.5, 2: 2.0}}, width=21).splitlines()
    assert rows == ["A     0    |    1", "long            1      |  *", "      1.0000         2.0000"]


def test_compare_prints_the_picture_and_p(tiny):
    folder, _ = tiny
    write_lines(folder / "mine.jsonl", ENDS)
    status, out, _ = run_track("compare", "--track", folder, "--results", folder / "mine.jsonl", "A, 60 s", "B, 60 s")
    lines = out.splitlines()
    assert status == 0 and lines[3].startswith("A, 60 s  0") and lines[4].startswith("B, 60 s  ")
    assert re.fullmatch(r" +1\.5000 +1\.6500", lines[5])
    assert re.fullmatch(r"mean -0\.0333, standard error 0\.0088, n = 3, p = 0\.063", lines[6])


# -----------------------------------------------------------------------------
# Text and machine


def test_text_of_ones_own_serves_short_runs_but_no_record(tiny, corpus, tmp_path):
    folder, _ = tiny
    notes = [f"note {i}: the tide is {i % 7} feet\n<|endoftext|>" for i in range(3000)]
    (tmp_path / "notes.txt").write_text("\n".join(notes))
    assert run_prepare(tmp_path)[0] == 0
    own = tiny_command(str(tmp_path / "notes"))
    status, out, err = run_track(*short(folder, "own", 0, "--steps", 3), *own)
    assert status == 0 and "seed 0: val/bpb" in out, err
    assert run_track(*short(folder, "pinned", 0, "--steps", 3), *tiny_command(corpus))[0] == 0
    said = refused("compare", "--track", folder, "--results", folder / "mine.jsonl", "own", "pinned")
    assert "were run on different --data" in said
    assert "with other --data" in refused(*short(folder, "own", 1, "--steps", 3), *tiny_command(corpus))
    record = ("short", "--record", "--track", folder, "--name", "x", "--seeds", 0)
    assert "other text serves runs without --record" in refused(*record, *own)


def run_prepare(folder: Path):
    from test_train import call

    words = ["--source", "files", "--path", folder / "notes.txt", "--encoding", "bytes", "--out", folder / "notes"]
    return call(prepare.main, words)


def test_a_track_may_pin_a_text_made_from_files_and_its_runs_leave_no_checkpoint(tiny, tmp_path):
    (tmp_path / "notes.txt").write_text("\n".join(f"note {i}: the tide is {i % 7} feet" for i in range(3000)))
    assert run_prepare(tmp_path)[0] == 0
    notes, rules = tmp_path / "notes", json.loads((tiny[0] / "track.json").read_text())
    pins = {sources.torch_version(): track.shards_sha256(data.load_meta(notes))}
    files = {"source": "files", "encoding": "bytes", "corpus_sha256": pins}
    command = tiny_command(str(notes))[3:]
    row = track.Row(rules | files, command, notes)
    assert row.facts["corpus_sha256"] == pins[sources.torch_version()]
    rows = row.run(tmp_path / "out", "seed0", num_iterations=2, val_tokens=64)
    assert rows[-1]["step"] == 2 and (tmp_path / "out/seed0/run.log").exists()
    assert not (tmp_path / "out/seed0/checkpoint").exists(), "a retimed record would fill the disk with them"


def test_more_seeds_of_a_name_have_its_length_and_unequal_lengths_are_noted(tiny, corpus, capsys):
    folder, _ = tiny
    lines = [{"name": name, "budget": seconds, "seeds": [0], "val/bpb": [value], "corpus_sha256": "a", "torch": "t"}
             for name, seconds, value in (("A", 60, 1.2), ("B", 600, 1.1))]  # fmt: skip
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, _, err = run_track("compare", "--track", folder, "--results", folder / "mine.jsonl", "A", "B")
    assert status == 0 and "note: 'A' had 60 s, 'B' 600 s" in err
    (folder / "mine.jsonl").unlink()
    assert run_track(*short(folder, "C", 0, "--seconds", 1), *tiny_command(corpus))[0] == 0
    assert run_track(*short(folder, "C", 1), *tiny_command(corpus))[0] == 0
    assert [(line["seeds"], line["budget"]) for line in mine(folder)] == [([0], 1.0), ([1], 1.0)]


def test_the_steps_of_an_ablation_are_timed_with_the_vocabulary_of_the_data(tiny, corpus):
    rules = json.loads((tiny[0] / "track.json").read_text())
    stepper = track.Stepper(track.Row(rules, tiny_command(corpus)[3:], Path(corpus)))
    try:
        assert stepper.session.model.config.vocab_size == data.load_meta(Path(corpus))["vocab_size"] == 257
        assert stepper.milliseconds() > 0
    finally:
        stepper.loader.close()


def test_a_finished_plan_prints_its_table_without_its_scripts(capsys):
    """The flags of an old plan may be gone."""
    status, out, err = run_track("ablate", "--plan", "records/cpu/ablations.json", "--seeds", 0, 1)
    assert status == 0 and "| change | flags | step / base's |" in out, err


def test_a_change_that_fails_is_noted_and_blocks_no_plan(tiny, corpus, monkeypatch):
    (folder, launched), train = tiny, track.launch
    monkeypatch.setattr(track, "launch", lambda words, threads: "--muon_lr=9.0" in words or train(words, threads))
    base, changes = tiny_command(corpus)[3:], {"bad": ["--muon_lr=9.0"]}
    plan = {"name": "p", "groups": [{"title": "g", "base": base, "changes": changes}]}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "plan.timing.json").write_text(json.dumps({"p, g: bad": {"base_ms": 15_000, "ratio": 1.0}}))
    words = ("ablate", "--plan", folder / "plan.json", "--data", corpus, "--seeds", 0)
    status, out, err = run_track(*words)
    assert status == 0 and "p, g: bad, seed 0: train_muon.py ended with status" in err, (out, err)
    found = {line["name"]: line["val/bpb"] for line in lines_of(folder)}
    assert found["p, g: bad"] == [None] and found["p, g"][0] > 0
    count = len(launched)
    assert run_track(*words)[0] == 0 and len(launched) == count == 1, "nothing is run again"


def test_a_text_with_few_validation_tokens_is_validated_whole(tiny, corpus, capsys):
    folder, _ = tiny
    rules = json.loads((folder / "track.json").read_text()) | {"val_tokens": 2**20}
    row = track.Row(rules, ["train_muon.py", "--seq_len=32", "--batch_tokens=64"], Path(corpus), is_record=False)
    assert row.val_tokens == 0 and "validation tokens, fewer than the track's 1,048,576" in capsys.readouterr().err


def test_another_gpu_or_torch_serves_short_runs_but_no_record(tiny, corpus, monkeypatch):
    folder, _ = tiny
    rules = json.loads((folder / "track.json").read_text()) | {"gpu": "NVIDIA H200", "corpus_sha256": {"1.0": "a" * 64}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["train_muon.py", "--seq_len=32", "--batch_tokens=64"]
    assert track.Row(rules, command, Path(corpus), is_record=False).facts["corpus_sha256"] == "a" * 64
    with pytest.raises(UserError, match="NVIDIA H200"):
        track.Row(rules, command, Path(corpus))
    with pytest.raises(UserError, match="is not pinned for this track"):
        track.Row({name: value for name, value in rules.items() if name != "gpu"}, command, Path(corpus))


def test_the_default_command_names_preset_and_device_on_a_cuda_machine(tiny, corpus, monkeypatch):
    """There no preset means speedrun; the run gets the track's preset, data and device."""
    folder, launched = tiny
    monkeypatch.setattr(track, "launch", lambda words, threads: launched.append(words) or 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert "ended with status 1" in refused(*short(folder, "x", 0, "--steps", 2), *tiny_command(corpus))
    assert {"--preset=cpu", f"--data={corpus}", "--device=cpu"} <= set(launched[0])


def test_help_fits_two_screens():
    for words in ([], ["short"], ["compare"], ["curve"], ["full"], ["ablate"]):
        status, out, _ = run_track(*words, "--help")
        lines = out.splitlines()
        assert status == 0 and len(lines) <= 100 and max(map(len, lines)) <= 120
        assert words or [line for line in lines if line.startswith("  python benchmarks/track.py ")]
    for line in run_track("--help")[1].splitlines():
        if line.startswith("  python benchmarks/track.py "):
            track.parse(shlex.split(line)[2:])


