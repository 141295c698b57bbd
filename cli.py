"""Shared by every command line: UserError, flags from a dataclass, whole files.

Imports the standard library only."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import os
import re
import signal
import sys
import time
import typing
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend; its message is one sentence: what is wrong, where, and how to mend it."""


def require(config, field: str, condition: bool, legal: str):
    """Raises UserError, which names a field of a configuration and its legal values, unless the condition holds."""
    if not condition:
        raise UserError(f"{field} is {getattr(config, field)!r}; it must be {legal}")


@contextlib.contextmanager
def command_line(script: str = "", *mistakes: type[Exception]):
    """The body of a script. A mistake ends it with one sentence, Ctrl-C with status 130, a closed pipe with 141.

    mistakes: kinds of exceptions besides UserError and OSError that are one."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # of characters that the terminal's encoding lacks
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be caught
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process
        sys.exit(128 + signal.SIGPIPE)
    except (UserError, OSError, *mistakes) as error:
        sys.exit(f"{script}: error: {error}" if script else f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


# -----------------------------------------------------------------------------
# Flags


def said_by_another() -> bool:
    """Whether torchrun's first process on this host prints a mistake in the flags, which all its processes meet.

    The others wait a second, as torchrun ends the first once one of them has failed."""
    is_other = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
    if is_other:
        time.sleep(1.0)
    return is_other


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; an error is one sentence that names the script; help has one line per flag.

    examples: command lines for the help. first: flags at its top, the most used ones."""

    def __init__(self, *, examples: tuple[str, ...] = (), first: tuple[str, ...] = (), add_help: bool = True, **kwargs):
        super().__init__(allow_abbrev=False, add_help=False, **kwargs)
        self.examples, self.first = examples, first
        if add_help:
            self.add_argument("-h", "--help", nargs="?", const="", action=PrintHelp, help="print this text")

    def error(self, message: str):
        self.exit(2, None if said_by_another() else f"{self.prog}: error: {message} (see --help)\n")

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{explain_unknown(unknown, known_flags(self))}")
        return args

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


COMMON_NAMES = {  # of a flag in nanoGPT, modded-nanogpt, nanochat, Hugging Face -> names of ours, the first that exists
    "lr learning_rate max_lr matrix_learning_rate": "muon_lr matrix_lr",
    "min_lr lr_min final_lr_frac": "final_lr_scale",
    "embedding_lr": "embed_lr",
    "unembedding_lr": "head_lr",
    "wd": "weight_decay",
    "warmup warmup_iters warmup_ratio lr_warmup_iters": "lr_warmup momentum_warmup",
    "cooldown_iters warmdown_iters warmdown_ratio lr_decay_iters": "cooldown_frac",
    "num_iters max_iters iters steps num_steps max_steps train_steps epochs num_epochs": "num_iterations",
    "batch_size device_batch_size total_batch_size global_batch_size": "batch_tokens",
    "micro_batch_size grad_accum gradient_accumulation_steps": "micro_batch_tokens",
    "block_size context_length context max_seq_len sequence_length train_seq_len": "seq_len",
    "eval_interval eval_every eval_steps val_interval val_loss_every": "val_every",
    "eval_iters eval_tokens val_batches": "val_tokens",
    "save_every save_interval save_steps save_checkpoint": "checkpoint_every",
    "dataset data_dir data_path input_bin train_files": "data",
    "output output_dir log_dir": "out_dir out",
    "run run_name run_id exp_name experiment": "experiment_name",
    "resume_from init_from load": "resume checkpoint",
    "layers num_layers n_layers num_hidden_layers": "n_layer",
    "heads num_heads n_heads num_attention_heads": "n_head",
    "dim d_model model_dim hidden_size embed_dim": "n_embd",
    "n_experts num_local_experts": "num_experts",
    "topk k num_experts_per_tok experts_per_token": "top_k",
    "ckpt model model_path checkpoint_path": "checkpoint",
    "start input text": "prompt path",
    "length max_length max_tokens num_tokens": "max_new_tokens tokens",
    "profile": "enable_profiling",
    "logdir runs": "out_dir",
    "workers num_workers threads": "num_proc",
    "tokenizer": "encoding",
}
SCRIPTS = {  # script -> the files that define its flags
    "train_muon.py": ("train_muon.py", "model.py"), "train_adamw.py": ("train_adamw.py",),
    "train_zoo.py": ("zoo/config.py", "zoo/recipes.py"), "model.py": ("tools/generate.py",),
    "data.py": ("tools/prepare.py",), "logger.py": ("logger.py",),
}  # fmt: skip


def known_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Names of a parser's flags and those of its sub-commands, with underscores."""
    names = [action.dest for action in parser._actions if action.option_strings]
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return names + [name for command in commands for part in command.choices.values() for name in known_flags(part)]


def explain_unknown(words: list[str], known: list[str]) -> str:
    """The end of a message on unknown words of a command line: flags that may be meant, scripts that have the flag."""
    meant, elsewhere = [], []
    for word in words:
        given = word.partition("=")[0]
        name = given.lstrip("-").replace("-", "_")
        if not re.fullmatch(r"--?[a-zA-Z][\w-]*", given):
            continue
        common = next((ours.split() for theirs, ours in COMMON_NAMES.items() if name in theirs.split()), [])
        found = [flag for flag in common if flag in known][:1]
        if not found and (scripts := scripts_with(name)):
            elsewhere.append(f"; --{name} is a flag of {scripts[0]}")
        elif found := found or difflib.get_close_matches(name, known, 1, 0.7):
            meant.append(f"--{found[0]} for {given}")
    return "".join(elsewhere) + (f"; did you mean {', '.join(meant)}?" if meant else "")


def scripts_with(flag: str) -> list[str]:
    """Scripts that define the flag in their sources, as a field of a dataclass or by name."""
    defined = re.compile(rf'^    {flag}: .+ = |"--{flag}"', re.M)
    root = Path(__file__).parent
    sources = {script: [root / file for file in files] for script, files in SCRIPTS.items()}
    return [script for script, paths in sources.items()
            if any(defined.search(path.read_text(encoding="utf-8")) for path in paths if path.exists())]  # fmt: skip


def flag_name(action: argparse.Action) -> str:
    """A flag in its one shown spelling, with the kind of its value."""
    if not action.option_strings:
        return action.metavar or action.dest.upper()
    name = "--" + action.option_strings[-1].lstrip("-").replace("-", "_")
    kinds = dict.fromkeys(("int", "positive", "seed_number", "rank_count"), "N")
    kinds |= {"float": "X", "true or false": "BOOL", "Path": "PATH"}
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


def given_flags(argv: list[str]) -> set[str]:
    """Names of the flags on a command line, with underscores."""
    return {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}


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
        value = options[0](text)
        if options[0] is int and abs(value) >= 2**63:
            raise ValueError(text)
        return value

    parse.__name__ = "true or false" if bool in options else options[0].__name__
    return parse


def positive(text: str) -> int:
    """A flag's type: an integer of at least 1."""
    return whole_number(text, 1)


def seed_number(text: str) -> int:
    """A flag's type: an integer that a random generator takes."""
    return whole_number(text, 0)


def rank_count(text: str) -> int:
    """A flag's type: a number of ranks; a plan lists the part of each."""
    return whole_number(text, 1, 2**14)


def whole_number(text: str, least: int, most: int = 2**63 - 1) -> int:
    """An integer in these bounds."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is not at least {least}")
    if number > most:
        raise argparse.ArgumentTypeError(f"{text[:20]} is not at most {most:,}")
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
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())  # else a crash of the system after the rename can leave an empty file
    os.replace(temporary, path)
