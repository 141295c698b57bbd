"""The recipes of train_zoo.py: train_muon's and train_adamw's with the model, data and losses of the zoo."""

import dataclasses
from dataclasses import dataclass

import settings
import train_adamw
import train_muon
import zoo
from cli import UserError
from train_adamw import CPU_RATES, AdamWConfig
from train_muon import CPU_RUN, MuonConfig, Recipe
from zoo import domains
from zoo.config import Config


@dataclass(frozen=True, kw_only=True)
class MuonZooConfig(domains.MixtureConfig, MuonConfig):
    """Settings of a run of the zoo with Muon."""


@dataclass(frozen=True, kw_only=True)
class AdamWZooConfig(domains.MixtureConfig, AdamWConfig):
    """Settings of a run of the zoo with AdamW."""


RUN_100M = dict(data="data/domains", num_iterations=6000, batch_tokens=131_072, seq_len=4096, micro_batch_tokens=16_384,
                domain_coef=0.3, domain_steps=2000, domain_anneal_steps=1000, embed_lr=0.008)  # fmt: skip
RUN_100M_CPU = CPU_RUN | dict(
    data="data/domains", num_iterations=400, seq_len=512, val_tokens=6 * 2**14, window_start=256, domain_coef=0.3,
    domain_steps=150, domain_anneal_steps=50, embed_lr=0.012)  # fmt: skip


def check(config: Config, hp: domains.MixtureConfig, world_size: int, device_type: str):
    """Raises UserError for settings that do not go together."""
    settings.check(config, hp, world_size, "cpu")
    parts = hp.expert_parallel
    if parts > 1 and len(config.expert_counts) > 1:
        raise UserError(f"experts is {config.experts!r}; with expert_parallel = {parts} all must be of one kind")
    if parts > 1 and (config.depth == "routed" or config.halt != "none"):
        legal = f"1 where tokens go apart (depth {config.depth}, halt {config.halt}), as ranks would not exchange rows"
        raise UserError(f"expert_parallel is {parts}; it must be {legal} equally often")
    if config.objective != "next" and hp.sample_tokens:
        legal = f"0 with objective {config.objective}, which cannot continue a text"
        raise UserError(f"sample_tokens is {hp.sample_tokens}; it must be {legal}")
    if device_type == "cuda":
        settings.check_for_cuda(config, hp, hp.seq_len + config.num_meta_tokens)


def zoo_recipe(core: Recipe, train_config: type, **cpu_rates) -> Recipe:
    """A recipe of the core with the zoo's model, data, loss and evaluation."""
    presets = {name: train_config(**dataclasses.asdict(preset)) for name, preset in core.presets.items()}
    presets |= {"100m": train_config(**RUN_100M), "100m-cpu": train_config(**RUN_100M_CPU | cpu_rates)}
    return core._replace(
        script="train_zoo.py", train_config=train_config, presets=presets, check=check, data=domains,
        model_config=Config, model_presets=zoo.PRESETS,
        open_loader=domains.open_loader, loss=domains.compute_loss, evaluate=domains.evaluate,
        validation_text=domains.validation_text)  # fmt: skip


ZOO_MUON = zoo_recipe(train_muon.MUON, MuonZooConfig, muon_lr=0.03, momentum_warmup=100)
ZOO_ADAMW = zoo_recipe(train_adamw.ADAMW, AdamWZooConfig, **CPU_RATES)
RECIPES = {"muon": ZOO_MUON, "adamw": ZOO_ADAMW}
