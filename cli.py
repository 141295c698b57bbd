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
    """argparse without abbreviations; an error is one sentence that names the script."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def add_flags(parser: argparse.ArgumentParser, fields_of: type, group: str = "the model"):
    """One flag per field of a dataclass, in both spellings, absent by default. Its help is the comment behind the
    field."""
    notes, flags = field_notes(fields_of), parser.add_argument_group(group)
    for field in dataclasses.fields(fields_of):
        names = {f"--{field.name}", f"--{field.name.replace('_', '-')}"}
        note = f"{notes[field.name]} " if field.name in notes else ""
        flags.add_argument(
            *sorted(names), type=flag_type(field.type), default=argparse.SUPPRESS, metavar=field.name.upper(),
            help=f"{note}(default {field.default!r})".replace("%", "%%"))  # fmt: skip


@functools.cache
def field_notes(fields_of: type) -> dict[str, str]:
    """Field of a dataclass -> the comment behind it in the source."""
    source = "".join(inspect.getsource(part) for part in fields_of.__mro__ if dataclasses.is_dataclass(part))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))


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
