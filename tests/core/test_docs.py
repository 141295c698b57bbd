"""README.md and docs/: every code block is run or parsed; links, anchors, files, flags and tests that they name exist.

pytest tests/core/test_docs.py"""

import ast
import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import logger
import train_adamw
import train_muon
import train_zoo
from tools import generate, prepare

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README} | {f"docs/{path.name}": path.read_text() for path in sorted(ROOT.glob("docs/*.md"))}
LINKED = sorted(PAGES.keys() | {"zoo/README.md", "benchmarks/README.md", "records/README.md"})
# text: files of the reader's own
MARKS = re.compile(r"bash (run|needs: (gpu|internet|nodes|text|a quiet machine))|python file: \w+\.py|mermaid|text")
A_RUN = "--num_iterations 3 --val_tokens 4096 --sample_tokens 8 --warmup_steps 0"

# what is added to a command so that it ends in seconds
SHORT = {
    "data.py": "--max_tokens 400000",
    "train_muon.py": A_RUN,
    "train_adamw.py": A_RUN,
    "train_zoo.py": A_RUN,
    "profile.sh": "--batch_tokens 2048 --warmup_steps 0",
    "pip": "--no-index --quiet",  # all that it names must be installed already
    "pytest": "--collect-only",
    "overlap.py": "--steps 1",
    "decode.py": "--rounds 1",
    "floor.py": "--tokens 512 --seq_len 128",
    "toys.py": "--steps 20",
}


def blocks(text: str) -> list[tuple[str, str]]:
    """(mark, body) of the code blocks of a page."""
    return re.findall(r"^```(.*?)\n(.*?)^```", text, re.M | re.S)


def commands(block: str) -> list[list[str]]:
    """The commands of a block: lines joined over backslashes, split at && and cleared of comments."""
    lines = re.sub(r"\\\n", " ", block).splitlines()
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    # a word that the shell may leave out
    return [[word for word in words if not word.startswith("${")] for words in parts if words]


def script_of(command: list[str]) -> tuple[str, list[str]]:
    """The script of ours (or pip, pytest) that a command runs, and its arguments."""
    if "-c" in command and "generate.main()" in command[command.index("-c") + 1]:
        return "model.py", command[command.index("-c") + 2 :]
    for i, word in enumerate(command):
        if Path(word).name in SHORT | PARSERS | OWN_FILES:
            return Path(word).name, command[i + 1 :]
    raise AssertionError(f"no test knows how to shorten {command}")


# A file that a page prints, and whether it starts a training run.
OWN_FILES = {
    mark.removeprefix("python file: "): A_RUN if "train_muon.main(" in body else ""
    for text in PAGES.values()
    for mark, body in blocks(text)
    if mark.startswith("python file: ")
}

# -----------------------------------------------------------------------------
# Blocks


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of a fresh clone's contents."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    for name in ("tests", "benchmarks", "records", "tools", "zoo", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def ran(clone):
    """Run the blocks of README.md in the clone; returns the commands that ran, for other pages not to repeat them."""
    done = set()
    run_page(README, clone, done)
    return done


