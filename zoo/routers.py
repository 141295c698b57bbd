"""Routers: hash, MLP, convolution, recurrence, attention; sigmoid scores, residual logits, Shazeer's losses.

Every router is router(x_BTD, ctx) -> Route in token order, as in model.py. A learned router subclasses Router and
computes logits; noise, selection bias, top-k, gates and losses are inherited."""

from collections import ChainMap
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
import ops
from cli import require
from model import PARAMETER_RULES, ParameterRule, constant, init_uniform, softmax_gates
from ops import linear_fp32, norm
from zoo.config import CHECKS, TABLES, Config, as_zoo


class Route(NamedTuple):
    """model.Route, and the probabilities of the balance loss."""

    expert_TK: Tensor  # int64; E (no expert) throughout a token that takes no part
    weight_TK: Tensor
    logits_TE: Tensor
    loss: Tensor | float = 0.0
    prob_TE: Tensor | None = None  # None: the softmax of the logits


# -----------------------------------------------------------------------------
# Scores: the selection and the gates, made from logits


class Scores(NamedTuple):
    of: callable  # logits_TE -> scores that are compared, with the bias added
    gates: callable  # (logits_TE, expert_TK, power) -> kept scores / (their sum ** power)
    prob: callable  # logits_TE -> Route.prob_TE


def sigmoid_gates(logits_TE: Tensor, expert_TK: Tensor, power: float) -> Tensor:
    kept_TK = logits_TE.gather(1, expert_TK).sigmoid()
    power = 0 if power == 1 and kept_TK.size(1) == 1 else power  # as in softmax_gates
    return kept_TK / kept_TK.sum(-1, keepdim=True) ** power


def sigmoid_shares(logits_TE: Tensor) -> Tensor:
    score_TE = logits_TE.sigmoid()
    return score_TE / score_TE.sum(-1, keepdim=True)


SCORES = {
    "softmax": Scores(ops.softmax, softmax_gates, lambda logits_TE: None),
    "sigmoid": Scores(torch.sigmoid, sigmoid_gates, sigmoid_shares),  # DeepSeek-V3, 2412.19437
}


# -----------------------------------------------------------------------------
# Learned routers


class Router(nn.Module):
    """Noisy top-k gating (1701.06538 eq. 3-5) over logits that a subclass computes."""

    def __init__(self, config: model.Config, width: int):
        super().__init__()
        config = as_zoo(config)
        self.top_k, self.noise_scale, self.power = config.top_k, config.router_noise, config.norm_topk_prob
        self.score, self.residual_scale = SCORES[config.router_score], config.router_residual
        self.importance_coef, self.load_coef, self.exits = config.importance_coef, config.load_coef, config.exits
        E, D = config.num_experts, config.n_embd
        self.gate = nn.Parameter(torch.empty(E, width))
        self.noise = nn.Parameter(torch.empty(E, D)) if config.router_noise else None
        self.residual = nn.Parameter(torch.empty(E, E)) if config.router_residual else None

    def forward(self, x_BTD: Tensor, ctx) -> Route:
        if self.training and self.noise_scale:
            logits_TE, std_TE = self.noisy_logits(x_BTD, ctx)
            logits_TE, std_TE = self.add_previous_logits(logits_TE, ctx), self.noise_scale * std_TE
            noisy_TE = logits_TE + ops.hashed_normal(*ctx.noise_key, logits_TE.size(1)) * std_TE
        else:
            noisy_TE, std_TE = self.add_previous_logits(self.logits(x_BTD, ctx), ctx), None
            logits_TE = noisy_TE
        expert_TK = ops.top_k(self.score.of(noisy_TE.detach()) + ctx.bias_E, self.top_k)
        weight_TK = self.score.gates(noisy_TE, expert_TK, self.power)
        valid_BT = getattr(ctx, "valid_BT", None)  # the core's contexts have none
        valid_T1 = 1.0 if valid_BT is None else valid_BT.reshape(-1, 1).type_as(weight_TK)
        loss = self.micro_batch_loss(logits_TE, noisy_TE, std_TE, expert_TK, weight_TK, valid_T1)
        return Route(expert_TK, weight_TK, logits_TE, loss, self.score.prob(logits_TE))

    def logits(self, x_BTD: Tensor, ctx) -> Tensor:
        raise NotImplementedError

    def noisy_logits(self, x_BTD: Tensor, ctx) -> tuple[Tensor, Tensor]:
        """Logits and the standard deviation of their noise."""
        return self.logits(x_BTD, ctx), F.softplus(linear_fp32(x_BTD.flatten(0, 1), self.noise))

    def add_previous_logits(self, logits_TE: Tensor, ctx) -> Tensor:
        """MoE++: the previous MoE layer's logits, through a learned matrix."""
        if self.residual is None:
            return logits_TE
        return logits_TE + self.residual_scale * ctx.previous_logits_TE @ self.residual.T

    def micro_batch_loss(self, logits_TE, noisy_TE, std_TE, expert_TK, weight_TK, valid_T1) -> Tensor | float:
        """Shazeer's importance and load losses (1701.06538 eq. 7, 11) of the valid tokens.

        Their gradients depend on how the batch is cut."""
        loss = 0.0
        if self.importance_coef:
            importance_E = torch.zeros_like(logits_TE).scatter(1, expert_TK, valid_T1 * weight_TK).sum(0)
            loss = loss + self.importance_coef * squared_variation(importance_E, self.exits)
        if self.load_coef and std_TE is not None:
            load_E = smooth_load(logits_TE, noisy_TE, std_TE, self.top_k, valid_T1)
            loss = loss + self.load_coef * squared_variation(load_E, self.exits)
        return loss


