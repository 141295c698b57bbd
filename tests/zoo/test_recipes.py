"""train_zoo.py: the recipes of train_muon.py and train_adamw.py with every option of the zoo.

CPU, no network: `pytest tests/zoo/test_recipes.py`."""

import dataclasses
import sys
from pathlib import Path

import pytest
from slow import all_but, but_every

from cli import UserError  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from test_train import (  # noqa: E402, F401  (shards is a fixture)
    CPU,
    TINY_MODEL,
    call,
    flags,
    hyper,
    observe,
    once,
    refused,
    same,
    series,
    session_of,
    shards,
    train,
)

import model  # noqa: E402
import train_adamw  # noqa: E402
import train_muon  # noqa: E402
import train_zoo  # noqa: E402
import zoo  # noqa: E402
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


@pytest.mark.parametrize("name", all_but(["muon"], RECIPES))
def test_the_script_trains_with_either_optimizer(name, shards, tmp_path):  # noqa: F811
    words = flags(RECIPES[name], data=shards, out_dir=tmp_path, num_iterations=2)
    status, _, err = call(train_zoo.main, [*words, "--optimizer", name])
    assert status == 0, err
    core = train(
        tmp_path / "core", {"muon": train_muon.MUON, "adamw": train_adamw.ADAMW}[name], data=shards, num_iterations=2
    )
    assert series(tmp_path / name, "train/loss") == series(core, "train/loss")


def test_help_names_the_optimizers_and_the_options_of_mixtures():
    status, out, _ = call(train_zoo.main, ["--help"])
    assert status == 0 and "--optimizer {muon,adamw}" in out and "--help zoo" in out
    status, out, _ = call(train_zoo.main, ["--help", "zoo"])
    assert status == 0 and "--domain_weights" in out and "--halt" in out


def test_experts_of_several_kinds_are_not_shared_among_ranks(shards, tmp_path):  # noqa: F811
    config, hp, args = train_muon.parse(
        ZOO_MUON, flags(ZOO_MUON, data=shards, out_dir=tmp_path / "logs", experts="mlp*2,zero*2", expert_parallel=2)
    )
    with pytest.raises(
        UserError, match="experts is 'mlp\\*2,zero\\*2'; with expert_parallel = 2 all must be of one kind"
    ):
        train_muon.prepare(config, hp, ZOO_MUON, tmp_path / "logs/muon", False, True, World(0, 2, CPU))


def test_experts_are_not_shared_among_ranks_where_tokens_go_apart(shards, tmp_path):  # noqa: F811
    for options in (dict(depth="routed"), dict(depth="loop", halt="act")):
        config, hp, args = train_muon.parse(
            ZOO_MUON, flags(ZOO_MUON, data=shards, out_dir=tmp_path / "logs", expert_parallel=2, **options)
        )
        with pytest.raises(UserError, match="expert_parallel is 2; it must be 1 where tokens go apart"):
            train_muon.prepare(config, hp, ZOO_MUON, tmp_path / "logs/muon", False, True, World(0, 2, CPU))


def test_meta_tokens_count_in_a_row_on_cuda(shards, tmp_path):  # noqa: F811
    words = flags(
        ZOO_MUON, data=shards, out_dir=tmp_path / "logs", num_meta_tokens=8, seq_len=2**14, batch_tokens=2**14
    )
    config, hp, _ = train_muon.parse(ZOO_MUON, words)
    with pytest.raises(UserError, match="seq_len . num_meta_tokens is 16392; on CUDA it must be a multiple of 128"):
        ZOO_MUON.check(config, hp, 1, "cuda")


def test_an_objective_that_cannot_continue_a_text_has_no_sample(shards, tmp_path):  # noqa: F811
    assert "sample_tokens is 4; it must be 0" in refused(
        tmp_path, ZOO_MUON, data=shards, objective="masked", sample_tokens=4
    )


