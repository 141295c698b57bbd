"""The speedrun's transformer with a mixture of experts in place of the MLP, whole in one file.

    python model.py --preset speedrun                                             # the model card
    python model.py --checkpoint logs/muon/checkpoint --prompt "def forward(self"   # sample

RMSNorm without gain, merged QKV, QK-norm, half-truncated rotary, ReLU^2 experts behind a noisy top-2 router, output
projections that start at zero, an untied head that reads a mix of all layers, embedding and U-net skips, value and
n-gram embeddings, keys of the previous token, long-short sliding windows, document masks, softcapped logits, an FP8
head, and a loss that never holds all logits in fp32.

The file in order: Config, masks, attention, router, experts and dispatch, block, GPT, initial values, presets. ROUTERS,
EXPERTS, ATTENTIONS and DEPTHS are tables: a file of your own adds an entry or a subclass, as zoo/ does.

Shape suffixes: B rows, T tokens of a row (or all B*T tokens where B is absent), S tokens of a row so far, D n_embd, H
heads, C head_dim, E experts, K top_k, R = T*K routed rows, F hidden width of an expert, L MoE layers, V padded
vocabulary.

Sources: KellerJordan/modded-nanogpt records 1-21 (the dense model and its constants), 49 (keys), 62 (n-gram tables) and
81 (mix of layers); Shazeer et al. 1701.06538 (noisy top-k), Fedus et al. 2101.03961 (balance loss), Zoph et al.
2202.08906 (z-loss), Wang et al. 2408.15664 (bias balance)."""

import dataclasses
import functools
import math
import typing
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from cli import UserError, require
from ops import norm

# -----------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the model and its loss. Raises UserError, which names the field and its legal values."""

    # vocabulary and shape
    vocab_size: int = 50257  # ids in use; tables are padded to a multiple of 64
    eot_token: int = 50256  # starts every document
    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 6
    head_dim: int = 128
    # mixture of experts
    pattern: str = "M"  # tiled over depth: M = mixture of experts, D = dense MLP
    mlp_ratio: float = 4.0  # active hidden width / n_embd: a dense MLP's, or that of a token's experts
    num_experts: int = 8
    experts: str = "mlp"  # a key of EXPERTS
    top_k: int = 2
    num_shared_experts: int = 0  # experts that every token passes through, beside its top_k
    shared_dim: int = 0  # hidden width of all shared experts together; 0 = each is as wide as a routed one
    router: str = "linear"  # a key of ROUTERS
    router_noise: float = 1.0  # scale of the learned noise on the logits in training; 0 = none
    norm_topk_prob: float = 1.0  # gates = kept scores / their sum ** this; at top-1, 1 acts as 0
    balance_coef: float = 0.01  # weight of the Switch load-balancing loss
    balance_window: int = 1  # optimizer steps whose counts make up the load in that loss
    z_coef: float = 0.001  # weight of the router z-loss
    bias_update_factor: float = 0.0  # step of the aux-loss-free selection bias, in units of probability
    depth: str = "stack"  # a key of DEPTHS
    # attention
    attention: str = "A"  # tiled over depth: A attention, K previous token's keys, - none
    window: str = "L"  # tiled over depth: L = window_size, S, Q, E = 1/2, 1/4, 1/8 of it
    window_size: int = 1792  # tokens that a long layer attends to
    attn_scale: float = 0.12
    # tables
    tie_embeddings: bool = False  # the embedding is the head too
    value_embeds: int = 3  # tables mixed into the values of the first and of the last layers
    ngrams: str = ""  # each digit n adds an embedding of the last n ids, looked up by a hash
    ngram_rows: int = 2**14  # rows of each of these tables
    # head and precision
    softcap: float = 15.0  # logits lie in (0, 2 * softcap)
    head: str = "bf16"  # the head's matmuls in training: a key of ops.HEADS; bf16 means `dtype`
    dtype: str = "bf16"  # of activations: a key of DTYPES

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, legal = getattr(self, field.name), typing.get_args(field.type) or (field.type,)
            fits = type(value) in legal or (float in legal and type(value) is int)
            require(self, field.name, fits, "of type " + " or ".join(kind.__name__ for kind in legal))
            require(self, field.name, not isinstance(value, float) or math.isfinite(value), "finite")
        self.check()

    def check(self):
        """Raises UserError for the first field with an illegal value."""
        for name in "vocab_size n_layer n_embd n_head num_experts top_k balance_window window_size ngram_rows".split():
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in """balance_coef z_coef bias_update_factor router_noise norm_topk_prob num_shared_experts
                       shared_dim""".split():
            require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in "mlp_ratio attn_scale softcap".split():
            require(self, name, getattr(self, name) > 0, "above 0")
        for name, table in self.tables().items():
            require(self, name, getattr(self, name) in table, "one of " + ", ".join(table))
        for name, letters in self.letters().items():
            value = getattr(self, name)
            require(self, name, value and set(value) <= set(letters), f"a string of the letters {' '.join(letters)}")
        require(self, "eot_token", 0 <= self.eot_token < self.vocab_size, f"an id below vocab_size = {self.vocab_size}")
        require(self, "ngrams", set(self.ngrams) <= set("23456789"), "a string of digits from 2 to 9")
        require(self, "n_layer", self.n_layer <= 10_000, "at most 10,000")
        half = self.n_layer // 2
        require(self, "value_embeds", 0 <= self.value_embeds <= half, f"from 0 to n_layer // 2 = {half}")
        require(self, "head_dim", self.head_dim > 0 and self.head_dim % 8 == 0, "a multiple of 8")  # rotary quarters
        require(self, "n_embd", self.n_embd % 8 == 0 and self.n_embd < 2**20, "a multiple of 8 below 2^20")  # 16 bytes
        require(self, "num_experts", self.num_experts < 2**15, "below 32768, as dispatch sorts 16-bit ids")
        require(self, "top_k", self.top_k <= self.num_experts, f"at most num_experts = {self.num_experts}")
        width = self.mlp_ratio * self.n_embd / self.equal_experts
        share = f"mlp_ratio * n_embd / {self.equal_experts} = {width}, the width of one of a token's equal experts,"
        require(self, "mlp_ratio", width > 0 and width % 8 == 0, f"such that {share} is a multiple of 8")
        require(self, "shared_dim", self.shared_dim % 8 == 0, "a multiple of 8")
        require(self, "shared_dim", self.shared_dim == 0 or self.num_shared_experts > 0, "0 without num_shared_experts")
        require(self, "softcap", self.softcap <= 64, "at most 64, as the loss adds up exp(+-softcap) in fp32")

    def tables(self) -> dict[str, dict]:
        """Field -> the table whose keys are its legal values."""
        return {"experts": EXPERTS, "router": ROUTERS, "depth": DEPTHS, "head": ops.HEADS, "dtype": DTYPES}

    def letters(self) -> dict[str, typing.Iterable[str]]:
        """Field of one letter per layer -> its legal letters."""
        return {"pattern": FEED_FORWARDS, "attention": ATTENTIONS, "window": WINDOWS}

    def per_layer(self, field: str) -> str:
        """One letter per layer: the pattern string tiled over n_layer."""
        return (getattr(self, field) * self.n_layer)[: self.n_layer]

    def describe_experts(self) -> str:
        """The experts on the model card."""
        shared = f"; {self.num_shared_experts} shared, {self.shared_width} wide together" if self.shared_width else ""
        return f"{self.num_experts} x {self.hidden_size} wide {self.experts}{shared}"

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64

    @property
    def num_moe_layers(self) -> int:
        return self.per_layer("pattern").count("M")

    @property
    def equal_experts(self) -> int:
        """Experts of the routed width that one token passes through."""
        return self.top_k + (0 if self.shared_dim else self.num_shared_experts)

    @property
    def hidden_size(self) -> int:
        """Hidden width of one expert; a token's experts, besides shared_dim, cost a dense MLP of mlp_ratio * n_embd."""
        return int(self.mlp_ratio * self.n_embd / self.equal_experts)

    @property
    def shared_width(self) -> int:
        return self.shared_dim or self.hidden_size * self.num_shared_experts


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WINDOWS = {"L": 1, "S": 2, "Q": 4, "E": 8}  # letter of `window` -> divisor of the long window

