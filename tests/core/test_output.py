"""What the programs print: help, progress, notes on long work, and the commands at the end of a run.

CPU, no network, about a minute: `pytest tests/core/test_output.py`."""

import dataclasses
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import TINY_MODEL, call, flags, no_matmul_rate, rows_of, shards, train  # noqa: F401  (fixtures)

import guards
import logger
import model
import terminal
import train_adamw
import train_muon
import train_zoo
import zoo
from cli import Parser, UserError, add_flags
from terminal import Progress
from tools import generate, prepare
from zoo.recipes import ZOO_ADAMW, ZOO_MUON

ROOT = Path(__file__).resolve().parents[2]
SCREEN, WIDTH = 50, 120  # lines, columns

# -----------------------------------------------------------------------------
# Help

SCRIPTS = {
    "train_muon.py": lambda: train_muon.main(train_muon.MUON),
    "train_adamw.py": lambda: train_muon.main(train_adamw.ADAMW),
    "train_zoo.py": train_zoo.main,
    "data.py": prepare.main,
    "logger.py": logger.main,
    "model.py": generate.main,
}
MOST_USED = {
    "data.py": "source path out encoding max_tokens",
    "logger.py": "experiment_name out_dir html follow routes",
    "model.py": "preset checkpoint prompt max_new_tokens temperature",
}
OF_TRAINING = "experiment_name preset data num_iterations resume"


def help_of(script: str, *words: str, page: tuple[str, ...] = ()) -> list[str]:
    status, out, err = call(SCRIPTS[script], [*words, "--help", *page])
    assert status == 0 and err == "", err
    return out.splitlines()


def entries(lines: list[str]) -> dict[str, str]:
    """Flag -> its line."""
    return {match[1]: line for line in lines if (match := re.match(r"  --(\S+)", line))}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_two_screens_with_the_most_used_flags_and_examples_first(script):
    lines = help_of(script)
    assert len(lines) <= 2 * SCREEN and max(map(len, lines)) <= WIDTH
    examples = [line for line in lines if line.startswith("  ") and script in line]
    assert len(examples) >= 3 and all(lines.index(line) < lines.index("most used:") for line in examples)
    assert list(entries(lines))[:5] == MOST_USED.get(script, OF_TRAINING).split()
    assert not [name for name in entries(lines) if "-" in name], "one spelling"


@pytest.mark.parametrize("script", SCRIPTS)
def test_examples_in_the_help_parse(script, monkeypatch):
    """Each command of the help is one of its script, whose flags are legal."""
    parse = {"data.py": prepare.parse, "logger.py": logger.parse, "model.py": generate.parse}
    recipe = {"train_adamw.py": train_adamw.ADAMW, "train_zoo.py": ZOO_MUON}.get(script, train_muon.MUON)
    parse = parse.get(script, lambda argv: train_muon.parse(recipe, argv))
    for line in help_of(script):
        if line.startswith("  ") and script in line:
            words = shlex.split(line, comments=True)
            parse(words[words.index(script) + 1 :])


@pytest.mark.parametrize("preset", ("cpu", "speedrun"))
@pytest.mark.parametrize(
    "script, recipe",
    [("train_muon.py", train_muon.MUON), ("train_adamw.py", train_adamw.ADAMW), ("train_zoo.py", ZOO_MUON)],
)
def test_help_names_every_field_with_the_default_of_its_preset(script, recipe, preset):
    lines = help_of(script, "--preset", preset)
    shown = entries(lines)
    if script == "train_zoo.py":
        shown |= entries(help_of(script, "--preset", preset, page=("zoo",)))
    for defaults in (recipe.presets[preset], recipe.model_presets[preset]):
        for name, value in vars(defaults).items():
            assert shown[name].endswith(f"(default {value!r})"), shown[name]
    assert any(f"Defaults are those of --preset {preset}." in line for line in lines)


def test_options_of_the_zoo_have_a_help_page_of_their_own():
    main, page = help_of("train_zoo.py"), help_of("train_zoo.py", page=("zoo",))
    assert any(line.endswith("--help zoo") for line in main) and max(map(len, page)) <= WIDTH
    assert entries(page).keys() == {
        field.name
        for kind in (zoo.Config, ZOO_MUON.train_config)
        for field in dataclasses.fields(kind)
        if field.name not in vars(model.Config()) | vars(train_muon.MuonConfig())
    }
    assert "--optimizer" in main[0] and "lr_warmup" in entries(help_of("train_zoo.py", "--optimizer", "adamw"))
    assert ZOO_ADAMW.train_config().lr_warmup == 250
    status, _, err = call(SCRIPTS["train_muon.py"], ["--help", "zoo"])
    assert status == 2 and err == "train_muon.py: error: there is no help page 'zoo'; pages: none (see --help)\n"