def squared_variation(x_E: Tensor, exits: tuple[int, int] | None = None) -> Tensor:
    """Squared coefficient of variation, variance over squared mean, of all experts but the exits."""
    x_E = x_E if exits is None else torch.cat([x_E[: exits[0]], x_E[exits[1] :]])
    return x_E.var(correction=0) / x_E.mean().square().clamp(min=1e-10)


def smooth_load(logits_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, k: int, valid_T1: Tensor | float = 1.0) -> Tensor:
    """(E,): each expert's expected number of tokens if its own noise were drawn anew (1701.06538 eq. 8-10).

    An expert is chosen when its logit exceeds the k-th largest of the others, which is the (k+1)-th of all if it is
    itself among the first k."""
    top_TK = noisy_TE.topk(k + 1).values
    threshold_TE = torch.where(noisy_TE > top_TK[:, k:], top_TK[:, k:], top_TK[:, k - 1 : k])
    return (valid_T1 * torch.special.ndtr((logits_TE - threshold_TE) / std_TE)).sum(0)


class LinearRouter(Router):
    """One matrix."""

    def __init__(self, config: model.Config):
        super().__init__(config, config.n_embd)

    def logits(self, x_BTD: Tensor, ctx) -> Tensor:
        return linear_fp32(x_BTD.flatten(0, 1), self.gate)

    def noisy_logits(self, x_BTD: Tensor, ctx) -> tuple[Tensor, Tensor]:
        both_TE = linear_fp32(x_BTD.flatten(0, 1), torch.cat([self.gate, self.noise]))
        logits_TE, raw_std_TE = both_TE.chunk(2, dim=1)
        return logits_TE, F.softplus(raw_std_TE.contiguous())


class MLPRouter(Router):
    """Two layers with ReLU between."""

    def __init__(self, config: model.Config):
        config = as_zoo(config)
        super().__init__(config, config.router_dim)
        self.up = nn.Parameter(torch.empty(config.router_dim, config.n_embd))

    def logits(self, x_BTD: Tensor, ctx) -> Tensor:
        return linear_fp32(x_BTD.flatten(0, 1), self.up).relu() @ self.gate.T


class ConvRouter(Router):
    """A causal convolution over the last router_kernel tokens of the document; kernel 1 is the linear router.

    The taps are columns of one matrix (E, router_kernel * D), the current token's first."""

    def __init__(self, config: model.Config):
        config = as_zoo(config)
        super().__init__(config, config.router_kernel * config.n_embd)
        self.kernel = config.router_kernel

    def logits(self, x_BTD: Tensor, ctx) -> Tensor:
        return linear_fp32(stack_taps(self, x_BTD, ctx, self.kernel).flatten(0, 1), self.gate)


def stack_taps(module: nn.Module, x_BTD: Tensor, ctx, kernel: int) -> Tensor:
    """(B, T, kernel * D): each token, then those before it; zeros in place of tokens of other documents."""
    T, back = x_BTD.size(1), kernel - 1
    if ctx.cache is None:
        x_BSD = F.pad(x_BTD, (0, 0, back, 0))
    else:
        previous_BTD = ctx.cache.recall(module, x_BTD.new_zeros(x_BTD.size(0), back, x_BTD.size(2)))
        x_BSD = torch.cat([previous_BTD, x_BTD], dim=1)
        ctx.cache.remember(module, x_BSD[:, x_BSD.size(1) - back :])
    same_doc_BS = F.pad(ctx.same_doc_BS, (back, 0))[:, -T - back :]
    taps, inside_BT = [x_BTD], torch.ones_like(same_doc_BS[:, back:])
    for lag in range(1, kernel):
        start = back - lag
        inside_BT = inside_BT & same_doc_BS[:, start + 1 : start + 1 + T]  # lag steps back without leaving the document
        taps.append(torch.where(inside_BT[..., None], x_BSD[:, start : start + T], 0))
    return torch.cat(taps, dim=-1)


