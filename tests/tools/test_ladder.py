"""benchmarks/ladder.py: the law of a ladder of runs, and the runs. CPU, no network: `pytest tests/tools/test_ladder.py`."""

import csv
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_train import WORDS, write_data

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import ladder  # noqa: E402

import train_muon  # noqa: E402
from cli import UserError  # noqa: E402

TRUTH = ladder.Law(np.array([math.log(0.4), -0.15, -0.3, 0.02, math.log(0.5), 0.12, -0.35, -0.03, math.log(0.5)]), 5e5, 1e7)


def synthetic_points(noise: float) -> dict[str, np.ndarray]:
    """Losses of TRUTH over 3 sizes, 4 lengths and 3 numbers of experts."""
    grid = np.meshgrid([1e5, 4e5, 1.6e6], [2e6, 8e6, 3.2e7, 1.28e8], [1, 8, 32], indexing="ij")
    points = dict(zip(ladder.COLUMNS, (values.flatten() for values in grid)))
    drawn = np.random.default_rng(1).normal(size=len(points["tokens"]))
    return points | {"loss": TRUTH.loss(*points.values()) * np.exp(noise * drawn)}


def write_points(path: Path, points: dict[str, np.ndarray]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([list(points), *zip(*points.values())])
    return path


def test_the_published_law_is_that_of_the_papers_coefficients():
    law = ladder.published_law()
    for experts, (m, mu, n, nu) in ladder.PUBLISHED.items():
        for active, tokens in ((1e6, 3e7), (1e9, 1e11)):
            expected = m * active**-mu + n * tokens**-nu + 1.3637
            assert abs(law.loss(active, tokens, experts) / expected - 1) < 2e-3
    assert abs(law.break_even(1e6, 8, 1.0) / 30e6 - 1) < 0.05  # 30 tokens per active parameter
    tokens, (m, mu, n, nu) = law.break_even(1e6, 8, 1.13), ladder.PUBLISHED[1]
    assert abs((m * 1e6**-mu + n * (1.13 * tokens) ** -nu + 1.3637) / law.loss(1e6, tokens, 8) - 1) < 1e-3


def test_a_speed_up_is_the_twins_tokens_over_the_taxed_ones():
    active, tokens, experts, tax = 4e5, 3e7, 16, 1.2
    speed_up = TRUTH.speed_up(active, tokens, experts, tax)
    assert math.isclose(TRUTH.loss(active, speed_up * tax * tokens, 1), TRUTH.loss(active, tokens, experts), rel_tol=1e-9)
    even = TRUTH.break_even(active, experts, tax)
    assert TRUTH.speed_up(active, even * 1.02, experts, tax) > 1 > TRUTH.speed_up(active, even / 1.02, experts, tax)
    useless = TRUTH._replace(theta=np.where(np.isin(ladder.COEFFICIENTS, ("delta", "gamma", "omega", "zeta")), 0, TRUTH.theta))
    assert math.isclose(useless.speed_up(active, tokens, experts, tax), 1 / tax)
    assert useless.break_even(active, experts, tax) == math.inf
    assert TRUTH.speed_up(1e5, 1e12, 32, 1.0) == math.inf  # below the least loss of so small a twin


def test_each_kind_at_its_best_size():
    loss, active, tokens = TRUTH.best(1e15, 16, 1.2, 4e5)
    assert math.isclose(6 * 1.2 * (active + 4e5) * tokens, 1e15) and math.isclose(TRUTH.loss(active, tokens, 16), loss)
    for other in (active / 1.3, active * 1.3):
        assert TRUTH.loss(other, 1e15 / (6 * 1.2 * (other + 4e5)), 16) > loss
    speed_up = TRUTH.speed_up_at_best(1e15, 16, 1.2, 4e5)
    assert math.isclose(TRUTH.best(speed_up * 1e15, 1, 1.0, 4e5)[0], loss, rel_tol=1e-3)
    assert math.isclose(TRUTH.speed_up_at_best(1e15, 1, 1.25, 4e5), 1 / 1.25, rel_tol=1e-2)


def test_the_fit_finds_the_law_of_the_points():
    exact = ladder.fit(synthetic_points(0.0))
    for question in ((2e5, 5e6, 1), (8e5, 5e7, 16), (1e6, 2e8, 32)):
        assert abs(exact.loss(*question) / TRUTH.loss(*question) - 1) < 1e-3

    points = synthetic_points(0.002)
    law = ladder.fit(points)
    truth = TRUTH.speed_up(8e5, 3e7, 16, 1.1)
    low, high = ladder.interval([other.speed_up(8e5, 3e7, 16, 1.1) for other in ladder.refits(points, law, 40)])
    assert low < truth < high and high - low < 0.2
    assert all(error < 0.03 for error in ladder.left_out(points).values())


def test_a_size_that_breaks_the_law_is_seen_when_it_is_left_out():
    points = synthetic_points(0.0)
    points["loss"][points["active"] == 1.6e6] *= 1.2
    assert ladder.left_out(points)[1.6e6] > 0.1


def test_a_size_without_which_too_few_points_are_left_stays_in():
    points = synthetic_points(0.0)
    few = points["active"] != points["active"][0]
    few[few] = np.arange(few.sum()) < 8
    kept = {name: values[(points["active"] == points["active"][0]) | few] for name, values in points.items()}
    assert points["active"][0] not in ladder.left_out(kept)


def test_predict_and_fit_of_a_ladder_made_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "REFITS", 10)
    path = write_points(tmp_path / "theirs.csv", synthetic_points(0.001))
    words = ["--points", str(path), "--tax", "1.1"]
    ladder.predict(ladder.parse(["predict", "--active", "0.4M", "--tokens", "30M", "--experts", "16", *words]))
    out, err = capsys.readouterr()
    speed_up = float(out.split("tax of 1.1: ")[1].split()[0])
    assert abs(speed_up / TRUTH.speed_up(4e5, 3e7, 16, 1.1) - 1) < 0.05 and "90%: [" in out and not err
    ladder.predict(ladder.parse(["predict", "--active", "20M", "--tokens", "30M", "--experts", "16", *words]))
    assert "note: active 20M is outside the ladder, 100K to 1.6M" in capsys.readouterr().err
    ladder.show_fit(ladder.parse(["fit", *words]))
    out = capsys.readouterr().out
    assert out.startswith("36 points, root mean squared relative error 0.") and "100K active parameters, predicted" in out
    assert (tmp_path / "ladder.png").stat().st_size > 10_000


