"""README.md tells the truth: every code block is run or parsed, and what it says of files, flags and tests exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import logger
import model
import train_adamw
import train_muon
from benchmarks import evaluate, gpu, track
from tools import prepare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(.*?)\n(.*?)^```", README, re.M | re.S)
MARKS = re.compile(r"bash (run|needs: (gpu|internet|nodes|text|a quiet machine))|python file: \w+\.py")  # text: files of the reader's own
A_RUN = "--num_iterations 3 --val_tokens 4096 --sample_tokens 8 --warmup_steps 0"

# what is added to a command so that it ends in seconds
SHORT = {
    "data.py": "--max_tokens 400000",
    "train_muon.py": A_RUN,
    "train_adamw.py": A_RUN,
    "my_router.py": A_RUN,
    "train_lion.py": A_RUN,
    "profile.sh": "--batch_tokens 2048 --warmup_steps 0",
    "pip": "--no-index --quiet",  # what it names must be installed already
    "pytest": "--collect-only",
    "overlap.py": "--steps 1",
    "decode.py": "--rounds 1",
    "floor.py": "--tokens 512 --seq_len 128",
    "toys.py": "--steps 20",
}


def commands(block: str) -> list[list[str]]:
    """The commands of a block: lines joined over backslashes, split at && and cleared of comments."""
    lines = re.sub(r"\\\n", " ", block).splitlines()
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [[word for word in words if not word.startswith("${")] for words in parts if words]  # a word the shell may leave out


def script_of(command: list[str]) -> tuple[str, list[str]]:
    """Which of our scripts (or pip, pytest) a command runs, and that script's arguments."""
    for i, word in enumerate(command):
        if Path(word).name in SHORT | PARSERS:
            return Path(word).name, command[i + 1 :]
    raise AssertionError(f"the README runs {command}, which no test knows how to shorten")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what a fresh clone holds."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for name in ("tests", "benchmarks", "records", "tools", "zoo"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_every_block_is_marked():
    assert len(BLOCKS) >= 5
    for mark, body in BLOCKS:
        assert MARKS.fullmatch(mark), f"mark this block as one of {MARKS.pattern}:\n{body}"


def test_run_blocks_run(clone):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    for mark, body in BLOCKS:
        if mark.startswith("python file: "):
            assert len(body.splitlines()) < 30, "an idea fits into thirty lines"
            (clone / mark.removeprefix("python file: ")).write_text(body)
        if mark == "bash run":
            for command in commands(body):
                script, _ = script_of(command)
                command = command if "--plan" in command else [*command, *shlex.split(SHORT.get(script, ""))]
                done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
                assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    for left in ("data/python/meta.json", "logs/muon/run.log", "logs/muon/checkpoint", "logs/adamw/metrics.jsonl", "logs/plots/val_loss.png"):
        assert (clone / left).exists(), f"the README's commands should have left {left}"
    assert list((clone / "logs").glob("*/profile/trace.json"))
    prior, lion, muon = (logger.read_run(clone / "logs" / name) for name in ("prior", "lion", "muon"))
    assert prior["config"]["model"]["router"] == "prior" and lion["config"]["optimizer"] == "lion"
    last_loss = lambda run: [row["train/loss"] for row in run["rows"] if "train/loss" in row][-1]
    assert len({last_loss(run) for run in (prior, lion, muon)}) == 3, "each of the three trains another model"


def gpu_script(argv: list[str]):
    """benchmarks/gpu.sh: which part, then the flags of what that part runs."""
    parts = {"tests": lambda flags: None if not flags else sys.exit(2), "bench": gpu.parse, "track": track.parse}
    return parts[argv[0]](argv[1:]) if argv[0] in parts else sys.exit(2)


PARSERS = {
    "gpu.sh": gpu_script,
    "train_muon.py": lambda argv: train_muon.parse(train_muon.MUON, argv),
    "train_adamw.py": lambda argv: train_muon.parse(train_adamw.ADAMW, argv),
    "profile.sh": lambda argv: train_muon.parse(train_muon.MUON, argv),
    "data.py": prepare.parse,
    "model.py": model.parse,
    "logger.py": logger.parse,
    "evaluate.py": evaluate.parse,
    "track.py": track.parse,
}


def test_other_blocks_parse():
    """Blocks that need a GPU, the internet, several hosts or text: their flags are legal and their configuration can be built."""
    for mark, body in BLOCKS:
        if mark.startswith("bash needs"):
            for command in commands(body):
                script, argv = script_of(command)
                if script == "pip":
                    assert argv[:2] == ["install", "-r"] and (ROOT / argv[2]).exists()
                else:
                    PARSERS[script](argv)


def test_a_wrong_flag_would_be_noticed():
    for parse in PARSERS.values():
        with pytest.raises(SystemExit) as stopped:
            parse(["--no_such_flag", "1"])
        assert stopped.value.code == 2


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci/run").read_text()
    install, test = (next(line for mark, body in BLOCKS for line in body.splitlines() if word in line) for word in ("requirements.txt", "pytest"))
    strip = lambda line: line.replace("--quiet ", "").strip()
    assert strip(install.split("&&")[0]) in strip(ci) and strip(test) in strip(ci)


def test_the_options_table_holds_the_entries_of_the_tables():
    """Every key of every table of model.py, and nothing that is not one."""
    tables = {"experts": model.EXPERTS, **model.KEYS_OF, **model.LETTERS_OF}
    del tables["looped"]  # its letters are places, no kinds
    rows = README[README.index("| flag | value | what |") :].split("\n\n")[0].splitlines()[2:]
    seen, flag = {}, ""
    for row in rows:
        name, values, what = (cell.strip() for cell in row.strip("|").split("|"))
        flag = name.strip("`- ") or flag
        seen.setdefault(flag, []).extend(re.findall(r"`([^`]+)`", values))
        assert what
    assert {flag: sorted(values) for flag, values in seen.items()} == {flag: sorted(table) for flag, table in tables.items()}


def test_links_and_named_files_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        assert (ROOT / target.split("#")[0]).exists(), f"README.md links to {target}, which is not there"
    headings = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", README, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_the_guided_tour_names_what_its_files_hold():
    tour = README[README.index("## For the student") : README.index("| file | what it is |")]
    stops = re.findall(r"^\d\. \[(?:\w+/)*(\w+\.py)\](.*?)(?=^\d\. |\Z|^$)", tour, re.M | re.S)
    assert len(stops) >= 6
    for file, told in stops:
        path = next(path for path in (ROOT / file, ROOT / "tests" / file, ROOT / "tools" / file) if path.exists())
        for name in re.findall(r"`([A-Za-z_]+)`", told):
            here = re.search(rf"^(class|def|    def) {name}\b", path.read_text(), re.M)
            assert here, f"the tour says that {file} holds {name}"
            if file == "model.py":
                assert here.start() < path.read_text().index("\n# The zoo"), f"the tour skips the zoo, and {name} stands in it"


def test_checklist_points_at_code_and_tests():
    """Each row of the speedrun checklist names code that exists and a test that exists."""
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    source = {path.name: path.read_text() for path in ROOT.glob("*.py")}
    checklist = README[README.index("## What is in it") :]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in checklist.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) >= 21
    for _, item, where, test in (row for row in rows if row[2] != "not yet"):
        for file, name in re.findall(r"`(\w+\.py): (\w+)`", where):
            assert re.search(rf"\b{name}\b", source[file]), f"{item}: {name} is not in {file}"
        named = re.findall(r"`(test_\w+)`", test)
        assert named and all(f"def {name}(" in tests for name in named), f"{item}: {test} names no existing test"
