"""cli.py: flags made from the fields of a dataclass. CPU, no network: `pytest tests/core/test_cli.py`."""

import inspect
from dataclasses import dataclass

import pytest

import cli
import model


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