# -----------------------------------------------------------------------------
# Masks: one visibility rule, three ways to attend with it


def visible(q_position: Tensor, kv_position: Tensor, q_doc: Tensor, kv_doc: Tensor, window) -> Tensor:
    """True where a query may attend to a key: not later, in the same document, fewer than `window` tokens back."""
    distance = q_position - kv_position
    return (distance >= 0) & ((distance < window) & (q_doc == kv_doc))


def first_visible(kv_position: Tensor, doc_BT: Tensor, window) -> Tensor:
    """Position (B, T), int32, of the first key visible to each query of a whole sequence.

    Documents only count up, so every key from there to the query's own is visible: one comparison in place of three."""
    starts_BT = F.pad(doc_BT.diff(dim=1) != 0, (1, 0))
    document_start_BT = torch.where(starts_BT, kv_position, kv_position[0]).cummax(1).values
    return torch.maximum(document_start_BT, kv_position - window + 1).int()


class DenseMask:
    """SDPA with a full mask: any device, any lengths. The reference in tests."""

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BS: Tensor, window: Tensor):
        q_doc, kv_doc = q_doc_BT[:, None, :, None], kv_doc_BS[:, None, None, :]
        self.mask = visible(q_position[:, None], kv_position, q_doc, kv_doc, window)

    def attend(self, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, attn_mask=self.mask, scale=scale)


class DecodeMask:
    """For queries behind a KVCache (below): a dense mask per block of queries, without the keys beyond its windows."""

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BS: Tensor, window: Tensor):
        (T, S), self.blocks = (len(q_position), len(kv_position)), []
        reach = S if window.is_meta else int(window)  # a meta tensor has no value
        for start in range(0, T, 128):
            q, end = slice(start, start + 128), S - T + start + 128
            kv = slice(max(0, end - 127 - reach), end)
            places = q_position[q], kv_position[kv], q_doc_BT[:, q], kv_doc_BS[:, kv]
            self.blocks.append((q, kv, DenseMask(*places, window)))

    def attend(self, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float) -> Tensor:
        ys = [mask.attend(q_BHTC[:, :, q], k_BHTC[:, :, kv], v_BHTC[:, :, kv], scale) for q, kv, mask in self.blocks]
        return torch.cat(ys, dim=2)


