"""Training on a mixture of domains: shares, supervised routes, and losses and expert loads per domain.

The functions are the parts of a Recipe (train_muon.py) that a mixture replaces. This module is also the Recipe's
`data`: load_meta, verify, fingerprint and validation_batches are those of zoo/mixture.py.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import data
import settings
import tokenizer
import train_muon
from cli import UserError, require
from distributed import World
from model import GPT
from train_muon import Session, TrainConfig, loss_metrics, loss_totals
from zoo.config import Config, has_matmuls
from zoo.mixture import (  # noqa: F401  (of a Recipe's `data`)
    Mix,
    MixtureBatch,
    MixtureLoader,
    domains,
    fingerprint,
    load_meta,
    mixture_validation_batches,
    verify,
)

validation_batches = mixture_validation_batches

# -----------------------------------------------------------------------------
# Settings


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(TrainConfig):
    """Settings of a run on a mixture of domains, to be mixed into those of an optimizer."""

    # routes
    routes_tokens: int = 0  # validation tokens whose experts each evaluation saves, for logger.py --routes
    # domains, where the data folder is a mixture
    domain_weights: str = ""  # name=number,...; "" = the tokens that each domain has
    domain_temperature: float = 1.0  # shares are weights to the power of 1 / this
    domain_epochs: str = ""  # passes over a domain at most: a number, or name=number,...; "" = no limit
    round_robin_steps: int = 0  # first steps, whose batches have one domain each, in turn
    domain_coef: float = 0.0  # weight of the loss that routes each domain's tokens to its own expert ...
    domain_steps: int = 0  # ... for so many steps ...
    domain_anneal_steps: int = 0  # ... falling to 0 in so many more
    trunk_domain: str = "web"  # has no expert of its own; the others have the first ones, in order

    def __post_init__(self):
        super().__post_init__()
        for name in "routes_tokens round_robin_steps domain_steps domain_anneal_steps domain_coef".split():
            require(self, name, 0 <= getattr(self, name) < math.inf, "at least 0")
        require(self, "domain_temperature", 0 < self.domain_temperature < math.inf, "above 0")


settings.MAY_CHANGE_ON_RESUME.add("routes_tokens")

# -----------------------------------------------------------------------------
# Data


def open_loader(config: Config, hp: MixtureConfig, world: World, micro_rows: int) -> MixtureLoader:
    """The loader of a mixture. Raises UserError for settings that the data do not allow."""
    mix = Mix(hp.domain_weights, hp.domain_temperature, hp.domain_epochs, hp.round_robin_steps)
    options = dict(kind=MixtureLoader, mix=mix, steps=hp.num_iterations)
    loader = train_muon.open_loader(config, hp, world, micro_rows, **options)
    if hp.routes_tokens:
        routes_batches(config, hp, "cpu")  # may raise
    domain_experts(config, hp, world.device)
    return loader


def routes_batches(config: Config, hp: MixtureConfig, device):
    """The first routes_tokens validation tokens, row by row. Raises UserError at the call."""
    return validation_batches(hp.data, seq_len=min(hp.routes_tokens, config.window_size), rows=1, device=device,
                              max_tokens=hp.routes_tokens, vocab_size=config.vocab_size)  # fmt: skip


def validation_text(session: Session, encoding: tokenizer.Encoding) -> bytes:
    """The beginning of the text that evaluate() predicts, equal parts of all domains, at most COMPRESSED_BYTES."""
    hp, names, ids = session.hp, domains(session.hp.data), {}
    max_tokens = min(hp.val_tokens or data.COMPRESSED_BYTES, data.COMPRESSED_BYTES)
    options = dict(seq_len=hp.seq_len, rows=1, max_tokens=max(max_tokens, hp.seq_len * len(names)))
    for batch in validation_batches(hp.data, **options):
        ids.setdefault(batch.domain_B[0].item(), []).append(batch.targets_BT[batch.targets_BT >= 0])
    texts = [encoding.decode_bytes(torch.cat(parts)) for parts in ids.values()]
    return b"".join(text[: data.COMPRESSED_BYTES // len(texts)] for text in texts)


# -----------------------------------------------------------------------------
# Supervised routes


def compute_loss(net: GPT, batch: data.Batch, step: int, hp: MixtureConfig) -> tuple[Tensor, dict]:
    """Loss of a micro-batch plus domain_price times the loss of supervised routes, and its statistics."""
    expert_D = domain_experts(net.config, hp, batch.inputs_BT.device)
    if expert_D is None:
        output = net(batch.inputs_BT, batch.targets_BT)
        return output.loss, output.stats
    is_mixture = isinstance(batch, MixtureBatch)  # random tokens of the warm-up have no domain
    domain_B = batch.domain_B if is_mixture else batch.inputs_BT.new_zeros(len(batch.inputs_BT))
    output, price = net(batch.inputs_BT, batch.targets_BT, expert_B=expert_D[domain_B]), domain_price(step, hp)
    domain_loss = output.stats["domain_loss"]
    logged = {"train/domain_loss": domain_loss, "train/domain_price": price}
    return output.loss + price * domain_loss, output.stats | logged


def domain_price(step: int, hp: MixtureConfig) -> float:
    """domain_coef for domain_steps, then linear to 0 over domain_anneal_steps."""
    annealed = (step - hp.domain_steps + 1) / (hp.domain_anneal_steps + 1)
    return hp.domain_coef * min(1.0, max(0.0, 1 - annealed))


@functools.cache
def domain_experts(config: Config, hp: MixtureConfig, device: torch.device) -> Tensor | None:
    """(D,) int64: the expert of each domain, -1 for the trunk's; None if domain_coef is 0.

    Raises UserError if there are fewer experts than domains, or no router that learns."""
    if hp.domain_coef == 0:
        return None
    names = list(domains(hp.data))
    own = [name for name in names if name != hp.trunk_domain]
    experts = sum(count for kind, count in config.expert_counts.items() if has_matmuls(kind))
    learns = config.num_moe_layers > 0 and config.router != "hash"
    if len(names) == 1 or len(own) > experts or not learns:
        found = ", ".join(names) if len(names) > 1 else "none"
        raise UserError(f"domain_coef is {hp.domain_coef}; it must be 0, or {hp.data} a mixture of at most {experts} "
                          f"domains (and that of trunk_domain), one for each expert that a learned router can choose; "
                          f"it has {found}")  # fmt: skip
    return torch.tensor([own.index(name) if name in own else -1 for name in names], device=device)


# -----------------------------------------------------------------------------
# Evaluation


def evaluate(session: Session, step: int) -> dict[str, float]:
    """As train_muon.evaluate; for several domains also val/<domain>/..., and the load of experts per domain."""
    one_domain = len(domains(session.hp.data)) == 1
    metrics = train_muon.evaluate(session, step) if one_domain else evaluate_domains(session, step)
    if session.hp.routes_tokens:
        save_routes(session, step)
    return metrics


@torch.no_grad()
def evaluate_domains(session: Session, step: int) -> dict[str, float]:
    """Metrics over all domains, per domain, and of the experts' load per domain."""
    net, world = session.model, session.world
    names, L, E = list(domains(session.hp.data)), *net.bias_LE.shape
    totals_DX = torch.zeros(len(names), 3 + L * E, dtype=torch.float64, device=world.device)  # losses, expert counts
    net.eval()
    for batch in train_muon.validation_batches(session, step):
        is_real_B = (batch.targets_BT >= 0).any(1)
        output = net(batch.inputs_BT, batch.targets_BT, real_B=is_real_B)
        losses = loss_totals(output.loss, batch.targets_BT, session.token_bytes)
        total_X = torch.cat([losses, output.stats["counts_LE"].flatten().double()])
        totals_DX.index_add_(0, batch.domain_B[:1], total_X[None])  # an index on the device, so the host does not wait
    net.train()

    session.timer.begin("communication")
    if world.size > 1:
        dist.all_reduce(totals_DX)
    metrics = loss_metrics("val", totals_DX[:, :3].sum(0))
    for name, total_X in zip(names, totals_DX):
        metrics |= loss_metrics(f"val/{name}", total_X[:3])
    if L:
        counts_DLE = totals_DX[:, 3:].view(-1, L, E)
        share_DLE = domain_load(counts_DLE)
        metrics |= {"moe/domain_load": share_DLE, "moe/domain_information": domain_information(share_DLE).mean()}
    return metrics


def domain_load(counts_DLE: Tensor) -> Tensor:
    """Each expert's share of a domain's tokens; 0 in a layer of a pool that no token of the domain picks."""
    return counts_DLE / counts_DLE.sum(-1, keepdim=True).clamp(min=1)


def domain_information(share_DLE: Tensor) -> Tensor:
    """(L,): mutual information of domain and chosen expert in bits, for equally likely domains."""
    joint_DLE = share_DLE / len(share_DLE)
    independent_DLE = joint_DLE.sum(0) * joint_DLE.sum(-1, keepdim=True)
    bits_DLE = joint_DLE * (joint_DLE / independent_DLE.clamp(min=1e-30)).log2()
    return torch.where(joint_DLE > 0, bits_DLE, 0.0).sum((0, 2))


def save_routes(session: Session, step: int):
    """Write routes/step_NNNNNN.npz; on all ranks, as they may share experts."""
    from tools import routes

    hp, net, device = session.hp, session.model, session.world.device
    arrays = routes.collect_routes(net, routes_batches(net.config, hp, device))
    if session.world.rank == 0:
        arrays = routes.add_difficulty(arrays, load_meta(hp.data)["encoding"])
        routes.write_routes(session.folder / "routes" / f"step_{step:06d}.npz", arrays)
