"""Routed depth: in each step a controller picks one layer of a pool, or an identity, for every token.

Training computes all layers of the pool and weights them. Evaluation computes the picked one: keys and values of all
tokens, queries and MLP rows of the tokens that picked it.

Shape suffixes as in model.py, N choices of a token, Q packed tokens of a row."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import require
from model import PARAMETER_RULES, ParameterRule, constant, init_uniform
from ops import linear_fp32, norm, softmax
from zoo.block import Block, add_terms
from zoo.config import CHECKS, TABLES, Config
from zoo.halting import HaltState
from zoo.loop import LoopGPT, PackedTokens, loop_context, packed_context
from zoo.masks import MaskInputs, document_starts
from zoo.moe import MoE, looks_at_neighbours
from zoo.stats import RouteStats, unrouted_stats

# -----------------------------------------------------------------------------
# Controllers: logits (N, choices) of N tokens in a step, and the state for the next step


class LinearController(nn.Module):
    """One matrix; each step scales its input channel by channel.

    With the scales it solves all programs of benchmarks/toys.py, with a bias per step in their place 0.52 of them."""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.weight, self.step = (nn.Parameter(torch.empty(count, config.n_embd)) for count in (choices, steps))

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        return linear_fp32(x_ND * (1 + self.step[step]).type_as(x_ND), self.weight), None


class MemorylessController(nn.Module):
    """One matrix that does not depend on the step: the negative control."""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(choices, config.n_embd))

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        return linear_fp32(x_ND, self.weight), None


class MLPController(nn.Module):
    """Two layers of width controller_dim; the step's bias is added before the ReLU."""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.controller_dim, config.n_embd))
        self.step, self.weight = (nn.Parameter(torch.empty(count, config.controller_dim)) for count in (steps, choices))

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        return (linear_fp32(x_ND, self.up) + self.step[step]).relu() @ self.weight.T, None


class LSTMController(nn.Module):
    """An LSTM over the steps, of width controller_dim, with a state per token: nothing passes between tokens."""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.cell = nn.LSTMCell(config.n_embd, config.controller_dim)
        self.weight = nn.Parameter(torch.empty(choices, config.controller_dim))

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        state = self.cell(x_ND.float(), state)
        return state[0] @ self.weight.T, state


class LearnedOrder(nn.Module):
    """Trained logits of each step, the same for all tokens: a reference without input."""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.step = nn.Parameter(torch.empty(steps, choices))

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        return self.step[step].expand(len(x_ND), -1), None


class FixedOrder(nn.Module):
    """Layers in turn, identities last: the plain transformer, as a reference."""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.choices = choices

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        picked = torch.arange(self.choices, device=x_ND.device) == step % self.choices
        return torch.where(picked, 0.0, -1e4).expand(len(x_ND), -1), None


CONTROLLERS = {"linear": LinearController, "memoryless": MemorylessController, "mlp": MLPController,
               "lstm": LSTMController, "learned": LearnedOrder, "fixed": FixedOrder}  # fmt: skip

# -----------------------------------------------------------------------------
# From a controller's logits to the weights of the pool


def route_by_token(logits_BTN: Tensor, inputs: MaskInputs, cache, key) -> Tensor:
    return logits_BTN


def route_by_first_token(logits_BTN: Tensor, inputs: MaskInputs, cache, key) -> Tensor:
    """Every token has the logits of its document's first token."""
    logits_BSN = logits_BTN if cache is None else cache.append(key, logits_BTN)[0]
    first_BT = document_starts(inputs.doc_BT, inputs.doc_BS)
    return logits_BSN.gather(1, first_BT[..., None].expand(-1, -1, logits_BTN.size(2)))


ROUTE_BY = {"token": route_by_token, "first_token": route_by_first_token}


def one_hot(prob: Tensor) -> Tensor:
    return F.one_hot(prob.argmax(-1), prob.size(-1)).type_as(prob)


ROUTE_TRAINING = {  # (probabilities, progress of annealing from 0 to 1) -> weights with the probabilities' gradients
    "soft": lambda prob, progress: prob,
    "straight_through": lambda prob, progress: prob + (one_hot(prob) - prob).detach(),
    "anneal": lambda prob, progress: prob + progress * (one_hot(prob) - prob).detach(),
}
STEP_LOSSES = ("last", "mean")  # steps whose hidden states enter the training loss; evaluation uses the last

# -----------------------------------------------------------------------------
# The model