class BlockedMask:
    """For the CPU: queries in blocks of 128, each against the keys within its reach.

    The upper triangle and keys beyond the window cost nothing. Forward + backward take 0.3 to 0.6 of SDPA with a dense
    mask (8,192 tokens, bf16, two heads of 128, T 512 and 1024, windows 128 and T, two cores)."""

    BLOCK = 128

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BS: Tensor, window: Tensor):
        T, reach = q_position.numel(), int(window)
        first_B1T1, key_S = first_visible(kv_position, kv_doc_BS, window)[:, None, :, None], kv_position.int()
        later = torch.ones(self.BLOCK, self.BLOCK, dtype=torch.bool, device=key_S.device).triu(1)
        self.blocks = []  # (query slice, key slice, masked keys of that block)
        for start in range(0, T, self.BLOCK):
            q = slice(start, min(start + self.BLOCK, T))
            kv = slice(max(0, start - reach + 1) // 16 * 16, q.stop)
            masked_B1QK = key_S[kv] < first_B1T1[:, :, q]
            masked_B1QK[..., start - q.stop :] |= later[: q.stop - start, : q.stop - start]
            self.blocks.append((q, kv, masked_B1QK))

    def attend(self, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float) -> Tensor:
        to_NTC = lambda x_BHTC: x_BHTC.flatten(0, 1).contiguous()
        y = ops.blocked_attention(to_NTC(q_BHTC) * scale, to_NTC(k_BHTC), to_NTC(v_BHTC), self.blocks)
        return y.view(q_BHTC.shape)


class FlexMask:
    """For CUDA: FlexAttention over a BlockMask built from block-wise document bounds, never from a T x T mask.

    T must be a multiple of 128. Blocks visible to every query skip the mask function (modded-nanogpt records 15-16)."""

    BLOCK = 128

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BS: Tensor, window: Tensor):
        first_BT = first_visible(kv_position, kv_doc_BS, window)
        self.use_blocks(*self.blocks(q_doc_BT, window), lambda b, h, q, kv: (kv <= q) & (kv >= first_BT[b, q]))

    def blocks(self, doc_BT: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of blocks (B, n, n) with some visible key, and those with all keys visible."""
        first_Bn, last_Bn = doc_BT[:, :: self.BLOCK], doc_BT[:, self.BLOCK - 1 :: self.BLOCK]  # documents only count up
        block = torch.arange(first_Bn.size(1), device=doc_BT.device)
        apart_nn = block[:, None] - block  # token distances in a pair: from 128 * apart - 127 to 128 * apart + 127
        reached = (apart_nn >= 0) & (self.BLOCK * (apart_nn - 1) + 1 < window)
        inside = (apart_nn > 0) & (self.BLOCK * (apart_nn + 1) - 1 < window)
        some_Bnn = reached & (first_Bn[:, :, None] <= last_Bn[:, None, :])
        one_document_Bnn = (first_Bn[:, :, None] == last_Bn[:, None, :]) & (last_Bn[:, :, None] == first_Bn[:, None, :])
        return some_Bnn, inside & one_document_Bnn

    def use_blocks(self, some_Bnn: Tensor, full_Bnn: Tensor, mask_mod):
        from torch.nn.attention.flex_attention import BlockMask

        def counts_and_indices(mask_Bnn: Tensor) -> tuple[Tensor, Tensor]:
            order = mask_Bnn.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
            return mask_Bnn.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()

        blocks = (*counts_and_indices(some_Bnn & ~full_Bnn), *counts_and_indices(full_Bnn))
        self.block_mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=self.BLOCK, mask_mod=mask_mod)
        self.flex_attention = compiled_flex_attention()

    def attend(self, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float) -> Tensor:
        return self.flex_attention(q_BHTC, k_BHTC, v_BHTC, block_mask=self.block_mask, scale=scale)


@functools.cache
def compiled_flex_attention():
    """Compiled once, outside the blocks: eager flex_attention builds all scores, and a compiled block inlines it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def fastest_mask(device_type: str, T: int) -> type:
    """The mask class for whole sequences of T tokens on this device."""
    classes = {"cpu": BlockedMask, "cuda": FlexMask if T % FlexMask.BLOCK == 0 else DenseMask}
    return classes.get(device_type, DenseMask)


# -----------------------------------------------------------------------------
# Attention


class Context(NamedTuple):
    """A layer's inputs besides the hidden states. Nothing in it depends on a later token.

    Per-layer differences are tensors, so layers of one kind share one compiled graph."""

    ids_BT: Tensor
    mask: object  # of this layer's window
    value_embed_BTHC: Tensor  # rows of a value-embedding table, or a 0-d zero
    cos: Tensor
    sin: Tensor
    same_doc_BS: Tensor  # whether each key's previous token is in the same document
    noise_key: tuple[Tensor, Tensor, Tensor, Tensor]  # seed, step, MoE layer, number of each token in the global batch
    bias_E: Tensor  # the aux-loss-free selection bias
    cache: "KVCache | None"


class Attention(nn.Module):
    """Causal attention with merged QKV, QK-norm, half-truncated rotary and a value embedding mixed into the values."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        width = config.n_head * config.head_dim
        self.n_head, self.scale = config.n_head, config.attn_scale
        self.qkv = nn.Parameter(torch.empty(3, width, config.n_embd))
        self.value_mix = nn.Parameter(torch.empty(2))
        self.out = nn.Parameter(torch.empty(config.n_embd, width))

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        q, k, v = F.linear(x_BTD, self.qkv.flatten(0, 1).type_as(x_BTD)).unflatten(-1, (3, self.n_head, -1)).unbind(2)
        q, k = rotate_normed(q, ctx), self.keys(k, ctx)
        v = ops.blend(self.value_mix, v, ctx.value_embed_BTHC)
        if ctx.cache is not None:
            k, v = ctx.cache.append(self, k, v)
        y = ctx.mask.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.scale).transpose(1, 2)
        return F.linear(y.flatten(-2), self.out.type_as(x_BTD))

    def keys(self, k_BTHC: Tensor, ctx: Context) -> Tensor:
        return rotate_normed(k_BTHC, ctx)


def rotate_normed(x_BTHC: Tensor, ctx: Context) -> Tensor:
    return ops.rotate(norm(x_BTHC), ctx.cos, ctx.sin)


class KeyOffsetAttention(Attention):
    """The channels of a key that do not rotate come from the previous token (modded-nanogpt record 49).

    A query that matches a token finds the token after it: an induction head in one layer; plain attention needs two."""

    def keys(self, k_BTHC: Tensor, ctx: Context) -> Tensor:
        k_BTHC = super().keys(k_BTHC, ctx)
        return offset_keys(k_BTHC, ctx.same_doc_BS) if ctx.cache is None else offset_new_keys(self, k_BTHC, ctx)


def offset_new_keys(module: nn.Module, k_BTHC: Tensor, ctx: Context) -> Tensor:
    """offset_keys of new tokens behind a cache, which holds the last key of the tokens before."""
    previous_B1HC = ctx.cache.recall(module, torch.zeros_like(k_BTHC[:, :1]))
    ctx.cache.remember(module, k_BTHC[:, -1:])
    same_doc = F.pad(ctx.same_doc_BS, (1, 0))[:, -1 - k_BTHC.size(1) :]
    return offset_keys(torch.cat([previous_B1HC, k_BTHC], dim=1), same_doc)[:, 1:]


def offset_keys(k_BSHC: Tensor, same_doc_BS: Tensor) -> Tensor:
    """Keys whose static channels are those of the previous token, zero at the start of a document."""
    a, a_static, b, b_static = k_BSHC.chunk(4, dim=-1)
    shifted = F.pad(torch.stack([a_static, b_static]), (0, 0, 0, 0, 1, -1)) * same_doc_BS[:, :, None, None]
    return torch.cat([a, shifted[0], b, shifted[1]], dim=-1)


class NoAttention(nn.Module):
    """A layer without attention (modded-nanogpt record 17)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        return x_BTD.new_zeros(x_BTD.size(-1))


ATTENTIONS = {"A": Attention, "K": KeyOffsetAttention, "-": NoAttention}  # letter of `attention` -> class


class KVCache:
    """Keys and values of up to max_len tokens for each of B rows, with their ids and documents.

    Raises ValueError when more tokens are added than there is room for."""

    def __init__(self, config: Config, batch_size: int, max_len: int, device=None):
        self.ids_BT, self.doc_BT = torch.zeros(2, batch_size, max_len, dtype=torch.int64, device=device)
        self.kept = {}  # module -> tensors (B, max_len, ...)
        self.state = {}  # module -> its state after the last token
        self.length = 0  # tokens so far

    def last_doc(self) -> Tensor:
        """Document (B, 1) of the last cached token, 0 for an empty cache."""
        return self.doc_BT[:, max(0, self.length - 1), None]

    def add_tokens(self, ids_BT: Tensor, doc_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Begin a forward pass of T new tokens; returns ids and documents of all S tokens so far."""
        start, end, room = self.length, self.length + doc_BT.size(1), self.doc_BT.size(1)
        if end > room:
            raise ValueError(f"the cache has room for {room} tokens and {end} were fed; use a larger max_len")
        self.ids_BT[:, start:end], self.doc_BT[:, start:end], self.length = ids_BT, doc_BT, end
        return self.ids_BT[:, :end], self.doc_BT[:, :end]

    def append(self, module: nn.Module, *parts: Tensor) -> tuple[Tensor, ...]:
        """Store a module's tensors (B, T, ...) of the new tokens; returns those of all S tokens so far."""
        if module not in self.kept:
            self.kept[module] = tuple(part.new_zeros(*self.doc_BT.shape, *part.shape[2:]) for part in parts)
        for stored, part in zip(self.kept[module], parts):
            stored[:, self.length - part.size(1) : self.length] = part
        return tuple(stored[:, : self.length] for stored in self.kept[module])

    def recall(self, module: nn.Module, default: Tensor) -> Tensor:
        """A module's state after the last cached token."""
        return self.state.get(module, default)

    def remember(self, module: nn.Module, value: Tensor):
        self.state[module] = value


# -----------------------------------------------------------------------------
# Router: hidden states -> the experts of each token and their gates


class Route(NamedTuple):
    """Routing decisions in token order."""

    expert_TK: Tensor  # int64, distinct within a token
    weight_TK: Tensor  # fp32 gates
    logits_TE: Tensor  # fp32, without noise and bias: input of the balance and z losses
    loss: Tensor | float = 0.0  # an auxiliary loss of the router's own, added to the training loss


class LinearRouter(nn.Module):
    """Noisy top-k gating (1701.06538 eq. 3-5): top-k of x W + N(0, 1) softplus(x W_noise), gates = softmax of these k.

    The noise is drawn in training only. The aux-loss-free bias changes the selection, never the gates (2408.15664)."""

    def __init__(self, config: Config):
        super().__init__()
        self.top_k, self.noise_scale, self.norm_power = config.top_k, config.router_noise, config.norm_topk_prob
        self.gate = nn.Parameter(torch.empty(config.num_experts, config.n_embd))  # W; the gates are Route.weight_TK
        self.noise = nn.Parameter(torch.empty(config.num_experts, config.n_embd)) if config.router_noise else None

    def forward(self, x_BTD: Tensor, ctx: Context) -> Route:
        x_TD = x_BTD.flatten(0, 1)
        if self.training and self.noise_scale:
            logits_TE, std_TE = self.noisy_logits(x_TD, ctx)
            noisy_TE = logits_TE + ops.hashed_normal(*ctx.noise_key, logits_TE.size(1)) * (self.noise_scale * std_TE)
        else:
            logits_TE = noisy_TE = self.logits(x_TD, ctx)
        expert_TK = ops.top_k(ops.softmax(noisy_TE.detach()) + ctx.bias_E, self.top_k)
        return Route(expert_TK, softmax_gates(noisy_TE, expert_TK, self.norm_power), logits_TE)

    def logits(self, x_TD: Tensor, ctx: Context) -> Tensor:
        return ops.linear_fp32(x_TD, self.gate)

    def noisy_logits(self, x_TD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Logits, and the standard deviation of their noise, from one matmul; other logits need both methods."""
        logits_TE, raw_std_TE = ops.linear_fp32(x_TD, torch.cat([self.gate, self.noise])).chunk(2, dim=1)
        return logits_TE, F.softplus(raw_std_TE.contiguous())  # strided, on a CPU, 6 times slower


def softmax_gates(logits_TE: Tensor, expert_TK: Tensor, norm_power: float) -> Tensor:
    """Softmax over the kept experts (norm_power 1), or their share of the softmax over all experts (norm_power 0)."""
    kept_TK = logits_TE.gather(1, expert_TK)
    if norm_power == 1 and kept_TK.size(1) > 1:
        return ops.softmax(kept_TK)
    share = (kept_TK.logsumexp(-1, keepdim=True) - logits_TE.logsumexp(-1, keepdim=True)).exp()
    return ops.softmax(kept_TK) * share ** ((1 - norm_power) or 1)  # at top-1 a gate of 1 would train no router


ROUTERS = {"linear": LinearRouter}  # key of `router` -> class

# -----------------------------------------------------------------------------
# Experts and dispatch


class MLPExperts(nn.Module):
    """E ReLU^2 MLPs as two grouped GEMMs; an expert without rows costs nothing and has an exactly zero gradient."""

    def __init__(self, config: Config, num_experts: int):
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, config.hidden_size, config.n_embd))
        self.down = nn.Parameter(torch.empty(num_experts, config.n_embd, config.hidden_size))

    def forward(self, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
        hidden_RF = ops.relu_squared(ops.grouped_mm(rows_RD, self.up.type_as(rows_RD), ends_E))
        return ops.grouped_mm(hidden_RF, self.down.type_as(rows_RD), ends_E)


EXPERTS = {"mlp": MLPExperts}  # key of `experts` -> class


def dispatch(x_TD: Tensor, route: Route, experts) -> tuple[Tensor, Tensor]:
    """The gated sum (T, D) of each token's K experts, and tokens per expert (E,), int64. Dropless, whatever the load.

    experts(rows_RD sorted by expert, ends_E) -> rows_RD. Expert id E means none: `experts` must zero these last rows.
    Gates multiply after the experts: ReLU^2 is of degree 2. slot_R: slot t K + k of a sorted row; row_TK: inverse."""
    (T, K), E = route.expert_TK.shape, route.logits_TE.size(1)
    expert_R, slot_R = route.expert_TK.flatten().to(torch.int16).sort(stable=True)  # radix sort: 5x faster than int64
    row_TK = torch.empty_like(slot_R).scatter_(0, slot_R, torch.arange(T * K, device=x_TD.device)).view(T, K)
    expert_E = torch.arange(E, dtype=torch.int16, device=x_TD.device)
    ends_E = torch.searchsorted(expert_R, expert_E, right=True, out_int32=True)  # bincount would serialise GPU atomics
    rows_RD = experts(ops.gather(x_TD, slot_R, row_TK), ends_E)
    y_TD = ops.combine(rows_RD, route.weight_TK.type_as(x_TD), slot_R, row_TK)
    return y_TD, ends_E.diff(prepend=ends_E.new_zeros(1)).long()


class ExpertRanks(NamedTuple):
    """The ranks that share the experts of every layer, E / size consecutive ones each. By default one holds all."""

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroup | None" = None

    def first(self, num_experts: int) -> int:
        """Number of the first expert on this rank."""
        return self.rank * num_experts // self.size


ALL_HERE = ExpertRanks()


def expert_all_to_all(group, experts, rows_RD: Tensor, ends_E: Tensor) -> Tensor:
    """experts(rows, ends) for experts spread over the ranks of `group`: rows travel to their expert's rank and back.

    One host synchronisation, for the row counts. A rank may receive any number of rows. Not called on one rank."""
    N = dist.get_world_size(group)
    sent_NE = ends_E.diff(prepend=ends_E.new_zeros(1)).view(N, -1)  # rows from here, per rank and expert on it
    received_NE = torch.empty_like(sent_NE)
    dist.all_to_all_single(received_NE, sent_NE.contiguous(), group=group)
    sent_N, received_N = torch.stack([sent_NE.sum(1), received_NE.sum(1)]).tolist()
    expert_R = torch.arange(sent_NE.size(1), dtype=torch.int16, device=rows_RD.device).repeat(N)
    expert_R = expert_R.repeat_interleave(received_NE.flatten(), output_size=sum(received_N))
    by_expert_R = expert_R.argsort(stable=True)  # rows arrive sorted by (rank, expert)
    position = torch.arange(len(by_expert_R), device=rows_RD.device)
    by_rank_R = torch.empty_like(by_expert_R).scatter_(0, by_expert_R, position)
    rows_RD = AllToAll.apply(rows_RD, sent_N, received_N, group)
    rows_RD = ops.gather(rows_RD, by_expert_R, by_rank_R[:, None])
    rows_RD = experts(rows_RD, received_NE.sum(0).cumsum(0).int())
    return AllToAll.apply(ops.gather(rows_RD, by_rank_R, by_expert_R[:, None]), received_N, sent_N, group)


class AllToAll(torch.autograd.Function):
    """The first sent[0] rows go to rank 0, the next sent[1] to rank 1, ...; backward sends their gradients back."""

    @staticmethod
    def forward(ctx, rows_RD, sent_N, received_N, group):
        ctx.sent_N, ctx.received_N, ctx.group = sent_N, received_N, group
        out_RD = rows_RD.new_empty(sum(received_N), rows_RD.size(1))
        dist.all_to_all_single(out_RD, rows_RD.contiguous(), received_N, sent_N, group=group)
        return out_RD

    @staticmethod
    def backward(ctx, dout_RD):
        drows_RD = dout_RD.new_empty(sum(ctx.sent_N), dout_RD.size(1))
        dist.all_to_all_single(drows_RD, dout_RD.contiguous(), ctx.sent_N, ctx.received_N, group=ctx.group)
        return drows_RD, None, None, None


# -----------------------------------------------------------------------------
# Block: attention, then a mixture of experts or a dense MLP


class RouteStats(NamedTuple):
    """Statistics of one MoE layer."""

    counts_E: Tensor  # int64, tokens per expert
    prob_E: Tensor  # mean router probability, differentiable
    z_loss: Tensor  # mean squared logsumexp of the logits, differentiable
    entropy: Tensor  # mean entropy of the router's distribution / log E: 1 = undecided
    loss: Tensor | float  # Route.loss


def route_stats(route: Route, counts_E: Tensor) -> RouteStats:
    lse_T = route.logits_TE.logsumexp(-1)
    log_p_TE = route.logits_TE - lse_T[:, None]
    p_TE = log_p_TE.exp()
    entropy = -(p_TE * log_p_TE).detach().sum(-1).mean() / math.log(max(p_TE.size(1), 2))
    return RouteStats(counts_E, p_TE.mean(0), lse_T.square().mean(0), entropy, route.loss)


class MLP(nn.Module):
    """A ReLU^2 MLP of plain matmuls."""

    def __init__(self, width: int, n_embd: int):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(width, n_embd)), nn.Parameter(torch.empty(n_embd, width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.linear(ops.relu_squared(F.linear(x_BTD, self.up.type_as(x_BTD))), self.down.type_as(x_BTD))


class DenseMLP(MLP):
    """A dense MLP, as wide as a token's experts together."""

    def __init__(self, config: Config, ranks: ExpertRanks):
        super().__init__(config.hidden_size * config.top_k + config.shared_width, config.n_embd)

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, list[RouteStats]]:
        return super().forward(x_BTD), []


class MoE(nn.Module):
    """A router, its experts, and a shared expert beside them."""

    def __init__(self, config: Config, ranks: ExpertRanks):
        super().__init__()
        self.ranks, self.router = ranks, ROUTERS[config.router](config)
        self.experts = EXPERTS[config.experts](config, config.num_experts // ranks.size)
        self.shared = MLP(config.shared_width, config.n_embd) if config.num_shared_experts else None
        self.all_to_all = torch.compiler.disable(expert_all_to_all) if ranks.size > 1 else None  # imports the compiler

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, list[RouteStats]]:
        route, experts = self.router(x_BTD, ctx), self.experts
        if self.all_to_all is not None:
            experts = functools.partial(self.all_to_all, self.ranks.group, experts)
        y_TD, counts_E = dispatch(x_BTD.flatten(0, 1), route, experts)
        y_BTD = y_TD.view_as(x_BTD)
        if self.shared is not None:
            y_BTD = self.shared(x_BTD) + y_BTD
        return y_BTD, [] if ctx.cache is not None else [route_stats(route, counts_E)]  # decoding needs no means


FEED_FORWARDS = {"M": MoE, "D": DenseMLP}  # letter of `pattern` -> class


class Block(nn.Module):
    """One layer: mix the embedding back in, attend, feed forward."""

    def __init__(self, config: Config, layer: int, ranks: ExpertRanks):
        super().__init__()
        self.stream_mix = nn.Parameter(torch.empty(2))
        self.attention = ATTENTIONS[config.per_layer("attention")[layer]](config, layer)
        self.ffn = FEED_FORWARDS[config.per_layer("pattern")[layer]](config, ranks)

    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, ctx: Context) -> tuple[Tensor, list[RouteStats]]:
        x_BTD = ops.blend(self.stream_mix, x_BTD, x0_BTD)
        x_BTD = x_BTD + self.attention(norm(x_BTD), ctx)
        y_BTD, stats = self.ffn(norm(x_BTD), ctx)
        return x_BTD + y_BTD, stats


# -----------------------------------------------------------------------------
# GPT


class Output(NamedTuple):
    """Result of GPT.forward."""

    logits: Tensor | None  # (B, T, V), softcapped, padded ids at -inf; None when targets are given
    loss: Tensor | None  # nats / (B T), plus the auxiliary losses in training; None without targets
    stats: dict[str, Tensor]  # balance_loss, z_loss, entropy, router_loss (0-d), counts_LE; with targets also ce


class GPT(nn.Module):
    """Tokens to logits or loss. forward changes nothing but the cache; the training loop calls set_step and balance."""

    block_type, cache_type, mask_type = Block, KVCache, None  # None: the device's fastest
    encoding: str | None = None  # data.py's name of the tokens' encoding, set when a checkpoint is loaded
    sparse_tables = False  # whether gradients of n-gram tables are sparse, set by train_muon.Exchange

    def __init__(self, config: Config, ranks: ExpertRanks = ALL_HERE):
        super().__init__()
        self.config, self.ranks = config, ranks
        V, D, W = config.padded_vocab_size, config.n_embd, config.n_head * config.head_dim
        L, E = config.num_moe_layers, config.num_experts
        self.embed = nn.Parameter(torch.empty(V, D))
        self.ngram_embeds = nn.ParameterList(torch.empty(config.ngram_rows, D) for _ in config.ngrams)
        self.value_embeds = nn.ParameterList(torch.empty(V, W) for _ in range(config.value_embeds))
        self.blocks = nn.ModuleList(self.block_type(config, layer, ranks) for layer in range(config.n_layer))
        self.skip_weights = nn.Parameter(torch.empty(config.n_layer // 2))
        self.layer_mix = nn.Parameter(torch.empty(config.n_layer, D))
        self.head = self.embed if config.tie_embeddings else nn.Parameter(torch.empty(V, D))
        self.add_skip = add_skip
        self.token_nll = functools.partial(ops.softcap_nll, vocab_size=config.vocab_size, softcap=config.softcap)
        # load balancing, see balance(): load of the last steps, and the selection bias
        self.register_buffer("load_WLE", torch.full((config.balance_window, L, E), 1 / E))
        self.register_buffer("bias_LE", torch.zeros(L, E))
        # written by set_step(): seed, step, number of the micro-batch's first token in the global batch, window
        self.register_buffer("clock", torch.tensor([0, 0, 0, config.window_size]), persistent=False)
        self.init_weights()

    def set_step(self, seed: int, step: int, first_token: int = 0, window: int | None = None):
        """Set the router noise's key and the attention window in tokens; call before each forward pass of a run."""
        self.clock.copy_(torch.tensor([seed, step, first_token, window or self.config.window_size]), non_blocking=True)

    @torch.no_grad()
    def balance(self, counts_LE: Tensor):
        """Update the load window and selection bias; call after each optimizer step with the global batch's counts."""
        total_L1, E = counts_LE.sum(-1, keepdim=True), counts_LE.size(-1)
        self.load_WLE.copy_(torch.cat([self.load_WLE[1:], (counts_LE / total_L1.clamp(min=1))[None].float()]))
        self.bias_LE += self.config.bias_update_factor * (total_L1 - E * counts_LE).sign()  # counts: even load gives 0
        self.bias_LE -= self.bias_LE.mean(-1, keepdim=True)  # selection ignores a common shift; this stops its drift

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, cache: KVCache | None = None,
                doc_ids_BT: Tensor | None = None) -> Output:  # fmt: skip
        """Logits of (B, T) ids, or with targets (-1 = ignored) the loss.

        doc_ids_BT numbers the documents, counting up along a row; by default each end-of-text token starts one."""
        doc_BT = self.documents(tokens_BT, cache) if doc_ids_BT is None else doc_ids_BT
        ids_BS, doc_BS = (tokens_BT, doc_BT) if cache is None else cache.add_tokens(tokens_BT, doc_BT)
        x0_BTD = norm(self.embeddings(tokens_BT, ids_BS, doc_BS))
        x_BTD, layer_stats = self.run_blocks(x0_BTD, self.contexts(tokens_BT, doc_BT, doc_BS, cache))
        x_BTD, stats = norm(x_BTD), self.summary(layer_stats)
        if targets_BT is None:
            return Output(self.logits(x_BTD), None, stats)
        ce = self.summed_nll(x_BTD, targets_BT) / targets_BT.numel()
        loss = ce + self.auxiliary_loss(stats) if self.training else ce
        return Output(None, loss, stats | {"ce": ce.detach()})

    def run_blocks(self, x0_BTD: Tensor, contexts: list[Context]) -> tuple[Tensor, list[RouteStats]]:
        """Every block once. The second half reads the first half's outputs in mirror order, U-net style (record 11)."""
        x_BTD, outputs, added, stats = x0_BTD.clone(), [], [], []  # block 0 compiled must not get one tensor twice
        num_down = len(self.blocks) - len(self.skip_weights)
        for layer, (block, ctx) in enumerate(zip(self.blocks, contexts)):
            if layer >= num_down:
                x_BTD = self.add_skip(self.skip_weights[layer - num_down], x_BTD, outputs[len(self.blocks) - 1 - layer])
            y_BTD, layer_stats = block(x_BTD, x0_BTD, ctx)
            outputs.append(y_BTD)
            added.append(y_BTD - x_BTD)  # y alone would not do: at first all y are parallel
            stats, x_BTD = stats + layer_stats, y_BTD
        return self.mix_layers(x_BTD, added), stats

    def mix_layers(self, x_BTD: Tensor, added: list[Tensor]) -> Tensor:
        """x plus each layer's part of it once more, with a weight of each token (MUDD before the head, record 81)."""
        weight_BTN = 0.1 * F.linear(norm(x_BTD), self.layer_mix.type_as(x_BTD))  # N = n_layer
        return x_BTD + sum(weight_BTN[..., n, None] * y_BTD for n, y_BTD in enumerate(added))

    def documents(self, ids_BT: Tensor, cache: KVCache | None) -> Tensor:
        """Document numbers (B, T): one more at each end-of-text token, counting on from the cache."""
        return (ids_BT == self.config.eot_token).long().cumsum(1) + (0 if cache is None else cache.last_doc())

    def embeddings(self, ids_BT: Tensor, ids_BS: Tensor, doc_BS: Tensor) -> Tensor:
        """Token embeddings plus the n-gram embeddings of the last n ids, looked up by hash."""
        x_BTD, T = F.embedding(ids_BT, self.embed), ids_BT.size(1)
        lengths = [int(n) for n in self.config.ngrams]
        recent = slice(1 - max(lengths, default=1) - T, None)
        hashes = ops.ngram_hashes(ids_BS[:, recent], doc_BS[:, recent], max(lengths)) if lengths else []
        for n, table in zip(lengths, self.ngram_embeds):
            x_BTD = x_BTD + ops.signed_rows(table, hashes[n - 1][:, -T:], self.sparse_tables)
        return x_BTD.to(DTYPES[self.config.dtype])

    def layer_value_embeds(self, ids_BT: Tensor) -> list[Tensor]:
        """Value embeddings of each layer: the last layers share the first layers' tables; zero between them."""
        dtype, heads = DTYPES[self.config.dtype], (self.config.n_head, self.config.head_dim)
        tables = [F.embedding(ids_BT, table).to(dtype).unflatten(-1, heads) for table in self.value_embeds]
        zero = torch.zeros((), dtype=dtype, device=ids_BT.device)
        return tables + [zero] * (self.config.n_layer - 2 * len(tables)) + tables

    def contexts(self, ids_BT: Tensor, doc_BT: Tensor, doc_BS: Tensor, cache: KVCache | None) -> list[Context]:
        """One context per layer. Layers with the same window share a mask."""
        (B, T), device, config = doc_BT.shape, doc_BT.device, self.config
        seed, step, first_token, window = self.clock.unbind()
        position_S = torch.arange(doc_BS.size(1), device=device)
        position_T = position_S[-T:]
        mask_type = DecodeMask if cache is not None else self.mask_type or fastest_mask(device.type, T)
        masks = {letter: mask_type(position_T, position_S, doc_BT, doc_BS, tokens)
                 for letter, tokens in window_sizes(config.window, window).items()}  # fmt: skip
        cos, sin = ops.rotary_tables(position_T, config.head_dim, DTYPES[config.dtype])
        same_doc_BS = F.pad(doc_BS, (1, -1), value=-2) == doc_BS
        token_T = first_token + torch.arange(B * T, device=device)
        layer_L = torch.arange(config.n_layer, device=device)
        bias_LE = F.pad(self.bias_LE, (0, 0, 0, 1))  # dense layers at the end read zeros
        contexts, moe_layer = [], 0
        letters = zip(config.per_layer("window"), config.per_layer("pattern"), self.layer_value_embeds(ids_BT))
        for letter, pattern_letter, value_embed in letters:
            noise, bias_E = (seed, step, layer_L[moe_layer], token_T), bias_LE[moe_layer]
            contexts.append(Context(ids_BT, masks[letter], value_embed, cos, sin, same_doc_BS, noise, bias_E, cache))
            moe_layer += pattern_letter == "M"
        return contexts

    def summary(self, stats: list[RouteStats]) -> dict[str, Tensor]:
        """Means over MoE layers, counts per layer. balance_loss is 1 at even load (2101.03961 eq. 4, per layer).

        Its load is that of the global batch in the last steps, so its gradient adds up over micro-batches and ranks."""
        if not stats:  # a dense model, or decoding
            zeros = dict.fromkeys(("balance_loss", "z_loss", "entropy", "router_loss"), self.bias_LE.new_zeros(()))
            return zeros | {"counts_LE": torch.zeros_like(self.bias_LE, dtype=torch.int64)}
        counts_LE, prob_LE, z_loss, entropy, losses = zip(*stats)
        balance_L = self.config.num_experts * (self.load_WLE.mean(0) * torch.stack(prob_LE)).sum(-1)
        return {
            "balance_loss": balance_L.mean(),
            "z_loss": torch.stack(z_loss).mean(),
            "entropy": torch.stack(entropy).mean(),
            "router_loss": sum(losses, start=torch.zeros_like(z_loss[0])),
            "counts_LE": torch.stack(counts_LE),
        }

    def auxiliary_loss(self, stats: dict[str, Tensor]) -> Tensor:
        """Sum over layers, so that each router's gradient does not depend on the depth."""
        layer_mean = self.config.balance_coef * stats["balance_loss"] + self.config.z_coef * stats["z_loss"]
        return self.config.num_moe_layers * layer_mean + stats["router_loss"]

    def summed_nll(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy in nats, summed over targets."""
        head = ops.HEADS[self.config.head if self.training else "bf16"]
        return ops.chunked_loss(x_BTD.flatten(0, 1), self.head, targets_BT.flatten(), head, self.token_nll)

    def logits(self, x_BTD: Tensor) -> Tensor:
        z_BTV = F.linear(x_BTD, self.head.type_as(x_BTD)).float()
        logits_BTV = 2 * self.config.softcap * torch.sigmoid(z_BTV * (2 / self.config.softcap))
        logits_BTV[..., self.config.vocab_size :] = -math.inf
        return logits_BTV

    # ---- sampling

    @torch.no_grad()
    def stream(self, tokens_BT: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0,
               top_p: float = 1.0, seed: int = 0, stop_at: int | None = None):  # fmt: skip
        """Yields the ids (B,) that follow (B, T >= 1) ids, one position at a time, sampled with a KV cache.

        temperature 0 takes the likeliest id; top_k keeps the k likeliest (0 = all), top_p the likeliest with this total
        probability (1904.09751). Row b is drawn from seed + b. After `stop_at` a row repeats it; sampling ends when
        all rows have stopped. Raises ValueError for an empty prompt, UserError for a number out of range."""
        limits = {"temperature": (temperature, 0 <= temperature < math.inf, "at least 0"),
                  "top_k": (top_k, top_k >= 0, "at least 0"),
                  "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1")}  # fmt: skip
        for name, (value, fits, legal) in limits.items():
            if not fits:
                raise UserError(f"{name} is {value}; it must be {legal}")
        (B, T), device = tokens_BT.shape, tokens_BT.device
        if T == 0:
            raise ValueError("the prompt is empty; start it with the end-of-text token")
        training, generators = self.training, [torch.Generator(device).manual_seed(seed + b) for b in range(B)]
        cache, new_BT = self.cache_type(self.config, B, T + max_new_tokens, device), tokens_BT
        stopped_B = torch.zeros_like(tokens_BT[:, 0], dtype=torch.bool)
        self.eval()
        try:
            for _ in range(max_new_tokens):
                with torch.compiler.set_stance("force_eager"):  # else every cache length is compiled
                    logits_BV = self(new_BT, cache=cache).logits[:, -1, : self.config.vocab_size]
                id_B = sample_ids(logits_BV, temperature, top_k, top_p, generators)
                if stop_at is not None:
                    id_B = id_B.masked_fill(stopped_B, stop_at)
                    stopped_B = id_B == stop_at
                yield id_B
                if stop_at is not None and stopped_B.all():
                    break
                new_BT = id_B[:, None]
        finally:
            self.train(training)

    def generate(self, tokens_BT: Tensor, max_new_tokens: int, **options) -> Tensor:
        """(B, T + up to max_new_tokens): the prompt and its continuation; options as in stream()."""
        new_ids = [id_B[:, None] for id_B in self.stream(tokens_BT, max_new_tokens, **options)]
        return torch.cat([tokens_BT, *new_ids], dim=1)

    # ---- parameters and cost

    def parameter_kinds(self) -> dict[str, str]:
        """Parameter name -> embed, ngram_embed, value_embed, head, matrix, expert, router or scalar."""
        return {name: parameter_rule(name).kind for name, _ in self.named_parameters()}

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> "GPT":
        """Sets every parameter, drawn on the CPU so that any device starts equal; returns the model.

        A rank that holds some of the experts draws all of them, layer by layer, and keeps its own."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            tied = parameter is self.head and self.config.tie_embeddings
            rule, shape = parameter_rule("tied" if tied else name), self.global_shape(name)
            first = self.ranks.first(shape[0]) if rule.kind == "expert" else 0
            parameter.copy_(rule.init(torch.empty(shape, device="cpu"), generator)[first : first + len(parameter)])
        return self

    def global_shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape with the experts of all ranks."""
        shape = tuple(self.get_parameter(name).shape)
        return (shape[0] * self.ranks.size, *shape[1:]) if parameter_rule(name).kind == "expert" else shape

    def compile_blocks(self) -> str:
        """Compile block by block, so that gradients are ready during backward and can be sent; returns a note."""
        on_cpu = self.head.device.type == "cpu"
        if on_cpu:  # CUDA has a kernel for either
            self.token_nll = torch.compile(self.token_nll, dynamic=False)
            attend = torch.compiler.disable(BlockedMask.attend)  # else a graph for each size of the window
            self.mask_type = type("UncompiledMask", (BlockedMask,), {"attend": attend})
        for block in self.blocks:
            block.compile(fullgraph=not on_cpu and self.ranks.size == 1, dynamic=False)  # all-to-alls break graphs too
        self.add_skip, self.mix_layers = (torch.compile(f, dynamic=False) for f in (self.add_skip, self.mix_layers))
        return "compiled"

    def active_share(self, name: str) -> float:
        """Share of a parameter in one token's forward pass: its top_k experts at even load, one row of each table."""
        kind = parameter_rule(name).kind
        if kind == "expert":
            return self.config.top_k / self.config.num_experts
        is_table = kind.endswith("embed") and not (self.config.tie_embeddings and name == "embed")
        return 1 / len(self.get_parameter(name)) if is_table else 1.0

    def count_parameters(self) -> dict[str, int]:
        """Parameters per kind, `total`, and `active`: those in one token's forward pass."""
        counts, active = dict.fromkeys((rule.kind for rule in PARAMETER_RULES.values()), 0), 0
        for name, parameter in self.named_parameters():
            counts[parameter_rule(name).kind] += parameter.numel()
            active += round(parameter.numel() * self.active_share(name))
        return counts | {"total": sum(counts.values()), "active": active}

    def is_in_matmul(self, name: str) -> bool:
        in_matmul = parameter_rule(name).kind in ("matrix", "expert", "router", "head")
        return in_matmul or (name == "embed" and self.config.tie_embeddings)

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward + backward per token: 6 per active weight of a matmul, 12 per attended key and channel.

        Attention counts the keys in the causal window at its full size, documents ignored."""
        weights = sum(p.numel() * self.active_share(n) for n, p in self.named_parameters() if self.is_in_matmul(n))
        letters = zip(self.config.per_layer("attention"), self.config.per_layer("window"))
        keys = sum(mean_keys(self.config, window, seq_len) for attention, window in letters if attention != "-")
        return 6 * weights + 12 * keys * self.config.n_head * self.config.head_dim


def window_sizes(letters: str, window: Tensor) -> dict[str, Tensor]:
    """Letter -> its window in tokens, at least 1: the token itself."""
    return {letter: (window // WINDOWS[letter]).clamp(min=1) for letter in dict.fromkeys(letters)}


def add_skip(weight: Tensor, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
    """x + weight y."""
    return ops.blend(torch.stack([torch.ones_like(weight), weight]), x_BTD, y_BTD)


def sample_ids(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, generators: list) -> Tensor:
    """An id (B,) per row, drawn with the row's own generator; the rules are those of GPT.stream."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    kept_BK, id_BK = logits_BV.topk(min(top_k, logits_BV.size(1)) or logits_BV.size(1))  # likeliest first
    prob_BK = ((kept_BK - kept_BK[:, :1]) / temperature).softmax(-1)
    prob_BK = prob_BK.masked_fill(prob_BK.cumsum(-1) - prob_BK >= top_p, 0)  # likelier ids already have the mass
    pick_B1 = torch.stack([torch.multinomial(prob_K, 1, generator=g) for prob_K, g in zip(prob_BK, generators)])
    return id_BK.gather(1, pick_B1)[:, 0]


def mean_keys(config: Config, letter: str, seq_len: int) -> float:
    """Mean number of keys in a query's causal window, in a layer with this letter of `window`."""
    reach = min(max(1, config.window_size // WINDOWS[letter]), seq_len)
    return (reach * (reach + 1) / 2 + (seq_len - reach) * reach) / seq_len


DEPTHS = {"stack": GPT}  # key of `depth` -> class


def build(config: Config, ranks: ExpertRanks = ALL_HERE) -> GPT:
    """The model of a Config, initialised with seed 0."""
    return config.tables()["depth"][config.depth](config, ranks)


def count_parameters(config: Config) -> dict[str, int]:
    """GPT.count_parameters of a Config, without its memory."""
    with torch.device("meta"):
        return build(config).count_parameters()


def flops_per_token(config: Config, seq_len: int) -> float:
    """GPT.flops_per_token of a Config, without its memory."""
    with torch.device("meta"):
        return build(config).flops_per_token(seq_len)


# -----------------------------------------------------------------------------
# Initial values, and the optimizer group of each parameter


class ParameterRule(NamedTuple):
    kind: str  # optimizer group
    init: callable  # (empty CPU tensor, generator) -> the tensor, filled


def constant(*values):
    return lambda p, generator: p.copy_(torch.tensor(values, device="cpu").expand_as(p))


def normal(p: Tensor, generator: torch.Generator) -> Tensor:
    return p.normal_(generator=generator)


def init_uniform(p: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform, standard deviation 0.5 / sqrt(fan in); fan in is the last dimension (modded-nanogpt record 19)."""
    bound = math.sqrt(3) * 0.5 * p.size(-1) ** -0.5
    return p.uniform_(-bound, bound, generator=generator)


PARAMETER_RULES = {  # end of a parameter's name -> its rule; the first that matches
    "embed": ParameterRule("embed", normal),
    "tied": ParameterRule("embed", lambda p, generator: p.normal_(std=0.02, generator=generator)),  # GPT-2's head
    "ngram_embeds.*": ParameterRule("ngram_embed", constant(0.0)),
    "value_embeds.*": ParameterRule("value_embed", normal),
    "head": ParameterRule("head", constant(0.0)),
    "attention.qkv": ParameterRule("matrix", init_uniform),
    "attention.out": ParameterRule("matrix", constant(0.0)),
    "ffn.up": ParameterRule("matrix", init_uniform),
    "ffn.down": ParameterRule("matrix", constant(0.0)),
    "shared.up": ParameterRule("matrix", init_uniform),
    "shared.down": ParameterRule("matrix", constant(0.0)),
    "experts.up": ParameterRule("expert", init_uniform),
    "experts.down": ParameterRule("expert", constant(0.0)),
    "router.gate": ParameterRule("router", constant(0.0)),
    "router.noise": ParameterRule("router", constant(0.0)),
    "attention.value_mix": ParameterRule("scalar", constant(0.5, 0.5)),
    "stream_mix": ParameterRule("scalar", constant(1.0, 0.0)),
    "skip_weights": ParameterRule("scalar", constant(1.0)),
    "layer_mix": ParameterRule("head", constant(0.0)),
}


def parameter_rule(name: str) -> ParameterRule:
    """The rule of a parameter. Raises KeyError if no entry of PARAMETER_RULES matches the end of its name."""
    words = ["*" if word.isdigit() else word for word in name.split(".")]
    for ending, rule in PARAMETER_RULES.items():
        if words[-len(ending.split(".")) :] == ending.split("."):
            return rule
    raise KeyError(f"parameter {name} has no rule in PARAMETER_RULES: give it a kind and an initial value")


# -----------------------------------------------------------------------------
# Presets

PRESETS = {
    "cpu": Config(  # a laptop: 2 cores, minutes
        vocab_size=2000, eot_token=0, n_layer=4, n_embd=192, n_head=2, head_dim=64, mlp_ratio=1.0, pattern="DDDM",
        router_noise=0.0, attention="K", window="EELE", window_size=2048, value_embeds=2, ngrams="23",
        ngram_rows=2**16),
    # one 24 GB GPU, no FP8 needed
    "small": Config(n_layer=8, n_embd=512, n_head=4, window="LSSS", window_size=1024, value_embeds=2),
    # 8 GPUs: modded-nanogpt record 21 with experts
    "speedrun": Config(attention="AAAAAAA-AAAA", window="LSSSLSSLSSSL", head="fp8"),
}  # fmt: skip

if __name__ == "__main__":
    from tools import generate

    generate.main()
