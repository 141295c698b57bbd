"""GPT with the zoo's options that reach beyond one slot: meta-tokens, embeddings as input, weighted losses.

A depth is a subclass that overrides run_blocks. Shape suffixes as in model.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
import ops
from cli import UserError
from model import DTYPES, PARAMETER_RULES, ParameterRule, normal
from ops import norm
from zoo.block import Block, Context, run_layers
from zoo.config import Config, as_zoo
from zoo.masked import OBJECTIVES
from zoo.masks import MaskInputs, document_starts, visible_keys
from zoo.stats import RouteStats, mean_over, neg_entropy, without_exits


class TrunkOutput(NamedTuple):
    """Output of the block stack."""

    states: list[tuple[Tensor, Tensor | None]]  # hidden states (B, T, D) and their loss weights (B, T; None: all 1)
    stats: list[RouteStats]  # one per MoE layer
    loss: Tensor | float = 0.0  # auxiliary loss of the depth
    loops_BT: Tensor | None = None  # iterations of each token
    choices_SBT: Tensor | None = None  # layer of each step, identities last, -1 for halted tokens


class KVCache(model.KVCache):
    """model.KVCache with room for the meta-tokens, and for inputs without ids."""

    def __init__(self, config: Config, batch_size: int, max_len: int, device=None):
        super().__init__(config, batch_size, max_len + config.num_meta_tokens, device)

    def add_tokens(self, ids_BT: Tensor | None, doc_BT: Tensor) -> tuple[Tensor, Tensor]:
        ids_BT = torch.zeros_like(doc_BT) if ids_BT is None else ids_BT
        return super().add_tokens(ids_BT, doc_BT)


class GPT(model.GPT):
    """Ids or embeddings to logits or loss, with every option of zoo.Config but depths."""

    block_type, cache_type = Block, KVCache

    def __init__(self, config: model.Config, ranks: model.ExpertRanks = model.ALL_HERE):
        config = as_zoo(config)
        super().__init__(config, ranks)
        self.objective = OBJECTIVES[config.objective]
        meta = config.num_meta_tokens
        self.meta_tokens = nn.Parameter(torch.empty(meta, config.n_embd)) if meta else None
        counted_LE = torch.zeros(config.num_moe_layers, config.num_experts, dtype=torch.int64)
        self.register_buffer("counted_LE", counted_LE)  # tokens since the bias last moved
        self.register_buffer("eta_E", torch.tensor(config.expert_etas), persistent=False)
        self.register_buffer("balanced_E", torch.tensor(config.balanced_experts), persistent=False)
        self.add_depth_modules()
        self.init_weights()

    def add_depth_modules(self):
        """Parameters of the depth, for a subclass."""

    @torch.no_grad()
    def balance(self, counts_LE: Tensor):
        """As model.GPT, without exits; the bias moves after bias_update_threshold tokens, to loads like 1 / eta."""
        share_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)
        self.load_WLE.copy_(torch.cat([self.load_WLE[1:], share_LE[None].float()]))
        mean = lambda x_LE: (self.balanced_E * x_LE).sum(-1, keepdim=True) / self.balanced_E.sum()
        even_E = self.balanced_E / self.eta_E / mean(1 / self.eta_E)
        self.counted_LE += counts_LE
        due_L1 = self.counted_LE.sum(-1, keepdim=True) >= self.config.bias_update_threshold * self.config.top_k
        kept_LE = self.counted_LE * self.balanced_E.long()  # counts, as shares would round an even load up or down
        direction_LE = (kept_LE.sum(-1, keepdim=True) * even_E - self.balanced_E.sum() * kept_LE).sign()
        self.bias_LE += self.config.bias_update_factor * due_L1 * direction_LE
        self.counted_LE *= ~due_L1
        self.bias_LE -= self.balanced_E * mean(self.bias_LE)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, cache: KVCache | None = None,
                doc_ids_BT: Tensor | None = None, expert_B: Tensor | None = None,
                real_B: Tensor | None = None) -> model.Output:  # fmt: skip
        """Logits of (B, T) ids or (B, T, D) embeddings, or with targets (-1 = ignored) the loss.

        expert_B: target expert of each row (-1: none), for stats["domain_loss"], which is not part of the loss.
        real_B: rows that are not padding; statistics and experts leave the others out."""
        doc_BT, T = self.documents(tokens_BT, cache) if doc_ids_BT is None else doc_ids_BT, tokens_BT.size(1)
        if targets_BT is not None:
            tokens_BT, targets_BT = self.objective.make_inputs(self, tokens_BT, targets_BT)
        tokens_BT, doc_BT = self.with_meta_tokens(tokens_BT, doc_BT, cache)
        ids_BT = None if tokens_BT.is_floating_point() else tokens_BT
        ids_BS, doc_BS = (ids_BT, doc_BT) if cache is None else cache.add_tokens(ids_BT, doc_BT)
        x0_BTD = norm(self.with_meta_vectors(self.input_embeddings(tokens_BT, ids_BS, doc_BS), doc_BT))
        contexts, mask_inputs = self.contexts(ids_BT, doc_BT, doc_BS, cache)
        if expert_B is not None:
            contexts = [ctx._replace(target_expert_BT=expert_B[:, None].expand(doc_BT.shape)) for ctx in contexts]
        if real_B is not None:
            contexts = [ctx._replace(valid_BT=real_B[:, None].expand(doc_BT.shape)) for ctx in contexts]
        trunk = self.run_blocks(x0_BTD, contexts, mask_inputs)
        states = [(norm(x_BTD[:, -T:]), None if w_BT is None else w_BT[:, -T:]) for x_BTD, w_BT in trunk.states]
        stats = self.summary(trunk, T, real_B) if cache is None else {}
        if targets_BT is None:
            return model.Output(self.logits(states[-1][0]), None, stats)
        nats = sum(self.summed_nll(x_BTD, targets_BT, weight_BT) for x_BTD, weight_BT in states)
        ce = nats / (len(targets_BT) * self.objective.num_targets(self.config, T))
        loss = ce + self.auxiliary_loss(stats) if self.training and stats else ce
        return model.Output(None, loss, stats | {"ce": ce.detach()})

    def run_blocks(self, x0_BTD: Tensor, contexts: list[Context], mask_inputs: MaskInputs) -> TrunkOutput:
        """Every block once, with the skips of model.GPT."""
        x_BTD, outputs, added, stats, kv = x0_BTD.clone(), [], [], [], None
        num_down = len(self.blocks) - len(self.skip_weights)
        for layer in range(len(self.blocks)):
            if layer >= num_down:
                x_BTD = self.add_skip(self.skip_weights[layer - num_down], x_BTD, outputs[len(self.blocks) - 1 - layer])
            here = slice(layer, layer + 1)
            y_BTD, layer_stats, kv = run_layers(self.blocks[here], x_BTD, x0_BTD, contexts[here], kv, stats)
            outputs.append(y_BTD)
            added.append(y_BTD - x_BTD)
            stats, x_BTD = stats + layer_stats, y_BTD
        return TrunkOutput([(self.mix_layers(x_BTD, added), None)], stats)

    # ---- inputs

    def documents(self, tokens_BT: Tensor, cache: KVCache | None) -> Tensor:
        if not tokens_BT.is_floating_point():
            return super().documents(tokens_BT, cache)
        one_document_BT = torch.zeros_like(tokens_BT[..., 0]).long()
        return one_document_BT.cumsum(1) + (0 if cache is None else cache.last_doc())

    def with_meta_tokens(self, tokens_BT: Tensor, doc_BT: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """Rows with num_meta_tokens end-of-text ids (or zeros) of document -1 in front, once per cache."""
        meta = self.config.num_meta_tokens if cache is None or cache.length == 0 else 0
        if meta == 0:
            return tokens_BT, doc_BT
        blank = 0 if tokens_BT.is_floating_point() else self.config.eot_token
        front = (0, 0) * (tokens_BT.ndim - 2) + (meta, 0)
        return F.pad(tokens_BT, front, value=blank), F.pad(doc_BT, (meta, 0), value=-1)

    def input_embeddings(self, tokens_BT: Tensor, ids_BS: Tensor | None, doc_BS: Tensor) -> Tensor:
        if tokens_BT.is_floating_point():
            return tokens_BT.to(DTYPES[self.config.dtype])
        return self.embeddings(tokens_BT, ids_BS, doc_BS)

    def with_meta_vectors(self, x_BTD: Tensor, doc_BT: Tensor) -> Tensor:
        """Embeddings with the learned vectors in place of the blanks in front."""
        if self.meta_tokens is None:
            return x_BTD
        vector_TD = F.pad(self.meta_tokens, (0, 0, 0, doc_BT.size(1) - len(self.meta_tokens))).type_as(x_BTD)
        return torch.where((doc_BT < 0)[..., None], vector_TD, x_BTD)

    def layer_value_embeds(self, ids_BT: Tensor | None) -> list[Tensor]:
        if ids_BT is not None:
            return super().layer_value_embeds(ids_BT)
        return [torch.zeros((), dtype=DTYPES[self.config.dtype], device=self.embed.device)] * self.config.n_layer

    def contexts(self, ids_BT: Tensor | None, doc_BT: Tensor, doc_BS: Tensor, cache: KVCache | None):
        """One context per layer, and the inputs of masks that are built later."""
        (B, T), device, config = doc_BT.shape, doc_BT.device, self.config
        seed, step, first_token, window = self.clock.unbind()
        position_S = torch.arange(doc_BS.size(1), device=device)
        position_T, meta = position_S[-T:], config.num_meta_tokens
        windows = model.window_sizes(config.window, window)
        inputs = MaskInputs(position_T, position_S, doc_BT, doc_BS, windows, meta, self.objective.visible)
        places = (position_T, position_S, doc_BT, doc_BS)
        masks = {letter: self.objective.mask(*places, size, meta=meta, cached=cache is not None)
                 for letter, size in windows.items()}  # fmt: skip
        log_visible = dict.fromkeys(windows)
        if config.attn_softmax == "ssmax":
            log_keys = lambda size: visible_keys(position_T, doc_BT, doc_BS, size, meta).log()
            log_visible = {letter: log_keys(size) for letter, size in windows.items()}
        same_doc_BS = F.pad(doc_BS, (1, -1), value=-2) == doc_BS
        rotary_position = position_T
        if meta:  # as if each document were the first one behind the meta-tokens
            rotary_position = position_T - document_starts(doc_BT, doc_BS) + meta * (doc_BT >= 0)
        speeds = {config.rope_spec(layer)[1] for layer in range(config.n_layer)}
        rotary = (rotary_position, config.head_dim, DTYPES[config.dtype])
        tables = {speed: ops.rotary_tables(*rotary, speed) for speed in speeds}
        layer_L, bias_LE = torch.arange(config.n_layer, device=device), F.pad(self.bias_LE, (0, 0, 0, 1))
        residual = config.router_residual
        previous_TE = torch.zeros(B * T, config.num_experts, device=device) if residual else None
        terms_L = None if config.residual == "add" else 2 * layer_L + 1
        new_meta = meta if T == len(position_S) else 0  # else the cache holds the meta-tokens
        token_T = token_numbers(first_token, B, T, new_meta)
        contexts, moe_layer = [], 0
        for layer, value_embed in enumerate(self.layer_value_embeds(ids_BT)):
            letter, (cos, sin) = config.per_layer("window")[layer], tables[config.rope_spec(layer)[1]]
            contexts.append(Context(
                ids_BT, masks[letter], value_embed, cos, sin, same_doc_BS, (seed, step, layer_L[moe_layer], token_T),
                bias_LE[moe_layer], cache, previous_TE,
                kv=() if config.per_layer("attention")[layer] == "S" else None,
                terms=None if terms_L is None else terms_L[layer],
                log_visible_BT=log_visible[letter]))  # fmt: skip
            moe_layer += config.per_layer("pattern")[layer] == "M"
        return contexts, inputs

    # ---- loss and statistics

    def summary(self, trunk: TrunkOutput, T: int, real_B: Tensor | None = None) -> dict[str, Tensor]:
        """As model.GPT, with the losses of options. The balance loss has weights eta (2410.07348 eq. 8), no exits."""
        stats, zero, config = trunk.stats, self.bias_LE.new_zeros(()), self.config
        prob_LE = torch.stack([s.prob_E for s in stats]) if stats else self.bias_LE
        load_LE = without_exits(self.load_WLE.mean(0), config.exits)
        balance_L = self.balanced_E.sum() * (self.eta_E * load_LE * prob_LE).sum(-1)
        mean = lambda values: torch.stack(values).mean() if values else zero
        mean_routed = lambda values: mean([s.share * value for s, value in zip(stats, values)])
        losses = zero + sum(s.loss for s in stats) + trunk.loss + config.entropy_coef * sum(map(neg_entropy, stats))
        summary = {
            "balance_loss": mean(list(balance_L)),
            "z_loss": mean(z_losses := [s.z_loss for s in stats]),
            "entropy": mean([s.entropy for s in stats]),
            "router_loss": losses,
            "depth_loss": zero + trunk.loss,  # part of router_loss
            "counts_LE": torch.stack([s.counts_E for s in stats]) if stats else self.bias_LE.long(),
            "domain_loss": sum(s.share * s.domain_loss for s in stats) / max(len(stats), 1) + zero,
        }
        routed_losses = {"balance_loss": mean_routed(balance_L), "z_loss": mean_routed(z_losses)}
        summary["aux_loss"] = super().auxiliary_loss(summary | routed_losses)
        if trunk.loops_BT is not None:
            real_T = None if real_B is None else real_B.repeat_interleave(T)
            summary["depth/loops"] = mean_over(trunk.loops_BT[:, -T:].flatten().float(), real_T)
        return summary

    def auxiliary_loss(self, stats: dict[str, Tensor]) -> Tensor:
        """As model.GPT, but a halted token counts zero: divided by a constant, gradients add over micro-batches."""
        return stats["aux_loss"]

    def summed_nll(self, x_BTD: Tensor, targets_BT: Tensor, weight_BT: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, summed over targets; tokens may have fp32 weights, which get gradients too."""
        if weight_BT is None:
            return super().summed_nll(x_BTD, targets_BT)
        weight_T, nll_T, start = weight_BT.flatten(), torch.empty_like(weight_BT).flatten(), 0
        token_nll = self.token_nll

        def weighted_nll(z_TV: Tensor, target_T: Tensor) -> Tensor:
            nonlocal start
            piece, start = slice(start, start + len(z_TV)), start + len(z_TV)
            nll_T[piece] = token_nll(z_TV, target_T)
            z_TV *= weight_T.detach()[piece, None]
            return nll_T[piece] * weight_T.detach()[piece]

        head = ops.HEADS[self.config.head if self.training else "bf16"]
        nats = ops.chunked_loss(x_BTD.flatten(0, 1), self.head, targets_BT.flatten(), head, weighted_nll)
        return nats + ((weight_T - weight_T.detach()) * nll_T).sum()  # adds zero, with the gradient of the weights

    def stream(self, tokens_BT: Tensor, max_new_tokens: int, *args, **kwargs):
        if self.config.objective != "next" and max_new_tokens:
            reason = "which looks both ways; to continue a text it must be next"
            raise UserError(f"objective is {self.config.objective}, {reason}")
        return super().stream(tokens_BT, max_new_tokens, *args, **kwargs)

    # ---- cost

    def active_share(self, name: str) -> float:
        config = self.config
        if name.endswith(("attention.values", "attention.outputs")):
            return config.attn_top_k / config.attn_experts
        if model.parameter_rule(name).kind == "expert":
            return config.expert_share
        return super().active_share(name)

    def flops_per_token(self, seq_len: int) -> float:
        """As model.GPT. Every iteration of a loop counts, though tokens may halt early; a pool counts at even use."""
        config = self.config
        runs, weights, keys = config.layer_runs, 0.0, 0.0
        row_tokens = (seq_len + config.num_meta_tokens) / seq_len  # the others share the cost of meta-tokens
        for name, parameter in self.named_parameters():
            if self.is_in_matmul(name):
                tokens = 1 if parameter is self.head else row_tokens  # meta-tokens have no logits
                weights += tokens * parameter.numel() * self.active_share(name) * self.runs_of(name)
        router_head = config.router_dim / (config.n_head * config.head_dim)  # of router attention, over a layer's width
        letters = zip(config.per_layer("attention"), config.per_layer("window"), config.per_layer("pattern"), runs)
        for attention, window, pattern, times in letters:
            heads = (attention != "-") + router_head * (pattern == "M" and config.router == "attention")
            layer_keys = self.objective.mean_keys(model.mean_keys(config, window, seq_len)) + config.num_meta_tokens
            keys += row_tokens * times * heads * layer_keys
        return 6 * weights + 12 * keys * config.n_head * config.head_dim

    def runs_of(self, name: str) -> float:
        """Uses of a parameter in one token's forward pass."""
        config, (module, *path) = self.config, name.split(".")
        if module != "blocks":
            return config.loops if module in ("controller", "halt") else 1
        layer, times = int(path[0]), config.layer_runs[int(path[0])]
        if config.depth == "routed" and config.per_layer("looped")[layer] == "o" and path[1] == "attention":
            key_share = KEY_SHARES.get(path[2], 0)  # keys and values are computed for all tokens
            return key_share * config.loops + (1 - key_share) * times
        return times


# parameter of attention -> share of it that makes keys and values
KEY_SHARES = {"qkv": 2 / 3, "latent": 1, "key": 1, "key_up": 1, "value_up": 1, "k": 1, "values": 1}


def token_numbers(first_token: Tensor, B: int, T: int, meta: int) -> Tensor:
    """(B * T,): number of each token in the global batch; the first `meta` of every row have -1, -2, ..."""
    own_BT = first_token + torch.arange(B * (T - meta), device=first_token.device).view(B, T - meta)
    return torch.cat([-1 - torch.arange(meta, device=first_token.device).expand(B, meta), own_BT], dim=1).flatten()


PARAMETER_RULES |= {"meta_tokens": ParameterRule("embed", normal)}
