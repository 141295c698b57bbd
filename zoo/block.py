"""One layer with the zoo's options: its context, norms, residual update rules, shared keys and values.

Shape suffixes as in model.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

import model
import ops
from ops import norm
from zoo.attention import ATTENTIONS
from zoo.config import LETTERS, TABLES, Config
from zoo.moe import MoE
from zoo.stats import RouteStats


class Context(NamedTuple):
    """model.Context and the inputs of options; None where no option needs one."""

    ids_BT: Tensor | None  # None when embeddings were given
    mask: object
    value_embed_BTHC: Tensor
    cos: Tensor
    sin: Tensor
    same_doc_BS: Tensor
    noise_key: tuple[Tensor, Tensor, Tensor, Tensor]
    bias_E: Tensor
    cache: object  # a KVCache, or a loop's keys in front of one
    previous_logits_TE: Tensor | None = None  # of the MoE layer before, zeros for the first
    kv: tuple[Tensor, ...] | None = None  # keys and values to share; () until a layer before has some
    raw_BTD: Tensor | None = None  # the residual stream before the norm
    terms: Tensor | None = None  # number of terms in the residual stream
    valid_BT: Tensor | None = None  # tokens that are not padding
    log_visible_BT: Tensor | None = None  # log of the number of visible keys
    target_expert_BT: Tensor | None = None  # target of the router's supervised loss, -1: none


# -----------------------------------------------------------------------------
# Block: norms and residual rules


class Norms(NamedTuple):
    after: bool = False  # a norm behind attention and feed-forward too
    raw: bool = False  # values of routed attention and experts see the stream before the norm


NORMS = {
    "P": Norms(),
    # peri-norm (2502.02737). norm(a y) = norm(y): gates, routed_scale and zero experts only mix directions before it.
    # Its slope at zero, where zero-initialised projections begin, is 1 / sqrt(eps), about 2,900.
    "R": Norms(after=True),
    "U": Norms(raw=True),  # MoEUT (2405.16039): queries, keys and routers see the normed stream
}


def add(x: Tensor, y: Tensor, n: Tensor | None, x0: Tensor) -> Tensor:
    return x + y


def average(x: Tensor, y: Tensor, n: Tensor, x0: Tensor) -> Tensor:
    """The stream is the mean of its n terms, so every block has the same weight."""
    return x + (y - x) / (n + 1).type_as(x)


def average_keep_embedding(x: Tensor, y: Tensor, n: Tensor, x0: Tensor) -> Tensor:
    """The embedding plus the mean of the n - 1 terms since."""
    return x + (y - (x - x0)) / n.type_as(x)


# key of `residual` -> function (x, y, n terms, x0) -> x
RESIDUALS = {"add": add, "average": average, "average_keep_embedding": average_keep_embedding}


def add_terms(terms: Tensor | None, count) -> Tensor | None:
    return None if terms is None else terms + count


FEED_FORWARDS = {"M": MoE, "D": model.DenseMLP}


class Block(nn.Module):
    """model.Block with a choice of norms and residual rule; also returns keys and values that a later layer shares."""

    def __init__(self, config: Config, layer: int, ranks: model.ExpertRanks):
        super().__init__()
        self.stream_mix = nn.Parameter(torch.empty(2)) if config.residual == "add" else None
        self.residual, self.norms = RESIDUALS[config.residual], NORMS[config.per_layer("norms")[layer]]
        self.attention = ATTENTIONS[config.per_layer("attention")[layer]](config, layer)
        self.ffn = FEED_FORWARDS[config.per_layer("pattern")[layer]](config, ranks)
        self.is_shared = layer in config.key_sources.values()  # compiled, unused outputs would get gradients of zeros

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, ctx: Context):
        x_BTD = self.mix_x0(x_BTD, x0_BTD)
        y_BTD, kv = self.attention(norm(x_BTD), self.update_context(ctx, x_BTD))
        x_BTD = self.add_residual(x_BTD, y_BTD, ctx.terms, x0_BTD)
        y_BTD, stats = self.ffn(norm(x_BTD), self.update_context(ctx, x_BTD))
        return self.add_residual(x_BTD, y_BTD, add_terms(ctx.terms, 1), x0_BTD), stats, kv if self.is_shared else None

    def mix_x0(self, x_BTD: Tensor, x0_BTD: Tensor) -> Tensor:
        return x_BTD if self.stream_mix is None else ops.blend(self.stream_mix, x_BTD, x0_BTD)

    def update_context(self, ctx: Context, x_BTD: Tensor) -> Context:
        return ctx._replace(raw_BTD=x_BTD) if self.norms.raw else ctx

    def add_residual(self, x_BTD: Tensor, y_BTD: Tensor, terms: Tensor | None, x0_BTD: Tensor) -> Tensor:
        return self.residual(x_BTD, norm(y_BTD) if self.norms.after else y_BTD, terms, x0_BTD)


def run_layers(blocks, x_BTD: Tensor, x0_BTD: Tensor, contexts: list[Context], kv=None,
               stats: tuple[RouteStats, ...] = ()):  # fmt: skip
    """(hidden states, statistics, last keys and values) of blocks in order. `stats` are those of earlier layers."""
    own_stats = []
    for block, ctx in zip(blocks, contexts):
        previous = [*stats, *own_stats]
        if ctx.previous_logits_TE is not None and previous:
            ctx = ctx._replace(previous_logits_TE=previous[-1].logits_TE)
        if ctx.kv is not None:
            ctx = ctx._replace(kv=kv)
        x_BTD, block_stats, block_kv = block(x_BTD, x0_BTD, ctx)
        own_stats, kv = own_stats + block_stats, block_kv or kv
    return x_BTD, own_stats, kv


LETTERS["norms"] = NORMS
TABLES["residual"] = RESIDUALS
