"""The model card of tools/cost.py and the flags of model.py: activations, presets, errors. CPU, no network."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_helpers import TINY

import model
from model import PRESETS, Config
from tools import cost, generate

ROOT = Path(__file__).parents[2]


def test_activation_bytes_grow_with_the_row():
    config = Config(**TINY | dict(dtype="bf16"))
    a, b = cost.activation_bytes(config, 128), cost.activation_bytes(config, 256)
    assert a > 128 * 4 * 32 * 4 * 2 and 1.8 < b / a < 3


@pytest.mark.parametrize("wide", (
    dict(n_embd=256), dict(n_embd=128), dict(n_head=1, head_dim=128), dict(head_dim=136), dict(mlp_ratio=8.0)),
    ids=str)  # fmt: skip
def test_activation_bytes_are_exact_where_no_width_equals_the_row(wide):
    config = Config(**TINY | dict(dtype="bf16") | wide)
    for T in (520, 1040):
        assert cost.activation_bytes(config, T) == cost.saved_bytes(config, T, meta=0)


def test_activation_bytes_count_rows_as_long_as_the_model_is_wide():
    config = Config(**TINY | dict(n_embd=256, dtype="bf16"))
    assert cost.saved_bytes(config, 256, meta=0) < cost.activation_bytes(config, 256)


def test_the_cache_holds_keys_and_values_of_each_attention():
    config = Config(**TINY | dict(attention="A-", dtype="bf16"))
    assert cost.cache_bytes_per_token(config) == 2 * 2 * 32 * 2
    net, cache = model.build(config), model.KVCache(config, 1, 8)
    with torch.no_grad():
        net(torch.zeros(1, 8, dtype=torch.int64), cache=cache)
    assert sum(part.nbytes for parts in cache.kept.values() for part in parts) == 8 * 2 * 2 * 32 * 2


# -----------------------------------------------------------------------------
# The command line


def run_main(capsys, *words):
    """Exit status of model.py's command line, and its output."""
    status = 0
    try:
        generate.main(list(words))
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
        message = exit.code if isinstance(exit.code, str) else ""
    printed = capsys.readouterr()
    return status, printed.out, (printed.err + (message if status else "")).strip()


def test_the_script_prints_a_card():
    words = [sys.executable, ROOT / "model.py", "--preset", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert "27,388,178 total" in done.stdout and "router linear" in done.stdout and "9,181,728 training" in done.stdout


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_has_a_card(preset, capsys):
    status, out, err = run_main(capsys, "--preset", preset)
    counts = model.count_parameters(PRESETS[preset])
    assert status == 0 and err == "" and f"{counts['total']:,} total, {counts['active']:,} active" in out
    assert all(word in out for word in ("layers", "experts", "FLOPs per token", "activations"))


@pytest.mark.parametrize("dtype", sorted(model.DTYPES))
def test_every_dtype_has_a_card(dtype, capsys):
    status, out, _ = run_main(capsys, "--preset", "cpu", "--dtype", dtype)
    assert status == 0 and "activations" in out


@pytest.mark.parametrize(
    "words", (("--n_layer", "2", "--value_embeds", "1"), ("--n-layer=2", "--value-embeds=1")), ids=str
)
def test_flags_override_the_preset_in_both_spellings(words, capsys):
    status, out, _ = run_main(capsys, "--preset", "cpu", *words, "--seq-len", "64")
    assert status == 0 and "2 (DKE DKE)" in out and "64 tokens per row" in out


@pytest.mark.parametrize("words, message, expect", (
    (("--preset", "huge"), ("--preset", "cpu", "small", "speedrun"), 2),
    (("--nonsense", "3"), ("--nonsense",), 2),
    (("--n_lay", "3"), ("--n_lay",), 2),
    (("--n_layer", "three"), ("n_layer", "int", "three"), 2),
    (("--router", "lineer"), ("router", "linear"), 1),
    (("--top_k", "9"), ("top_k", "at most num_experts = 8"), 1),
    (("--mlp_ratio", "inf"), ("mlp_ratio",), 1),
    (("--seq_len", "-5"), ("seq_len",), 2),
    (("--checkpoint", "/no/such/folder"), ("--preset names a model", "leave --preset or --checkpoint out"), 1),
), ids=str)  # fmt: skip
def test_a_bad_flag_stops_with_one_sentence(words, message, expect, capsys):
    status, out, err = run_main(capsys, "--preset", "cpu", *words)
    assert status == expect and out == ""
    assert len(err.splitlines()) == 1 and all(word in err for word in message)
