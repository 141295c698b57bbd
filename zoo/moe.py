"""The MoE layer with the zoo's options: pools of several expert kinds, shared experts, masked tokens, statistics."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
import ops
from cli import require
from model import PARAMETER_RULES, KVCache, ParameterRule, init_uniform
from zoo.config import CHECKS, TABLES, Config, has_matmuls, is_list, listed_kinds, routed_scale, width_of
from zoo.routers import stack_taps
from zoo.stats import mean_over, route_stats, without_exits

# -----------------------------------------------------------------------------
# Shared experts


class SharedMLP(model.MLP):
    """num_shared_experts ReLU^2 MLPs as one."""

    def __init__(self, config: Config):
        super().__init__(config.shared_width, config.n_embd)

    def forward(self, x_BTD: Tensor, ctx) -> Tensor:
        return super().forward(x_BTD)


class SharedConv(nn.Module):
    """BiBo: down(silu(gate) * up) with a causal convolution over shared_kernel tokens of the document as gate.

    Its width gives it the FLOPs of the MLP. The taps are columns of one matrix, so initial values shrink with their
    number."""

    def __init__(self, config: Config):
        super().__init__()
        self.kernel = config.shared_kernel
        width = 8 * max(1, round(config.shared_width * 2 / (self.kernel + 2) / 8))
        self.gate = nn.Parameter(torch.empty(width, self.kernel * config.n_embd))
        self.up = nn.Parameter(torch.empty(width, config.n_embd))
        self.down = nn.Parameter(torch.empty(config.n_embd, width))

    def forward(self, x_BTD: Tensor, ctx) -> Tensor:
        gate_BTF = F.linear(stack_taps(self, x_BTD, ctx, self.kernel), self.gate.type_as(x_BTD))
        return F.linear(F.silu(gate_BTF) * F.linear(x_BTD, self.up.type_as(x_BTD)), self.down.type_as(x_BTD))


SHARED = {"mlp": SharedMLP, "conv": SharedConv}


# -----------------------------------------------------------------------------
# The MoE layer


class MoE(nn.Module):
    """A router, pools of experts of one kind each, and shared experts beside them."""

    def __init__(self, config: Config, ranks: model.ExpertRanks):
        super().__init__()
        self.router, self.num_experts, self.ranks = TABLES["router"][config.router](config), config.num_experts, ranks
        self.pools, self.free_pools, first = [], [], 0  # (module name, first expert, number of experts; None = all)
        self.exits, self.row_entropy = config.exits, config.entropy_coef > 0
        for kind, count in config.expert_counts.items():
            name = "experts" if kind == "mlp" else kind
            self.add_module(name, TABLES["experts"][kind](config, count // ranks.size))
            pools = self.pools if has_matmuls(kind) else self.free_pools
            pools.append((name, first, count if count < config.num_experts or config.depth != "stack" else None))
            first += count
        self.shared = SHARED[config.shared](config) if config.num_shared_experts else None
        self.routed_scale = routed_scale(config)
        self.all_to_all = torch.compiler.disable(exchange_rows) if ranks.size > 1 else None

    def forward(self, x_BTD: Tensor, ctx):
        valid_T = None if ctx.valid_BT is None else ctx.valid_BT.flatten()
        route = self.router(x_BTD, ctx)
        if valid_T is not None:
            route = route._replace(expert_TK=route.expert_TK.where(valid_T[:, None], self.num_experts))
        x_TD = (x_BTD if ctx.raw_BTD is None else ctx.raw_BTD).flatten(0, 1)
        ys, counts = [], []
        for name, first, count in self.pools:
            count = self.num_experts if count is None and valid_T is not None else count
            y_TD, counts_E = dispatch_to_pool(x_TD, route, self.across_ranks(self.get_submodule(name)), first, count)
            ys.append(y_TD)
            counts.append(counts_E)
        for name, first, count in self.free_pools:
            chosen_TKn = route.expert_TK[:, :, None] == torch.arange(first, first + count, device=x_TD.device)
            ys.append(self.get_submodule(name)(x_TD, (route.weight_TK[:, :, None] * chosen_TKn).sum(1), ctx))
        stats = self.statistics(route, counts[0], x_BTD, ctx, valid_T)
        return self.add_shared(sum(ys[1:], ys[0]).view_as(x_BTD), x_BTD, ctx), [stats]

    def across_ranks(self, experts):
        return experts if self.all_to_all is None else functools.partial(self.all_to_all, self.ranks.group, experts)

    def add_shared(self, routed_BTD: Tensor, x_BTD: Tensor, ctx) -> Tensor:
        if self.routed_scale != 1:
            routed_BTD = self.routed_scale * routed_BTD
        return routed_BTD if self.shared is None else self.shared(x_BTD, ctx) + routed_BTD

    def statistics(self, route, counts_E: Tensor, x_BTD: Tensor, ctx, valid_T: Tensor | None):
        """RouteStats; while decoding only the fields that routers and halting read."""
        stats = route_stats(route, counts_E, valid_T, is_decoding(ctx.cache), self.exits)
        if self.exits is not None:
            exit_ids = torch.arange(*self.exits, device=route.expert_TK.device)
            exits_T = torch.isin(route.expert_TK, exit_ids).any(1)
            exit_prob_T = route.logits_TE.softmax(-1)[:, slice(*self.exits)].sum(1)
            stats = stats._replace(exits_T=exits_T, exit_prob_T=exit_prob_T)
        if is_decoding(ctx.cache):
            return stats
        if self.row_entropy:
            prob_BTE = without_exits(ops.softmax(route.logits_TE), self.exits).view(*x_BTD.shape[:2], -1)
            valid_BT = torch.ones_like(prob_BTE[..., 0]) if ctx.valid_BT is None else ctx.valid_BT.type_as(prob_BTE)
            chosen_BE = (prob_BTE * valid_BT[..., None]).sum(1)
            stats = stats._replace(chosen_BE=chosen_BE, row_tokens_B=valid_BT.sum(1))
        if ctx.target_expert_BT is not None:
            stats = stats._replace(domain_loss=target_expert_loss(route, ctx.target_expert_BT.flatten(), valid_T))
        return stats


def is_decoding(cache) -> bool:
    """Whether keys go into a KV cache, directly or through a loop's keys."""
    return cache is not None and (isinstance(cache, KVCache) or cache.cache is not None)


