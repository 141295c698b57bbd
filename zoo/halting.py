"""Halting rules of loops: ACT, stick-breaking, threshold, PonderNet, exits among the experts.

A rule is called after each iteration with the hidden states after and before it. It returns the states to go on with
and the HaltState, in which tokens that have halted are no longer active. Shape suffixes as in model.py."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model import PARAMETER_RULES, ParameterRule, constant
from ops import linear_fp32, norm
from zoo.config import TABLES, Config
from zoo.stats import mean_over


class HaltState(NamedTuple):
    """Active tokens, and the sums that a rule keeps."""

    active_BT: Tensor
    loops_BT: Tensor  # iterations of each token so far
    sum_BT: Tensor  # fp32, the rule's own sum, compared with its threshold
    cost_BT: Tensor  # fp32, differentiable
    output_BTD: Tensor | None = None  # weighted sum over iterations, for rules that mix them
    states: tuple[tuple[Tensor, Tensor], ...] = ()  # hidden states and loss weight of each iteration, for PonderNet
    all_active: bool = True
    none_active: bool = False

    @staticmethod
    def initial(x_BTD: Tensor) -> "HaltState":
        zeros_BT = torch.zeros(x_BTD.shape[:2], device=x_BTD.device)
        return HaltState(zeros_BT == 0, zeros_BT.long(), zeros_BT, zeros_BT)


def count_true(mask: Tensor) -> int:
    """Number of true entries; on the meta device, where they have no value, all."""
    return mask.numel() if mask.is_meta else int(mask.sum())


class NoHalt(nn.Module):
    """Every token runs every iteration."""

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, new_BTD: Tensor, x_BTD: Tensor, state: HaltState, last: bool, exits) -> tuple[Tensor, HaltState]:
        """exits: (B, T) tokens that chose an exit, and the probability of that choice; None without exits."""
        return new_BTD, state._replace(loops_BT=state.loops_BT + 1)

    def outputs(self, x_BTD: Tensor, state: HaltState) -> list[tuple[Tensor, Tensor | None]]:
        """Hidden states to go on with, each with its tokens' weights in the loss."""
        return [(x_BTD, None)]

    def cost(self, state: HaltState, valid_BT: Tensor | None) -> Tensor | float:
        """Mean cost of the tokens that are not padding."""
        return 0.0


class Halt(NoHalt):
    """Base of the learned rules: halt_prob, the sigmoid of a linear head on the normed hidden states."""

    threshold = 0.99

    def __init__(self, config: Config):
        super().__init__(config)
        self.weight, self.bias = nn.Parameter(torch.empty(1, config.n_embd)), nn.Parameter(torch.empty(1))
        self.limit, self.prior = config.halt_threshold or self.threshold, config.ponder_prior

    def halt_prob(self, x_BTD: Tensor) -> Tensor:
        return (linear_fp32(norm(x_BTD).flatten(0, 1), self.weight).view(x_BTD.shape[:2]) + self.bias).sigmoid()

    def update_state(self, state: HaltState, halts_BT: Tensor, **changes) -> HaltState:
        active_BT, loops_BT = state.active_BT & ~halts_BT, state.loops_BT + state.active_BT
        count = count_true(active_BT)
        all_active = count == active_BT.numel()
        changes |= dict(all_active=all_active, none_active=count == 0)
        return state._replace(active_BT=active_BT, loops_BT=loops_BT, **changes)

    def cost(self, state: HaltState, valid_BT: Tensor | None) -> Tensor:
        return mean_over(state.cost_BT.flatten(), None if valid_BT is None else valid_BT.flatten())


class ACT(Halt):
    """Adaptive computation time (Graves, 1603.08983): a token halts when its probabilities sum to the threshold.

    The remainder to 1 is the last iteration's share of the weighted mean. Cost: iterations plus that remainder."""

    def forward(self, new_BTD: Tensor, x_BTD: Tensor, state: HaltState, last: bool, exits) -> tuple[Tensor, HaltState]:
        prob_BT = self.share(self.halt_prob(new_BTD), state.sum_BT)
        halts_BT = (state.sum_BT + prob_BT >= self.limit) | last
        weight_BT = torch.where(halts_BT, 1 - state.sum_BT, prob_BT) * state.active_BT
        cost_BT = state.cost_BT + self.price(weight_BT, state, halts_BT)
        output_BTD = weight_BT[..., None].type_as(new_BTD) * new_BTD
        if state.output_BTD is not None:
            output_BTD = state.output_BTD + output_BTD
        sum_BT = state.sum_BT + weight_BT
        return new_BTD, self.update_state(state, halts_BT, sum_BT=sum_BT, cost_BT=cost_BT, output_BTD=output_BTD)

    def share(self, prob_BT: Tensor, sum_BT: Tensor) -> Tensor:
        """An iteration's weight, from its halt_prob and the weights before."""
        return prob_BT

    def price(self, weight_BT: Tensor, state: HaltState, halts_BT: Tensor) -> Tensor:
        return state.active_BT + weight_BT * halts_BT

    def outputs(self, x_BTD: Tensor, state: HaltState) -> list[tuple[Tensor, Tensor | None]]:
        return [(state.output_BTD, None)]