class LayerRoutedGPT(LoopGPT):
    """h' = sum of w_i F_i(h) over a pool of layers and identities; in evaluation F_i(h) of the likeliest one."""

    def add_depth_modules(self):
        super().add_depth_modules()
        config = self.config
        self.needs_keys, self.identities = True, config.identity_layers
        choices = self.group.stop - self.group.start + self.identities
        self.controller = CONTROLLERS[config.controller](config, max(self.loops, self.eval_loops), choices)
        self.route_by, self.weigh = ROUTE_BY[config.route_by], ROUTE_TRAINING[config.route_training]
        self.hard_evaluation = True  # an analysis may evaluate the soft mixture instead
        self.packs = not looks_at_neighbours(config)

    def run_loops(self, blocks, x_BTD: Tensor, x0_BTD: Tensor, contexts: list, inputs: MaskInputs, kv):
        begin_BTD, runs, controller_state, choices, probs, states_after = x_BTD, [], None, [], [], []
        cache, (_, step, *_) = contexts[0].cache, contexts[0].noise_key
        store = None if cache is None else self.loop_keys(cache)
        state, loops = HaltState.initial(x_BTD), self.num_loops()
        for loop in range(loops):
            here = [loop_context(ctx, loop, 0, store) for ctx in contexts]
            if store is not None:
                store.begin(loop, state.active_BT)
            entry_BTD = x_BTD + self.reinject * begin_BTD if loop and self.reinject else x_BTD
            logits_ND, controller_state = self.controller(norm(entry_BTD).flatten(0, 1), loop, controller_state)
            logits_BTN = self.route_by(logits_ND.view(*x_BTD.shape[:2], -1), inputs, cache, ("route", loop))
            prob_BTN = softmax(logits_BTN)
            probs.append(prob_BTN)
            choices.append(torch.where(state.active_BT, prob_BTN.argmax(-1), -1))
            if self.training or not self.hard_evaluation:
                progress = (step / self.config.anneal_steps).clamp(max=1)
                weight_BTN = self.weigh(prob_BTN, progress) if self.training else prob_BTN
                here = [only_active(ctx, state) for ctx in here]
                new_BTD, stats = mix_layers(blocks, entry_BTD, x0_BTD, here, weight_BTN)
            else:
                new_BTD, stats = self.run_picked(blocks, entry_BTD, x0_BTD, here, inputs, choices[-1], state.active_BT)
            new_BTD = torch.where(state.active_BT[..., None], new_BTD, x_BTD)
            runs.append(stats)
            x_BTD, state = self.halt(new_BTD, x_BTD, state, loop + 1 == loops, None)
            states_after.append(x_BTD)
            if state.none_active and cache is None:
                break
        states = self.halt.outputs(x_BTD, state)
        if self.training and self.config.step_loss == "mean":
            states = [(x, torch.full(x.shape[:2], 1 / loops, device=x.device)) for x in states_after]
        choices_SBT, valid_BT = torch.stack(choices), contexts[0].valid_BT
        counted_SBT = choices_SBT if valid_BT is None else choices_SBT.where(valid_BT, -1)
        balance = self.layer_balance(torch.stack(probs), counted_SBT)
        cost = self.config.ponder_coef * self.halt.cost(state, valid_BT) + self.config.layer_balance_coef * balance
        return states, runs, cost, state.loops_BT, None, choices_SBT

    def run_picked(self, blocks, x_BTD, x0_BTD, contexts: list, inputs: MaskInputs, choice_BT: Tensor,
                   active_BT: Tensor):  # fmt: skip
        """(hidden states, statistics) after each token's own layer; tokens without one keep their hidden states.

        Layers that look at neighbours are computed for all tokens."""
        new_BTD, all_stats = x_BTD, []
        for i, (block, ctx, letter) in enumerate(zip(blocks, contexts, self.windows[self.group])):
            picked_BT = (choice_BT == i) & active_BT
            if self.packs:
                packed = PackedTokens(picked_BT)
                packed_ctx = packed_context(ctx, letter, packed, inputs, None)
                y_BQD, stats = run_block_packed(block, x_BTD, x0_BTD, ctx, packed, packed_ctx)
                new_BTD = packed.scatter(new_BTD, y_BQD)
            else:
                y_BTD, stats, _ = block(x_BTD, x0_BTD, ctx)
                new_BTD = torch.where(picked_BT[..., None], y_BTD, new_BTD)
            all_stats += stats
        return new_BTD, all_stats

    def layer_balance(self, prob_SBTN: Tensor, choice_SBT: Tensor) -> Tensor:
        """n sum_i f_i P_i over the pool's n layers in this micro-batch, f_i the share of choices: 1 at even use."""
        n, active_SBT1 = self.group.stop - self.group.start, (choice_SBT >= 0)[..., None]
        prob_N = (prob_SBTN * active_SBT1).flatten(0, 2).sum(0)[:n]
        chosen_SBTN = F.one_hot(choice_SBT.clamp(min=0), prob_SBTN.size(-1)) * active_SBT1
        count_N = chosen_SBTN.flatten(0, 2).sum(0)[:n].float()
        return n * (count_N / count_N.sum().clamp(min=1e-8) * prob_N / prob_N.sum().clamp(min=1e-8)).sum()


