"""cli.py: flags made from the fields of a dataclass. CPU, no network: `pytest tests/core/test_cli.py`."""

import inspect
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import cli
import model
import train_muon
from train_adamw import ADAMW
from train_muon import MUON

ROOT = Path(__file__).parents[2]


@dataclass
class Flags:
    compile: bool | None = None  # compile the blocks
    rate: float = 1.0
    scale: float | str = 1.0


def parser() -> cli.Parser:
    parser = cli.Parser(prog="x.py")
    cli.add_flags(parser, Flags)
    return parser


def test_optional_and_boolean_flags_parse_and_refuse(capsys):
    for text, value in (("true", True), ("False", False), ("0", False), ("none", None)):
        assert parser().parse_args(["--compile", text]).compile is value
    assert "compile" not in vars(parser().parse_args([]))  # absent, so that presets keep their value
    with pytest.raises(SystemExit) as exit:
        parser().parse_args(["--compile", "maybe"])
    assert exit.value.code == 2 and "true or false" in capsys.readouterr().err


def test_a_number_or_a_word_keeps_its_type():
    assert (
        parser().parse_args(["--scale", "2"]).scale == 2.0 and parser().parse_args(["--scale", "auto"]).scale == "auto"
    )


def test_the_help_of_a_flag_is_the_comment_behind_its_field():
    assert "compile the blocks (default None)" in " ".join(parser().format_help().split())


def test_a_flag_that_counts_is_at_least_one():
    assert cli.positive("3") == 3
    with pytest.raises(Exception, match="0 is not at least 1"):
        cli.positive("0")


def test_abbreviations_are_refused_in_one_sentence(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--rat", "2"])
    assert len(capsys.readouterr().err.splitlines()) == 1


def complaint(argv: list[str], recipe, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        train_muon.parse(recipe, argv)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("recipe, theirs, ours", [
    (MUON, "--lr", "muon_lr"), (ADAMW, "--lr", "matrix_lr"), (ADAMW, "--learning-rate=1", "matrix_lr"),
    (MUON, "--batch_size", "batch_tokens"), (MUON, "--num_iters", "num_iterations"), (MUON, "--block_size", "seq_len"),
    (MUON, "--num-iteration", "num_iterations"), (MUON, "--val_loss_every", "val_every"), (MUON, "--dim", "n_embd"),
])  # fmt: skip
def test_an_unknown_flag_names_the_one_that_was_meant(recipe, theirs, ours, capsys):
    given = theirs.partition("=")[0]
    assert f"; did you mean --{ours} for {given}? (see --help)" in complaint([theirs, "1"], recipe, capsys)


def test_a_flag_of_another_script_names_that_script(capsys):
    assert "--muon_lr is a flag of train_muon.py (see" in complaint(["--muon_lr", "1"], ADAMW, capsys)
    assert "--lr_warmup is a flag of train_adamw.py (see" in complaint(["--lr-warmup=1"], MUON, capsys)
    assert "--halt is a flag of train_zoo.py (see" in complaint(["--halt", "act"], MUON, capsys)
    assert "--prompt is a flag of model.py (see" in complaint(["--prompt", "act"], MUON, capsys)
    said = complaint(["--lr", "1", "stray", "-5", "--batch_size=2"], MUON, capsys)
    assert said.endswith("did you mean --muon_lr for --lr, --batch_tokens for --batch_size? (see --help)\n")
    assert "mean" not in complaint(["--qwertyuiop", "1"], MUON, capsys)


def test_every_common_name_leads_to_a_flag_and_names_none_of_ours():
    parsers = [train_muon.flag_parser(recipe, cli.Parser(prog="x.py", add_help=False), "cpu") for recipe in (MUON, ADAMW)]
    trained = {name for parser in parsers for name in cli.known_flags(parser)}
    elsewhere = "prompt path checkpoint max_new_tokens tokens out num_proc encoding".split()
    for theirs, ours in cli.COMMON_NAMES.items():
        assert set(ours.split()) & {*trained, *elsewhere}, theirs
        assert not set(theirs.split()) & trained, theirs


def test_every_comment_behind_a_field_is_one_line():
    """The help of a flag is read from the line of its field, so no formatter may wrap that line."""
    source = inspect.getsource(model.Config).partition("def __post_init__")[0]
    assert not [line for line in source.splitlines() if line.rstrip().endswith("= (")]
    assert "normalised" in cli.field_notes(model.Config)["norm_topk_prob"]


def test_flags_that_were_given_replace_fields():
    args = parser().parse_args(["--rate", "3"])
    assert cli.with_flags(Flags(scale=2.0), args) == Flags(rate=3.0, scale=2.0)


def test_a_switch_has_both_spellings_and_no_value():
    switches = cli.Parser(prog="x.py")
    switches.add_switch("dry_run", "print only")
    assert switches.parse_args(["--dry-run"]).dry_run and switches.parse_args(["--dry_run"]).dry_run
    assert not switches.parse_args([]).dry_run and "  --dry_run                 print only\n" in switches.format_help()


# -----------------------------------------------------------------------------
# The end of a script


@pytest.mark.parametrize("error, said", [
    (cli.UserError("no such thing"), "x.py: error: no such thing"), (KeyboardInterrupt(), 130),
    (FileNotFoundError(2, "No such file", "a.txt"), "x.py: error: [Errno 2] No such file: 'a.txt'"),
    (ValueError("odd"), "x.py: error: odd"),
])  # fmt: skip
def test_a_script_ends_with_a_sentence_or_a_status(error, said):
    with pytest.raises(SystemExit) as end, cli.command_line("x.py", ValueError):
        raise error
    assert end.value.code == said


def test_a_mistake_in_the_code_stays_a_traceback():
    with pytest.raises(RuntimeError), cli.command_line("x.py"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("words", (["--help"], ["--out_dir", "RUNS"]), ids=" ".join)
def test_a_closed_pipe_is_quiet_and_has_the_status_of_other_tools(words, tmp_path):
    (tmp_path / "muon").mkdir()
    (tmp_path / "muon/metrics.jsonl").write_text('{"step": 1, "val/loss": 1.0}\n')
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "logger.py", *(str(tmp_path) if word == "RUNS" else word for word in words)]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_closed_streams_of_a_shell_are_no_error(tmp_path):
    done = subprocess.run([f"'{sys.executable}' logger.py --out_dir '{tmp_path}' >&- 2>&-"], shell=True, cwd=ROOT)
    assert done.returncode == 1


def profile_sh(tmp_path, **env) -> subprocess.CompletedProcess:
    """profile.sh with stand-ins for python and torchrun that print their arguments."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | env
    return subprocess.run(["bash", "profile.sh", "--pattern", "D"], cwd=ROOT, env=env, capture_output=True, text=True)


def test_profile_sh_takes_every_number_of_processes_that_torchrun_takes(tmp_path):
    rest = "train_muon.py --enable_profiling --pattern D\n"
    assert profile_sh(tmp_path).stdout == profile_sh(tmp_path, NPROC="1").stdout == f"python {rest}"
    for count in ("2", "16", "auto", "gpu"):
        assert profile_sh(tmp_path, NPROC=count).stdout == f"torchrun --standalone --nproc_per_node={count} {rest}"
    for count in ("0", "two", "-3", "1.5"):
        done = profile_sh(tmp_path, NPROC=count)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr == (f"profile.sh: error: NPROC is '{count}'; it must be a number of processes, auto, gpu or "
                               "cpu\n")  # fmt: skip