@pytest.mark.parametrize("change, sentence", [
    (lambda points: points.pop("loss"), "needs a number above 0 in column 'loss' of every row"),
    (lambda points: points.update(tokens=-points["tokens"]), "needs a number above 0 in column 'tokens' of every row"),
    (lambda points: points.update(experts=points["experts"] * 0 + 8), "1 of experts: the law needs at least 10"),
    (lambda points: points.update({name: values[:5] for name, values in points.items()}), "5 points with values"),
])  # fmt: skip
def test_points_that_cannot_be_fitted_are_one_sentence(tmp_path, change, sentence):
    points = synthetic_points(0.0)
    change(points)
    with pytest.raises(UserError, match=sentence):
        ladder.fit(ladder.read_points(write_points(tmp_path / "points.csv", points)))


def test_a_missing_file_and_a_wrong_count_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="make it with run, or name another file"):
        ladder.read_points(tmp_path / "none.csv")
    with pytest.raises(UserError, match="'many' is not a count"):
        ladder.parse(["predict", "--active", "many", "--tokens", "1M", "--experts", "8"])


@pytest.mark.parametrize("value, text", [(999, "999"), (1_570_000, "1.57M"), (6e8, "600M"), (math.inf, "never")])
def test_counts_are_read_as_they_are_written(value, text):
    assert ladder.number(value) == text and (text == "never" or ladder.count(text) == value)


def test_a_mixture_and_its_twin_have_the_same_active_parameters():
    plan = json.loads((ROOT / "benchmarks/ladder/plan.json").read_text())
    by_size = {}
    for rung in ladder.rungs(plan):
        config, hp, _ = train_muon.parse(train_muon.MUON, list(rung.flags))
        assert rung.tokens % hp.batch_tokens == 0
        by_size.setdefault(rung.size, set()).add(ladder.active_parameters(config))
    assert all(len(counts) == 1 for counts in by_size.values())


@pytest.mark.slow
def test_run_adds_the_missing_runs_and_no_others(tmp_path, capsys):
    plan = {"data": write_data(tmp_path / "data", WORDS["greek"]), "val_tokens": 256, "seeds": [0],
            "flags": "--preset cpu --batch_tokens 256 --seq_len 128 --n_layer 2 --n_head 1 --head_dim 16 --value_embeds 0 --mlp_ratio 2",
            "sizes": {"s": "--n_embd 32"}, "tokens": {"s": [512, 1024]},
            "experts": {"1": "--pattern D", "4": "--pattern M --num_experts 4"}}  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    points = tmp_path / "points.csv"
    words = ["run", "--plan", str(tmp_path / "plan.json"), "--points", str(points)]
    ladder.run(ladder.parse(words))
    columns, rows = ladder.read_points(points), list(csv.DictReader(points.open()))
    assert sorted(zip(columns["experts"], columns["tokens"])) == [(1, 512), (1, 1024), (4, 512), (4, 1024)]
    assert all(4 < loss < 9 for loss in columns["loss"]) and len(set(columns["active"])) == 1
    assert len(set(columns["loss"])) == 4 and all(float(row["step_ms"]) > 0 for row in rows)

    kept = points.read_text().splitlines(keepends=True)
    points.write_text("".join(kept[:-1]))
    capsys.readouterr()
    ladder.run(ladder.parse(words))
    assert "1 of 4 runs are missing" in capsys.readouterr().err and sorted(points.read_text().splitlines(keepends=True))[:3]
    assert len(points.read_text().splitlines()) == 5

    plan["tokens"]["s"] = [300]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="300 tokens are no multiple of batch_tokens = 256"):
        ladder.run(ladder.parse(words))


def test_a_run_that_fails_does_not_throw_away_the_one_beside_it(tmp_path, monkeypatch):
    def train(rung, plan):
        if rung.experts == 1:
            raise UserError("the loss is not finite")
        time.sleep(0.3)  # it ends after the one that fails
        return {"size": rung.size, "experts": rung.experts, "tokens": rung.tokens, "seed": rung.seed, "loss": 1.0}

    plan = {"flags": "", "sizes": {"s": ""}, "tokens": {"s": [512]}, "seeds": [0], "experts": {"1": "", "4": "", "8": ""}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    points = tmp_path / "points.csv"
    monkeypatch.setattr(ladder, "train", train)
    with pytest.raises(UserError, match="not finite"):
        ladder.run(ladder.parse(["run", "--plan", str(tmp_path / "plan.json"), "--points", str(points)]))
    assert "4" in [row["experts"] for row in csv.DictReader(points.open())]
