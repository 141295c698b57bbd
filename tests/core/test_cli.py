"""cli.py: flags made from the fields of a dataclass. CPU, no network: `pytest tests/core/test_cli.py`."""

import contextlib
import inspect
import io
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import cli
import logger
import model
import settings
import train_muon
import train_zoo
from benchmarks import (
    arithmetic,
    decode,
    domains,
    evaluate,
    floor,
    gpu,
    overlap,
    scaling,
    throughput,
    tokenise,
    toys,
    track,
)
from tools import generate, prepare
from train_adamw import ADAMW
from train_muon import MUON
from zoo.recipes import ZOO_MUON

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


def test_under_torchrun_one_process_of_a_host_names_the_mistake(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank, lines in (("0", 1), ("1", 0), ("7", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert complaint(["--lr", "1"], MUON, capsys).count("\n") == lines


def test_a_flag_of_another_script_names_that_script(capsys):
    assert "--muon_lr is a flag of train_muon.py (see" in complaint(["--muon_lr", "1"], ADAMW, capsys)
    assert "--lr_warmup is a flag of train_adamw.py (see" in complaint(["--lr-warmup=1"], MUON, capsys)
    assert "--halt is a flag of train_zoo.py (see" in complaint(["--halt", "act"], MUON, capsys)
    assert "--prompt is a flag of model.py (see" in complaint(["--prompt", "act"], MUON, capsys)
    said = complaint(["--lr", "1", "stray", "-5", "--batch_size=2"], MUON, capsys)
    assert said.endswith("did you mean --muon_lr for --lr, --batch_tokens for --batch_size? (see --help)\n")
    assert "mean" not in complaint(["--qwertyuiop", "1"], MUON, capsys)


def test_every_common_name_leads_to_a_flag_and_names_none_of_ours():
    parsers = [train_muon.flag_parser(recipe, "cpu") for recipe in (MUON, ADAMW)]
    trained = {name for parser in parsers for name in cli.known_flags(parser)}
    elsewhere = "prompt path checkpoint max_new_tokens tokens out num_proc encoding".split()
    for theirs, ours in cli.COMMON_NAMES.items():
        assert set(ours.split()) & {*trained, *elsewhere}, theirs
        assert not set(theirs.split()) & trained, theirs


def test_every_comment_behind_a_field_is_one_line():
    """The help of a flag is read from the line of its field, so no formatter may wrap that line."""
    source = inspect.getsource(model.Config).partition("def __post_init__")[0]
    assert not [line for line in source.splitlines() if line.rstrip().endswith("= (")]
    assert "top-1" in cli.field_notes(model.Config)["norm_topk_prob"]


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


# -----------------------------------------------------------------------------
# Nasty values: every flag and every file ends in success, in one sentence, or in argparse's status 2

NASTY = ["", "-1", "0", "1e5", "nan", "inf", str(2**31), str(2**64), "9" * 5000, "x" * 300, "a\nb", "\udcff", "/dev/null",
         "mlp*99999999999"]  # fmt: skip
NASTY_FILES = ["", ".", "no/such", "x" * 300, "\udcff", "a\nb", "/dev/null", "/proc/self/mem", "not_utf8", "half.json"]


class Parsed(Exception):
    """Ends a script once its command line is read."""


def must_be_clean(call, what: str):
    """Raises AssertionError for any exception but UserError, SystemExit and Parsed, and for more than one sentence."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            call()
    except (cli.UserError, SystemExit) as end:
        said = str(end.code) if isinstance(end, SystemExit) else str(end)
        assert "Traceback" not in said + err.getvalue() and err.getvalue().count("error: ") <= 1, (what, err.getvalue())
    except Parsed:
        pass
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def words_of(parse) -> list[str]:
    """The flags of a script's parser, caught before it reads a command line."""
    found = []

    def catch(parser, *words):
        found.extend(cli.known_flags(parser))
        raise Parsed

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Parsed):
        patch.setattr(cli.Parser, "parse_args", catch)
        parse([])
    return [name for name in dict.fromkeys(found) if name != "help"]


def only_parse(module):
    """The command line of a script without a parse() of its own."""

    def parse(argv):
        read = cli.Parser.parse_args

        def stop(parser, *words):
            read(parser, *words)
            raise Parsed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli.Parser, "parse_args", stop)
            patch.setattr(sys, "argv", ["script", *argv])
            module.main()

    return parse


COMMANDS = {  # name -> parser of a command line, what comes before and behind the flag
    "train_zoo.py": (lambda argv: train_muon.parse(ZOO_MUON, ["--preset", "cpu", *argv]), [], []),
    "train_adamw.py": (lambda argv: train_muon.parse(ADAMW, ["--preset", "cpu", *argv]), [], []),
    "model.py": (generate.parse, [], []), "model.py --checkpoint": (generate.parse, ["--checkpoint", "x"], []),
    "data.py": (prepare.parse, ["--source", "files"], []), "logger.py": (logger.parse, [], []),
    "track.py short": (track.parse, "short --name x --seeds 1".split(), ["--", "train_muon.py"]),
    "track.py full": (track.parse, "full --folder x --steps 1 --seeds 1".split(), ["--", "train_muon.py"]),
    "evaluate.py": (evaluate.parse, "bpb --checkpoint x --path y".split(), []),
    "evaluate.py harness": (evaluate.parse, "harness --checkpoint x --tasks y".split(), []),
    **{f"{module.__name__}.py": (module.parse, [], []) for module in (floor, gpu, overlap, scaling, throughput)},
    "decode.py": (only_parse(decode), [], []), "tokenise.py": (only_parse(tokenise), ["--path", "x"], []),
    "toys.py": (only_parse(toys), ["count"], []), "arithmetic.py": (only_parse(arithmetic), "run --seeds 1".split(), []),
    "domains.py": (only_parse(domains), "run --seeds 1".split(), []),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_no_value_of_any_flag_is_a_traceback(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse, before, behind = COMMANDS[name]
    flags = words_of(lambda argv: parse([*before, *behind]))
    if name == "train_adamw.py":  # the rest are flags of train_zoo.py too
        flags = [flag for flag in flags if flag not in vars(ZOO_MUON.presets["cpu"]) | vars(ZOO_MUON.model_presets["cpu"])]
    assert len(flags) > 1
    for flag in flags:
        for value in NASTY:
            words = [*before, f"--{flag}={value}", *behind]
            must_be_clean(lambda words=words: parse(words), f"{name} {' '.join(words)[:100]!r}")
    assert not list(tmp_path.iterdir())


def run_main(module, *argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *argv])
        module.main()


FILES = {  # command line -> what reads the file
    "model.py --checkpoint": lambda path: generate.main([f"--checkpoint={path or 'gone'}"]),
    "model.py --routes": lambda path: generate.main(["--checkpoint=gone", f"--routes={path}", f"--data={path}"]),
    "data.py --path": lambda path: prepare.main("--source files --encoding bytes --out made".split() + [f"--path={path}"]),
    "logger.py --out_dir": lambda path: run_main(logger, f"--out_dir={path}"),
    "logger.py --experiment_name": lambda path: run_main(logger, "--out_dir=runs", f"--experiment_name={path}"),
    "logger.py --records": lambda path: run_main(logger, f"--records={path or 'gone'}"),
    "train_muon.py --data": lambda path: train_muon.main(MUON, ["--preset=cpu", f"--data={path}", "--out_dir=runs"]),
    "train_muon.py --out_dir": lambda path: train_muon.main(MUON, ["--preset=cpu", "--data=gone", f"--out_dir={path}"]),
    "train_zoo.py --data": lambda path: train_muon.main(ZOO_MUON, ["--preset=cpu", f"--data={path}", "--out_dir=runs"]),
    "track.py compare --results": lambda path: run_main(track, "compare", f"--results={Path(path or 'gone').absolute()}"),
    "track.py compare --track": lambda path: run_main(track, "compare", f"--track={Path(path).absolute()}"),
    "track.py curve": lambda path: run_main(track, "curve", path, path),
    "track.py ablate": lambda path: run_main(track, "ablate", "--seeds=1", f"--plan={path}"),
    "track.py full": lambda path: run_main(track, *"full --seeds 1 --steps 3".split(), f"--folder={path}", "--", "train_muon.py"),
    "track.py script": lambda path: run_main(track, *"short --seeds 1 --name x --".split(), path),
    "domains.py table": lambda path: run_main(domains, "table", f"--results={Path(path).absolute()}"),
    "arithmetic.py table": lambda path: run_main(arithmetic, "table", f"--results={Path(path).absolute()}"),
    "evaluate.py bpb": lambda path: run_main(evaluate, "bpb", f"--checkpoint={path or 'gone'}", "--path=x"),
    "evaluate.py choices": lambda path: evaluate.read_questions(Path(path)),
}


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_any_command_is_a_traceback(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "not_utf8").write_bytes(b"caf\xe9\n\xff\xfe\x00\n" * 3)
    (tmp_path / "half.json").write_text('{"a": [1,\n{"name"\n')
    for path in NASTY_FILES:
        must_be_clean(lambda path=path: FILES[name](path), f"{name} {path[:60]!r}")
        os.chdir(tmp_path)  # benchmarks go to the root of the repository


def test_contenders_is_no_script_and_says_which_one_is():
    with pytest.raises(SystemExit, match="contenders.py: error: .* see `python benchmarks/throughput.py --help`"):
        runpy.run_path(str(ROOT / "benchmarks/contenders.py"), run_name="__main__")


def test_more_experts_or_layers_than_fit_are_one_sentence(tmp_path, monkeypatch):
    for words, said in ((["--experts=mlp*99999999999"], "fewer than 32,768 experts"), (["--n_layer=99999999"], "10,000"),
                        (["--n_embd=80000000"], r"below 2\^20"), (["--loops=99999999999"], "10,000"),
                        (["--sample_tokens=100000000"], "100,000")):  # fmt: skip
        with pytest.raises(cli.UserError, match=said):
            train_muon.parse(ZOO_MUON, words)
    monkeypatch.setattr(sys, "argv", ["train_zoo.py", "--experts=mlp*99999999999"])
    with pytest.raises(SystemExit, match="train_zoo.py: error: experts is 'mlp.99999999999'; it must list fewer"):
        train_zoo.main()
    config, hp, _ = train_muon.parse(MUON, ["--preset=cpu", "--vocab_size=9000000000"])
    with pytest.raises(cli.UserError, match=r"parameters take 21,458 GiB of the \d+ here"):
        settings.check(config, hp, 1, "cpu")
