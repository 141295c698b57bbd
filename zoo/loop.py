"""Looped depth: a group of layers repeated, with keys per iteration, packed tokens and halting per token.

Shape suffixes as in model.py, Q packed tokens of a row (padded to a multiple of 64).
"""

import re

import torch
from torch import Tensor, nn

from cli import require
from zoo.block import add_terms, run_layers
from zoo.config import CHECKS, LETTERS, TABLES, Config
from zoo.gpt import GPT, KVCache, TrunkOutput
from zoo.halting import HALTS, HaltState, count_true
from zoo.masks import MaskInputs, PackedMask
from zoo.stats import RouteStats, merge_runs

# -----------------------------------------------------------------------------
# Keys and values of each iteration


class LoopKeys:
    """Keys and values per iteration, in front of a KV cache or without one; the same in training and in decoding.

    A halted token is visible as it was in its last iteration. One cache entry per token, overwritten by each iteration,
    would show later tokens the end of an earlier token's loop, where training shows them the same iteration."""

    def __init__(self, cache: KVCache | None):
        self.cache, self.loop, self.packed, self.full = cache, 0, None, {}

    def begin(self, loop: int, active_BT: Tensor) -> Tensor | None:
        """Start an iteration of these tokens; returns the keys (B, S) that are hidden in it, if any."""
        self.loop, self.packed = loop, None
        return self.hidden(active_BT)

    def append(self, module: nn.Module, *parts: Tensor) -> tuple[Tensor, ...]:
        scattered = self.packed is not None
        self.full[module] = tuple(map(self.packed.scatter, self.full[module], parts)) if scattered else parts
        return self.store(module, self.loop)

    def store(self, module: nn.Module, loop: int) -> tuple[Tensor, ...]:
        return self.full[module] if self.cache is None else self.cache.append((module, loop), *self.full[module])

    def recall(self, module: nn.Module, default):
        return default if self.cache is None else self.cache.recall((module, self.loop), default)

    def remember(self, module: nn.Module, value):
        if self.cache is not None:
            self.cache.remember((module, self.loop), value)

    def hidden(self, active_BT: Tensor) -> Tensor | None:
        return None

    def skip(self, loops: range):
        """Store the halted tokens' keys and values for these iterations, in which no token is active."""
        for loop in loops:
            for module in self.full:
                self.store(module, loop)


class OwnLoopKeys(LoopKeys):
    """Only active tokens are visible (Mixture-of-Recursions, 2507.10524: recursion-wise caching)."""

    def hidden(self, active_BT: Tensor) -> Tensor | None:
        if self.cache is not None:
            (active_BT,) = self.cache.append(("active", self.loop), active_BT)
        return None if count_true(active_BT) == active_BT.numel() else ~active_BT


class FirstLoopKeys(LoopKeys):
    """Every iteration uses the first one's keys and values: one entry per token (same paper: recursive sharing)."""

    def append(self, module: nn.Module, *parts: Tensor) -> tuple[Tensor, ...]:
        if self.loop == 0:
            self.full[module] = parts
        return self.store(module, 0)

    def skip(self, loops: range):
        return


TABLES["loop_keys"] = LOOP_KEYS = {"latest": LoopKeys, "per_loop": OwnLoopKeys, "share_first": FirstLoopKeys}


# -----------------------------------------------------------------------------
# Packed tokens


