"""facts.Norms: the norms of gradients and updates in the log are those of the model, on any number of ranks.

CPU, no network: `pytest tests/core/test_norms.py`. Run as a script under torchrun it is one rank of a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import distributed  # noqa: E402
import facts  # noqa: E402
import model  # noqa: E402
import train_muon  # noqa: E402
from logger import PhaseTimer  # noqa: E402
from train_muon import MUON, Exchange, Session, random_batches, train_step  # noqa: E402

FLAGS = """--preset cpu --device cpu --vocab_size 64 --eot_token 63 --n_layer 2 --n_embd 32 --n_head 1 --head_dim 32
    --value_embeds 1 --num_experts 4 --pattern M --attention AK --ngrams 2 --ngram_rows 64 --window L --window_size 64
    --dtype fp32 --ns_dtype fp32 --seq_len 32 --batch_tokens 384 --num_iterations 100 --bucket_mb 0""".split()
KINDS = {"embed", "expert", "head", "matrix", "ngram_embed", "router", "scalar", "value_embed"}
KEYS = {f"norm/{quantity}/{kind}" for quantity in ("grad", "update") for kind in KINDS}
STEP = facts.NORMS_EVERY - 1  # its row is that of step 25


def make_session(world=None, **changes):
    """A tiny model and its batches; the seeds are the same in each call."""
    torch.set_num_threads(1)
    flags = [*FLAGS, *(word for name, value in changes.items() for word in (f"--{name}", str(value)))]
    config, hp, _ = train_muon.parse(MUON, flags)
    world = world or distributed.World(0, 1, torch.device("cpu"))
    world = world.with_expert_groups(hp.expert_parallel, hp.collectives_timeout)
    net = model.build(config, world.expert_ranks).init_weights(0).train()
    exchange = Exchange(net, world, hp.bucket_mb)
    exchange.attach_optimizers(MUON, hp)
    (batch,) = random_batches(config, hp, 1, 12, world.device)()
    rows = slice(world.rank, None, world.size)
    batch = batch._replace(inputs_BT=batch.inputs_BT[rows], targets_BT=batch.targets_BT[rows])
    return Session(MUON, hp, net, exchange, PhaseTimer("cpu")), lambda: [batch]


def norms_of(row) -> dict:
    return {key: float(value) for key, value in row.items() if key.startswith("norm/")}


def parameter_bytes(session) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in session.model.parameters()]


def test_the_norms_are_those_of_autograd_and_of_the_changed_parameters():
    session, next_step = make_session()
    for step in range(3):  # away from initial zeros
        train_step(session, next_step, step)
    net, (batch,) = session.model, next_step()
    kinds, before = net.parameter_kinds(), {name: p.detach().clone() for name, p in net.named_parameters()}
    hp = session.hp
    net.set_step(hp.seed, STEP, batch.first_row * hp.seq_len, train_muon.window(STEP, hp, net.config))
    grads = torch.autograd.grad(net(batch.inputs_BT, batch.targets_BT).loss, list(net.parameters()), allow_unused=True)
    grads = {name: torch.zeros(()) if grad is None else grad for name, grad in zip(before, grads)}

    found = norms_of(train_step(session, next_step, STEP)[0])
    assert found.keys() == KEYS and {kinds[name] for name in before} == KINDS
    for kind in KINDS:
        names = [name for name in before if kinds[name] == kind]
        grad = sum(grads[name].double().square().sum() for name in names) ** 0.5
        update = sum((net.get_parameter(name) - before[name]).double().square().sum() for name in names) ** 0.5
        assert found[f"norm/grad/{kind}"] == pytest.approx(grad.item(), rel=1e-4)
        assert found[f"norm/update/{kind}"] == pytest.approx(update.item(), rel=1e-5) and update > 0


def test_they_are_logged_every_25th_step_and_change_no_bit_of_training(monkeypatch):
    logged, ends = {}, []
    for every in (25, 3, 10**9):
        monkeypatch.setattr(facts, "NORMS_EVERY", every)
        session, next_step = make_session()
        logged[every] = [step + 1 for step in range(26) if norms_of(train_step(session, next_step, step)[0])]
        ends.append(parameter_bytes(session))
    assert logged == {25: [25], 3: [3, 6, 9, 12, 15, 18, 21, 24], 10**9: []}
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.slow
@pytest.mark.parametrize("changes", ({}, {"expert_parallel": 2}), ids=("replicated", "expert_parallel"))
def test_two_ranks_log_the_norms_of_the_whole_model(tmp_path, changes):
    session, next_step = make_session(top_k=4)  # of 4: rounding changes no route
    alone = norms_of(train_step(session, next_step, STEP)[0])
    words = [f"{name}={value}" for name, value in {"top_k": 4, **changes}.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    subprocess.run([*launch, str(tmp_path), *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1] and ranks[0] == pytest.approx(alone, rel=2e-3)


def main(folder, *words):
    world = distributed.init_distributed("cpu", train_muon.MuonConfig().collectives_timeout)
    session, next_step = make_session(world, **dict(word.split("=") for word in words))
    row, _ = train_step(session, next_step, STEP)
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(norms_of(row)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