def only_active(ctx, state: HaltState):
    """The context in which tokens that have halted have no experts and no part in the statistics."""
    if state.all_active:
        return ctx
    return ctx._replace(valid_BT=state.active_BT if ctx.valid_BT is None else ctx.valid_BT & state.active_BT)


def mix_layers(blocks, x_BTD: Tensor, x0_BTD: Tensor, contexts: list,
               weight_BTN: Tensor) -> tuple[Tensor, list[RouteStats]]:  # fmt: skip
    """The weighted sum of all layers of the pool; identities are the hidden states themselves."""
    weight_BTN, all_stats = weight_BTN.type_as(x_BTD), []
    mixed_BTD = weight_BTN[..., len(blocks) :].sum(-1, keepdim=True) * x_BTD
    for i, (block, ctx) in enumerate(zip(blocks, contexts)):
        y_BTD, stats, _ = block(x_BTD, x0_BTD, ctx)
        mixed_BTD = mixed_BTD + weight_BTN[..., i, None] * y_BTD
        all_stats += stats
    return mixed_BTD, all_stats


def run_block_packed(block: Block, x_BTD: Tensor, x0_BTD: Tensor, ctx, packed: PackedTokens, packed_ctx):
    """Output (B, Q, D) of a block for packed tokens, whose queries attend to all tokens' keys; and its statistics."""
    x_BTD = block.mix_x0(x_BTD, x0_BTD)
    x_BQD, x0_BQD = packed.gather(x_BTD), packed.gather(x0_BTD)
    kv = block.attention.keys_values(norm(x_BTD), block.update_context(ctx, x_BTD))
    if packed.count == 0:
        return x_BQD, [unrouted_stats(ctx.bias_E)] * isinstance(block.ffn, MoE)
    if kv is not None:
        normed_BQD, attention_ctx = norm(x_BQD), block.update_context(packed_ctx, x_BQD)
        queries = block.attention.queries(normed_BQD, attention_ctx)
        y_BQD = block.attention.attend(queries, kv, normed_BQD, attention_ctx)
        x_BQD = block.add_residual(x_BQD, y_BQD, packed_ctx.terms, x0_BQD)
    y_BQD, stats = block.ffn(norm(x_BQD), block.update_context(packed_ctx, x_BQD))
    return block.add_residual(x_BQD, y_BQD, add_terms(packed_ctx.terms, 1), x0_BQD), stats


TABLES |= {"controller": CONTROLLERS, "route_by": ROUTE_BY, "route_training": ROUTE_TRAINING, "step_loss": STEP_LOSSES}
PARAMETER_RULES |= {
    "controller.weight": ParameterRule("router", init_uniform),
    "controller.up": ParameterRule("router", init_uniform),
    "controller.step": ParameterRule("scalar", constant(0.0)),
    "controller.cell.weight_ih": ParameterRule("router", init_uniform),
    "controller.cell.weight_hh": ParameterRule("router", init_uniform),
    "controller.cell.bias_ih": ParameterRule("scalar", constant(0.0)),
    "controller.cell.bias_hh": ParameterRule("scalar", constant(0.0)),
}


def check(config: Config):
    alone = config.step_loss == "last" or config.halt == "none"
    require(config, "step_loss", alone, f"last next to halt {config.halt}, which has its own weights")
    if config.depth == "routed":
        legal = "add with depth routed, whose streams have no number of terms"
        require(config, "residual", config.residual == "add", legal)
        legal = "latest with depth routed, where a layer's keys come from the current states of all tokens"
        require(config, "loop_keys", config.loop_keys == "latest", legal)
        allowed = config.halt in ("none", "act", "stick_breaking")
        require(config, "halt", allowed, "none, act or stick_breaking with depth routed")
        legal = "without S with depth routed: no layer has a layer before it"
        require(config, "attention", "S" not in config.per_layer("attention"), legal)


CHECKS.append(check)
