"""The shape of the repository: line budgets, imports that run one way, and a core that runs without zoo/ and tools/."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WIDTH = 120  # columns
BUDGETS = {  # file -> lines
    "model.py": 1030, "ops.py": 560, "train_muon.py": 980, "train_adamw.py": 70, "train_zoo.py": 60, "data.py": 600,
    "logger.py": 650, "checkpoint.py": 400, "guards.py": 250,
}  # fmt: skip
ZOO_BUDGET = 302
MODEL_IMPORTS = {"ops", "kernels", "cli"}  # modules of ours that model.py imports
IMPORT_ZOO = {"train_zoo"}  # modules at the root that may import zoo or tools

ROOT_FILES = sorted(path.name for path in ROOT.glob("*.py"))
ZOO_FILES = sorted(f"zoo/{path.name}" for path in (ROOT / "zoo").glob("*.py"))
TOOLS_FILES = sorted(f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py"))
FILES = ROOT_FILES + ZOO_FILES + TOOLS_FILES
MODULES = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in FILES}

# -----------------------------------------------------------------------------
# Lines


@pytest.mark.parametrize("file", sorted(BUDGETS) + ZOO_FILES)
def test_a_file_keeps_its_line_budget(file):
    if not (ROOT / file).exists():
        pytest.skip(f"{file} does not exist yet")
    lines, budget = len((ROOT / file).read_text().splitlines()), BUDGETS.get(file, ZOO_BUDGET)
    assert lines <= budget, f"{file} has {lines} lines, {budget} at most: move a concern to a file of its own"


@pytest.mark.parametrize("file", FILES)
def test_no_line_is_wider_than_the_page(file):
    lines = enumerate((ROOT / file).read_text().splitlines(), 1)
    wide = [f"{file}:{number} has {len(line)} columns" for number, line in lines if len(line) > WIDTH]
    assert not wide, wide


# -----------------------------------------------------------------------------
# Imports


def imports(source: str, everywhere: bool) -> set[str]:
    """Our modules that a source imports at module level, or `everywhere`, with functions and `if` blocks too."""
    tree = ast.parse(source)
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


def imports_of(module: str, everywhere: bool = False) -> set[str]:
    return imports((ROOT / MODULES[module]).read_text(), everywhere)


def in_package(module: str, package: str) -> bool:
    return module.partition(".")[0] == package


def test_imports_are_found():
    source = "import ops\nfrom zoo import moe, build\nfrom tools.hub import load\ndef f():\n import kernels"
    assert imports(source, everywhere=False) == {"ops", "zoo.moe", "zoo", "tools.hub"}
    assert imports(source, everywhere=True) == {"ops", "zoo.moe", "zoo", "tools.hub", "kernels"}


def test_model_imports_operators_kernels_and_flags_alone():
    assert imports_of("model") <= MODEL_IMPORTS
    assert imports_of("model", everywhere=True) <= MODEL_IMPORTS | {"tools.generate", "tools"}  # behind __main__
    assert imports_of("ops", everywhere=True) <= {"kernels"} and imports_of("kernels", everywhere=True) == set()


@pytest.mark.parametrize("file", ROOT_FILES)
def test_the_root_imports_neither_zoo_nor_tools(file):
    module = file.removesuffix(".py")
    if module not in IMPORT_ZOO:
        outside = {name for name in imports_of(module) if in_package(name, "zoo") or in_package(name, "tools")}
        assert not outside


@pytest.mark.parametrize("file", ZOO_FILES + TOOLS_FILES)
def test_a_package_imports_the_core_and_itself(file):
    package, other = ("zoo", "tools") if file.startswith("zoo/") else ("tools", "zoo")
    module = next(name for name, path in MODULES.items() if path == file)
    foreign = {name for name in imports_of(module) if in_package(name, other) or name in IMPORT_ZOO}
    assert not foreign, f"{package} imports the core and {package} alone"


@pytest.mark.parametrize("module, theirs", [("model", {"torch"}), ("train_muon", {"torch", "numpy"}), ("logger", set())])
def test_an_import_reads_no_other_package_and_not_the_compiler(module, theirs):
    """torch._dynamo alone would be more than a second of every `--help`."""
    needed = " ".join(f"import {name};" for name in sorted(theirs))
    script = f"import sys; {needed} before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    new = set(done.stdout.split())
    ours = {path.stem for path in ROOT.glob("*.py")} | {"tools"}
    foreign = {name.partition(".")[0] for name in new} - ours - theirs - sys.stdlib_module_names
    assert module in new and not foreign and "torch._dynamo" not in new, sorted(new)


def test_no_imports_form_a_cycle():
    graph = {module: imports_of(module) - {module} for module in MODULES}
    while graph:  # take modules away whose imports are all taken
        done = [module for module, needed in graph.items() if not needed & graph.keys()]
        assert done, f"a cycle among {sorted(graph)}"
        for module in done:
            del graph[module]


# -----------------------------------------------------------------------------
# The core alone

CORE_ALONE = """
import sys
import torch
import model

for preset in ("cpu", "speedrun"):
    with torch.device("meta"):
        net = model.build(model.PRESETS[preset])
    assert all(parameter.is_meta for parameter in net.parameters()), preset
config = model.Config(vocab_size=64, eot_token=63, n_layer=2, n_embd=32, n_head=2, head_dim=16, num_experts=4,
                      value_embeds=1, window_size=16, attention="AK", pattern="MD", dtype="fp32")
net = model.build(config).train()
with torch.no_grad():
    for parameter in net.parameters():
        parameter += 0.1 * torch.randn(parameter.shape)
ids = torch.randint(64, (2, 17))
loss = net(ids[:, :-1], ids[:, 1:]).loss
loss.backward()
assert loss.isfinite() and all(parameter.grad is not None for parameter in net.parameters())
assert net.generate(ids, 3).shape == (2, 20)
assert not {name.partition(".")[0] for name in sys.modules} & {"zoo", "tools"}
print("done")
"""


def test_the_core_runs_without_zoo_and_tools(tmp_path):
    for file in ROOT_FILES:
        shutil.copy(ROOT / file, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", CORE_ALONE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "done", done.stderr