def target_expert_loss(route, expert_T: Tensor, valid_T: Tensor | None) -> Tensor:
    """Cross-entropy of the router to each token's target expert (-1: none)."""
    prob_TE = getattr(route, "prob_TE", None)
    prob_TE = ops.softmax(route.logits_TE) if prob_TE is None else prob_TE
    nats_T = -prob_TE.gather(1, expert_T.clamp(min=0)[:, None]).clamp(min=1e-9).log().squeeze(1)
    return mean_over(nats_T * (expert_T >= 0), valid_T)


def dispatch_to_pool(x_TD: Tensor, route, experts, first: int, count: int | None) -> tuple[Tensor, Tensor]:
    """model.dispatch to `count` experts from number `first` on (None: all of them); no row goes to the others."""
    if first:  # renumber, so that the pool's rows come first; E, no expert, stays
        E, expert_TK = route.logits_TE.size(1), route.expert_TK
        route = route._replace(expert_TK=torch.where(expert_TK < E, (expert_TK - first) % E, E))
    return model.dispatch(x_TD, route, experts if count is None else functools.partial(run_masked, experts, count))


def run_masked(experts, count: int, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
    """Outputs of the first `count` experts, zeros in other rows, which grouped GEMMs leave uninitialised."""
    own_R1 = (torch.arange(len(rows_RD), device=rows_RD.device) < ends_E[count - 1])[:, None]
    return torch.where(own_R1, experts(torch.where(own_R1, rows_RD, 0), ends_E[:count].clone()), 0)


def exchange_rows(group, experts, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
    """model.expert_all_to_all of the rows with an expert; the others come last, and their outputs are zeros."""
    count = int(ends_E[-1])
    rows_out_RD = model.expert_all_to_all(group, experts, rows_RD[:count], ends_E)
    return F.pad(rows_out_RD, (0, 0, 0, len(rows_RD) - count))


def looks_at_neighbours(config: Config) -> bool:
    """Whether a token's feed-forward depends on other tokens."""
    return config.router not in ("linear", "hash", "mlp") or (config.num_shared_experts > 0 and config.shared != "mlp")


TABLES["shared"] = SHARED
PARAMETER_RULES["shared.gate"] = ParameterRule("matrix", init_uniform)


def check(config: Config):
    kinds = listed_kinds(config.experts)
    legal = f"names out of {', '.join(TABLES['experts'])}, each with *n for n of them, separated by commas"
    require(config, "experts", kinds and all(kind in TABLES["experts"] for kind in kinds), legal)
    legal = "a list with at least one that has matmuls: " + ", ".join(filter(has_matmuls, TABLES["experts"]))
    require(config, "experts", any(map(has_matmuls, kinds)), legal)
    if is_list(config.experts):
        legal = f"{len(kinds)}, the number of experts in {config.experts!r}"
        require(config, "num_experts", config.num_experts == len(kinds), legal)
    for kind in filter(has_matmuls, config.expert_counts):
        width, flops = width_of(kind, config.hidden_size)
        beside = f"next to an mlp of hidden width {config.hidden_size} its own, a multiple of 8, would be {width}"
        legal = f"without {kind}: {beside} and its FLOPs {flops:.2f} times; choose a larger mlp_ratio"
        require(config, "experts", width > 0 and abs(flops - 1) <= 0.05, legal)
    scale = config.routed_scale
    fits = scale == "auto" or (not isinstance(scale, str) and scale >= 0)
    require(config, "routed_scale", fits, "auto or a number, at least 0")


CHECKS.append(check)