def test_groups_are_the_comments_above_fields():
    lines = help_of("train_muon.py")
    titles = [line for line in lines if not line.startswith(" ")]
    for title in ("the run:", "schedule:", "Muon:", "mixture of experts:", "attention:"):
        assert title in titles
    assert lines.index("schedule:") < lines.index(entries(lines)["cooldown_frac"]) < lines.index("Muon:")


def test_both_spellings_parse_and_a_mistake_is_one_sentence():
    for words in (["--num_iterations", "7"], ["--num-iterations=7"], ["--num_iterations=7"]):
        assert train_muon.parse(train_muon.MUON, words)[1].num_iterations == 7
    for words, named in {
        ("--num_iteration", "7"): "--num_iteration",
        ("--seed", "x"): "--seed",
        ("--preset", "x"): "x",
        ("--preset",): "--preset",
    }.items():
        status, out, err = call(SCRIPTS["train_muon.py"], words)
        assert status == 2 and out == "" and named in err
        assert err.startswith("train_muon.py: error: ") and len(err.splitlines()) == 1
    with pytest.raises(UserError, match="n_layer is 0"):
        train_muon.parse(train_muon.MUON, ["--n_layer", "0"])


@dataclasses.dataclass
class Base:
    # speed
    rate: float = 1.0  # steps per second


@dataclasses.dataclass
class Child(Base):
    rate: float = 2.0  # 100% of them


def test_a_subclass_may_change_the_comment_of_a_field():
    parser = Parser(prog="x.py")
    add_flags(parser, Child)
    assert "speed:\n  --rate X                  100% of them (default 2.0)" in parser.format_help()


# -----------------------------------------------------------------------------
# Progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_elsewhere_progress_is_a_line_every_30_seconds(clock, capsys):
    progress = Progress(total_steps=200, tokens_per_step=1000)
    for step in range(1, 101):
        clock[0] = float(step)
        progress.update(step, loss=1 / step, seconds=0.5, peak_bytes=2**30)
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        f"step {step}/200  loss {1 / step:.4f}  2,000 tokens/s  0:0{left} left  1,024 MiB"
        for step, left in ((30, "2:50"), (60, "2:20"), (90, "1:50"))
    ]


