"""Statistics of MoE layers with the zoo's options, and their merge over several runs of a layer."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RouteStats(NamedTuple):
    """model.RouteStats and the statistics of options."""

    counts_E: Tensor  # int64, tokens per expert
    prob_E: Tensor | float  # mean router probability, differentiable
    z_loss: Tensor | float  # mean squared logsumexp of the logits, differentiable
    entropy: Tensor | float  # mean entropy of the router's distribution / log E
    loss: Tensor | float = 0.0  # Route.loss
    logits_TE: Tensor | None = None  # for the router of the next layer
    tokens: Tensor | int = 0  # routed tokens
    share: Tensor | float = 1.0  # of the tokens and iterations, those that were routed: below 1 where tokens halt
    chosen_BE: Tensor | None = None  # sum of the router's softmax over each row, with entropy_coef
    row_tokens_B: Tensor | None = None  # tokens in that sum
    exits_T: Tensor | None = None  # tokens that chose an exit, if some expert is one
    exit_prob_T: Tensor | None = None  # probability of that choice
    domain_loss: Tensor | float = 0.0  # cross-entropy of the router to the target experts


def mean_over(x: Tensor, valid_T: Tensor | None) -> Tensor:
    """Mean over the valid entries of the first dimension."""
    if valid_T is None:
        return x.mean(0)
    return (x * valid_T.view(-1, *[1] * (x.ndim - 1))).sum(0) / valid_T.sum().clamp(min=1)


def without_exits(share_NE: Tensor, exits: tuple[int, int] | None) -> Tensor:
    """Probabilities or loads given that no exit is chosen; exits, first and end of their numbers, have none."""
    if exits is None:
        return share_NE
    expert_E = torch.arange(share_NE.size(-1), device=share_NE.device)
    kept_NE = share_NE.masked_fill((expert_E >= exits[0]) & (expert_E < exits[1]), 0.0)
    return kept_NE / kept_NE.sum(-1, keepdim=True).clamp(min=1e-30)


def route_stats(route, counts_E: Tensor, valid_T: Tensor | None, decoding: bool, exits=None) -> RouteStats:
    """Statistics of a route; while decoding without the means, which are not needed there."""
    if decoding:
        return RouteStats(counts_E, 0.0, 0.0, 0.0, logits_TE=route.logits_TE, tokens=len(route.logits_TE))
    lse_T = route.logits_TE.logsumexp(-1)
    log_p_TE = route.logits_TE - lse_T[:, None]
    p_TE = log_p_TE.exp()
    prob_TE = getattr(route, "prob_TE", None)
    prob_TE = without_exits(p_TE if prob_TE is None else prob_TE, exits)
    entropy = mean_over(-(p_TE * log_p_TE).detach().sum(-1), valid_T) / math.log(max(p_TE.size(1), 2))
    prob_E, z_loss = mean_over(prob_TE, valid_T), mean_over(lse_T.square(), valid_T)
    tokens = len(lse_T) if valid_T is None else valid_T.sum()
    return RouteStats(counts_E, prob_E, z_loss, entropy, route.loss, route.logits_TE, tokens)


def unrouted_stats(bias_E: Tensor) -> RouteStats:
    """Statistics of a layer without tokens."""
    zeros_E = torch.zeros_like(bias_E)
    return RouteStats(zeros_E.long(), zeros_E, zeros_E.sum(), zeros_E.sum())


def merge_runs(runs: list[list[RouteStats]], iterations: int) -> list[RouteStats]:
    """Statistics of the same layers over all iterations, of which the last ones did not run if all tokens had halted.

    Counts add up, means are over all routed tokens."""
    return [merge_layer(layer_runs, iterations) for layer_runs in zip(*runs)]


def merge_layer(runs: tuple[RouteStats, ...], iterations: int) -> RouteStats:
    if iterations == 1:
        return runs[0]
    tokens, with_rows = sum(run.tokens for run in runs), [run for run in runs if run.chosen_BE is not None]
    mean = lambda name: sum(getattr(run, name) * run.tokens for run in runs) / max(tokens, 1)
    return RouteStats(
        sum(run.counts_E for run in runs), mean("prob_E"), mean("z_loss"), mean("entropy"),
        loss=sum(run.loss for run in runs), tokens=tokens, share=tokens / (iterations * max(runs[0].tokens, 1)),
        chosen_BE=sum(run.chosen_BE for run in with_rows) if with_rows else None,
        row_tokens_B=sum(run.row_tokens_B for run in with_rows) if with_rows else None,
        domain_loss=mean("domain_loss"),
    )  # fmt: skip


def neg_entropy(stats: RouteStats) -> Tensor | float:
    """Minus the entropy of a row's mean choice, mean over rows (MoEUT, 2405.16039): rows are balanced one by one."""
    if stats.chosen_BE is None:
        return 0.0
    p_BE = stats.chosen_BE / stats.row_tokens_B[:, None].clamp(min=1)
    return mean_over((p_BE * p_BE.clamp(min=1e-12).log()).sum(-1), stats.row_tokens_B > 0)
