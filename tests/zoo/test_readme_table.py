"""zoo/README.md: its tables hold every option with its default and its values, and its commands are legal."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest

import train_muon
import train_zoo
from train_muon import TrainConfig
from zoo.config import LETTERS, TABLES, Config
from zoo.domains import MixtureConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "zoo/README.md").read_text()


def read_options() -> dict[str, tuple[str, list[str]]]:
    """Field -> its default and the values of its rows, as written."""
    options, field = {}, None
    tables = re.findall(r"^\| flag and default \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE, re.M)
    for row in "".join(tables).splitlines():
        flag, value, effect, _ = (cell.strip() for cell in row.strip("|").split("|"))
        if flag:
            field, default = re.fullmatch(r"`--(\w+) (.+)`", flag).groups()
            assert field not in options, f"--{field} has two rows"
            options[field] = default.strip("'"), []
        assert effect, f"--{field} {value} has no explanation"
        options[field][1].append(value.strip("`"))
    return options


def fields_of_a_run() -> list[dataclasses.Field]:
    """Fields of zoo.Config, and those of a mixture that train_muon.py does not have."""
    core = {field.name for field in dataclasses.fields(TrainConfig)}
    return [*dataclasses.fields(Config), *(f for f in dataclasses.fields(MixtureConfig) if f.name not in core)]


def test_every_field_has_a_row_with_its_default():
    assert {name: default for name, (default, _) in read_options().items()} == {
        field.name: str(field.default) for field in fields_of_a_run()
    }


def test_every_entry_of_a_table_has_a_row():
    options, config = read_options(), Config()
    for field, table in (config.tables() | config.letters() | TABLES | LETTERS).items():
        assert sorted(options[field][1]) == sorted(table), field


def commands_of_train_zoo() -> list[list[str]]:
    blocks = re.findall(r"^```bash needs: (?:gpu|internet|text|a quiet machine)\n(.*?)^```", PAGE, re.M | re.S)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[2:] for words in lines if words[:2] == ["python", "train_zoo.py"]]


@pytest.mark.parametrize("argv", commands_of_train_zoo(), ids=" ".join)
def test_the_commands_are_legal(argv, monkeypatch):
    def check_flags(recipe, flags):
        config, hp, args = train_muon.parse(recipe, flags)
        recipe.check(config, hp, 1, "cpu")

    monkeypatch.setattr(train_muon, "main", check_flags)
    monkeypatch.setattr(sys, "argv", ["train_zoo.py", *argv])
    train_zoo.main()


def test_links_of_the_page_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE):
        assert (ROOT / "zoo" / target).exists(), f"zoo/README.md links to {target}, which is not there"


def test_tests_named_on_the_page_exist():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in tests, f"zoo/README.md: there is no test {name}"