def test_what_is_hidden_in_evaluation_does_not_depend_on_the_micro_batch(shards):  # noqa: F811
    config = zoo.Config(vocab_size=257, eot_token=256, **TINY_MODEL, objective="masked")
    net, hp = model.build(config), hyper(ZOO_MUON, data=shards, val_tokens=256)
    losses = [ZOO_MUON.evaluate(session_of(net, hp, rows, ZOO_MUON), 3)["val/loss"] for rows in (1, 2, 4)]
    assert max(losses) - min(losses) < 1e-5


# -----------------------------------------------------------------------------
# No dead option: another value of any field changes what a short run does

CHANGES = {  # field -> (another legal value, the settings under which it acts)
    "experts": ("mlp*2,identity,zero", {}),
    "free_eta": (0.5, {"experts": "mlp*2,identity,zero", "balance_coef": 0.5}),
    "router": ("recurrent", {}),
    "router_score": ("sigmoid", {}),
    "router_residual": (0.5, {}),
    "router_kernel": (2, {"router": "conv"}),
    "router_dim": (32, {"router": "mlp"}),
    "bias_update_threshold": (10**6, {"bias_update_factor": 0.1}),
    "importance_coef": (0.5, {"router_noise": 1.0}),
    "shared": ("conv", {"num_shared_experts": 1, "mlp_ratio": 3.0}),
    "shared_kernel": (2, {"num_shared_experts": 1, "mlp_ratio": 3.0, "shared": "conv"}),
    "routed_scale": ("2.0", {}),
    "load_coef": (0.5, {"router_noise": 1.0}),
    "depth": ("loop", {}),
    "residual": ("average", {}),
    "looped": (".ooo", {"depth": "loop"}),
    "loops": (3, {"depth": "loop"}),
    "eval_loops": (1, {"depth": "loop"}),
    "loop_keys": ("share_first", {"depth": "loop"}),
    "reinject": (0.5, {"depth": "loop"}),
    "halt": ("act", {"depth": "loop"}),
    "halt_threshold": (0.1, {"depth": "loop", "halt": "act"}),
    "ponder_coef": (0.5, {"depth": "loop", "halt": "act"}),
    "ponder_prior": (0.5, {"depth": "loop", "halt": "ponder"}),
    "identity_layers": (1, {"depth": "routed"}),
    "controller": ("lstm", {"depth": "routed"}),
    "controller_dim": (32, {"depth": "routed", "controller": "mlp"}),
    "route_by": ("first_token", {"depth": "routed"}),
    "route_training": ("straight_through", {"depth": "routed"}),
    "anneal_steps": (2, {"depth": "routed", "route_training": "anneal"}),
    "step_loss": ("mean", {"depth": "routed"}),
    "layer_balance_coef": (0.5, {"depth": "routed"}),
    "norms": ("R", {}),
    "rotary": ("N", {}),
    "attn_softmax": ("ssmax", {}),
    "qk_norm": ("none", {}),
    "latent_dim": (16, {"attention": "L"}),
    "num_meta_tokens": (2, {}),
    "attn_experts": (2, {"attention": "R"}),
    "attn_top_k": (1, {"attention": "R"}),
    "entropy_coef": (0.5, {}),
    "objective": ("masked", {}),
    "mask_share": (0.5, {"objective": "masked"}),
}
CORE = {field.name for field in dataclasses.fields(model.Config)}
FIELDS = [field.name for field in dataclasses.fields(zoo.Config) if field.name in CHANGES or field.name not in CORE]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, shards):  # noqa: F811
    """companions -> what a run without the change did."""
    return once(lambda companions: observe(tmp_path_factory.mktemp("plain"), ZOO_MUON, data=shards, **dict(companions)))


@pytest.mark.parametrize("field", but_every(20, FIELDS))
def test_no_option_of_the_zoo_is_dead(field, shards, tmp_path, plain_run):  # noqa: F811
    assert field in CHANGES, f"{field} is new: give it a row in CHANGES, so that this test can see what it does"
    value, companions = CHANGES[field]
    before = plain_run(tuple(companions.items()))
    after = observe(tmp_path, ZOO_MUON, data=shards, **companions | {field: value})
    assert not same(before, after), f"--{field} {value} changed nothing"
