"""What faults.py injects, at fewer moments: runs that are killed, stopped, poisoned and left without room, and files
that are damaged.

CPU, about two minutes: `pytest tests/core/test_faults.py`. All of it, with a table: `python tests/core/faults.py`."""

import sys
from pathlib import Path

import pytest
from slow import all_but

sys.path.insert(0, str(Path(__file__).resolve().parent))
import faults  # noqa: E402

CHEAP = [  # rows of the table as they are
    "nan_loss",
    "nan_gradient",
    "nan_gradient_before_saving",
    "nan_gradient_in_the_last_step",
    "absurd_rates",
    "ranks_differ_in_rate",
    "ranks_differ_in_data",
    "ranks_differ_in_code",
    "read_only",
    "all_checkpoints_damaged",
    "damaged_headers",
    "damaged_tokens",
]


@pytest.fixture(scope="module")
def lab():
    with faults.Lab() as lab:
        yield lab


FAST = ("nan_gradient", "ranks_differ_in_rate", "read_only", "damaged_headers", "damaged_tokens")


@pytest.mark.parametrize("name", all_but(FAST, CHEAP))
def test_row(name, lab):
    try:
        faults.ROWS[name].run(lab)
    except faults.Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.slow
@pytest.mark.parametrize(
    "damages, count", [(faults.CHECKPOINT_DAMAGE, 6), (faults.MANIFEST_DAMAGE, 8)], ids=["tensors", "manifest"]
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_serves(damages, count, lab):
    faults.damaged(lab, damages, count)


@pytest.mark.slow
def test_a_run_ends_the_same_whenever_it_is_killed(lab):
    faults.kills(lab, 1, 4)


@pytest.mark.slow
def test_torchrun_restarts_a_run_by_itself(lab):
    faults.torchrun_restarts(lab, (1,))


@pytest.mark.slow
def test_a_dead_rank_is_named(lab):
    faults.dead_rank(lab, 1, resumed=False)


@pytest.mark.slow
def test_a_stuck_rank_is_named(lab):
    faults.sleeping_rank(lab, 0)


@pytest.mark.slow
def test_a_full_disk_costs_no_checkpoint(lab):
    try:
        faults.full_disk(lab, 1, (1.5,))
    except faults.Skipped as reason:
        pytest.skip(str(reason))
