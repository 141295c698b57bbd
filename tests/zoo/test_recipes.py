"""train_zoo.py: the recipes of train_muon.py and train_adamw.py with every option of the zoo.

CPU, no network: `pytest tests/zoo/test_recipes.py`."""

import dataclasses
import sys
from pathlib import Path

import pytest

from cli import UserError  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from test_train import CPU, call, flags, refused, series, shards, train  # noqa: E402, F401  (shards is a fixture)

import train_adamw  # noqa: E402
import train_muon  # noqa: E402
import train_zoo  # noqa: E402
from distributed import World  # noqa: E402
from zoo.recipes import RECIPES, ZOO_ADAMW, ZOO_MUON  # noqa: E402


def test_presets_of_the_core_are_the_same_runs_and_two_are_the_zoo_s_own():
    for recipe, core in ((ZOO_MUON, train_muon.MUON), (ZOO_ADAMW, train_adamw.ADAMW)):
        assert set(recipe.presets) == set(core.presets) | {"100m", "100m-cpu"}
        for name, preset in core.presets.items():
            assert dataclasses.asdict(preset).items() <= dataclasses.asdict(recipe.presets[name]).items()
        for name in recipe.presets:
            config, hp, _ = train_muon.parse(recipe, ["--preset", name])
            assert config == recipe.model_presets[name] and hp == recipe.presets[name]


@pytest.mark.parametrize("name", RECIPES)
def test_the_script_trains_with_either_optimizer(name, shards, tmp_path):  # noqa: F811
    words = flags(RECIPES[name], data=shards, out_dir=tmp_path, num_iterations=2)
    status, _, err = call(train_zoo.main, [*words, "--optimizer", name])
    assert status == 0, err
    core = train(tmp_path / "core", {"muon": train_muon.MUON, "adamw": train_adamw.ADAMW}[name], data=shards, num_iterations=2)
    assert series(tmp_path / name, "train/loss") == series(core, "train/loss")


def test_help_names_the_optimizers_and_the_options_of_mixtures():
    status, out, _ = call(train_zoo.main, ["--help"])
    assert status == 0 and "--optimizer {muon,adamw}" in out and "--domain_weights" in out


def test_experts_of_several_kinds_are_not_shared_among_ranks(shards, tmp_path):  # noqa: F811
    config, hp, args = train_muon.parse(ZOO_MUON, flags(ZOO_MUON, data=shards, out_dir=tmp_path / "logs", experts="mlp*2,zero*2", expert_parallel=2))
    with pytest.raises(UserError, match="experts is 'mlp\\*2,zero\\*2'; with expert_parallel = 2 all must be of one kind"):
        train_muon.prepare(config, hp, ZOO_MUON, tmp_path / "logs/muon", False, True, World(0, 2, CPU))


def test_experts_are_not_shared_among_ranks_where_tokens_go_apart(shards, tmp_path):  # noqa: F811
    for options in (dict(depth="routed"), dict(depth="loop", halt="act")):
        config, hp, args = train_muon.parse(ZOO_MUON, flags(ZOO_MUON, data=shards, out_dir=tmp_path / "logs", expert_parallel=2, **options))
        with pytest.raises(UserError, match="expert_parallel is 2; it must be 1 where tokens go apart"):
            train_muon.prepare(config, hp, ZOO_MUON, tmp_path / "logs/muon", False, True, World(0, 2, CPU))


def test_meta_tokens_count_in_a_row_on_cuda(shards, tmp_path):  # noqa: F811
    words = flags(ZOO_MUON, data=shards, out_dir=tmp_path / "logs", num_meta_tokens=8, seq_len=2**14, batch_tokens=2**14)
    config, hp, _ = train_muon.parse(ZOO_MUON, words)
    with pytest.raises(UserError, match="seq_len . num_meta_tokens is 16392; on CUDA it must be a multiple of 128"):
        ZOO_MUON.check(config, hp, 1, "cuda")


def test_an_objective_that_cannot_continue_a_text_has_no_sample(shards, tmp_path):  # noqa: F811
    assert "sample_tokens is 4; it must be 0" in refused(tmp_path, ZOO_MUON, data=shards, objective="masked", sample_tokens=4)
