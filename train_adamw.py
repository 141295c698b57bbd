"""The control: the run of train_muon.py with one thing changed, AdamW on the matrices too.

    python train_adamw.py --experiment_name adamw

Everything else (model, data order, loop, clock, AdamW on tables and scalars) is imported from train_muon.py. What AdamW needs of
its own is here: the rate of matrices and experts, and a linear warm-up of all rates, as in modded-nanogpt's AdamW baseline.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import train_muon
from train_muon import CPU_RUN, DOMAINS_CPU_RUN, DOMAINS_RUN, SMALL_RUN, Common, Recipe, adamw, adamw_groups, lr_scale


@dataclass(frozen=True, kw_only=True)
class Hyperparameters(Common):
    """AdamW's own: the rate of the matrices, and the warm-up of all rates."""

    matrix_lr: float = 0.0018  # modded-nanogpt's AdamW baseline
    lr_warmup: int = 250  # steps
    weight_decay: float = 0.0  # decoupled, on matrices, times the rate

    def __post_init__(self):
        super().__post_init__()
        self.check("lr_warmup", self.lr_warmup >= 0, "at least 0")


PRESETS = {
    "cpu": Hyperparameters(**CPU_RUN, matrix_lr=0.003, lr_warmup=50, embed_lr=0.1, value_embed_lr=0.1, head_lr=0.012, scalar_lr=0.01),
    "small": Hyperparameters(**SMALL_RUN),
    "100m": Hyperparameters(**DOMAINS_RUN),
    "100m-cpu": Hyperparameters(**DOMAINS_CPU_RUN, matrix_lr=0.003, lr_warmup=50, scalar_lr=0.01),
    "speedrun": Hyperparameters(),
}


def make_optimizers(tensors: dict[str, list[Tensor]], hp: Hyperparameters) -> list[torch.optim.Optimizer]:
    """kind -> the slabs this rank owns, to one AdamW over all of them."""
    matrices = [dict(params=tensors[kind], base_lr=hp.matrix_lr, weight_decay=hp.weight_decay) for kind in ("matrix", "expert") if tensors.get(kind)]
    return adamw(adamw_groups(tensors, hp) + matrices, hp)


def set_rates(optimizers: list[torch.optim.Optimizer], step: int, hp: Hyperparameters):
    scale = min(1.0, (step + 1) / max(1, hp.lr_warmup)) * lr_scale(step, hp)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale


ADAMW = Recipe("adamw", Hyperparameters, PRESETS, make_optimizers, set_rates, matrix_state=2, newton_schulz=0)

if __name__ == "__main__":
    train_muon.main(ADAMW)