def run_page(text: str, clone: Path, done: set[tuple[str, ...]]):
    """Run the blocks of a page in order. A command in `done` is not run again, as its experiment exists."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONWARNINGS": "ignore"}
    for mark, body in blocks(text):
        if mark.startswith("python file: "):
            (clone / mark.removeprefix("python file: ")).write_text(body)
        for command in commands(body) if mark == "bash run" else []:
            if tuple(command) in done:
                continue
            done.add(tuple(command))
            script, _ = script_of(command)
            short = shlex.split((SHORT | OWN_FILES).get(script, ""))
            command = command if "--plan" in command else [*command, *short]
            result = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
            assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_marked(page):
    for mark, body in blocks(PAGES[page]):
        assert MARKS.fullmatch(mark), f"mark this block as one of {MARKS.pattern}:\n{body}"
        assert not mark.startswith("python") or len(body.splitlines()) < 30, "an idea fits into thirty lines"


@pytest.mark.slow
def test_the_readmes_blocks_run(clone, ran):
    for path in """data/python/meta.json logs/muon/run.log logs/muon/checkpoint logs/adamw/metrics.jsonl
                   logs/plots/val_loss.png logs/plots/report.html data/notes/meta.json logs/notes/checkpoint""".split():
        assert (clone / path).exists(), f"the README's commands should have written {path}"
    prior, muon = (logger.read_run(clone / "logs" / name) for name in ("prior", "muon"))
    assert prior["config"]["model"]["router"] == "prior" and last_loss(prior) != last_loss(muon)


def last_loss(run: dict) -> float:
    return [row["train/loss"] for row in run["rows"] if "train/loss" in row][-1]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_a_pages_blocks_run(page, clone, ran):
    run_page(PAGES[page], clone, ran)
    if page == "docs/extending.md":
        runs = [logger.read_run(clone / "logs" / name) for name in ("muon", "lion", "modulo", "gated", "prior")]
        assert runs[1]["config"]["optimizer"] == "lion"
        assert len(set(map(last_loss, runs))) == len(runs), "each trains another model"
    if page == "docs/training.md":
        assert list((clone / "logs").glob("*/profile/trace.json"))


def zoo_script(argv: list[str]):
    """train_zoo.py up to its call of train_muon.main, with train_muon's parser in its place."""
    with (
        mock.patch.object(sys, "argv", ["train_zoo.py", *argv]),
        mock.patch.object(train_muon, "main", train_muon.parse),
    ):
        train_zoo.main()


def benchmark(name: str, argv: list[str]):
    return importlib.import_module(f"benchmarks.{name}").parse(argv)


def gpu_script(argv: list[str]):
    """benchmarks/gpu.sh: the part, then the flags of that part's script."""
    parts = {"tests": lambda flags: None if not flags else sys.exit(2), "bench": functools.partial(benchmark, "gpu"),
             "track": functools.partial(benchmark, "track")}  # fmt: skip
    return parts[argv[0]](argv[1:]) if argv[0] in parts else sys.exit(2)


PARSERS = {
    "gpu.sh": gpu_script,
    "train_muon.py": lambda argv: train_muon.parse(train_muon.MUON, argv),
    "train_adamw.py": lambda argv: train_muon.parse(train_adamw.ADAMW, argv),
    "train_zoo.py": zoo_script,
    "profile.sh": lambda argv: train_muon.parse(train_muon.MUON, argv),
    "data.py": prepare.parse,
    "model.py": generate.parse,
    "logger.py": logger.parse,
    "evaluate.py": functools.partial(benchmark, "evaluate"),
    "track.py": functools.partial(benchmark, "track"),
}


@pytest.mark.parametrize("page", PAGES)
def test_other_blocks_parse(page):
    """Blocks that need a GPU, the internet, several hosts or text: their flags are legal and their configuration can
    be built."""
    for mark, body in blocks(PAGES[page]):
        for command in commands(body) if mark.startswith("bash needs") else []:
            script, argv = script_of(command)
            if script == "pip":
                assert argv[:2] == ["install", "-r"] and (ROOT / argv[2]).exists()
            else:
                PARSERS[script](argv)


@pytest.mark.parametrize("script", PARSERS)
def test_a_wrong_flag_would_be_noticed(script):
    with pytest.raises(SystemExit) as stopped:
        PARSERS[script](["--no_such_flag", "1"])
    assert stopped.value.code == 2


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci/run").read_text()
    lines = [line for mark, body in blocks(README) for line in body.splitlines()]
    install, test = (next(line for line in lines if word in line) for word in ("requirements.txt", "pytest"))
    strip = lambda line: line.replace("--quiet ", "").strip()
    assert strip(install.split("&&")[0]) in strip(ci) and strip(test) in strip(ci)
    assert test.split("&&")[1].strip() + " --slow" in ci.splitlines()


# -----------------------------------------------------------------------------
# Size, links, names


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short_and_narrow(page):
    text = PAGES[page]
    assert len(text.splitlines()) <= (150 if page == "README.md" else 200)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    wide = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))]
    assert not wide, "\n".join(wide)


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    found, names = {}, set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{found[name]}" if found[name] else name)
    return names


def dead_links(page: str, text: str) -> list[str]:
    """Links of a page to missing files, and to missing headings of pages of this repository."""
    dead, prose = [], re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists():
            dead.append(f"{page} links to {target}, which does not exist")
        elif anchor and anchor not in anchors(text if path == ROOT / page else path.read_text()):
            dead.append(f"{page} links to {target}, a heading that does not exist")
    return dead


