"""Routes: the arithmetic source with its difficulties, statistics of known routes, collecting, and the two commands.

CPU, no network: `pytest tests/tools/test_routes.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import core, random_controller, rng, tiny

import data
from cli import UserError
from tools import prepare, sources
from tools.routes import (
    analyse,
    collect_routes,
    correlation_matrix,
    joint_matrix,
    lift_matrix,
    read_routes,
    saturation,
    transition_matrix,
    use_by_step,
    write_routes,
)

ROOT = Path(__file__).parents[2]

# -----------------------------------------------------------------------------
# Arithmetic


def run_chain(text: str) -> str:
    value = sources.DIGITS.index(text[0])
    for step in text[1:]:
        value = {"s": value + 1, "d": value * 2, "n": -value, "e": value}[step] % 11
    return sources.DIGITS[value]


def test_problems_have_the_right_answer_and_difficulty():
    rng = np.random.default_rng(3)
    lengths, digits = set(), set()
    for _ in range(300):
        problem, answer = sources.make_chain(rng).split("=")
        assert run_chain(problem) == answer
        lengths.add(len(problem) - 1)
        a, b, total = map(int, sources.make_sum(rng).replace("+", "=").split("="))
        assert a + b == total
        digits.add(max(len(str(a)), len(str(b))))
    assert lengths == set(range(1, 9)) and digits == {1, 2, 3, 4}


def test_difficulty_labels_the_answers_alone():
    text = b"\n7sdne=5\n58+967=1025\n3ee=3\nno problem\n"
    chain, total = sources.difficulty(text)["chain"], sources.difficulty(text)["sum"]
    labelled = {text[i : i + 1]: chain[i] for i in np.flatnonzero(chain)}
    assert labelled == {b"5": 3} and chain.sum() == 3, "the answer of 3ee is its first digit"
    assert total[text.index(b"1025") : text.index(b"1025") + 4].tolist() == [3] * 4 and total.sum() == 4 * 3
    assert chain.shape == total.shape == (len(text),)


def prepare_arithmetic(folder: Path):
    words = ["--source", "arithmetic", "--encoding", "bytes", "--max_tokens", "20000"]
    prepare.main([*words, "--out", str(folder)])


def test_arithmetic_needs_a_limit_and_is_deterministic(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--source", "arithmetic", "--encoding", "bytes", "--out", str(tmp_path / "endless")])
    assert "say how much of it with --max_tokens" in capsys.readouterr().err
    for name in "ab":
        prepare_arithmetic(tmp_path / name)
    train, again = (data.read_shard(tmp_path / name / "arithmetic_train_000001.bin") for name in "ab")
    val = data.read_shard(tmp_path / "a" / "arithmetic_val_000000.bin")
    problems = [set(bytes(np.where(tokens == 256, 10, tokens).astype(np.uint8)).split()) for tokens in (train, val)]
    assert np.array_equal(train, again) and len(problems[1]) > 10 and not problems[0] & problems[1]


# -----------------------------------------------------------------------------
# Statistics of known routes


def test_matrices_of_known_routes():
    """Four tokens in three steps among three members: 0 0 1, 0 1 1, 2 2 2, 0 0 2."""
    choice = np.array([[0, 0, 1], [0, 1, 1], [2, 2, 2], [0, 0, 2]]).T
    assert use_by_step(choice, 3).tolist() == [[0.75, 0.5, 0], [0, 0.25, 0.5], [0.25, 0.25, 0.5]]
    assert np.allclose(transition_matrix(choice, 3), [[2 / 5, 2 / 5, 1 / 5], [0, 1, 0], [0, 0, 1]])
    both = joint_matrix(choice, 3)
    assert np.isnan(np.diag(both)).all() and both[0, 1] == 0.5 and both[0, 2] == 0.25 and both[1, 2] == 0
    assert lift_matrix(choice, 3)[0, 1] == pytest.approx(0.5 / (0.75 * 0.5))
    met = np.array([[1, 1, 0, 1], [1, 1, 0, 0]])
    assert correlation_matrix(choice, 3)[0, 1] == pytest.approx(np.corrcoef(met)[0, 1])
    assert np.isnan(transition_matrix(choice, 4)[3]).all(), "no token was at member 3"
    choice[1:, 1] = -1  # the second token halts after one step
    assert use_by_step(choice, 3).tolist() == [[0.75, 0.5, 0], [0, 0, 0.25], [0.25, 0.25, 0.5]]
    assert np.allclose(transition_matrix(choice, 3)[0], [2 / 4, 1 / 4, 1 / 4])


# -----------------------------------------------------------------------------
# Collecting


def batches(rows: int, T: int, count: int) -> list[data.Batch]:
    ids = torch.randint(60, (count, rows, T + 1), generator=rng(5))
    return [data.Batch(micro[:, :-1], micro[:, 1:], i * rows) for i, micro in enumerate(ids)]


@pytest.mark.parametrize("net", (core(), tiny(num_meta_tokens=3)), ids=("core", "meta-tokens"))
def test_routes_have_every_token_but_meta_tokens(net, tmp_path):
    arrays = collect_routes(net, batches(2, 18, 2))
    assert arrays["token_N"].shape == (72,) and arrays["expert_LTK"].shape == (4, 72, 2)
    write_routes(tmp_path / "folder" / "routes.npz", arrays)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["routes.npz"]
    again = read_routes(tmp_path / "folder" / "routes.npz")
    assert again.keys() == arrays.keys() and all(np.array_equal(again[name], arrays[name]) for name in arrays)


def test_collected_experts_are_those_of_the_counts():
    net, (batch,) = core().eval(), batches(2, 18, 1)
    arrays = collect_routes(net, [batch])
    counts = [np.bincount(expert_TK.flatten(), minlength=4) for expert_TK in arrays["expert_LTK"]]
    assert np.array_equal(counts, net(batch.inputs_BT).stats["counts_LE"])
    right_BT = net(batch.inputs_BT).logits.argmax(-1) == batch.targets_BT
    assert np.array_equal(arrays["right_N"], right_BT.flatten())


def test_batches_that_halt_after_different_steps_are_padded():
    net = random_controller(halt="act", loops=4)
    with torch.no_grad():
        net.halt.weight.normal_(generator=rng(3))
        net.halt.bias.fill_(1.0)
    steps, run_loops = set(), net.run_loops

    def run_loops_recorded(*inputs):
        found = run_loops(*inputs)
        steps.add(len(found[-1]))
        return found

    net.run_loops = run_loops_recorded
    arrays = collect_routes(net, batches(1, 2, 30))
    assert len(steps) > 1 and arrays["layer_SN"].shape == (4, 60)
    assert ((arrays["layer_SN"] >= 0).sum(0) == arrays["loops_N"]).all()


def test_routes_of_blocks_that_are_compiled_already():
    net, some = tiny().eval(), batches(1, 18, 1)
    for block in net.blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    net(some[0].inputs_BT)
    assert collect_routes(net, some)["expert_LTK"].shape == (4, 18, 2)
    torch._dynamo.reset()


def test_no_hook_remains_after_a_batch_that_fails():
    net = tiny().train()
    with pytest.raises(AttributeError):
        collect_routes(net, [None])
    assert net.training and "run_blocks" not in vars(net) and not any(module._forward_hooks for module in net.modules())


# -----------------------------------------------------------------------------
# Analyses


def test_independent_members_have_a_lift_of_one_and_no_correlation():
    rng = np.random.default_rng(0)
    choice = rng.choice(3, p=[0.5, 0.3, 0.2], size=(1, 20000))
    choice = np.concatenate([choice, rng.choice([3, 4], size=(1, 20000))])  # one of 0 1 2, then one of 3 4
    lifts, correlations = lift_matrix(choice, 5), correlation_matrix(choice, 5)
    assert np.abs(lifts[:3, 3:] - 1).max() < 0.05 and np.abs(correlations[:3, 3:]).max() < 0.03
    assert lifts[0, 1] == 0 and correlations[3, 4] == pytest.approx(-1)


def test_analyses_of_difficulty_and_load():
    routes = {
        "layer_SN": np.array([[0, 1, 0, 2], [2, 1, 2, 2]]),
        "layers": 2,
        "identities": 1,
        "chain_N": np.array([1, 2, 1, 0]),
        "right_N": np.array([1, 0, -1, 1], np.int8),
        "loops_N": np.array([1, 3, 2, 3]),
        "expert_LTK": np.array([[[0, 1], [0, 2], [1, 0], [0, 1]]]),
        "experts": 3,
    }
    found = analyse(routes)
    assert found["identities_by_step"] == [0.25, 0.75] and found["identities_by_difficulty"]["chain"] == {
        1: 1.0,
        2: 0.0,
    }
    assert found["loops"] == {1: 0.25, 2: 0.25, 3: 0.5} and found["loops_by_difficulty"] == {"chain": {1: 1.5, 2: 3.0}}
    assert found["accuracy"] == pytest.approx(2 / 3) and found["accuracy_by_difficulty"] == {"chain": {1: 1.0, 2: 0.0}}
    assert found["load"] == [[0.5, 0.375, 0.125]] and found["coactivation"][0][0][1] == 0.75


def test_saturation_is_the_share_of_choices_that_stay():
    first, last = np.array([[[0, 1], [2, 3]], [[0, 1], [0, 1]]]), np.array([[[1, 0], [3, 1]], [[2, 3], [0, 1]]])
    assert saturation(first, last).tolist() == [0.75, 0.5]
    then, now = ({"expert_LTK": choice, "experts": 4, "token_N": np.array([7, 8])} for choice in (first, last))
    assert analyse(now, [(0, then), (5, now)])["saturation"] == {0: [0.75, 0.5], 5: [1, 1]}
    other = then | {"token_N": then["token_N"] + 1}  # a run that was resumed with another --routes_tokens
    assert list(analyse(now, [(0, other), (3, then), (5, now)])["saturation"]) == [3, 5]


def test_a_damaged_routes_file_is_one_sentence(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "empty.npz").touch()
    for name in ("array.npz", "empty.npz"):
        with pytest.raises(UserError, match=f"{name} cannot be read .*; remove it and make it again"):
            read_routes(tmp_path / name)


# -----------------------------------------------------------------------------
# The commands


def run(*words):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def run_well(*words):
    status, _, err = run(*words)
    assert status == 0, err


SMALL = """--preset cpu --device cpu --pattern M --n_embd 32 --n_head 2 --head_dim 16 --window_size 128 --seq_len 128
           --batch_tokens 512 --num_iterations 2 --value_embeds 0 --sample_tokens 0 --val_tokens 128""".split()


@pytest.mark.slow
@pytest.mark.parametrize("script, flags, pictures", (
    ("train_zoo.py", ["--depth", "routed", "--identity_layers", "1", "--looped", ".oo."],
     {"layers", "loops", "difficulty"}),
    ("train_zoo.py", ["--depth", "loop", "--halt", "act", "--objective", "masked"], {"loops", "difficulty"}),
    ("train_muon.py", [], {"coactivation", "difficulty"})))  # fmt: skip
def test_routes_of_a_run_are_drawn(script, flags, pictures, tmp_path):
    shards, logs = tmp_path / "shards", tmp_path / "logs"
    prepare_arithmetic(shards)
    run_well(script, "--data", shards, "--out_dir", logs, "--experiment_name", "muon", *SMALL, *flags)
    status, _, err = run("logger.py", "--routes", "--out_dir", logs)
    assert status != 0 and "python model.py --checkpoint" in err
    folder = logs / "muon"
    run_well("model.py", "--checkpoint", folder / "checkpoint", "--routes", folder / "routes.npz", "--data", shards,
             "--tokens", 300)  # fmt: skip
    run_well("logger.py", "--routes", "--out_dir", logs)
    found = json.loads((logs / "plots" / "muon_routes.json").read_text())
    assert {path.stem for path in (logs / "plots").glob("*.png")} == {f"muon_{name}" for name in pictures}
    if "layers" in pictures:
        assert np.allclose(np.sum(found["use_by_step"], 0), 1) and np.shape(found["use_by_step"]) == (3, 2)
        assert found["identities_by_difficulty"]["sum"]
    if "loops" in pictures:
        assert sum(found["loops"].values()) == pytest.approx(1) and found["loops_by_difficulty"]["chain"]
    if "coactivation" in pictures:
        assert np.allclose(np.sum(found["load"], 1), 1) and len(found["load"]) == 4


def test_evaluations_save_their_routes(tmp_path):
    shards, logs = tmp_path / "shards", tmp_path / "logs"
    prepare_arithmetic(shards)
    run_well("train_zoo.py", "--data", shards, "--out_dir", logs, "--experiment_name", "muon", "--val_every", 1,
             "--routes_tokens", 200, *SMALL)  # fmt: skip
    run_well("logger.py", "--routes", "--out_dir", logs)
    found = json.loads((logs / "plots" / "muon_routes.json").read_text())
    assert list(found["saturation"]) == ["0", "1", "2"] and found["saturation"]["2"] == [1.0] * 4
    assert (logs / "plots" / "muon_saturation.png").exists()
    (logs / "muon" / "routes" / "step_000001.npz").write_bytes(b"half a file")
    status, _, err = run("logger.py", "--routes", "--out_dir", logs)
    assert status != 0 and err.count("\n") == 1 and "step_000001.npz cannot be read" in err


@pytest.mark.slow
def test_routes_without_checkpoint_or_data_are_one_sentence(tmp_path):
    for words, flag in (((), "--checkpoint"), (("--checkpoint", tmp_path), "--data")):
        status, _, err = run("model.py", "--routes", tmp_path / "routes.npz", *words)
        assert status != 0 and err.count("\n") == 1 and flag in err