class StickBreaking(ACT):
    """Each probability is a share of what is left of a stick (SUT, 2310.07096). Cost: expected iterations."""

    threshold = 0.999

    def share(self, prob_BT: Tensor, sum_BT: Tensor) -> Tensor:
        return prob_BT * (1 - sum_BT)

    def price(self, weight_BT: Tensor, state: HaltState, halts_BT: Tensor) -> Tensor:
        return weight_BT * (state.loops_BT + 1)


class Threshold(Halt):
    """Probabilities sum to a threshold, and each is the step size of its iteration, so the loss has a gradient for it.

    Cost: the distance to the threshold, summed over iterations."""

    threshold = 1.0

    def forward(self, new_BTD: Tensor, x_BTD: Tensor, state: HaltState, last: bool, exits) -> tuple[Tensor, HaltState]:
        prob_BT = self.halt_prob(new_BTD) * state.active_BT
        sum_BT = state.sum_BT + prob_BT
        cost_BT = state.cost_BT + (self.limit - sum_BT).clamp(min=0) * state.active_BT
        x_BTD = x_BTD + prob_BT[..., None].type_as(x_BTD) * (new_BTD - x_BTD)
        return x_BTD, self.update_state(state, (sum_BT >= self.limit) | last, sum_BT=sum_BT, cost_BT=cost_BT)


class Ponder(Halt):
    """PonderNet (2107.05407): halt_prob is the probability of halting now, given that the token has not halted before.

    Training runs every iteration for all tokens and weights each one's loss by the probability that it is the last.
    Cost: the divergence from a geometric prior. In evaluation a token halts once it has more likely halted than not."""

    threshold = 0.5

    def forward(self, new_BTD: Tensor, x_BTD: Tensor, state: HaltState, last: bool, exits) -> tuple[Tensor, HaltState]:
        prob_BT = self.halt_prob(new_BTD).clamp(min=float(last)) * (1 - state.sum_BT)
        sum_BT = state.sum_BT + prob_BT * state.active_BT
        if not self.training:
            return new_BTD, self.update_state(state, (sum_BT >= self.limit) | last, sum_BT=sum_BT)
        log_now = 0.0 if last else math.log(self.prior)  # the last iteration has the rest
        log_prior_BT = log_now + state.loops_BT * math.log1p(-self.prior)  # the prior itself underflows
        divergence_BT = prob_BT * (prob_BT.clamp(min=1e-8).log() - log_prior_BT)
        changes = dict(sum_BT=sum_BT, cost_BT=state.cost_BT + divergence_BT, states=(*state.states, (new_BTD, prob_BT)))
        return new_BTD, self.update_state(state, torch.zeros_like(state.active_BT), **changes)

    def outputs(self, x_BTD: Tensor, state: HaltState) -> list[tuple[Tensor, Tensor | None]]:
        return list(state.states) or [(x_BTD, None)]


class ExitHalt(NoHalt):
    """A token halts after the iteration in which it chose an exit expert. Cost: the sum of 1 - exit probability."""

    update_state, cost = Halt.update_state, Halt.cost

    def forward(self, new_BTD: Tensor, x_BTD: Tensor, state: HaltState, last: bool, exits) -> tuple[Tensor, HaltState]:
        exits_BT, prob_BT = exits
        cost_BT = state.cost_BT + (1 - prob_BT) * state.active_BT
        return new_BTD, self.update_state(state, exits_BT | last, cost_BT=cost_BT)


HALTS = {"none": NoHalt, "act": ACT, "stick_breaking": StickBreaking, "ponder": Ponder, "threshold": Threshold,
         "exit": ExitHalt}  # fmt: skip
TABLES["halt"] = HALTS
PARAMETER_RULES |= {
    "halt.weight": ParameterRule("router", constant(0.0)),
    "halt.bias": ParameterRule("scalar", constant(-2.0)),
}
