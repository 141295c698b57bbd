"""Runs several training jobs in one process of torchrun, under spies, and writes down what they saw.
test_distributed.py starts it.

    torchrun --nproc_per_node=2 tests/core/worker.py OUT    # reads OUT/jobs<W>.json, writes OUT/<job>.rank<r>.{json,pt}

A job: {"recipe": "muon", "words": [flags], "copy": [from, to] or null, "plant": a key of INJECTIONS or null, "half":
its token}."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fault_injection import INJECTIONS  # noqa: E402

import checkpoint  # noqa: E402
import distributed  # noqa: E402
import facts  # noqa: E402
import train_adamw  # noqa: E402
import train_muon  # noqa: E402
from train_muon import Exchange, RowTransfer, Transfer  # noqa: E402
from zoo.recipes import ZOO_MUON  # noqa: E402

RECIPES = {"muon": train_muon.MUON, "adamw": train_adamw.ADAMW, "zoo": ZOO_MUON}
OUT = Path(sys.argv[1])


class Spies:
    """What one job did on this rank."""

    def __init__(self):
        self.steps, self.apart, self.gradients = 0, [], {}
        self.first_send, self.parameters, self.order = (
            [],
            0,
            [],
        )  # gradients there at each step's first send; all; what left in step 1
        self.bytes = {
            "reduce_scatter": 0,
            "all_gather": 0,
            "all_to_all": 0,
            "all_reduce": 0,
        }  # sent by this rank in step 1
        self.training = False  # rather than validating
        self.expert_ranks = []  # the ranks among which each expert's slab travels


spies = Spies()


def group_size(group) -> int:
    return dist.get_world_size(group)


def counted(name, collective, sent):
    def spy(*words, **names):
        if spies.steps == 0:
            spies.bytes[name] += sent(group_size(names.get("group")), *words)
        return collective(*words, **names)

    return spy


def nbytes(tensor) -> int:
    return tensor.numel() * tensor.element_size()


distributed.reduce_scatter = counted(
    "reduce_scatter", distributed.reduce_scatter, lambda n, output, source: nbytes(source) * (n - 1) // n
)
distributed.all_gather = counted("all_gather", distributed.all_gather, lambda n, output, source: nbytes(source) * (n - 1))
dist.all_reduce = counted("all_reduce", dist.all_reduce, lambda n, tensor: 2 * nbytes(tensor) * (n - 1) // n)
all_to_all = dist.all_to_all_single


def spy_all_to_all(output, source, received=None, sent=None, group=None):
    if spies.steps == 0 and spies.training and sent is not None:
        stays = sent[dist.get_rank(group)]
        spies.bytes["all_to_all"] += (sum(sent) - stays) * source.size(1) * source.element_size()
    return all_to_all(output, source, received, sent, group=group)


dist.all_to_all_single = spy_all_to_all
finish, begin, arrived = (
    Exchange.finish,
    Exchange.begin_reduce,
    Exchange.on_grad_ready,
)


def spied_receive(receive):
    def spy(self):
        receive(self)
        if spies.steps == 0:
            spies.gradients |= {local.slab.name: local.value.grad.to_dense().clone() for local in self.owned}

    return spy


def spy_begin(self, totals):
    spies.parameters, self.there = sum(len(transfer.parameters) for transfer in self.transfers), 0
    spies.first_send.append(None)
    spies.expert_ranks = [
        [local.slab.name, dist.get_process_group_ranks(transfer.group or dist.group.WORLD) if transfer.travels else []]
        for transfer in self.transfers
        for local in transfer.owned
        if local.slab.kind == "expert"
    ]
    global exchange
    exchange = self
    begin(self, totals)


def spy_arrived(self, transfer, parameter):
    if self.reducing:
        self.there += 1
    arrived(self, transfer, parameter)


def spied_send(send):
    def spy(self):
        if spies.first_send[-1] is None:
            spies.first_send[-1] = exchange.there
        if spies.steps == 0:
            spies.order.append(self.slabs[0].slab.name)
        send(self)

    return spy


def spy_finish(self):
    """After each step: every rank's copy of a slab is the same, bit for bit."""
    finish(self)
    spies.steps += 1
    digest = lambda tensor: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
    mine = {local.slab.name: digest(local.value) for transfer in self.transfers for local in transfer.slabs}
    mine |= {name: digest(buffer) for name, buffer in (("load", self.model.load_WLE), ("bias", self.model.bias_LE))}
    copies = [None] * dist.get_world_size()
    dist.all_gather_object(copies, mine)
    names = set().union(*copies)
    if any(len({copy[name] for copy in copies if name in copy}) != 1 for name in names):
        spies.apart.append(spies.steps)


for kind in (Transfer, RowTransfer):
    kind.receive_gradients, kind.send_gradients = spied_receive(kind.receive_gradients), spied_send(kind.send_gradients)
Exchange.finish, Exchange.begin_reduce, Exchange.on_grad_ready = spy_finish, spy_begin, spy_arrived

facts.matmul_rate = lambda *_: 1e11  # half a second of matmuls per job
train_step = train_muon.train_step


def spy_train_step(*words):
    spies.training = True
    row = train_step(*words)
    spies.training = False
    return row


train_muon.train_step = spy_train_step
write_checkpoint = checkpoint.write_checkpoint


def keep_step_10(folder, step, *words):
    """Step 10 would be pruned before the run ends, and a test resumes from it."""
    path = write_checkpoint(folder, step, *words)
    if step == 10 and dist.get_rank() == 0:
        shutil.copytree(path, folder.parent.parent / f"{folder.parent.name}_kept" / "checkpoint" / path.name)
    return path


checkpoint.write_checkpoint = keep_step_10


def main():
    global spies
    dist.init_process_group("gloo")
    destroy, dist.init_process_group, dist.destroy_process_group = (
        dist.destroy_process_group,
        lambda *_, **__: None,
        lambda: None,
    )
    rank = dist.get_rank()
    for name, job in json.loads((OUT / f"jobs{dist.get_world_size()}.json").read_text()).items():
        spies = Spies()
        if job["copy"] and rank == 0:
            shutil.copytree(*job["copy"])
        dist.barrier()
        sys.argv[1:] = job["words"]
        with pytest.MonkeyPatch.context() as patch:
            if job["plant"]:
                INJECTIONS[job["plant"]](patch, job["half"])
            train_muon.main(RECIPES[job["recipe"]])
        torch.save(spies.gradients, OUT / f"{name}.rank{rank}.pt")
        del spies.gradients
        (OUT / f"{name}.rank{rank}.json").write_text(json.dumps(vars(spies)))
        dist.barrier()
    destroy()


if __name__ == "__main__":
    main()
