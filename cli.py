"""Shared by every command line: the error of a user's mistake, flags from a dataclass, whole files.

Imports the standard library only."""

import argparse
import dataclasses
import functools
import hashlib
import inspect
import os
import re
import typing
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend: one sentence that says what is wrong, where, and how to mend it."""


def require(config, field: str, condition: bool, legal: str):
    """Raises UserError, which names a field of a configuration and its legal values, unless the condition holds."""
    if not condition:
        raise UserError(f"{field} is {getattr(config, field)!r}; it must be {legal}")


# -----------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; an error is one sentence that names the script; help has one line per flag.

    examples: command lines for the help. first: flags at its top, the most used ones."""

    def __init__(self, *, examples: tuple[str, ...] = (), first: tuple[str, ...] = (), add_help: bool = True, **kwargs):
        super().__init__(allow_abbrev=False, add_help=False, **kwargs)
        self.examples, self.first = examples, first
        if add_help:
            self.add_argument("-h", "--help", nargs="?", const="", action=PrintHelp, help="print this text")

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def add_switch(self, name: str, note: str):
        """A flag without a value, in both spellings."""
        self.add_argument(*sorted({f"--{name}", f"--{name.replace('_', '-')}"}), action="store_true", help=note)

    def pages(self) -> list[str]:
        """Names of the groups of flags that the main page leaves out."""
        return list(dict.fromkeys(filter(None, (getattr(group, "page", "") for group in self._action_groups))))

    def format_help(self, page: str = "") -> str:
        """One of the pages, without blank lines: two screens of 50 lines hold 75 flags."""
        actions = [action for group in self._action_groups for action in group._group_actions]
        names = [flag_name(action) for action in actions if not action.option_strings]
        lines = [" ".join(["usage:", "python", self.prog, *names, "[--flag value ...]"])]
        if page == "":
            lines += (self.description or "").strip().splitlines()
            lines += ["examples:", *(f"  {example}" for example in self.examples)] if self.examples else []
        top = [action for name in self.first for action in actions if action.dest == name] if page == "" else []
        groups = [("most used:", top)] + [
            (f"{group.title}:", [action for action in group._group_actions if action not in top])
            for group in self._action_groups if getattr(group, "page", "") == page]  # fmt: skip
        for title, members in groups:
            lines += [title, *map(describe_flag, members)] if members else []
        if page == "":
            lines += [f"more flags: python {self.prog} --help {name}" for name in self.pages()]
        return "\n".join(lines) + "\n"


class PrintHelp(argparse.Action):
    """--help, or --help PAGE."""

    def __call__(self, parser: Parser, namespace, page: str, option_string=None):
        if page not in ("", *parser.pages()):
            parser.error(f"there is no help page {page!r}; pages: {', '.join(parser.pages()) or 'none'}")
        print(parser.format_help(page), end="")
        parser.exit()


def flag_name(action: argparse.Action) -> str:
    """A flag in its one shown spelling, with the kind of its value."""
    if not action.option_strings:
        return action.metavar or action.dest.upper()
    name = "--" + action.option_strings[-1].lstrip("-").replace("-", "_")
    kinds = {"int": "N", "positive": "N", "float": "X", "true or false": "BOOL", "Path": "PATH"}
    value = action.metavar or kinds.get(getattr(action.type, "__name__", ""), "TEXT")
    if action.nargs == "?":
        return f"{name} [{value}]" if action.metavar else name
    return name if action.nargs == 0 else f"{name} {value}"


def describe_flag(action: argparse.Action) -> str:
    """One line: flag, legal values, meaning, default."""
    default = vars(action).get("field_default", action.default)
    choices = [", ".join(map(str, action.choices))] if action.choices else []
    words = [": ".join(choices + ([action.help.replace("%%", "%")] if action.help else []))]
    is_plain = default is None or default is False or default in ([], argparse.SUPPRESS)
    if "field_default" in vars(action) or not is_plain:
        words.append(f"(default {default!r})" if isinstance(default, str) else f"(default {default})")
    return f"  {flag_name(action):25} {' '.join(filter(None, words))}".rstrip()


def add_flags(parser: argparse.ArgumentParser, fields_of: type, defaults=None):
    """One flag per field of a dataclass, in both spellings, absent by default.

    The comment behind a field is its help, and the comment above some fields their group. Fields of a package such as
    zoo/ have a help page of their own. defaults: an instance whose values the help shows."""
    notes, places, shown, groups = field_notes(fields_of), field_groups(fields_of), defaults or fields_of, {}
    for field in dataclasses.fields(fields_of):
        title, page = places.get(field.name, (fields_of.__name__, ""))
        if (title, page) not in groups:
            groups[title, page] = parser.add_argument_group(title)
            groups[title, page].page = page
        names = {f"--{field.name}", f"--{field.name.replace('_', '-')}"}
        note = notes.get(field.name, "").replace("%", "%%")
        flag = groups[title, page].add_argument(
            *sorted(names), type=flag_type(field.type), default=argparse.SUPPRESS, help=note)  # fmt: skip
        flag.field_default = getattr(shown, field.name)


def with_flags(config, args: argparse.Namespace):
    """A dataclass's instance with the fields that flags of add_flags set. Raises its UserError."""
    given = {field.name for field in dataclasses.fields(config)} & vars(args).keys()
    return dataclasses.replace(config, **{name: vars(args)[name] for name in given})


@functools.cache
def field_notes(fields_of: type) -> dict[str, str]:
    """Field of a dataclass -> the comment behind it in the source; a subclass may change it."""
    parts = filter(dataclasses.is_dataclass, reversed(fields_of.__mro__))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", "".join(map(inspect.getsource, parts)), re.M))


@functools.cache
def field_groups(fields_of: type) -> dict[str, tuple[str, str]]:
    """Field -> the comment above it or above fields before it, else the name of its class; and its package or ""."""
    groups = {}
    for part in filter(dataclasses.is_dataclass, reversed(fields_of.__mro__)):
        title, package = part.__name__, part.__module__.rpartition(".")[0]
        for comment, name in re.findall(r"^    (?:# (.*)|(\w+): .*)$", inspect.getsource(part), re.M):
            title = comment or title
            if name:
                groups.setdefault(name, (title, package))
    return groups


def flag_type(annotation):
    """Parser of a field's type: numbers and text as they are, true/false for bool, `none` for an optional field."""
    options = typing.get_args(annotation) or (annotation,)

    def parse(text: str):
        if type(None) in options and text.lower() == "none":
            return None
        if bool in options:
            if text.lower() not in ("true", "false", "1", "0"):
                raise ValueError(text)
            return text.lower() in ("true", "1")
        if float in options and str in options:
            return float(text) if re.fullmatch(r"[-+.\de]+", text) else text
        return options[0](text)

    parse.__name__ = "true or false" if bool in options else options[0].__name__
    return parse


def positive(text: str) -> int:
    """A flag's type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


# -----------------------------------------------------------------------------
# Files


def file_sha256(path: Path) -> str:
    """The sha256 of a file's contents, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, write):
    """Replace a file through write(temporary path): a crash or a full disk leaves the old content."""
    temporary = path.with_name(f".{path.name}.partial{path.suffix}")
    write(temporary)
    os.replace(temporary, path)
