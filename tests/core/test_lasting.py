"""A run is not lost: dead terminals, failing evaluations, signals. Processes of their own, on a CPU."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from slow import all_but
from test_distributed import free_port
from test_train import WORDS, flags, write_data
from torch.distributed.run import parse_args

import guards
from checkpoint import checkpoints
from distributed import World
from terminal import LastingStream
from train_muon import MUON

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "greek", WORDS["greek"])


def start(folder: Path, data, **values) -> subprocess.Popen:
    """A tiny run in a process of its own; its output goes to folder/out.txt and folder/err.txt."""
    values = dict(data=data, out_dir=folder, experiment_name="run") | values
    out, err = open(folder / "out.txt", "w"), open(folder / "err.txt", "w")
    hang_up = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup, the run does not
    words = [sys.executable, "train_muon.py", *flags(MUON, **values)]
    return subprocess.Popen(words, cwd=ROOT, stdout=out, stderr=err, preexec_fn=hang_up)


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def rows(folder: Path) -> list[dict]:
    path = folder / "run/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def saved(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in checkpoints(folder / "run/checkpoint")]


@pytest.mark.parametrize("redirection", all_but(["| head -1"], ["| head -1", ">&-", ">&- 2>&-", "2>&1 | true"]))
def test_a_dead_terminal_ends_no_run(shards, tmp_path, redirection):
    words = flags(MUON, data=shards, out_dir=tmp_path, experiment_name="run", val_every=2, num_iterations=4)
    command = " ".join([sys.executable, "train_muon.py", *(f"'{word}'" for word in words), redirection])
    subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, timeout=120)
    assert saved(tmp_path)[0] == 4
    assert rows(tmp_path)[-1]["event"] == "end" and [row["step"] for row in rows(tmp_path) if "val/loss" in row] == [0, 2, 4]


def test_a_stream_without_a_reader_drops_its_text():
    reading, writing = os.pipe()
    stream = LastingStream(os.fdopen(writing, "w"))
    os.close(reading)
    assert stream.write("x" * 10**6) == 10**6
    stream.flush()
    LastingStream(None).write("nothing")


def test_a_character_that_a_stream_cannot_show_does_not_silence_it():
    stream = LastingStream(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    for text in ("pi is π, ", "caf\udce9, ", "and so on"):
        stream.write(text)
    stream.flush()
    assert stream.stream.buffer.getvalue() == b"pi is ?, caf?, and so on"


def test_nohup_is_kept():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with guards.StopSignals(World(0, 1, torch.device("cpu"))) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_the_last_checkpoint_is_saved_before_the_last_evaluation(shards, tmp_path):
    """The folder of the data is renamed during the run, so the evaluation fails; the weights are there."""
    data = shutil.copytree(shards, tmp_path / "data")
    process = start(tmp_path, data, num_iterations=300, val_every=0)
    wait_for(lambda: any("train/loss" in row for row in rows(tmp_path)))
    data.rename(tmp_path / "renamed")
    assert process.wait(120) != 0
    assert "holds no token shards" in (tmp_path / "err.txt").read_text()
    assert saved(tmp_path)[0] == 300
    (tmp_path / "renamed").rename(data)
    assert start(tmp_path, data, num_iterations=300, val_every=0, resume=True).wait(120) == 0
    assert [row["step"] for row in rows(tmp_path) if "val/loss" in row] == [300] and rows(tmp_path)[-1]["event"] == "end"


@pytest.mark.parametrize(
    "number",
    all_but([signal.SIGTERM], [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]),
    ids=lambda number: number.name,
)
def test_every_signal_ends_with_a_checkpoint_and_repeats_count_once(shards, tmp_path, number):
    process = start(tmp_path, shards, num_iterations=10**5)
    wait_for(lambda: any("train/loss" in row for row in rows(tmp_path)))
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.05)
    assert process.wait(60) == 128 + number
    err = (tmp_path / "err.txt").read_text()
    assert err.count("stopping: saving a checkpoint") == 1 and "Traceback" not in err
    assert saved(tmp_path)[0] == rows(tmp_path)[-1]["step"] > 0


@pytest.mark.parametrize("script", ("train_muon.py", "train_adamw.py", "train_zoo.py"))
def test_a_ctrl_c_during_the_imports_is_quiet(script, tmp_path):
    """A package named torch stands in the way of the real one; its import takes forever."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, ROOT / script], cwd=tmp_path, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_a_signal_interrupts_an_evaluation(shards, tmp_path):
    """An evaluation of some 10,000 rows of two tokens, one by one, takes much longer than the answer."""
    process = start(tmp_path, shards, num_iterations=4, seq_len=2, batch_tokens=4, micro_batch_tokens=2, val_every=2)
    wait_for(lambda: (tmp_path / "run/run.log").exists())
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 30 and not any("val/loss" in row for row in rows(tmp_path))
    assert "there is no checkpoint" in (tmp_path / "out.txt").read_text()


# -----------------------------------------------------------------------------
# Under a scheduler


def slurm_recipe() -> str:
    """The script for sbatch in docs/training.md."""
    return re.search(r"```bash needs: nodes\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs/training.md").read_text(), re.S)[1]


def test_torchrun_waits_for_the_checkpoint_nearly_until_the_job_is_killed():
    script = slurm_recipe()
    seconds_left = int(re.search(r"--signal=TERM@(\d+)", script)[1])
    words = shlex.split(re.search(r"srun torchrun (.*?)train_muon.py", script, re.S)[1].replace("$SLURM_NNODES", "2"))
    assert seconds_left - 30 < parse_args([*words, "train_muon.py"]).shutdown_timeout < seconds_left


@pytest.mark.slow
def test_the_slurm_recipe_starts_stops_and_resumes(shards, tmp_path):
    """The first attempt died before it made the folder; the second is signalled, and the third goes on from there."""
    for name, line in {"srun": 'exec "$@"', "scontrol": "echo localhost"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    ours = shlex.join(flags(MUON, data=shards, out_dir=tmp_path, experiment_name="muon", num_iterations=10**5))
    script = slurm_recipe().replace("--nproc_per_node=8", "--nproc_per_node=2").replace("29400", str(free_port()))
    script = script.replace("--experiment_name muon", ours)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = dict(SLURM_JOB_ID="7", SLURM_NNODES="1", SLURM_JOB_NODELIST="node0", PATH=path)
    metrics = tmp_path / "muon/metrics.jsonl"
    trained = lambda: [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if "train/loss" in row]

    for attempt in (1, 2):
        before = trained()[-1] if metrics.exists() else 0
        environment = os.environ | job | {"SLURM_RESTART_COUNT": str(attempt)}
        process = subprocess.Popen(["bash", "-c", script.replace("srun", "exec srun")], cwd=ROOT, env=environment,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
        wait_for(lambda: metrics.exists() and trained() and trained()[-1] > before)
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1]
        assert process.returncode != 0
        assert ("this Slurm job starts the run" in err) == (attempt == 1)
        assert [int(path.name[-6:]) for path in checkpoints(tmp_path / "muon/checkpoint")][0] == trained()[-1] > before
    assert f"the run continues from step {before}" in (tmp_path / "muon/run.log").read_text()