@pytest.mark.parametrize("page", LINKED)
def test_links_and_anchors_exist(page):
    assert not dead_links(page, (ROOT / page).read_text())


def test_dead_links_would_be_noticed():
    text = "# A title\n\n## A `heading`, twice\n\n## A `heading`, twice\n\n"
    good = "[a](#a-heading-twice) [b](#a-heading-twice-1) [c](records/README.md#rules) [d](https://example.org/x#y)"
    assert dead_links("README.md", text + good) == []
    for link in ("no.md", "#a-heading", "#a-heading-twice-2", "records/README.md#no-rules", "docs/no.md#rules"):
        assert len(dead_links("README.md", f"{text}[bad]({link})")) == 1


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_the_readme_links_to_every_page_and_every_page_to_others(page):
    assert f"({page}" in README
    others = [target for target in re.findall(r"\]\((?!https?:)([^)#\s]*\.md)", PAGES[page])]
    assert len(set(others)) >= 2, f"{page} links to {others}"


def test_files_named_in_shell_scripts_exist():
    scripts = [ROOT / "profile.sh", ROOT / ".ci/run", *ROOT.glob("benchmarks/*.sh")]
    lines = [line for script in scripts for line in script.read_text().splitlines() if not line.startswith("#")]
    named = set(re.findall(r"[\w/]+\.py\b", "\n".join(lines)))
    assert len(named) >= 5 and all((ROOT / path).is_file() for path in named), named


def test_the_file_tree_is_complete():
    tree = README[README.index("## The files") :].split("```")[1]
    shown = set(re.findall(r"[\w.]+(?:\.py|\.sh|/)", tree))
    shown = {name.rstrip("/") for name in shown}
    hidden = {"data", "logs", "hub", "venv"}
    there = {path.name for path in ROOT.iterdir() if path.suffix in (".py", ".sh")}
    there |= {path.parent.name for path in ROOT.glob("[a-z]*/*") if path.suffix in (".py", ".md")} - hidden
    assert shown == there


# -----------------------------------------------------------------------------
# Tables and lists of names


def options(text: str) -> dict[str, list[str]]:
    """Flag -> values, sorted, of the table with the columns flag, value and meaning."""
    seen = {}
    for row in text.split("| flag | value | meaning |")[1].split("\n\n")[0].splitlines()[2:]:
        flag, values, meaning = (cell.strip() for cell in row.strip("|").split("|"))
        assert meaning
        seen[flag.strip("`-")] = sorted(re.findall(r"`([^`]+)`", values))
    return seen


def test_the_options_table_holds_the_entries_of_the_cores_tables():
    """In a process of its own, as zoo has added its entries here. zoo/README.md has a test of its own."""
    code = "import model; config = model.Config(); tables = config.tables() | config.letters()"
    code += "; print({name: sorted(table) for name, table in tables.items()})"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert options(PAGES["docs/training.md"]) == ast.literal_eval(printed.stdout)


def test_the_guided_tour_names_what_its_files_hold():
    tour = PAGES["docs/tour.md"]
    tour = tour[tour.index("## The tour") : tour.index("## The mixture of experts")]
    stops = re.findall(r"^\d\. \[([\w/]+\.py)\](.*?)(?=^\d\. |\Z|^$)", tour, re.M | re.S)
    assert len(stops) >= 6
    for file, text in stops:
        for name in re.findall(r"`([A-Za-z_]+)`", text):
            held = re.search(rf"^(class|def|    def) {name}\b|^{name} = ", (ROOT / file).read_text(), re.M)
            assert held, f"the tour says that {file} holds {name}"


def test_code_and_tests_named_in_docs_exist():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    source = {path.name: path.read_text() for path in ROOT.glob("*.py")}
    for page, text in PAGES.items():
        for file, name in re.findall(r"`(\w+\.py): (\w+)`", text):
            assert re.search(rf"\b{name}\b", source[file]), f"{page}: {name} is not in {file}"
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in tests, f"{page}: there is no test {name}"
    rows = [line for line in PAGES["docs/tour.md"].splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) >= 21 and all("`test_" in row for row in rows)
