"""The control: the run of train_muon.py with AdamW on the matrices too, and rates and a warm-up to match.

    python train_adamw.py --experiment_name adamw

Everything else (model, data order, loop, clock, AdamW on tables and scalars) is train_muon.py's. The rate of matrices
and experts, and the linear warm-up of all rates, are those of modded-nanogpt's AdamW baseline; preset cpu was tuned.
"""

import signal
from dataclasses import dataclass

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

import torch
from torch import Tensor

import train_muon
from cli import require
from train_muon import CPU_RUN, MUON, SMALL_RUN, TrainConfig, adamw


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(TrainConfig):
    """Settings of a run with AdamW."""

    matrix_lr: float = 0.0018  # modded-nanogpt's AdamW baseline
    lr_warmup: int = 250  # steps
    weight_decay: float = 0.0  # decoupled, on matrices, times the rate

    def __post_init__(self):
        super().__post_init__()
        require(self, "lr_warmup", self.lr_warmup >= 0, "at least 0")


CPU_RATES = dict(matrix_lr=0.003, lr_warmup=50, scalar_lr=0.01)

PRESETS = {
    "cpu": AdamWConfig(**CPU_RUN, **CPU_RATES, embed_lr=0.1, value_embed_lr=0.1, head_lr=0.012),
    "small": AdamWConfig(**SMALL_RUN),
    "speedrun": AdamWConfig(),
}


def make_optimizers(tensors: dict[str, list[Tensor]], hp: AdamWConfig) -> list[torch.optim.Optimizer]:
    """One AdamW over this rank's slabs, given by kind, and RowAdamW over its n-gram tables."""
    decay = dict(base_lr=hp.matrix_lr, weight_decay=hp.weight_decay)
    matrices = [dict(params=tensors[kind], **decay) for kind in ("matrix", "expert") if tensors.get(kind)]
    return adamw(tensors, hp, matrices)


def lr_scale(step: int, hp: AdamWConfig) -> float:
    """Linear from 0 to 1 over lr_warmup steps, times train_muon's schedule."""
    return min(1.0, (step + 1) / max(1, hp.lr_warmup)) * train_muon.lr_scale(step, hp)


ADAMW = MUON._replace(
    script="train_adamw.py", name="adamw", train_config=AdamWConfig, presets=PRESETS, make_optimizers=make_optimizers,
    lr_scale=lr_scale, matrix_state=2, newton_schulz=0)  # fmt: skip

if __name__ == "__main__":
    train_muon.main(ADAMW)