class PackedTokens:
    """The active tokens of each row, packed into (B, Q); rows with fewer are padded with inactive ones."""

    STEP = 64  # Q is a multiple of it, so few shapes occur

    def __init__(self, active_BT: Tensor):
        longest, T = int(active_BT.sum(1).max()), active_BT.size(1)
        self.count = min(T, -(-longest // self.STEP) * self.STEP)
        self.index_BQ = (~active_BT).to(torch.int8).argsort(dim=1, stable=True)[:, : self.count]
        self.valid_BQ = active_BT.gather(1, self.index_BQ)
        row_BQ = self.index_BQ + torch.arange(len(active_BT), device=active_BT.device)[:, None] * T  # in (B * T, ...)
        self.all_R, self.valid_R = row_BQ.flatten(), row_BQ[self.valid_BQ]

    def gather(self, x_BT: Tensor) -> Tensor:
        """(B, T, ...) -> (B, Q, ...)"""
        return x_BT.flatten(0, 1).index_select(0, self.all_R).view(*self.index_BQ.shape, *x_BT.shape[2:])

    def scatter(self, x_BT: Tensor, packed_BQ: Tensor) -> Tensor:
        """x with the active tokens replaced."""
        valid = packed_BQ.flatten(0, 1)[self.valid_BQ.flatten()]
        return x_BT.flatten(0, 1).index_copy(0, self.valid_R, valid).view(x_BT.shape)


def packed_context(ctx, letter: str, packed: PackedTokens, inputs: MaskInputs, hidden_BS: Tensor | None):
    """A layer's context for the packed tokens; hidden_BS: keys that are not visible to them."""
    B, T = inputs.doc_BT.shape
    seed, step, layer, token_T = ctx.noise_key
    gather_if = lambda x_BT: None if x_BT is None else packed.gather(x_BT)
    table = lambda x: packed.gather(x.expand(B, *x.shape[-3:]))  # (T, 1, C) or (B, T, 1, C)
    mask = PackedMask(inputs, letter, packed.index_BQ, hidden_BS)
    previous_TE, value_embed = ctx.previous_logits_TE, ctx.value_embed_BTHC
    return ctx._replace(
        ids_BT=gather_if(ctx.ids_BT),
        mask=mask,
        value_embed_BTHC=packed.gather(value_embed) if value_embed.ndim else value_embed,
        cos=table(ctx.cos),
        sin=table(ctx.sin),
        noise_key=(seed, step, layer, packed.gather(token_T.view(B, T)).flatten()),
        previous_logits_TE=None if previous_TE is None else packed.gather(previous_TE.view(B, T, -1)).flatten(0, 1),
        valid_BT=packed.valid_BQ if ctx.valid_BT is None else packed.valid_BQ & packed.gather(ctx.valid_BT),
        target_expert_BT=gather_if(ctx.target_expert_BT),
        log_visible_BT=None if ctx.log_visible_BT is None else mask.visible_keys().log(),
    )


def exits_of(stats: list[RouteStats], packed: PackedTokens | None, x_BTD: Tensor) -> tuple[Tensor, Tensor] | None:
    """Tokens (B, T) that chose an exit in some layer, and the last layer's probability of it; None without exits."""
    with_exits = [s for s in stats if s.exits_T is not None]
    if not with_exits:
        return None
    found = torch.stack([s.exits_T for s in with_exits]).any(0), with_exits[-1].exit_prob_T
    if packed is None:
        return tuple(part.view(x_BTD.shape[:2]) for part in found)
    return tuple(packed.scatter(part.new_zeros(x_BTD.shape[:2]), part.view(packed.index_BQ.shape)) for part in found)


# -----------------------------------------------------------------------------
# The model


class LoopGPT(GPT):
    """Some layers, then a group of layers `loops` times, then the others.

    Universal Transformer (1807.03819), MoEUT (2405.16039), AbbIE (2507.08567); with the first and the last layer
    outside the loop, the middle-cycle strategy of Mixture-of-Recursions (2507.10524). Evaluation may use another number
    of loops."""

    def add_depth_modules(self):
        config = self.config
        del self.skip_weights, self.layer_mix  # no mirrored half, and no layer that runs once for each token
        looped = config.per_layer("looped")
        self.group, self.windows = slice(looped.index("o"), looped.rindex("o") + 1), config.per_layer("window")
        self.loops, self.eval_loops, self.reinject = config.loops, config.eval_loops or config.loops, config.reinject
        self.loop_keys = LOOP_KEYS[config.loop_keys]
        self.needs_keys = config.loop_keys == "share_first" or config.halt != "none"
        self.halt = HALTS[config.halt](config)

    def compile_blocks(self) -> str:
        return "eager (halting tokens make shapes of their own)" if self.needs_keys else super().compile_blocks()

    def run_blocks(self, x0_BTD: Tensor, contexts: list, inputs: MaskInputs) -> TrunkOutput:
        before, after = slice(0, self.group.start), slice(self.group.stop, len(self.blocks))
        x_BTD, stats, kv = run_layers(self.blocks[before], x0_BTD.clone(), x0_BTD, contexts[before])
        looped = self.run_loops(self.blocks[self.group], x_BTD, x0_BTD, contexts[self.group], inputs, kv)
        states, runs, cost, loops_BT, kv, choices_SBT = looped
        outputs, runs_after = [], []
        for (x_BTD, weight_BT), state_loops_BT in zip(states, self.loops_of(states, loops_BT)):
            contexts_after = [ctx._replace(terms=self.terms_after(ctx, state_loops_BT)) for ctx in contexts[after]]
            x_BTD, stats_after, _ = run_layers(self.blocks[after], x_BTD, x0_BTD, contexts_after, kv)
            outputs.append((x_BTD, weight_BT))
            runs_after.append(stats_after)
        stats += merge_runs(runs, self.num_loops()) + merge_runs(runs_after, len(states))
        return TrunkOutput(outputs, stats, cost, loops_BT, choices_SBT)

    def num_loops(self) -> int:
        """Iterations at most."""
        return self.loops if self.training else self.eval_loops

    def loops_of(self, states: list, loops_BT: Tensor) -> list[Tensor]:
        """Iterations (B, T) behind each of the states: one state ends all loops, several (PonderNet) are successive."""
        return [loops_BT] if len(states) == 1 else [torch.full_like(loops_BT, n) for n in range(1, len(states) + 1)]

    def terms_after(self, ctx, loops_BT: Tensor) -> Tensor | None:
        """Terms in the residual stream after the loop; a token that halted early has fewer."""
        return add_terms(ctx.terms, (2 * (self.group.stop - self.group.start) * (loops_BT - 1))[..., None])

    def run_loops(self, blocks, x_BTD: Tensor, x0_BTD: Tensor, contexts: list, inputs: MaskInputs, kv):
        """(states with loss weights, statistics per iteration, cost, loops_BT, last keys and values, layer choices)."""
        begin_BTD, num_terms, runs, store = x_BTD, 2 * len(blocks), [], None
        if self.needs_keys or contexts[0].cache is not None:
            store = self.loop_keys(contexts[0].cache)
        state, loops = HaltState.initial(x_BTD), self.num_loops()
        for loop in range(loops):
            here = [loop_context(ctx, loop, num_terms, store) for ctx in contexts]
            hidden_BS = None if store is None else store.begin(loop, state.active_BT)
            packed = None if state.all_active and hidden_BS is None else PackedTokens(state.active_BT)
            entry_BTD = x_BTD + self.reinject * begin_BTD if loop and self.reinject else x_BTD
            if packed is None:
                new_BTD, stats, last_kv = run_layers(blocks, entry_BTD, x0_BTD, here, kv)
            else:
                store.packed = packed
                letters = self.windows[self.group]
                here = [packed_context(ctx, letter, packed, inputs, hidden_BS) for ctx, letter in zip(here, letters)]
                packed_x, packed_x0 = packed.gather(entry_BTD), packed.gather(x0_BTD)
                new_BQD, stats, last_kv = run_layers(blocks, packed_x, packed_x0, here, kv)
                new_BTD = packed.scatter(x_BTD, new_BQD)
            runs.append(stats)
            x_BTD, state = self.halt(new_BTD, x_BTD, state, loop + 1 == loops, exits_of(stats, packed, x_BTD))
            if state.none_active:
                store.skip(range(loop + 1, loops))
                break
        cost = self.config.ponder_coef * self.halt.cost(state, contexts[0].valid_BT)
        return self.halt.outputs(x_BTD, state), runs, cost, state.loops_BT, last_kv, None


def loop_context(ctx, loop: int, num_terms: int, store: LoopKeys | None):
    """The context of one iteration: its own noise, and the number of terms in the residual stream."""
    seed, step, layer, token_T = ctx.noise_key
    noise_key, terms = (seed, step, layer + 256 * loop, token_T), add_terms(ctx.terms, num_terms * loop)
    return ctx._replace(noise_key=noise_key, terms=terms, cache=store)


def check(config: Config):
    looped = config.per_layer("looped")
    legal = f"such that the layers of the loop, o, are neighbours; over {config.n_layer} layers it is {looped}"
    require(config, "looped", re.fullmatch(r"\.*o+\.*", looped), legal)
    can_exit = "exit" in config.expert_counts and ("M", "o") in zip(config.per_layer("pattern"), looped)
    legal = "another, or there must be an exit among the experts of some layer of the loop"
    require(config, "halt", config.halt != "exit" or can_exit, legal)
    halts = config.depth == "loop" and config.halt != "none"
    borrowed = [layer for layer, source in config.key_sources.items() if looped[layer] == "." and looped[source] == "o"]
    reason = f"next to halt {config.halt}: they would see keys of whichever iteration a token halted in"
    legal = f"without S in layers {borrowed}, after the loop, {reason}; or loop_keys must be share_first"
    require(config, "attention", not (halts and borrowed) or config.loop_keys == "share_first", legal)
    if halts:
        legal = f"next to halt {config.halt}, where tokens halt, a kind that looks at no neighbours"
        require(config, "router", config.router not in ("conv", "recurrent"), legal)
        require(config, "shared", config.num_shared_experts == 0 or config.shared != "conv", legal)
        for field in ("importance_coef", "load_coef"):
            legal = f"0 next to halt {config.halt}: it looks at all tokens of a micro-batch"
            require(config, field, getattr(config, field) == 0, legal)


LETTERS["looped"] = "o."
CHECKS.append(check)