class RecurrentRouter(Router):
    """A gated linear recurrence over the document (minGRU, 2410.01201), in fp32, as a scan of log2(T) steps.

    h_t = (1 - z_t) h_{t-1} + z_t v_t, z = sigmoid(W_z x), v = W_v x; 1 - z is 0 at a document's first token."""

    def __init__(self, config: model.Config):
        config = as_zoo(config)
        super().__init__(config, config.router_dim)
        self.update, self.value = (nn.Parameter(torch.empty(config.router_dim, config.n_embd)) for _ in range(2))

    def logits(self, x_BTD: Tensor, ctx) -> Tensor:
        B, T, _ = x_BTD.shape
        both = linear_fp32(x_BTD.flatten(0, 1), torch.cat([self.update, self.value])).unflatten(0, (B, T))
        z_BTC, v_BTC = both.chunk(2, dim=-1)
        z_BTC = z_BTC.sigmoid()
        h_BC = z_BTC.new_zeros(B, z_BTC.size(-1))
        if ctx.cache is not None:
            h_BC = ctx.cache.recall(self, h_BC)
        h_BTC = linear_scan((1 - z_BTC) * ctx.same_doc_BS[:, -T:, None], z_BTC * v_BTC, h_BC)
        if ctx.cache is not None:
            ctx.cache.remember(self, h_BTC[:, -1])
        return h_BTC.flatten(0, 1) @ self.gate.T


def linear_scan(a_BTC: Tensor, b_BTC: Tensor, h_BC: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t for all t, starting at h_BC; each of log2(T) rounds doubles the reach."""
    b_BTC = torch.cat([b_BTC[:, :1] + a_BTC[:, :1] * h_BC[:, None], b_BTC[:, 1:]], dim=1)
    reach, T = 1, a_BTC.size(1)
    while reach < T:
        b_BTC = b_BTC + a_BTC * F.pad(b_BTC, (0, 0, reach, 0))[:, :T]
        a_BTC = a_BTC * F.pad(a_BTC, (0, 0, reach, 0))[:, :T]
        reach *= 2
    return b_BTC


class AttentionRouter(Router):
    """One causal head over the inputs of the feed-forward, with the layer's own window and documents."""

    def __init__(self, config: model.Config):
        config = as_zoo(config)
        super().__init__(config, config.router_dim)
        self.qkv = nn.Parameter(torch.empty(3 * config.router_dim, config.n_embd))

    def logits(self, x_BTD: Tensor, ctx) -> Tensor:
        q, k, v = F.linear(x_BTD, self.qkv.type_as(x_BTD)).chunk(3, dim=-1)
        if ctx.cache is not None:
            k, v = ctx.cache.append(self, k, v)
        y_BTC = ctx.mask.attend(norm(q)[:, None], norm(k)[:, None], v[:, None], q.size(-1) ** 0.5 / 4)[:, 0]
        return linear_fp32(y_BTC.flatten(0, 1), self.gate)


# -----------------------------------------------------------------------------
# A router without parameters


class HashRouter(nn.Module):
    """Token id mod E, further choices spread evenly, uniform gates (Hash Layers, 2106.04426)."""

    def __init__(self, config: model.Config):
        super().__init__()
        self.top_k, self.num_experts = config.top_k, config.num_experts

    def forward(self, x_BTD: Tensor, ctx) -> Route:
        choice_K = torch.arange(self.top_k, device=x_BTD.device) * (self.num_experts // self.top_k)
        expert_TK = (ctx.ids_BT.flatten()[:, None] + choice_K) % self.num_experts
        weight_TK = torch.full_like(expert_TK, 1 / self.top_k, dtype=torch.float32)
        return Route(expert_TK, weight_TK, torch.zeros(len(expert_TK), self.num_experts, device=x_BTD.device))


ROUTERS = {"linear": LinearRouter, "hash": HashRouter, "mlp": MLPRouter, "conv": ConvRouter,
           "recurrent": RecurrentRouter, "attention": AttentionRouter}  # fmt: skip
TABLES |= {"router": ChainMap(ROUTERS, model.ROUTERS), "router_score": SCORES}  # model.ROUTERS: a user's own
PARAMETER_RULES |= {
    "router.residual": ParameterRule("router", constant(0.0)),
    "router.up": ParameterRule("router", init_uniform),
    "router.update": ParameterRule("router", init_uniform),
    "router.value": ParameterRule("router", init_uniform),
    "router.qkv": ParameterRule("router", init_uniform),
}


def check(config: Config):
    require(config, "router_dim", config.router_dim > 0 and config.router_dim % 16 == 0, "a multiple of 16")
    for field in ("importance_coef", "load_coef", "entropy_coef"):
        legal = f"0 with router {config.router}, which learns nothing"
        require(config, field, config.router != "hash" or getattr(config, field) == 0, legal)
    varies = config.router_noise > 0 and config.top_k < config.num_experts
    legal = "0, or there must be router_noise above 0, and fewer than num_experts chosen"
    require(config, "load_coef", varies or config.load_coef == 0, legal)
    stacked = config.router_residual == 0 or config.depth == "stack"
    require(config, "router_residual", stacked, f"0 with depth {config.depth}, where layers have no fixed order")


CHECKS.append(check)