def test_on_a_terminal_progress_is_one_line_that_is_overwritten(clock, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    progress = Progress(total_steps=20, tokens_per_step=1000)
    for step in (1, 2, 3):
        clock[0] += 0.15  # more often than the eye can see
        progress.update(step, loss=2.0, seconds=0.15, peak_bytes=2**20)
    progress.pause("evaluating")
    progress.close()
    out, err = capsys.readouterr()
    states = err.split("\r\x1b[K")
    assert out == "" and "\n" not in err
    assert [state.split("  ")[0] for state in states] == ["", "step 1/20", "step 3/20", "evaluating", ""]
    assert states[1] == "step 1/20  loss 2.0000  6,667 tokens/s  0:00:03 left  1 MiB"


def test_other_ranks_are_silent(clock, capsys):
    progress = Progress(total_steps=2, tokens_per_step=1, active=False)
    clock[0] = 100.0
    progress.update(1, 1.0, 1.0, 1)
    progress.close()
    terminal.say("verifying", active=False)
    assert capsys.readouterr() == ("", "")


def test_lines_hold_the_losses_of_the_log_and_stay_out_of_it(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    status, out, err = call(
        lambda: train_muon.main(train_muon.MUON), flags(train_muon.MUON, data=shards, out_dir=tmp_path)
    )
    assert status == 0, err
    shown = dict(re.findall(r"^step (\d+)/4  loss (\S+) ", err, re.M))
    losses = {row["step"]: f"{row['train/loss']:.4f}" for row in rows_of(tmp_path / "muon") if "train/loss" in row}
    assert shown == {str(step): losses[step] for step in (1, 2, 3)}
    log = (tmp_path / "muon/run.log").read_text()
    assert "tokens/s  " not in log.split(logger.SEPARATOR)[-1] and "tokens/s  " not in out
    assert re.search(r"^step:4/4 val_loss:\d\.\d{5} train_time:\d+\.\d{3}s step_avg:\d+\.\d\dms", log, re.M)
    assert out.split("next:")[0] in log, "stdout holds the lines of run.log"


def test_progress_reads_no_loss_that_a_gpu_may_still_compute(shards, tmp_path, monkeypatch):
    made, reads = [], []

    class Watched(guards.AsyncHostCopy):
        def __init__(self, values):
            super().__init__(values)
            made.append(self)

        def read(self):
            reads.append(self is made[-1])
            return super().read()

    monkeypatch.setattr(train_muon, "AsyncHostCopy", Watched)
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    train(tmp_path, data=shards)
    assert len(reads) == 4 + 3 + 1 and reads == [False] * 7 + [True], "the last step's is read at the end alone"


def test_a_run_on_a_terminal(shards, tmp_path):
    """Live line and evaluations of a process whose stdout and stderr are a terminal."""
    words = flags(train_muon.MUON, data=shards, out_dir=tmp_path, num_iterations=30, val_every=10)
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_muon.py", *words],
        stdout=secondary,
        stderr=secondary,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(secondary)
    text = b""
    while True:
        try:
            chunk = os.read(primary, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        text += chunk
    os.close(primary)
    assert process.wait(60) == 0, text
    lines = text.decode().split("\r\n")
    live = re.findall(r"\r\x1b\[K(step \d+/30  loss [^\r]*)", text.decode())
    assert live and all(
        re.fullmatch(r"step \d+/30  loss \d\.\d{4}  [\d,]+ tokens/s  \d:\d\d:\d\d left  [\d,]+ MiB", line)
        for line in live
    )
    evaluations = [line.rpartition("\x1b[K")[2] for line in lines if "val_loss:" in line]
    assert [line.split()[0] for line in evaluations] == ["step:0/30", "step:10/30", "step:20/30", "step:30/30"]
    log = (tmp_path / "muon/run.log").read_text().split(logger.SEPARATOR)[-1]
    assert "\x1b" not in log and "tokens/s  " not in log and all(line in log for line in evaluations)


# -----------------------------------------------------------------------------
# Long silent work


@pytest.mark.slow
def test_long_work_is_named_when_it_begins(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(train_muon, "compile_model", lambda *args: "compiled")
    main = lambda: train_muon.main(train_muon.MUON)
    status, _, err = call(main, flags(train_muon.MUON, data=shards, out_dir=tmp_path, warmup_steps=2, sample_tokens=2))
    notes = [
        f"verifying the shards of {shards}",
        "compiling in the first step: minutes, or seconds from a cache",
        "warm-up steps: 2, undone before the clock starts",
        "sampling, and compressing the validation text for comparison",
    ]
    assert status == 0 and [line for line in err.splitlines() if line in notes] == notes, err
    status, _, err = call(main, flags(train_muon.MUON, data=shards, out_dir=tmp_path, enable_profiling=True))
    assert status == 0 and "profiling: 20 steps to settle, then 3 under the profiler\nwriting the trace\n" in err, err
    status, _, err = call(logger.main, ["--out_dir", tmp_path, "--html"])
    assert status == 0 and err == f"reading 1 run below {tmp_path}\ndrawing the page\n"


def test_work_that_is_not_done_is_not_named(shards, tmp_path):
    status, _, err = call(
        lambda: train_muon.main(train_muon.MUON), flags(train_muon.MUON, data=shards, out_dir=tmp_path)
    )
    assert status == 0 and "warm-up" not in err and "compiling" not in err


# -----------------------------------------------------------------------------
# The end of a run


@pytest.mark.slow
def test_the_commands_at_the_end_of_a_run_work_when_pasted(shards, tmp_path):
    out_dir = tmp_path / "my logs"
    recipe = train_muon.MUON
    status, out, err = call(
        lambda: train_muon.main(recipe), flags(recipe, data=shards, out_dir=out_dir, experiment_name="it's")
    )
    assert status == 0, err
    commands = out[out.index("next:\n") :].splitlines()[1:]
    assert [command.split("# ")[1] for command in commands] == ["sample", "look", "compare"]
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python").symlink_to(sys.executable)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=os.getcwd(), env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert (out_dir / "plots/report.html").exists() and (out_dir / "plots/val_loss.png").exists()


def test_a_run_that_is_stopped_prints_no_such_commands(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(guards.StopSignals, "__enter__", lambda self: setattr(self, "received", 15) or self)
    status, out, _ = call(
        lambda: train_muon.main(train_muon.MUON), flags(train_muon.MUON, data=shards, out_dir=tmp_path)
    )
    assert status == 128 + 15 and "--resume" in out and "next:" not in out
