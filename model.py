"""The speedrun's transformer with experts in place of the MLP, whole in one file.

    python model.py --preset speedrun                        # the model card
    python model.py --checkpoint logs/muon/checkpoint --prompt "def forward(self"

What is in it: RMSNorm without gain, merged QKV, QK-norm, half-truncated rotary, attention scale 0.12, ReLU^2 experts behind a noisy
top-2 router, zero-initialised output projections, an untied head, embedding and U-net skips, value embeddings, n-gram tables, keys
of the token before, long-short sliding windows, document masks, softcapped logits, an FP8 head, and a loss that never holds all logits in fp32.

Two axes: width (what a block does to a token: `ROUTERS`, `EXPERTS`, `dispatch`) and depth (which blocks, how often: `DEPTHS`).
To read it in ten minutes: Config, dispatch, MoE, Stack, GPT. The speedrun's model ends at the line "The zoo": what follows are other entries of
the same tables, what a Config must be, presets, the model card, checkpoints, the Hub, the command line.

Shapes: B rows, T tokens of a row (or all B*T tokens where B is absent), D n_embd, H heads, C head_dim, E experts, K top_k,
R = T*K routed rows, F hidden width of one expert, L routed layers, V padded vocabulary. `x_BTD` has the shape (B, T, D).

Sources: KellerJordan/modded-nanogpt records 1-21 (the dense model and its constants), 49 (keys) and 62 (n-gram tables), Shazeer et al.
1701.06538 (noisy top-k), Fedus et al. 2101.03961 (balance loss), Zoph et al. 2202.08906 (z-loss), Wang et al. 2408.15664 (bias balance).
"""

import argparse
import codecs
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import io
import json
import math
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# -----------------------------------------------------------------------------
# Config


class ConfigError(ValueError):
    """A field of Config has a value that cannot be built; the message names the field and the legal values."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides the model's shape and its loss. Checked once, here; the modules below trust it."""

    # vocabulary
    vocab_size: int = 50257  # ids in use; tables are padded to a multiple of 64
    eot_token: int = 50256  # starts every document
    # shape
    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 6
    head_dim: int = 128
    # width: which feed-forward each layer has
    pattern: str = "M"  # tiled over depth: M = mixture of experts, D = dense MLP
    mlp_ratio: float = 4.0  # active hidden width / n_embd, of a dense MLP and of a token's experts together
    num_experts: int = 8
    experts: str = "mlp"  # kinds out of EXPERTS, as in "mlp*12,identity,zero": one name stands for all num_experts, a list says how many there are
    top_k: int = 2
    num_shared_experts: int = 0  # that every token meets, of the same width each, beside its top_k
    shared: str = "mlp"  # a key of SHARED
    shared_dim: int = 0  # hidden width of the shared experts together; 0 = each is as wide as a routed one
    shared_kernel: int = 3  # tokens that shared conv looks at
    routed_scale: str = "1.0"  # multiplies what the routed experts add up to; auto: estimated so that it is as large as the shared ones
    router: str = "linear"  # a key of ROUTERS
    router_noise: float = 1.0  # multiplies the noise on the scores in training; 0 = no noise, and no weights for it
    router_spread: str = "learned"  # a key of SPREADS: what that noise's standard deviation is for a token and expert
    router_score: str = "softmax"  # a key of SCORES: what is compared, and what gates are made of
    norm_topk_prob: float = 1.0  # power of the sum of the kept scores that gates are divided by: 1 = they add up to 1, 0 = left as they are
    router_residual: float = 0.0  # share of the routed layer before: its logits, through a learned matrix, are added (MoE++)
    router_kernel: int = 3  # tokens that router conv looks at
    router_dim: int = 64  # inner width of the routers mlp, recurrent and attention
    balance_coef: float = 0.01  # Switch balance loss
    z_coef: float = 0.001  # router z-loss
    entropy_coef: float = 0.0  # MoEUT's loss: less entropy of the mean choice of a row's tokens, over all loops
    importance_coef: float = 0.0  # Shazeer's loss on the sums of gates, within a micro-batch
    load_coef: float = 0.0  # and on the smooth numbers of tokens, which needs noise
    bias_update_factor: float = 0.0  # step of the aux-loss-free bias, in units of what it is added to: probability or sigmoid
    bias_update_threshold: int = 0  # tokens that are counted before it moves again; 0 = every optimizer step
    free_eta: float = 1.0  # weight in the balance of experts without matmuls: with less than 1 they may take more than their share (MoE++: 0.75)
    balance_window: int = 1  # optimizer steps whose counts make up the load that the balance loss sees
    # depth
    depth: str = "stack"  # a key of DEPTHS
    residual: str = "add"  # a key of RESIDUALS: how the stream takes up what attention and feed-forward say
    looped: str = "o"  # depths loop and routed; tiled over depth: o = a layer of the loop or pool, . = one that runs once, before or after it
    loops: int = 2  # times that the loop runs, or steps in which a layer of the pool is picked, at most
    eval_loops: int = 0  # the same in evaluation; 0 = as in training
    loop_keys: str = "latest"  # a key of LOOP_KEYS: whose keys and values a token sees in the second loop and after
    reinject: float = 0.0  # what the loop began with is added, so many times, before each further loop
    halt: str = "none"  # a key of HALTS: how a token finds out that it may leave the loop
    halt_threshold: float = 0.0  # of what adds up until it leaves; 0 = the rule's own
    ponder_coef: float = 0.01  # price of further loops in the loss
    ponder_prior: float = 0.2  # halt ponder: the chance of leaving after each loop that it is drawn to
    identity_layers: int = 0  # depth routed: members of the pool that do nothing
    controller: str = "linear"  # a key of CONTROLLERS: what picks a layer of the pool
    controller_dim: int = 64  # inner width of the controllers mlp and lstm
    route_by: str = "token"  # a key of ROUTE_BY: whose state the controller sees
    route_training: str = "soft"  # a key of ROUTE_TRAINING: what training makes of the controller's choice; evaluation takes one layer
    anneal_steps: int = 1000  # optimizer steps in which route_training anneal goes from soft to one layer
    step_loss: str = "last"  # a key of STEP_LOSSES: after which steps the loss looks
    layer_balance_coef: float = 0.0  # price of an uneven use of the pool's layers
    norms: str = "P"  # tiled over depth: P = before attention and feed-forward, R = after them too, U = MoEUT's
    # attention
    attention: str = "A"  # tiled over depth: A = attention, K = keys know the token before, L = latent, S = shares keys, R = routed, - = none
    window: str = "L"  # tiled over depth: L = window_size, S, Q, E = a half, a quarter, an eighth of it
    window_size: int = 1792  # tokens that a long layer sees
    rotary: str = "H"  # tiled over depth: H = queries and keys turn, V = values and outputs, B = both, N = nothing, W = by the layer's window
    attn_scale: float = 0.12
    attn_softmax: str = "plain"  # a key of SOFTMAXES
    qk_norm: str = "rms"  # a key of QK_NORMS; without it attn_scale is about 1 / sqrt(head_dim)
    latent_dim: int = 64  # numbers that a token's keys and values are made of where attention is latent
    attn_experts: int = 4  # matrices for values, and for outputs, that each head of routed attention has
    attn_top_k: int = 2  # of them, that a token meets
    num_meta_tokens: int = 0  # learned vectors in front of each row that every token sees
    # tables
    tie_embeddings: bool = False  # the embedding is the head too
    value_embeds: int = 3  # tables added to the values of the first and of the last layers
    ngrams: str = ""  # each digit n adds a table to the embedding, looked up by a hash of the last n ids
    ngram_rows: int = 2**14  # of each of them
    # what is asked
    objective: str = "next"  # a key of OBJECTIVES; masked looks both ways and cannot continue a text, so it is for toys alone
    mask_share: float = 0.15  # of the tokens, that objective masked hides
    # head and numbers
    softcap: float = 15.0  # logits lie in (0, 2 * softcap)
    head: str = "bf16"  # a key of HEADS: the precision of the head's matmuls while training
    dtype: str = "bf16"  # activations: a key of DTYPES

    def __post_init__(self):
        check_config(self)

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 64) * 64

    @property
    def mask_token(self) -> int:
        """The id that stands for a hidden token: the first one past the vocabulary."""
        return self.vocab_size

    @property
    def hidden_size(self) -> int:
        """Hidden width of one expert: a token's experts together (without shared ones that have a shared_dim) cost what the dense MLP of width
        mlp_ratio * n_embd costs."""
        hidden = self.mlp_ratio * self.n_embd / self.equal_experts
        return int(hidden) if hidden == int(hidden) else -1

    def tiled(self, field: str) -> str:
        """The letter of each layer: the pattern string repeated until it covers n_layer."""
        pattern = getattr(self, field)
        return (pattern * -(-self.n_layer // len(pattern)))[: self.n_layer]

    @property
    def key_makers(self) -> dict[int, int | None]:
        """Layer that shares keys and values -> the nearest one before it that makes some."""
        letters = self.tiled("attention")
        makers = {layer: [other for other in range(layer) if letters[other] not in "S-"] for layer, letter in enumerate(letters) if letter == "S"}
        return {layer: found[-1] if found else None for layer, found in makers.items()}

    def turning(self, layer: int) -> tuple:
        """What turns in a layer, and how fast: a letter of ROTARIES and the factor on its frequencies."""
        letter = self.tiled("rotary")[layer]
        return letter, ROTARIES[letter].speed(WINDOWS[self.tiled("window")[layer]])

    @property
    def equal_experts(self) -> int:
        """That one token meets, of the same width."""
        return self.top_k + self.num_shared_experts * (self.shared_dim == 0)

    @property
    def shared_width(self) -> int:
        return self.shared_dim or self.hidden_size * self.num_shared_experts

    @property
    def listed_experts(self) -> list[str]:
        """The names in `experts`, as often as it says; [] if it is no such list."""
        parts = [re.fullmatch(r"\s*(\w+)\s*(?:\*\s*(\d+))?\s*", part) for part in self.experts.split(",")]
        return [part[1] for part in parts for _ in range(int(part[2] or 1))] if all(parts) else []

    @property
    def counts_experts(self) -> bool:
        """Whether `experts` says how many there are."""
        return bool(set(self.experts) & set("*,"))

    @property
    def expert_counts(self) -> dict[str, int]:
        """Kind -> how many, in the order in which experts are numbered: those with matmuls come first, kinds as listed."""
        listed = self.listed_experts
        counts = {name: listed.count(name) for name in sorted(dict.fromkeys(listed), key=lambda name: not EXPERTS[name].has_matmuls)}
        return counts if self.counts_experts else dict.fromkeys(counts, self.num_experts)

    @property
    def expert_etas(self) -> list[float]:
        """Each expert's weight in the balance; loads in proportion to 1 / eta count as even."""
        return [1.0 if EXPERTS[name].has_matmuls else self.free_eta for name, count in self.expert_counts.items() for _ in range(count)]

    @property
    def experts_balanced(self) -> list[float]:
        """1 for each expert whose load is to be evened out, 0 for an exit."""
        return [0.0 if EXPERTS[name].leaves else 1.0 for name, count in self.expert_counts.items() for _ in range(count)]

    @property
    def expert_share(self) -> float:
        """Of the tokens, those that an expert with matmuls gets when the load is even."""
        return self.top_k / sum(1 / eta for eta in self.expert_etas)

    @property
    def layer_runs(self) -> list[float]:
        """How often each layer runs for a token: at most, if tokens may leave, and at even use of the pool, if layers are picked."""
        pool = self.tiled("looped").count("o") + self.identity_layers
        runs = {"loop": self.loops, "routed": self.loops / pool}.get(self.depth, 1)
        return [runs if letter == "o" else 1 for letter in self.tiled("looped")]

    @property
    def routed_layers(self) -> int:
        return self.tiled("pattern").count("M")


# -----------------------------------------------------------------------------
# Small parts

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def differentiable(function, *args):
    """function.apply(*args), or only its forward where nobody will ask for gradients: decoding a token, apply() takes a third of a norm's time."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(KEEPS_NOTHING, *args)


KEEPS_NOTHING = SimpleNamespace(save_for_backward=lambda *_: None)


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, no gain."""
    return differentiable(RMSNorm, x)


class RMSNorm(torch.autograd.Function):
    """y = x / rms(x), keeping y and 1 / rms. On a CPU in bf16 forward + backward take a quarter of F.rms_norm's time.

    In bf16 the factor 1 / rms is rounded too: a row may come out up to 0.4% too long or short, as a whole."""

    @staticmethod
    def forward(ctx, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        y_scale = (length.square() / x.size(-1) + torch.finfo(torch.float32).eps).rsqrt()
        y = x * y_scale
        ctx.save_for_backward(y, y_scale)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, y_scale = ctx.saved_tensors
        along_y = torch.linalg.vecdot(dy, y).unsqueeze(-1) / -y.size(-1)
        return torch.addcmul(dy, y, along_y) * y_scale


def relu_squared(x: Tensor) -> Tensor:
    return differentiable(ReLUSquared, x)


class ReLUSquared(torch.autograd.Function):
    """relu(x)^2, keeping relu(x) alone for backward."""

    @staticmethod
    def forward(ctx, x):
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, dy):
        (positive,) = ctx.saved_tensors
        return (dy * positive).mul_(2)


def blend(weight_2: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """weight[0] x + weight[1] y, for the learned skips; y may be a 0-d zero."""
    return differentiable(Blend, weight_2, x, y)


class Blend(torch.autograd.Function):
    """Its scalar gradients are summed row by row in fp32: the same for any number of threads, as one long bf16 sum is not."""

    @staticmethod
    def forward(ctx, weight_2, x, y):
        ctx.save_for_backward(weight_2, x, y)
        a, b = weight_2.type_as(x)
        return a * x + b * y

    @staticmethod
    def backward(ctx, dout):
        weight_2, x, y = ctx.saved_tensors
        a, b = weight_2.type_as(x)
        dots = [torch.linalg.vecdot(dout, z.expand_as(dout)).float().sum(-1).sum() for z in (x, y)]
        return torch.stack(dots).type_as(weight_2), a * dout, b * dout if ctx.needs_input_grad[2] else None


def rotary_tables(position: Tensor, head_dim: int, dtype: torch.dtype, speed: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin (..., 1, C) of the half-truncated rotary for positions (...), signed as `rotate` wants them: the pairs (c, c + C/2) turn
    for c < C/4, with base 1024; the others stand still and carry content without position (modded-nanogpt record 17)."""
    frequency = speed * (1 / 1024) ** torch.linspace(0, 1, head_dim // 4, device=position.device)
    theta = F.pad(position.float()[..., None, None] * frequency, (0, head_dim // 4))
    return torch.cat([theta.cos()] * 2, dim=-1).to(dtype), torch.cat([theta.sin(), -theta.sin()], dim=-1).to(dtype)


def rotate(x_BTHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (c, c + C/2) by its token's angle, out of rotary_tables; the same shape and type."""
    return differentiable(Rotation, x_BTHC, cos, sin)


class Rotation(torch.autograd.Function):
    """Its backward is the rotation by the opposite angle."""

    @staticmethod
    def turn(x_BTHC, cos, sin):
        a, b = x_BTHC.chunk(2, dim=-1)
        return torch.addcmul(x_BTHC * cos, torch.cat([b, a], dim=-1), sin)

    @staticmethod
    def forward(ctx, x_BTHC, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotation.turn(x_BTHC, cos, sin)

    @staticmethod
    def backward(ctx, dy_BTHC):
        cos, sin = ctx.saved_tensors
        return Rotation.turn(dy_BTHC, cos, -sin), None, None


def unchanged(x: Tensor, *_) -> Tensor:
    return x


class Rotary(NamedTuple):
    """What a layer turns by its tables, and how fast."""

    qk: callable  # of queries and keys: (x_BTHC, cos, sin) -> x_BTHC
    vo: callable  # of values, and backwards of what is read of them
    speed: callable  # divisor of the layer's window -> factor on the frequencies


ROTARIES = {"H": Rotary(rotate, unchanged, lambda divisor: 1.0)}  # the zoo, below, has more
QK_NORMS = {"rms": norm, "none": unchanged}


class Norms(NamedTuple):
    """Of a block."""

    before: callable  # attention and feed-forward
    after: callable
    tell: callable  # (ctx, x_BTD) -> ctx, with what some look at past the norm


NORMS = {"P": Norms(norm, unchanged, lambda ctx, x_BTD: ctx)}  # letter of `norms`; the zoo, below, has more


class Residual(NamedTuple):
    """How the stream x, made of n terms (its embedding is the first), takes up another."""

    enter: callable  # (stream_mix, x, embedding) -> x as a block begins
    take_up: callable  # (x, y, n, embedding) -> x


RESIDUALS = {"add": Residual(blend, lambda x, y, n, embedding: x + y)}  # the zoo, below, has more


def mix_bits(x: Tensor) -> Tensor:
    """A hash of int32 values, element by element: two multiply-xorshift rounds, whose products wrap around."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def ngram_hashes(id_BT: Tensor, doc_BT: Tensor, most: int) -> list[Tensor]:
    """Hashes (B, T), int32, of each token's last 1, 2, ... `most` ids, its own included; ids of an earlier document count as one special id."""
    hashes = [mix_bits(id_BT.to(torch.int32))]
    for back in range(1, most):
        id_before_BT, doc_before_BT = (F.pad(x, (back, 0), value=-1)[:, : x.size(1)] for x in (id_BT, doc_BT))
        hashes.append(mix_bits(hashes[-1] + id_before_BT.masked_fill(doc_before_BT != doc_BT, -1).to(torch.int32)))
    return hashes


def hashed_counter(seed: Tensor, step: Tensor, layer: Tensor, token_T: Tensor) -> Tensor:
    """32 bits (T,), int32, that belong to these tokens in this step and layer."""
    seed, step, layer, token_T = ((x & 0xFFFFFFFF).to(torch.int32) for x in (seed ^ (seed >> 32), step, layer, token_T))
    return mix_bits(mix_bits(mix_bits(mix_bits(seed + 0x1E3779B9) + step) + layer) + token_T)


def hashed_normal(seed: Tensor, step: Tensor, layer: Tensor, token_T: Tensor, num: int) -> Tensor:
    """Standard normal noise (T, num): a pure function of its arguments, so any rank layout or resumed run draws the same.

    token_T holds token numbers within the global batch. Box-Muller: two counter-based hashes of 24 bits make two normals."""
    lane = torch.arange(-(-num // 2), dtype=torch.int32, device=token_T.device)
    counter_T1 = hashed_counter(seed, step, layer, token_T)[:, None]
    u, v = ((mix_bits(counter_T1 ^ mix_bits(2 * lane + i)) & 0xFFFFFF).float() for i in (1, 2))
    radius, angle = ((u + 1) / 2**24).log().mul(-2).sqrt(), v * (2 * math.pi / 2**24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :num]


# -----------------------------------------------------------------------------
# Masks: one visibility rule, three ways to attend with it


def visible(q_position: Tensor, kv_position: Tensor, q_doc: Tensor, kv_doc: Tensor, window, meta: int = 0) -> Tensor:
    """May this query see this key: not later, same document, fewer than `window` tokens back; or one of the row's first `meta` tokens."""
    distance = q_position - kv_position
    return (distance >= 0) & ((distance < window) & (q_doc == kv_doc) | (kv_position < meta))


def document_begins(q_doc_BT: Tensor, kv_doc_BS: Tensor) -> Tensor:
    """Where among the keys each query's document begins (B, T); documents only count up."""
    return torch.searchsorted(kv_doc_BS.contiguous(), q_doc_BT.contiguous())


def first_seen(q_position: Tensor, kv_position: Tensor, doc_BT: Tensor, window) -> Tensor:
    """The position (B, T), int32, of the first key that each query of a whole sequence sees. As documents only count up, it sees all from
    there to its own: one comparison where visible() asks three questions."""
    begins_BT = F.pad(doc_BT.diff(dim=1) != 0, (1, 0))
    document_BT = torch.where(begins_BT, kv_position, kv_position[0]).cummax(1).values
    return torch.maximum(document_BT, q_position - window + 1).int()


class DenseMask:
    """SDPA with the full mask: any device, any lengths. Tests take it as the reference."""

    rule = staticmethod(visible)

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BT: Tensor, window: Tensor, meta: int = 0):
        self.mask = self.rule(q_position[:, None], kv_position, q_doc_BT[:, None, :, None], kv_doc_BT[:, None, None, :], window, meta)

    def attend(self, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, attn_mask=self.mask, scale=scale)


class DecodeMask(DenseMask):
    """For queries that follow on a cache: the dense mask without the keys that lie beyond the window of all of them."""

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BT: Tensor, window: Tensor, meta: int = 0):
        whole = meta > 0 or window.is_meta  # meta-tokens are seen from everywhere, and a meta tensor has no value
        self.first = 0 if whole else max(0, len(kv_position) - len(q_position) - int(window) + 1)
        super().__init__(q_position, kv_position[self.first :], q_doc_BT, kv_doc_BT[:, self.first :], window, meta)

    def attend(self, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float) -> Tensor:
        return super().attend(q_BHTC, k_BHTC[:, :, self.first :], v_BHTC[:, :, self.first :], scale)


class BlockedMask:
    """For the CPU: queries in blocks of 128, each against the keys it can reach at all.

    The upper triangle and what lies beyond the window cost nothing: forward + backward take 0.3 to 0.6 of the time of SDPA with
    a dense mask (8,192 tokens, bf16, two heads of 128, T 512 and 1024, windows 128 and T, two cores); what is hidden is found by
    first_seen() in a third of the time that visible() takes."""

    BLOCK = 128

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BT: Tensor, window: Tensor, meta: int = 0):
        T, reach = q_position.numel(), int(window)
        first_B1T1, key_S = first_seen(q_position, kv_position, kv_doc_BT, window)[:, None, :, None], kv_position.int()
        later = torch.ones(self.BLOCK, self.BLOCK, dtype=torch.bool, device=first_B1T1.device).triu(1)
        self.blocks = []  # (query slice, keys, what is hidden in that block)
        for start in range(0, T, self.BLOCK):
            q = slice(start, min(start + self.BLOCK, T))
            kv = slice(max(0, start - reach + 1) // 16 * 16, q.stop)
            if kv.start < meta:
                kv = slice(0, q.stop)
            elif meta:
                kv = torch.cat([key_S[:meta], key_S[kv]])
            hidden_B1QK = key_S[kv] < first_B1T1[:, :, q]
            if meta:
                hidden_B1QK &= key_S[kv] >= meta
            hidden_B1QK[..., start - q.stop :] |= later[: q.stop - start, : q.stop - start]
            self.blocks.append((q, kv, hidden_B1QK))

    def attend(self, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float) -> Tensor:
        flat = lambda x_BHTC: x_BHTC.flatten(0, 1).contiguous()
        y = BlockedAttention.apply(flat(q_BHTC) * scale, flat(k_BHTC), flat(v_BHTC), self.blocks)
        return y.view(q_BHTC.shape)


class BlockedAttention(torch.autograd.Function):
    """softmax(q k^T) v block by block over (N = B*H, T, C); q comes scaled. Keeps the probabilities for backward."""

    @staticmethod
    def forward(ctx, q_NTC, k_NTC, v_NTC, blocks):
        y_NTC, probabilities = torch.empty_like(q_NTC), []
        for q, kv, hidden_B1QK in blocks:
            score = torch.bmm(q_NTC[:, q], k_NTC[:, kv].mT)
            score.unflatten(0, (len(hidden_B1QK), -1)).masked_fill_(hidden_B1QK, -math.inf)
            probabilities.append(score.softmax(-1))
            y_NTC[:, q] = torch.bmm(probabilities[-1], v_NTC[:, kv])
        ctx.save_for_backward(q_NTC, k_NTC, v_NTC, *probabilities)
        ctx.blocks = blocks
        return y_NTC

    @staticmethod
    def backward(ctx, dy_NTC):
        q_NTC, k_NTC, v_NTC, *probabilities = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q_NTC), torch.zeros_like(k_NTC), torch.zeros_like(v_NTC)
        for (q, kv, _), p in zip(ctx.blocks, probabilities):
            dy = dy_NTC[:, q]
            dv[:, kv] += torch.bmm(p.mT, dy)
            ds = torch._softmax_backward_data(torch.bmm(dy, v_NTC[:, kv].mT), p, -1, p.dtype)
            dq[:, q] = torch.bmm(ds, k_NTC[:, kv])
            dk[:, kv] += torch.bmm(ds.mT, q_NTC[:, q])
        return dq, dk, dv, None


class FlexMask:
    """For CUDA: FlexAttention over a BlockMask built from block-wise document bounds, never from a T x T mask.

    T must be a multiple of 128. Blocks that every query sees whole skip the mask function (modded-nanogpt records 15-16)."""

    BLOCK = 128

    def __init__(self, q_position: Tensor, kv_position: Tensor, q_doc_BT: Tensor, kv_doc_BT: Tensor, window: Tensor, meta: int = 0):
        from torch.nn.attention.flex_attention import BlockMask

        first_BT = first_seen(q_position, kv_position, kv_doc_BT, window)

        def plain(b, h, q, kv):
            return (kv <= q) & (kv >= first_BT[b, q])

        def with_meta(b, h, q, kv):
            return (kv <= q) & ((kv >= first_BT[b, q]) | (kv < meta))

        first_Bn, last_Bn = q_doc_BT[:, :: self.BLOCK], q_doc_BT[:, self.BLOCK - 1 :: self.BLOCK]  # documents only count up
        block = torch.arange(first_Bn.size(1), device=q_doc_BT.device)
        apart_nn = block[:, None] - block  # distances within a pair of blocks: from 128 * apart - 127 to 128 * apart + 127
        reached = (apart_nn >= 0) & (self.BLOCK * (apart_nn - 1) + 1 < window)
        inside = (apart_nn > 0) & (self.BLOCK * (apart_nn + 1) - 1 < window)
        some_Bnn = (reached & (first_Bn[:, :, None] <= last_Bn[:, None, :])) | ((apart_nn >= 0) & (block * self.BLOCK < meta))
        full_Bnn = inside & (first_Bn[:, :, None] == last_Bn[:, None, :]) & (last_Bn[:, :, None] == first_Bn[:, None, :])

        def listed(mask_Bnn: Tensor) -> tuple[Tensor, Tensor]:
            order = mask_Bnn.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
            return mask_Bnn.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None].contiguous()

        blocks = (*listed(some_Bnn & ~full_Bnn), *listed(full_Bnn))
        self.block_mask = BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=self.BLOCK, mask_mod=with_meta if meta else plain)
        self.flex_attention = compiled_flex_attention()

    def attend(self, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor, scale: float) -> Tensor:
        return self.flex_attention(q_BHTC, k_BHTC, v_BHTC, block_mask=self.block_mask, scale=scale)


@functools.cache
def compiled_flex_attention():
    """Made once and outside the blocks: uncompiled, flex_attention builds all scores; a compiled block inlines it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


WINDOWS = {"L": 1, "S": 2, "Q": 4, "E": 8}  # letter of `window` -> divisor of the long window


def mask_kind(device_type: str, T: int) -> type:
    """The fastest mask over a whole sequence of T tokens that the device has."""
    kinds = {"cpu": BlockedMask, "cuda": FlexMask if T % FlexMask.BLOCK == 0 else DenseMask}
    return kinds.get(device_type, DenseMask)


def windows_in_use(letters: str, window: Tensor) -> dict[str, Tensor]:
    """The window of each letter that occurs; even the shortest sees its own token."""
    return {letter: (window // WINDOWS[letter]).clamp(min=1) for letter in dict.fromkeys(letters)}


# -----------------------------------------------------------------------------
# Attention


class Context(NamedTuple):
    """What a layer may look at besides its input. Nothing in it depends on a later token.

    What differs from layer to layer is a tensor here and no number in the module, so layers of one kind share one compiled graph."""

    token_BT: Tensor | None  # ids, None when embeddings were given
    mask: object  # of this layer's window
    value_embed_BTHC: Tensor  # what is mixed into this layer's values: a table's rows or zero
    cos: Tensor  # by which this layer turns
    sin: Tensor
    follows_BS: Tensor  # of each key's token: is the one before it in the same document
    noise_key: tuple[Tensor, Tensor, Tensor, Tensor]  # seed, step, routed layers before this one, number of each token in the global batch (T,)
    bias_E: Tensor  # the aux-loss-free bias
    cache: "Cache | None"
    logits_before_TE: Tensor | None = None  # of the routed layer before, zeros for the first; None where no router asks for them
    kv: tuple[Tensor, ...] | None = None  # of the nearest layer before that makes its own; None where this layer does
    raw_BTD: Tensor | None = None  # the stream without its norm, where some look at that
    terms: Tensor | None = None  # how many the stream is made of, where a residual asks
    valid_BT: Tensor | None = None  # tokens that count, where some rows are only there to fill up
    log_seen_BT: Tensor | None = None  # log of the number of keys that each token sees; None where no softmax asks for it
    expert_BT: Tensor | None = None  # that each token should choose, -1: no matter; None where nobody is told


SOFTMAXES = {"plain": lambda attention, q_BTHC, ctx: q_BTHC}  # name -> what becomes of queries


class Attention(nn.Module):
    """Causal attention with merged QKV, QK-norm, half-truncated rotary and a value embedding mixed into the values.

    Returns, besides, the keys and values that were read."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        width = config.n_head * config.head_dim
        self.n_head, self.scale = config.n_head, config.attn_scale
        self.qk_norm, self.softmax, self.rotary = QK_NORMS[config.qk_norm], SOFTMAXES[config.attn_softmax], ROTARIES[config.tiled("rotary")[layer]]
        self.add_projections(config, width)
        self.add_output(config, width)
        self.sharpness = nn.Parameter(torch.empty(config.n_head)) if config.attn_softmax == "ssmax" else None

    def add_projections(self, config: Config, width: int):
        self.qkv, self.value_mix = nn.Parameter(torch.empty(3, width, config.n_embd)), nn.Parameter(torch.empty(2))

    def add_output(self, config: Config, width: int):
        self.out = nn.Parameter(torch.empty(config.n_embd, width))

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, kv = self.project(x_BTD, ctx)
        return self.read(q, kv, x_BTD, ctx), kv

    def project(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Queries (B, T, H, C) of the new tokens, keys and values of all S so far."""
        q, k, v = F.linear(x_BTD, self.qkv.flatten(0, 1).type_as(x_BTD)).unflatten(-1, (3, self.n_head, -1)).unbind(2)
        return self.turned(q, ctx), self.remembered(k, v, ctx)

    def queries(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        return self.turned(F.linear(x_BTD, self.qkv[0].type_as(x_BTD)).unflatten(-1, (self.n_head, -1)), ctx)

    def keys_values(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        k, v = F.linear(x_BTD, self.qkv[1:].flatten(0, 1).type_as(x_BTD)).unflatten(-1, (2, self.n_head, -1)).unbind(2)
        return self.remembered(k, v, ctx)

    def turned(self, x_BTHC: Tensor, ctx: Context) -> Tensor:
        return self.rotary.qk(self.qk_norm(x_BTHC), ctx.cos, ctx.sin)

    def remembered(self, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        k, v = self.turned(k, ctx), self.rotary.vo(blend(self.value_mix, v, ctx.value_embed_BTHC), ctx.cos, ctx.sin)
        if ctx.cache is None:
            return self.keys(k, ctx), v
        if ctx.cache.final:
            return ctx.cache.extend(self, self.new_keys(k, ctx), v)
        k, v = ctx.cache.extend(self, k, v)
        return self.keys(k, ctx), v

    def keys(self, k_BSHC: Tensor, ctx: Context) -> Tensor:
        return k_BSHC

    def new_keys(self, k_BTHC: Tensor, ctx: Context) -> Tensor:
        """keys() of the new tokens alone, for a cache whose keys stay as they are."""
        return k_BTHC

    def read(self, q_BTHC: Tensor, kv: tuple[Tensor, Tensor], x_BTD: Tensor, ctx: Context) -> Tensor:
        """What the queries find, (B, T, D)."""
        q_BTHC, (k, v) = self.softmax(self, q_BTHC, ctx), kv
        y = ctx.mask.attend(q_BTHC.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.scale).transpose(1, 2)
        return self.output(self.rotary.vo(y, ctx.cos, -ctx.sin), x_BTD)

    def output(self, y_BTHC: Tensor, x_BTD: Tensor) -> Tensor:
        return F.linear(y_BTHC.flatten(-2), self.out.type_as(x_BTD))


class OffsetAttention(Attention):
    """The channels of a key that do not turn come from the token before it, as in modded-nanogpt record 49.

    A query that looks for its own text then finds what came after it: one layer copies, where plain attention needs two."""

    def keys(self, k_BSHC: Tensor, ctx: Context) -> Tensor:
        a, a_still, b, b_still = k_BSHC.chunk(4, dim=-1)
        still = F.pad(torch.stack([a_still, b_still]), (0, 0, 0, 0, 1, -1)) * ctx.follows_BS[:, :, None, None]
        return torch.cat([a, still[0], b, still[1]], dim=-1)

    def new_keys(self, k_BTHC: Tensor, ctx: Context) -> Tensor:
        before_B1HC = ctx.cache.recall(self, torch.zeros_like(k_BTHC[:, :1]))
        ctx.cache.remember(self, k_BTHC[:, -1:])
        follows_BS = F.pad(ctx.follows_BS, (1, 0))[:, -1 - k_BTHC.size(1) :]
        return self.keys(torch.cat([before_B1HC, k_BTHC], dim=1), ctx._replace(follows_BS=follows_BS))[:, 1:]


class NoAttention(nn.Module):
    """A layer whose attention was dropped (modded-nanogpt record 17)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, None]:
        return x_BTD.new_zeros(x_BTD.size(-1)), None

    def keys_values(self, x_BTD: Tensor, ctx: Context) -> None:
        return None


ATTENTIONS = {"A": Attention, "K": OffsetAttention, "-": NoAttention}  # the zoo, below, has more


class Cache:
    """What attention keeps of the tokens seen so far, for decoding, and their ids and documents: room for `max_len` tokens of each of B rows,
    and for the meta-tokens in front of them.

    Raises ValueError when more tokens are fed than there is room for."""

    fills, final = True, True  # is a cache of tokens that are decoded; what one of them has left here never changes

    def __init__(self, config: Config, batch_size: int, max_len: int, device=None):
        self.id_BT, self.doc_BT = torch.zeros(2, batch_size, max_len + config.num_meta_tokens, dtype=torch.int64, device=device)
        self.kept = {}  # module, (module, loop), or a name and a loop -> tensors (B, max_len and the meta-tokens, ...)
        self.states = {}  # the same -> what it has to remember of the last few tokens, for routers
        self.length = 0  # tokens of finished forward passes, the meta-tokens included

    def last_doc(self) -> Tensor:
        """The document (B, 1) of the last cached token, 0 for an empty cache."""
        return self.doc_BT[:, max(0, self.length - 1), None]

    def claim(self, id_BT: Tensor | None, doc_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Note the ids (None for embeddings) and documents of the next T tokens; return those of all tokens so far."""
        end = self.length + doc_BT.size(1)
        if end > self.doc_BT.size(1):
            raise ValueError(f"the cache has room for {self.doc_BT.size(1)} tokens and {end} were fed; make it with a larger max_len")
        self.doc_BT[:, self.length : end] = doc_BT
        if id_BT is not None:
            self.id_BT[:, self.length : end] = id_BT
        return self.id_BT[:, :end], self.doc_BT[:, :end]

    def recall(self, module, default):
        return self.states.get(module, default)

    def remember(self, module, value):
        self.states[module] = value

    def extend(self, module, *parts: Tensor) -> tuple[Tensor, ...]:
        """Store what a module keeps of the new tokens, tensors (B, T, ...); return the same of all tokens so far."""
        end = self.length + parts[0].size(1)
        if module not in self.kept:
            self.kept[module] = tuple(part.new_zeros(*self.doc_BT.shape, *part.shape[2:]) for part in parts)
        for all_of_them, part in zip(self.kept[module], parts):
            all_of_them[:, self.length : end] = part
        return tuple(part[:, :end] for part in self.kept[module])


# -----------------------------------------------------------------------------
# Routers: each returns a Route, in token order


class Route(NamedTuple):
    expert_TK: Tensor  # int64, distinct within a row; number E, no expert, throughout a row that is left out
    weight_TK: Tensor  # fp32 gates; softmax ones of power 1 add up to 1
    logits_TE: Tensor  # fp32, without noise and bias: what the balance and z losses see
    prob_TE: Tensor | None = None  # what the balance loss takes for probabilities, where that is not the softmax of the logits
    local_loss: Tensor | float = 0.0  # of importance and load within this micro-batch, with their coefficients


def softmax(x: Tensor) -> Tensor:
    """Over the last dimension. Over 2 to 64 numbers, on a CPU, a quarter of Tensor.softmax's time."""
    return (x - x.logsumexp(-1, keepdim=True)).exp()


def linear_fp32(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x weight^T with everything in fp32, as top-k wants it; the gradients are made in x's own type."""
    return differentiable(LinearFP32, x_TD, weight_ED)


@torch.library.custom_op("nanomoe::split_matmul", mutates_args=())
def split_matmul(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """bf16 rows times the two bf16 halves of each fp32 weight, summed in fp32: lost are a weight's last 8 bits. On an H200 a quarter of the
    time of a matmul in fp32, which has no tensor cores and needs a copy of x."""
    high = weight_ED.to(torch.bfloat16)
    y_TF = torch.mm(x_TD, torch.cat([high, (weight_ED - high).to(torch.bfloat16)]).T, out_dtype=torch.float32)
    return y_TF[:, : len(weight_ED)] + y_TF[:, len(weight_ED) :]


split_matmul.register_fake(lambda x, weight: x.new_empty(len(x), len(weight), dtype=torch.float32))
plain_matmul = lambda x_TD, weight_ED: x_TD.float() @ weight_ED.T
MATMULS_FP32 = {("cuda", torch.bfloat16): split_matmul}


class LinearFP32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_ED):
        ctx.save_for_backward(x_TD, weight_ED)
        return MATMULS_FP32.get((x_TD.device.type, x_TD.dtype), plain_matmul)(x_TD, weight_ED)

    @staticmethod
    def backward(ctx, dy_TE):
        x_TD, weight_ED = ctx.saved_tensors
        dy_TE = dy_TE.type_as(x_TD)
        return dy_TE @ weight_ED.type_as(x_TD), (dy_TE.T @ x_TD).type_as(weight_ED)


def largest(score_TE: Tensor, k: int) -> Tensor:
    """Indices (T, k) of the largest scores, one after another: for a few of them a GPU's topk takes twice as long."""
    index_E, found = torch.arange(score_TE.size(1), device=score_TE.device), []
    for _ in range(k):
        found.append(score_TE.argmax(-1))
        score_TE = score_TE.masked_fill(index_E == found[-1][:, None], -math.inf)
    return torch.stack(found, dim=1)


def sorted_out(score_TE: Tensor, k: int) -> Tensor:
    return score_TE.topk(k).indices


TOP_K = {"cpu": sorted_out, "cuda": lambda score_TE, k: (largest if k <= 4 else sorted_out)(score_TE, k)}

SPREADS = {  # (router, x_TD) -> the standard deviation of the noise, before Config.router_noise
    "learned": lambda router, x_TD: F.softplus(linear_fp32(x_TD, router.noise)),
    "constant": lambda router, x_TD: 1.0,
}


class Scores(NamedTuple):
    """What a router does with its logits."""

    of: callable  # logits_TE -> what is compared, with the bias added
    gates: callable  # (logits_TE, expert_TK, power) -> the kept scores over the power-th power of their sum
    prob: callable  # logits_TE -> Route.prob_TE


def softmax_gates(logits_TE: Tensor, expert_TK: Tensor, power: float) -> Tensor:
    kept_TK = logits_TE.gather(1, expert_TK)
    share = 1.0 if power == 1 else (kept_TK.logsumexp(-1, keepdim=True) - logits_TE.logsumexp(-1, keepdim=True)).exp() ** (1 - power)
    return softmax(kept_TK) * share


SCORES = {"softmax": Scores(softmax, softmax_gates, lambda logits_TE: None)}  # the zoo, below, has more


class Router(nn.Module):
    """What learned routers share: noise, bias, top-k and gates. An entry of ROUTERS says where the logits come from.

    Noisy top-k gating (1701.06538 eq. 3-5): H = logits + N(0, 1) softplus(x W_noise), gates = softmax over the k kept. The noise is drawn
    in training only. The aux-loss-free bias moves the selection, never the gates (2408.15664)."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.top_k, self.noise_scale, self.power = config.top_k, config.router_noise, config.norm_topk_prob
        self.spread, self.score, self.residual_scale = SPREADS[config.router_spread], SCORES[config.router_score], config.router_residual
        self.importance_coef, self.load_coef = config.importance_coef, config.load_coef
        learned = config.router_noise > 0 and config.router_spread == "learned"
        self.gate = nn.Parameter(torch.empty(config.num_experts, width))
        self.noise = nn.Parameter(torch.empty(config.num_experts, config.n_embd)) if learned else None
        self.residual = nn.Parameter(torch.empty(config.num_experts, config.num_experts)) if config.router_residual else None

    def logits(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        raise NotImplementedError

    def logits_and_spread(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return self.logits(x_BTD, ctx), self.spread(self, x_BTD.flatten(0, 1))

    def with_residual(self, logits_TE: Tensor, ctx: Context) -> Tensor:
        if self.residual is None:
            return logits_TE
        return logits_TE + self.residual_scale * ctx.logits_before_TE @ self.residual.T

    def local_loss(self, logits_TE: Tensor, noisy_TE: Tensor, spread_TE: Tensor | None, expert_TK: Tensor, weight_TK: Tensor) -> Tensor | float:
        """Shazeer's importance and load losses (1701.06538 eq. 7, 11). Of a micro-batch, so their gradients depend on how the batch is cut."""
        loss = 0.0
        if self.importance_coef:
            importance_E = torch.zeros_like(logits_TE).scatter(1, expert_TK, weight_TK).sum(0)
            loss = loss + self.importance_coef * squared_variation(importance_E)
        if self.load_coef and spread_TE is not None:
            loss = loss + self.load_coef * squared_variation(smooth_load(logits_TE, noisy_TE, spread_TE, self.top_k))
        return loss

    def forward(self, x_BTD: Tensor, ctx: Context) -> Route:
        if self.training and self.noise_scale:
            logits_TE, spread_TE = self.logits_and_spread(x_BTD, ctx)
            logits_TE, spread_TE = self.with_residual(logits_TE, ctx), self.noise_scale * spread_TE
            noisy_TE = logits_TE + hashed_normal(*ctx.noise_key, logits_TE.size(1)) * spread_TE
        else:
            noisy_TE, spread_TE = self.with_residual(self.logits(x_BTD, ctx), ctx), None
            logits_TE = noisy_TE
        expert_TK = TOP_K.get(x_BTD.device.type, largest)(self.score.of(noisy_TE.detach()) + ctx.bias_E, self.top_k)
        weight_TK = self.score.gates(noisy_TE, expert_TK, self.power)
        local_loss = self.local_loss(logits_TE, noisy_TE, spread_TE, expert_TK, weight_TK)
        return Route(expert_TK, weight_TK, logits_TE, self.score.prob(logits_TE), local_loss)


class LinearRouter(Router):
    """One matrix."""

    def __init__(self, config: Config):
        super().__init__(config, config.n_embd)

    def logits(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        return linear_fp32(x_BTD.flatten(0, 1), self.gate)

    def logits_and_spread(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        if self.noise is None:
            return super().logits_and_spread(x_BTD, ctx)
        logits_TE, spread_TE = linear_fp32(x_BTD.flatten(0, 1), torch.cat([self.gate, self.noise])).chunk(2, dim=1)
        return logits_TE, F.softplus(spread_TE.contiguous())  # strided, on a CPU, 6 times slower


ROUTERS = {"linear": LinearRouter}  # the zoo, below, has more

# -----------------------------------------------------------------------------
# Experts: fn(rows_RD sorted by expert, offs_E the end of each expert's rows) -> rows_RD


def grouped_mm(rows_RK: Tensor, weight_ENK: Tensor, offs_E: Tensor) -> Tensor:
    """Each row times its expert's matrix, transposed as in F.linear: (R, K), (E, N, K) -> (R, N). Row r belongs to the first
    expert whose end offs_E (int32) lies beyond r."""
    if rows_RK.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return grouped_mm_op(rows_RK, weight_ENK, offs_E)
    return mm_expert_by_expert(rows_RK, weight_ENK, offs_E)  # to decode a token, what an operator costs is more than the product


@torch.library.custom_op("nanomoe::grouped_mm", mutates_args=())
def grouped_mm_op(rows_RK: Tensor, weight_ENK: Tensor, offs_E: Tensor) -> Tensor:
    """An operator of our own because torch's fake kernel, which compilation and the meta device need, knows bf16 only."""
    return F.grouped_mm(rows_RK, weight_ENK.mT, offs=offs_E)


@torch.library.custom_op("nanomoe::grouped_outer", mutates_args=())
def grouped_outer(dy_RN: Tensor, rows_RK: Tensor, offs_E: Tensor) -> Tensor:
    """The gradient of grouped_mm by the weights: each expert's dy^T rows, (E, N, K); zero for an expert without rows."""
    return F.grouped_mm(dy_RN.mT, rows_RK, offs=offs_E)


def granule(n: int) -> int:
    """On a CPU, n rows are computed as a multiple of this: 16 multiples to an octave. oneDNN spends about a millisecond and a megabyte
    on every new shape of a matmul, and experts' row counts are new in every step; few shapes stay in its cache."""
    return 1 << max(0, n.bit_length() - 5)


@grouped_mm_op.register_kernel("cpu")
def mm_expert_by_expert(rows_RK: Tensor, weight_ENK: Tensor, offs_E: Tensor) -> Tensor:
    """Expert by expert, each somewhat past its end: what it writes there the next one overwrites."""
    out_RN, a = rows_RK.new_empty(len(rows_RK), weight_ENK.size(1)), 0
    for e, b in enumerate(offs_E.tolist()):
        if a == b:  # most experts, for a token that is decoded
            continue
        weight_NK = weight_ENK[e]
        length = -(-(b - a) // granule(b - a)) * granule(b - a)
        if a + length <= len(rows_RK):
            torch.mm(rows_RK[a : a + length], weight_NK.T, out=out_RN[a : a + length])
        else:  # no rows to spare behind: take some before it along, and drop them
            first = max(0, b - length)
            out_RN[a:b] = (rows_RK[first:b] @ weight_NK.T)[a - first :]
        a = b
    return out_RN


@grouped_outer.register_kernel("cpu")
def _(dy_RN: Tensor, rows_RK: Tensor, offs_E: Tensor) -> Tensor:
    """Expert by expert in two parts: most of its rows, and its last ones together with rows before them that count zero."""
    out_ENK, a = dy_RN.new_zeros(len(offs_E), dy_RN.size(1), rows_RK.size(1)), 0
    for out_NK, b in zip(out_ENK, offs_E.tolist()):
        most = (b - a) // granule(b - a) * granule(b - a)
        torch.mm(dy_RN[a : a + most].T, rows_RK[a : a + most], out=out_NK)
        if a + most < b:
            first = max(0, b - granule(b - a))
            last = dy_RN[first:b].clone()
            last[: a + most - first] = 0
            out_NK.addmm_(last.T, rows_RK[first:b])
        a = b
    return out_ENK


grouped_mm_op.register_fake(lambda rows, weight, offs: rows.new_empty(len(rows), weight.size(1)))
grouped_outer.register_fake(lambda dy, rows, offs: rows.new_empty(len(offs), dy.size(1), rows.size(1)))


def grouped_mm_backward(ctx, dy_RN: Tensor):
    rows_RK, weight_ENK, offs_E = ctx.saved_tensors
    dy_RN = dy_RN.contiguous()  # grouped_mm refuses the stride 0 of an expanded gradient
    return grouped_mm_op(dy_RN, weight_ENK.mT, offs_E), grouped_outer(dy_RN, rows_RK, offs_E), None


grouped_mm_op.register_autograd(grouped_mm_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class MLPExperts(nn.Module):
    """E ReLU^2 MLPs as two grouped GEMMs; an expert without rows costs nothing and gets an exactly zero gradient."""

    has_matmuls, leaves = True, False
    activation = staticmethod(relu_squared)

    def __init__(self, config: Config, num_experts: int):
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts, config.hidden_size, config.n_embd))
        self.down = nn.Parameter(torch.empty(num_experts, config.n_embd, config.hidden_size))

    @staticmethod
    def width(hidden_size: int) -> tuple[int, float]:
        """Own hidden width beside an MLP's, and own FLOPs over the MLP's."""
        return hidden_size, 1.0

    def forward(self, rows_RD: Tensor, offs_E: Tensor) -> Tensor:
        hidden_RF = grouped_mm(rows_RD, self.up.type_as(rows_RD), offs_E)
        return grouped_mm(self.activation(hidden_RF), self.down.type_as(rows_RD), offs_E)


EXPERTS = {"mlp": MLPExperts}  # the zoo, below, has more

# -----------------------------------------------------------------------------
# Dispatch: the only code that sorts, moves and combines experts' rows; with experts on several ranks `exchanged`, below, takes them there


def dispatch(x_TD: Tensor, route: Route, fn, first: int = 0, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Send every token to its K experts and add up what comes back, weighted: dropless, whatever the load. Also returns how many
    tokens chose each expert (E,), int64, beginning with number `first`.

    fn holds `count` experts from number `first` on (all by default); to the others no row goes and none comes back.
    Gates multiply after the experts: ReLU^2 is of degree 2, so a gate before them would count twice."""
    (T, K), E = route.expert_TK.shape, route.logits_TE.size(1)
    own_TK = route.expert_TK
    if first:  # numbered from there on, so that fn's rows come first; E, no expert, stays
        own_TK = torch.where(own_TK < E, (own_TK - first) % E, E)
    expert_R, choice_R = own_TK.flatten().to(torch.int16).sort(stable=True)  # a radix sort: 5 times faster than on int64
    row_TK = torch.empty_like(choice_R).scatter_(0, choice_R, torch.arange(T * K, device=x_TD.device)).view(T, K)
    expert_E = torch.arange(E, dtype=torch.int16, device=x_TD.device)
    offs_E = torch.searchsorted(expert_R, expert_E, right=True, out_int32=True)  # no counting: a GPU's atomics would queue up for E numbers
    rows_RD = differentiable(Gather, x_TD, choice_R // K, row_TK)
    if count is None:
        rows_RD = fn(rows_RD, offs_E)
    else:  # what grouped GEMMs leave behind the last end is uninitialised, in both directions
        own_R1 = (expert_R < count)[:, None]
        rows_RD = torch.where(own_R1, fn(torch.where(own_R1, rows_RD, 0), offs_E[:count].clone()), 0)
    return differentiable(Combine, rows_RD, route.weight_TK.type_as(x_TD), choice_R, row_TK), offs_E.diff(prepend=offs_E.new_zeros(1)).long()


def bag_sum(rows_RD: Tensor, row_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """Each token's K rows, added up with these weights: (T, D)."""
    return F.embedding_bag(row_TK, rows_RD, per_sample_weights=weight_TK, mode="sum")


def gather_sum(rows_RD: Tensor, row_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """The same in operators that a compiler melts into one kernel, with what comes before and after."""
    rows_TKD = rows_RD[row_TK]
    return (rows_TKD if weight_TK is None else rows_TKD * weight_TK[:, :, None]).sum(1)


ROW_SUMS = {"cpu": bag_sum, "cuda": gather_sum}


class Gather(torch.autograd.Function):
    """x_TD -> rows_RD. Its backward sums each token's K rows by a gather too: no atomics, no accumulating index_put."""

    @staticmethod
    def forward(ctx, x_TD, token_R, row_TK):
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_R)  # on a CPU a fifth of the time of x_TD[token_R]

    @staticmethod
    def backward(ctx, drows_RD):
        (row_TK,) = ctx.saved_tensors
        return ROW_SUMS.get(drows_RD.device.type, gather_sum)(drows_RD.contiguous(), row_TK), None, None


class Combine(torch.autograd.Function):
    """rows_RD -> y_TD, the weighted sum of each token's K rows."""

    @staticmethod
    def forward(ctx, rows_RD, weight_TK, choice_R, row_TK):
        ctx.save_for_backward(rows_RD, weight_TK, choice_R, row_TK)
        return ROW_SUMS.get(rows_RD.device.type, gather_sum)(rows_RD, row_TK, weight_TK)

    @staticmethod
    def backward(ctx, dy_TD):
        rows_RD, weight_TK, choice_R, row_TK = ctx.saved_tensors
        dy_RD = dy_TD.index_select(0, choice_R // weight_TK.size(1))
        dweight_R = torch.linalg.vecdot(rows_RD, dy_RD)
        return dy_RD.mul_(weight_TK.flatten()[choice_R, None]), dweight_R[row_TK], None, None


class ExpertRanks(NamedTuple):
    """The N ranks that share the experts of every layer, a run of E / N on each. By default this rank holds all."""

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroup | None" = None

    def first(self, num_experts: int) -> int:
        """Number of the first expert that this rank holds."""
        return self.rank * num_experts // self.size


ALL_HERE = ExpertRanks()


def stay(fn, rows_RD: Tensor, offs_E: Tensor) -> Tensor:
    """Where this rank holds all experts, rows travel nowhere."""
    return fn(rows_RD, offs_E)


# -----------------------------------------------------------------------------
# Feed-forwards: each returns (y_BTD, [statistics of each routing decision])


class RouteStats(NamedTuple):
    counts_E: Tensor  # int64, tokens that chose each expert
    prob_E: Tensor  # mean router probability, differentiable
    z_loss: Tensor  # mean squared logsumexp of the logits, differentiable
    entropy: Tensor  # mean entropy of the router's distribution / log E: 1 = undecided
    logits_TE: Tensor | None = None  # for the router of the next layer
    local_loss: Tensor | float = 0.0
    tokens: Tensor | int = 0  # that were routed
    chosen_BE: Tensor | None = None  # each row's sum of its tokens' softmax, where entropy_coef asks
    row_tokens_B: Tensor | None = None  # and their number
    exits_T: Tensor | None = None  # who chose to leave, where some expert is an exit
    exit_prob_T: Tensor | None = None  # and how probable that was
    domain_loss: Tensor | float = 0.0  # cross-entropy of the router to the experts of Context.expert_BT


def unnormed(x_BTD: Tensor, ctx: Context) -> Tensor:
    return x_BTD if ctx.raw_BTD is None else ctx.raw_BTD


def mean_over(x: Tensor, valid_T: Tensor | None) -> Tensor:
    """The mean over the first dimension, of the tokens that count."""
    if valid_T is None:
        return x.mean(0)
    return (x * valid_T.view(-1, *[1] * (x.ndim - 1))).sum(0) / valid_T.sum().clamp(min=1)


def route_stats(route: Route, counts_E: Tensor, valid_T: Tensor | None = None) -> RouteStats:
    lse_T = route.logits_TE.logsumexp(-1)
    log_p_TE = route.logits_TE - lse_T[:, None]
    p_TE = log_p_TE.exp()
    prob_TE = p_TE if route.prob_TE is None else route.prob_TE
    entropy = mean_over(-(p_TE * log_p_TE).detach().sum(-1), valid_T) / math.log(max(p_TE.size(1), 2))
    tokens = len(lse_T) if valid_T is None else valid_T.sum()
    return RouteStats(counts_E, mean_over(prob_TE, valid_T), mean_over(lse_T.square(), valid_T), entropy, route.logits_TE, route.local_loss, tokens)


def left_out(route: Route, valid_T: Tensor | None) -> Route:
    """The route with no expert (number E, which owns no rows) for tokens that do not count."""
    if valid_T is None:
        return route
    return route._replace(expert_TK=route.expert_TK.where(valid_T[:, None], route.logits_TE.size(1)))


def flat(x_BT: Tensor | None, last: int = 0) -> Tensor | None:
    """(B * T, ...): all tokens of all rows in one line, or the last few of each row."""
    return None if x_BT is None else x_BT[:, -last:].flatten(0, 1)


class MoE(nn.Module):
    """A router, pools of experts, the dispatch between them, and beside it what every token meets."""

    def __init__(self, config: Config, ranks: ExpertRanks = ALL_HERE):
        super().__init__()
        self.router, self.num_experts = ROUTERS[config.router](config), config.num_experts
        self.pools, self.free_pools, first = [], [], 0  # name of the module, its first expert, how many (None: all there are)
        self.exits, self.wants_rows = None, config.entropy_coef > 0
        for kind, count in config.expert_counts.items():
            name = "experts" if kind == "mlp" else kind
            self.add_module(name, EXPERTS[kind](config, count // ranks.size))
            pools = self.pools if EXPERTS[kind].has_matmuls else self.free_pools
            pools.append((name, first, count if count < config.num_experts or config.depth != "stack" else None))
            if EXPERTS[kind].leaves:
                self.exits = first, first + count
            first += count
        self.carry = stay if ranks.size == 1 else functools.partial(exchanged, ranks.group)
        self.shared = SHARED[config.shared](config) if config.num_shared_experts else None
        self.routed_scale = routed_scale(config)

    def with_shared(self, routed_BTD: Tensor, x_BTD: Tensor, ctx: Context) -> Tensor:
        if self.routed_scale != 1:
            routed_BTD = self.routed_scale * routed_BTD
        return routed_BTD if self.shared is None else self.shared(x_BTD, ctx) + routed_BTD

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, list[RouteStats]]:
        valid_T = flat(ctx.valid_BT)
        route, x_TD = left_out(self.router(x_BTD, ctx), valid_T), unnormed(x_BTD, ctx).flatten(0, 1)
        experts = [(functools.partial(self.carry, self.get_submodule(name)), first, count) for name, first, count in self.pools]
        parts = [dispatch(x_TD, route, fn, first, self.to_mask(count, valid_T)) for fn, first, count in experts]
        ys = [y_TD for y_TD, _ in parts]
        for name, first, count in self.free_pools:
            chosen_TKn = route.expert_TK[:, :, None] == torch.arange(first, first + count, device=x_TD.device)
            ys.append(self.get_submodule(name)(x_TD, (route.weight_TK[:, :, None] * chosen_TKn).sum(1), ctx))
        stats = self.statistics(route, parts[0][1], x_BTD, ctx)
        return self.with_shared(sum(ys[1:], ys[0]).view_as(x_BTD), x_BTD, ctx), [stats]

    def to_mask(self, count: int | None, valid_T: Tensor | None) -> int | None:
        """dispatch's count: where every row has an expert, None saves the masks; rows of tokens that are left out have none."""
        return self.num_experts if count is None and valid_T is not None else count

    def statistics(self, route: Route, counts_E: Tensor, x_BTD: Tensor, ctx: Context) -> RouteStats:
        if ctx.cache is not None and ctx.cache.fills:  # decoding: nobody asks for means, which would be a tenth of the operators
            return self.about_exits(RouteStats(counts_E, 0.0, 0.0, 0.0, route.logits_TE, tokens=len(route.logits_TE)), route)
        stats = self.about_exits(route_stats(route, counts_E, flat(ctx.valid_BT)), route)
        return self.about_domains(self.about_rows(stats, route, x_BTD, ctx), route, ctx)

    def about_exits(self, stats: RouteStats, route: Route) -> RouteStats:
        if self.exits is None:
            return stats
        exits_T = torch.isin(route.expert_TK, torch.arange(*self.exits, device=route.expert_TK.device)).any(1)
        return stats._replace(exits_T=exits_T, exit_prob_T=route.logits_TE.softmax(-1)[:, slice(*self.exits)].sum(1))

    def about_domains(self, stats: RouteStats, route: Route, ctx: Context) -> RouteStats:
        if ctx.expert_BT is None:
            return stats
        prob_TE, expert_T = softmax(route.logits_TE) if route.prob_TE is None else route.prob_TE, ctx.expert_BT.flatten()
        nats_T = -prob_TE.gather(1, expert_T.clamp(min=0)[:, None]).clamp(min=1e-9).log().squeeze(1)
        return stats._replace(domain_loss=mean_over(nats_T * (expert_T >= 0), flat(ctx.valid_BT)))

    def about_rows(self, stats: RouteStats, route: Route, x_BTD: Tensor, ctx: Context) -> RouteStats:
        if not self.wants_rows:
            return stats
        prob_BTE, valid_BT = softmax(route.logits_TE).view(*x_BTD.shape[:2], -1), ctx.valid_BT
        valid_BT = torch.ones_like(prob_BTE[..., 0]) if valid_BT is None else valid_BT.type_as(prob_BTE)
        return stats._replace(chosen_BE=(prob_BTE * valid_BT[..., None]).sum(1), row_tokens_B=valid_BT.sum(1))


class DenseMLP(nn.Module):
    """The dense twin: the same ReLU^2 MLP at the same active width, plain matmuls."""

    def __init__(self, config: Config, ranks: ExpertRanks = ALL_HERE):
        super().__init__()
        width = config.hidden_size * config.top_k + config.shared_width
        self.up = nn.Parameter(torch.empty(width, config.n_embd))
        self.down = nn.Parameter(torch.empty(config.n_embd, width))

    def forward(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, list[RouteStats]]:
        hidden_BTF = F.linear(x_BTD, self.up.type_as(x_BTD))
        return F.linear(relu_squared(hidden_BTF), self.down.type_as(x_BTD)), []


FEED_FORWARDS = {"M": MoE, "D": DenseMLP}


def more(terms: Tensor | None, count: int = 1) -> Tensor | None:
    return None if terms is None else terms + count


class Block(nn.Module):
    """Mix the embedding back in, attend, feed forward."""

    def __init__(self, config: Config, layer: int, ranks: ExpertRanks = ALL_HERE):
        super().__init__()
        self.stream_mix = nn.Parameter(torch.empty(2)) if config.residual == "add" else None
        self.residual = RESIDUALS[config.residual]
        self.attention = ATTENTIONS[config.tiled("attention")[layer]](config, layer)
        self.ffn = FEED_FORWARDS[config.tiled("pattern")[layer]](config, ranks)
        self.before, self.after, self.tell = NORMS[config.tiled("norms")[layer]]
        self.is_shared = layer in config.key_makers.values()  # compiled, what nobody reads would still get a gradient of zeros

    def forward(self, x_BTD: Tensor, embedding_BTD: Tensor, ctx: Context) -> tuple[Tensor, list[RouteStats], tuple[Tensor, Tensor] | None]:
        enter, take_up = self.residual
        x_BTD = enter(self.stream_mix, x_BTD, embedding_BTD)
        y_BTD, kv = self.attention(self.before(x_BTD), self.tell(ctx, x_BTD))
        x_BTD = take_up(x_BTD, self.after(y_BTD), ctx.terms, embedding_BTD)
        y_BTD, stats = self.ffn(self.before(x_BTD), self.tell(ctx, x_BTD))
        return take_up(x_BTD, self.after(y_BTD), more(ctx.terms), embedding_BTD), stats, self.handed_on(kv)

    def handed_on(self, kv):
        return kv if self.is_shared else None


# -----------------------------------------------------------------------------
# Depth: in what order, and how often, the blocks run


def add_skip(weight: Tensor, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
    return blend(torch.stack([torch.ones_like(weight), weight]), x_BTD, y_BTD)


class Trail(NamedTuple):
    """What the blocks so far have left behind."""

    stats: list[RouteStats] = []
    kv: tuple[Tensor, Tensor] | None = None  # of the last one with keys and values


def run_block(block, x_BTD: Tensor, embedding_BTD: Tensor, ctx: Context, trail: Trail) -> tuple[Tensor, Trail]:
    """One block, told what it asks for of those before it."""
    if ctx.logits_before_TE is not None and trail.stats:
        ctx = ctx._replace(logits_before_TE=trail.stats[-1].logits_TE)
    if ctx.kv is not None:
        ctx = ctx._replace(kv=trail.kv)
    x_BTD, stats, kv = block(x_BTD, embedding_BTD, ctx)
    return x_BTD, Trail(trail.stats + stats, kv or trail.kv)


class Deep(NamedTuple):
    """What all layers together have made."""

    outputs: list[tuple[Tensor, Tensor | None]]  # streams (B, T, D) for the head, each with its tokens' weights (B, T) in the loss
    stats: list[RouteStats]  # one for each routed layer
    loss: Tensor | float = 0.0  # of depth itself, in training
    loops_BT: Tensor | None = None  # that each token went through
    choices_SBT: Tensor | None = None  # number of the layer that each step picked, identities last, -1 for tokens that had left


class Place(NamedTuple):
    """Where the new tokens and the keys stand: what a mask is made of."""

    position_T: Tensor
    position_S: Tensor
    doc_BT: Tensor
    doc_BS: Tensor
    windows: dict[str, Tensor]  # of each letter
    meta: int
    visible: callable  # the rule of the objective's masks


class Stack(nn.Module):
    """Every block once. The second half reads the first half's outputs in mirror order, U-net style (modded-nanogpt record 11)."""

    needs_keys = False  # nobody leaves, so all shapes stay
    to_compile = ("add_skip",)  # besides the blocks

    def __init__(self, config: Config):
        super().__init__()
        self.skip_weights = nn.Parameter(torch.empty(config.n_layer // 2))
        self.add_skip = add_skip

    def forward(self, blocks, embedding_BTD: Tensor, contexts: list[Context], place: Place) -> Deep:
        x_BTD, trail, outputs = embedding_BTD.clone(), Trail(), []  # a compiled Function refuses one tensor twice
        num_down = len(blocks) - len(self.skip_weights)
        for block, ctx in zip(blocks[:num_down], contexts[:num_down]):
            x_BTD, trail = run_block(block, x_BTD, embedding_BTD, ctx, trail)
            outputs.append(x_BTD)
        outputs = outputs[: len(self.skip_weights)]
        for block, ctx, weight in zip(blocks[num_down:], contexts[num_down:], self.skip_weights):
            x_BTD = self.add_skip(weight, x_BTD, outputs.pop())
            x_BTD, trail = run_block(block, x_BTD, embedding_BTD, ctx, trail)
        return Deep([(x_BTD, None)], trail.stats)


DEPTHS = {"stack": Stack}  # the zoo, below, has more

# -----------------------------------------------------------------------------
# Head and loss

TRITON_IS_THERE = importlib.util.find_spec("triton") is not None  # torch brings it along for CUDA, but not on every system


def on_cuda_a_kernel(plain):
    """Decorates a function that has a Triton kernel of the same name in kernels.py: tensors on CUDA go there. The plain one is __wrapped__."""

    @functools.wraps(plain)
    def pick(x: Tensor, *args, **kwargs):
        if not (x.is_cuda and TRITON_IS_THERE):
            return plain(x, *args, **kwargs)
        import kernels

        return getattr(kernels, plain.__name__)(x, *args, **kwargs)

    return pick


@on_cuda_a_kernel
def quantise(x: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale (rows, cols) in an FP8 type, clipped to its range, and its transpose, both contiguous."""
    most = torch.finfo(dtype).max
    q = (x.float() / scale).clamp(-most, most).to(dtype)  # in fp32, or bf16 would round first
    return q, q.T.contiguous()


class HeadMatmul(NamedTuple):
    """w_ready = prepare(w, x); z, saved = forward(x, w_ready); dx, dw = backward(dz, saved)."""

    prepare: callable
    forward: callable
    backward: callable


FP8_MOST = {"weight": 24.0, "dz": 1.0}  # in size, of a head weight and of the loss's gradient: scales are constants, never measured


def fp8_scale(name: str, n_embd: int) -> float:
    """What is divided by before e4m3, whose largest is 448; an input is RMS-normed, so at most sqrt(D)."""
    return FP8_MOST.get(name, math.sqrt(n_embd)) / 448


def fp8_matmul(a: Tensor, b_T: Tensor, a_scale: float, b_scale: float, **how) -> Tensor:
    """a @ b of FP8 matrices, b given as its transpose: the GPU wants both contiguous along what is summed over."""
    scales = (torch.full((), scale, device=a.device) for scale in (a_scale, b_scale))
    return torch._scaled_mm(a, b_T.T, *scales, **how)


def fp8_prepare(w_VD: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    return quantise(w_VD, fp8_scale("weight", w_VD.size(1)), torch.float8_e4m3fn)


def fp8_forward(x_TD: Tensor, w_ready: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple]:
    """z = x w^T with both sides in e4m3 (modded-nanogpt record 19)."""
    (w_VD, w_DV), D = w_ready, x_TD.size(1)
    x_f8_TD, x_f8_DT = quantise(x_TD, fp8_scale("x", D), torch.float8_e4m3fn)
    z_TV = fp8_matmul(x_f8_TD, w_VD, fp8_scale("x", D), fp8_scale("weight", D), out_dtype=torch.bfloat16, use_fast_accum=True)
    return z_TV, (x_f8_DT, w_DV)


def fp8_backward(dz_TV: Tensor, saved: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """dx (bf16) and dw (fp32); the incoming gradient, at most 1 in size, in e5m2."""
    x_DT, w_DV = saved
    x_scale, w_scale, dz_scale = (fp8_scale(name, len(x_DT)) for name in ("x", "weight", "dz"))
    dz_f8_TV, dz_f8_VT = quantise(dz_TV, dz_scale, torch.float8_e5m2)
    dx_TD = fp8_matmul(dz_f8_TV, w_DV, dz_scale, w_scale, out_dtype=torch.bfloat16)
    return dx_TD, fp8_matmul(dz_f8_VT, x_DT, dz_scale, x_scale, out_dtype=torch.float32)


HEADS = {
    "bf16": HeadMatmul(
        lambda w, x: w.type_as(x), lambda x, w: (x @ w.T, (x, w)), lambda dz, saved: (dz @ saved[1], dz.T @ saved[0])),
    "fp8": HeadMatmul(fp8_prepare, fp8_forward, fp8_backward),
}  # fmt: skip


@on_cuda_a_kernel
def softcap_nll(z_TV: Tensor, target_T: Tensor, vocab_size: int, softcap: float) -> Tensor:
    """Cross-entropy (T,) in nats, fp32, of logits softcapped to 2 c sigmoid(2 z / c); z becomes its own gradient.

    As the logits are bounded, exp needs no running maximum. A target below 0 counts nothing. On a CPU sigmoid takes a sixth of the
    time of tanh, and exp2 a third of that of exp."""
    s_TV = (z_TV.float() * (2 / softcap)).sigmoid_()
    bits = 2 * softcap / math.log(2)  # a logit is s * bits in powers of two; less the middle of their range it is in +-bits / 2
    e_TV = torch.rsub(s_TV, -bits / 2, alpha=-bits).exp2_()
    e_TV[:, vocab_size:] = 0
    total_T1 = e_TV.sum(-1, keepdim=True)
    counts_T1 = (target_T >= 0)[:, None].float()
    target_T1 = target_T.clamp(min=0)[:, None]
    nll_T1 = total_T1.log() - softcap * (2 * s_TV.gather(1, target_T1) - 1)
    dlogit_TV = e_TV.mul_(counts_T1 / total_T1).scatter_add_(1, target_T1, -counts_T1)
    z_TV.copy_(dlogit_TV.mul_(s_TV).mul_(1 - s_TV).mul_(4))
    return (nll_T1 * counts_T1).squeeze(1)


LOSS_CHUNK = {"cpu": 2**25, "cuda": 2**29}  # logits held at a time
LOSS_PIECE = {"cpu": 2**20, "cuda": 2**29}  # logits of which the loss is computed at a time: on a CPU what the caches hold in fp32


def loss_rows(limit: dict[str, int], w_VD: Tensor) -> int:
    """Tokens whose logits keep to a limit; multiples of 128, where there are as many, as FP8 matmuls want their sides aligned."""
    rows = max(1, limit.get(w_VD.device.type, 2**24) // len(w_VD))
    return rows - rows % 128 if rows > 128 else rows


def chunked_loss(x_TD: Tensor, w_VD: Tensor, target_T: Tensor, head: HeadMatmul, chunk_nll, weight_T: Tensor | None = None) -> Tensor:
    """Summed cross-entropy (nats) of the head w_VD (fp32), a chunk of tokens at a time: no more logits than LOSS_CHUNK ever exist.
    Tokens may have weights, fp32, which get gradients too."""
    return ChunkedLoss.apply(x_TD, w_VD, target_T, head, chunk_nll, weight_T, torch.is_grad_enabled())


class ChunkedLoss(torch.autograd.Function):
    """Forward makes the gradients too, where they are wanted, so that no logits are kept; backward only scales them."""

    @staticmethod
    def forward(ctx, x_TD, w_VD, target_T, head, chunk_nll, weight_T, with_gradients):
        nats, nll_T = torch.zeros((), device=x_TD.device), None if weight_T is None else torch.empty_like(weight_T)
        dx_TD, dw_VD, w_ready = torch.empty_like(x_TD), torch.zeros_like(w_VD), head.prepare(w_VD, x_TD)
        rows, piece = (loss_rows(limit, w_VD) for limit in (LOSS_CHUNK, LOSS_PIECE))
        for start in range(0, len(x_TD), rows):
            chunk = slice(start, start + rows)
            z, saved = head.forward(x_TD[chunk], w_ready)
            for some_z, some_target in zip(z.split(piece), target_T[chunk].split(piece)):
                nll = chunk_nll(some_z, some_target)
                if weight_T is not None:
                    part = slice(start, start + len(nll))
                    nll_T[part], nll = nll, nll * weight_T[part]
                    some_z *= weight_T[part, None]
                nats += nll.sum()
                start += len(some_z)
            if with_gradients:
                dx_chunk, dw_chunk = head.backward(z, saved)  # z is its own gradient by now
                dx_TD[chunk] = dx_chunk
                dw_VD += dw_chunk
        ctx.save_for_backward(dx_TD, dw_VD, nll_T)
        return nats

    @staticmethod
    def backward(ctx, dnats):
        dx_TD, dw_VD, nll_T = ctx.saved_tensors
        return dx_TD * dnats, dw_VD * dnats, None, None, None, None if nll_T is None else nll_T * dnats, None


# -----------------------------------------------------------------------------
# The model


class Output(NamedTuple):
    logits: Tensor | None  # (B, T, padded vocabulary), softcapped, padded ids at -inf; None when targets are given
    loss: Tensor | None  # nats per token, plus the auxiliary losses while training; None without targets
    stats: dict  # of this forward pass, without a cache: ce, balance_loss, z_loss, entropy, domain_loss, local_loss, loops (0-d), counts_LE


def less_entropy(stats: RouteStats) -> Tensor | float:
    """Minus the entropy of what a row's tokens choose on the whole, mean over rows (MoEUT, 2405.16039): rows are balanced one by one."""
    if stats.chosen_BE is None:
        return 0.0
    p_BE = stats.chosen_BE / stats.row_tokens_B[:, None].clamp(min=1)
    return (p_BE * p_BE.clamp(min=1e-12).log()).sum(-1).mean()


def token_numbers(first_token: Tensor, B: int, T: int, meta: int) -> Tensor:
    """(B * T,): each token's number in the global batch. The `meta` first ones of each row are not counted: in all rows they are -1, -2, ..."""
    own_BT = first_token + torch.arange(B * (T - meta), device=first_token.device).view(B, T - meta)
    return torch.cat([-1 - torch.arange(meta, device=first_token.device).expand(B, meta), own_BT], dim=1).flatten()


class Objective(NamedTuple):
    """What the loss asks of the model."""

    pose: callable  # (model, id_BT, targets_BT) -> inputs and targets; a target below 0 asks nothing
    asked: callable  # (config, T) -> by how many of a row's T tokens the loss is divided
    mask: callable  # (device type, T) -> the kind of mask over a whole sequence
    visible: callable  # its rule
    keys: callable  # mean number of keys that a token sees up to its own -> all that it sees


OBJECTIVES = {  # the zoo, below, has more
    "next": Objective(lambda model, id_BT, targets_BT: (id_BT, targets_BT), lambda config, T: T, mask_kind, visible, lambda keys: keys),
}


class GPT(nn.Module):
    """tokens -> logits or loss. `forward` mutates nothing but the cache; the loop calls `set_step` before and `balance` after."""

    def __init__(self, config: Config, ranks: ExpertRanks = ALL_HERE):
        super().__init__()
        self.config, self.ranks = config, ranks
        width, routed = config.n_head * config.head_dim, config.routed_layers
        self.embed = nn.Parameter(torch.empty(config.padded_vocab_size, config.n_embd))
        self.meta_tokens = nn.Parameter(torch.empty(config.num_meta_tokens, config.n_embd)) if config.num_meta_tokens else None
        self.ngram_embeds = nn.ParameterList(torch.empty(config.ngram_rows, config.n_embd) for _ in config.ngrams)
        self.value_embeds = nn.ParameterList(torch.empty(config.padded_vocab_size, width) for _ in range(config.value_embeds))
        self.blocks = nn.ModuleList(Block(config, layer, ranks) for layer in range(config.n_layer))
        self.depth = DEPTHS[config.depth](config)
        self.head = self.embed if config.tie_embeddings else nn.Parameter(torch.empty(config.padded_vocab_size, config.n_embd))
        self.chunk_nll = functools.partial(softcap_nll, vocab_size=config.vocab_size, softcap=config.softcap)
        # state that optimizer steps move, see balance(): the load of the last steps, and the selection bias
        self.register_buffer("load_WLE", torch.full((config.balance_window, routed, config.num_experts), 1 / config.num_experts))
        self.register_buffer("bias_LE", torch.zeros(routed, config.num_experts))
        self.register_buffer("counted_LE", torch.zeros(routed, config.num_experts, dtype=torch.int64))  # since the bias last moved
        self.register_buffer("eta_E", torch.tensor(config.expert_etas), persistent=False)
        self.register_buffer("balanced_E", torch.tensor(config.experts_balanced), persistent=False)
        # set by the loop, see set_step(): seed, step, number of the micro-batch's first token in the global batch, window
        self.register_buffer("clock", torch.tensor([0, 0, 0, config.window_size]), persistent=False)
        self.init_weights()

    # ---- state between steps

    def set_step(self, seed: int, step: int, first_token: int = 0, window: int | None = None):
        """Tell the model where in the run it is: keys of the router's noise, and the attention window in tokens."""
        self.clock.copy_(torch.tensor([seed, step, first_token, window or self.config.window_size]), non_blocking=True)

    @torch.no_grad()
    def balance(self, counts_LE: Tensor):
        """Once per optimizer step, with the counts of the whole global batch: move the load window, and the selection bias when
        enough tokens have been counted."""
        share_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp(min=1)
        self.load_WLE.copy_(torch.cat([self.load_WLE[1:], share_LE[None].float()]))
        even_E = 1 / self.eta_E / (1 / self.eta_E).mean()  # over the mean
        self.counted_LE += counts_LE
        counted_L1 = self.counted_LE.sum(-1, keepdim=True)
        share_LE, due_L1 = self.counted_LE / counted_L1.clamp(min=1), counted_L1 >= self.config.bias_update_threshold * self.config.top_k
        self.bias_LE += self.config.bias_update_factor * due_L1 * self.balanced_E * (share_LE.mean(-1, keepdim=True) * even_E - share_LE).sign()
        self.counted_LE *= ~due_L1
        self.bias_LE -= self.bias_LE.mean(-1, keepdim=True)  # selection ignores a common shift; this stops its drift

    # ---- forward

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, cache: Cache | None = None,
                doc_ids_BT: Tensor | None = None, expert_B: Tensor | None = None, real_B: Tensor | None = None) -> Output:
        """Logits of (B, T) ids or (B, T, D) embeddings, or with targets (-1 = ignored) the loss; with objective masked, ids and the loss of those
        that it hides.

        expert_B: the expert that each row's tokens should choose (-1: no matter), for stats["domain_loss"], which is not in the loss.
        real_B: rows that are not only there to fill up the batch; statistics leave the others out, and no expert sees them.
        Documents are told apart by doc_ids_BT (counting up along a row, from 0 or more), by default by the end-of-text tokens."""
        doc_BT, T, objective = self.documents(tokens_BT, doc_ids_BT, cache), tokens_BT.size(1), OBJECTIVES[self.config.objective]
        if targets_BT is not None:
            tokens_BT, targets_BT = objective.pose(self, tokens_BT, targets_BT)
        tokens_BT, doc_BT = self.with_meta_tokens(tokens_BT, doc_BT, cache)
        id_BT = self.ids(tokens_BT)
        id_BS, doc_BS = (id_BT, doc_BT) if cache is None else cache.claim(id_BT, doc_BT)  # S tokens so far, T of them new
        embedding_BTD, value_embeds = self.look_up(tokens_BT, id_BS, doc_BS)
        contexts, place = self.contexts(id_BT, doc_BT, doc_BS, value_embeds, cache)
        if expert_B is not None:
            contexts = [ctx._replace(expert_BT=expert_B[:, None].expand(doc_BT.shape)) for ctx in contexts]
        if real_B is not None:
            contexts = [ctx._replace(valid_BT=real_B[:, None].expand(doc_BT.shape)) for ctx in contexts]
        deep = self.depth(self.blocks, norm(self.with_meta_vectors(embedding_BTD, doc_BT)), contexts, place)
        if cache is not None:
            cache.length += doc_BT.size(1)
        outputs = [(norm(x_BTD[:, -T:]), flat(weight_BT, T)) for x_BTD, weight_BT in deep.outputs]
        stats = self.summary(deep, T) if cache is None else {}
        if targets_BT is None:
            return Output(self.logits(outputs[-1][0]), None, stats)
        head, target_T = HEADS[self.config.head if self.training else "bf16"], targets_BT.flatten()
        nats = sum(chunked_loss(x_BTD.flatten(0, 1), self.head, target_T, head, self.chunk_nll, weight_T) for x_BTD, weight_T in outputs)
        ce = nats / (len(targets_BT) * objective.asked(self.config, T))
        loss = ce + self.auxiliary_loss(stats) if self.training and cache is None else ce
        return Output(None, loss, stats | {"ce": ce.detach()})

    def with_meta_tokens(self, tokens_BT: Tensor, doc_BT: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """The row with num_meta_tokens more in front, end-of-text ids (or zeros) in a document of their own, number -1; no more where a cache
        has them already."""
        meta = self.config.num_meta_tokens if cache is None or cache.length == 0 else 0
        if meta == 0:
            return tokens_BT, doc_BT
        blank = 0 if tokens_BT.is_floating_point() else self.config.eot_token
        front = (0, 0) * (tokens_BT.ndim - 2) + (meta, 0)
        return F.pad(tokens_BT, front, value=blank), F.pad(doc_BT, (meta, 0), value=-1)

    def look_up(self, tokens_BT: Tensor, id_BS: Tensor, doc_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The embedding, and what each layer adds to its values: a table's rows or zero."""
        dtype, n = DTYPES[self.config.dtype], len(self.value_embeds)
        nothing = torch.zeros((), dtype=dtype, device=self.embed.device)
        if tokens_BT.is_floating_point():
            return tokens_BT.to(dtype), [nothing] * self.config.n_layer
        heads = (self.config.n_head, self.config.head_dim)
        tables = [F.embedding(tokens_BT, table).to(dtype).unflatten(-1, heads) for table in self.value_embeds]
        value_embeds = tables + [nothing] * (self.config.n_layer - 2 * n) + tables  # the last layers share the first layers' tables
        embedding_BTD, T = F.embedding(tokens_BT, self.embed), tokens_BT.size(1)
        lengths = list(map(int, self.config.ngrams))
        recent = slice(1 - max(lengths, default=1) - T, None)
        hashes = lengths and ngram_hashes(id_BS[:, recent], doc_BS[:, recent], max(lengths))
        for n, table in zip(lengths, self.ngram_embeds):
            embedding_BTD = embedding_BTD + F.embedding(hashes[n - 1][:, -T:] % len(table), table)
        return embedding_BTD.to(dtype), value_embeds

    def with_meta_vectors(self, embedding_BTD: Tensor, doc_BT: Tensor) -> Tensor:
        """The embeddings with the learned vectors in place of the blanks in front."""
        if self.meta_tokens is None:
            return embedding_BTD
        vector_TD = F.pad(self.meta_tokens, (0, 0, 0, doc_BT.size(1) - len(self.meta_tokens))).type_as(embedding_BTD)
        return torch.where((doc_BT < 0)[..., None], vector_TD, embedding_BTD)

    def ids(self, tokens_BT: Tensor) -> Tensor | None:
        return None if tokens_BT.is_floating_point() else tokens_BT

    def documents(self, tokens_BT: Tensor, doc_ids_BT: Tensor | None, cache: Cache | None) -> Tensor:
        """The caller's numbers, or one more at each end-of-text token, counting on from the cache."""
        if doc_ids_BT is not None:
            return doc_ids_BT
        starts_BT = torch.zeros_like(tokens_BT[..., 0]) if tokens_BT.is_floating_point() else tokens_BT == self.config.eot_token
        return starts_BT.long().cumsum(1) + (0 if cache is None else cache.last_doc())

    def contexts(self, id_BT: Tensor | None, doc_BT: Tensor, doc_BS: Tensor, value_embeds: list[Tensor],
                 cache: Cache | None) -> tuple[list[Context], Place]:  # fmt: skip
        """One for each layer, and what masks are made of."""
        (B, T), device, config = doc_BT.shape, doc_BT.device, self.config
        position_S = torch.arange(doc_BS.size(1), device=device)
        position_T = position_S[-T:]
        seed, step, first_token, window = self.clock.unbind()
        kind = OBJECTIVES[config.objective].mask(device.type, T) if cache is None else DecodeMask
        windows, meta = windows_in_use(config.window, window), config.num_meta_tokens
        masks = {letter: kind(position_T, position_S, doc_BT, doc_BS, tokens, meta) for letter, tokens in windows.items()}
        log_seen = dict.fromkeys(windows)
        if config.attn_softmax == "ssmax":
            log_seen = {letter: seen_keys(position_T, doc_BT, doc_BS, tokens, meta).log() for letter, tokens in windows.items()}
        follows_BS = F.pad(doc_BS, (1, -1), value=-2) == doc_BS
        turned_at = position_T if meta == 0 else position_T - document_begins(doc_BT, doc_BS) + meta * (doc_BT >= 0)  # as if each document came first
        table = functools.cache(lambda speed: rotary_tables(turned_at, config.head_dim, DTYPES[config.dtype], speed))
        layer_L, bias_LE = torch.arange(config.n_layer, device=device), F.pad(self.bias_LE, (0, 0, 0, 1))  # dense layers at the end read zeros
        before_TE = torch.zeros(B * T, config.num_experts, device=device) if config.router_residual else None
        terms_L = None if config.residual == "add" else 2 * layer_L + 1
        token_T, contexts = token_numbers(first_token, B, T, meta if T == len(position_S) else 0), []  # a cache may have the meta-tokens already
        for layer, (letter, value_embed) in enumerate(zip(config.tiled("window"), value_embeds)):
            r = config.tiled("pattern")[:layer].count("M")
            noise_key, (cos, sin) = (seed, step, layer_L[r], token_T), table(config.turning(layer)[1])
            kv = () if config.tiled("attention")[layer] == "S" else None
            contexts.append(Context(
                id_BT, masks[letter], value_embed, cos, sin, follows_BS, noise_key, bias_LE[r], cache, before_TE, kv,
                None, None if terms_L is None else terms_L[layer], None, log_seen[letter]))  # fmt: skip
        return contexts, Place(position_T, position_S, doc_BT, doc_BS, windows, meta, OBJECTIVES[config.objective].visible)

    def summary(self, deep: Deep, T: int) -> dict[str, Tensor]:
        """Means over routed layers, counts per layer. balance_loss is 1 at even load (2101.03961 eq. 4, per layer; with eta, 2410.07348 eq. 8).

        Its load is the global batch's of the last steps, so the gradient adds up over micro-batches and ranks."""
        empty, stats = self.bias_LE.new_zeros(0), deep.stats
        prob_LE = torch.stack([s.prob_E for s in stats]) if stats else self.bias_LE.new_zeros(self.bias_LE.shape)
        counts_LE = torch.stack([s.counts_E for s in stats]) if stats else self.bias_LE.long()
        balance_L = self.config.num_experts * (self.balanced_E * self.eta_E * self.load_WLE.mean(0) * prob_LE).sum(-1)
        mean = lambda values: torch.stack(values).mean() if values else empty.sum()
        return {
            "balance_loss": mean(list(balance_L)),
            "z_loss": mean([s.z_loss for s in stats]),
            "entropy": mean([s.entropy for s in stats]),
            "counts_LE": counts_LE,
            "domain_loss": sum(s.domain_loss for s in stats) / max(len(stats), 1) + empty.sum(),
            "local_loss": sum(s.local_loss for s in stats) + deep.loss + self.config.entropy_coef * sum(map(less_entropy, stats)),
            "loops": empty.new_ones(()) if deep.loops_BT is None else deep.loops_BT[:, -T:].float().mean(),
        }

    def auxiliary_loss(self, stats: dict[str, Tensor]) -> Tensor:
        """Summed over layers, so that each router feels its coefficient whatever the depth."""
        per_layer = self.config.balance_coef * stats["balance_loss"] + self.config.z_coef * stats["z_loss"]
        return self.config.routed_layers * per_layer + stats["local_loss"]

    def logits(self, x_BTD: Tensor) -> Tensor:
        z_BTV = F.linear(x_BTD, self.head.type_as(x_BTD)).float()
        logits_BTV = 2 * self.config.softcap * torch.sigmoid(z_BTV * (2 / self.config.softcap))
        logits_BTV[..., self.config.vocab_size :] = -math.inf
        return logits_BTV

    @torch.no_grad()
    def stream(self, tokens_BT: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
               stop_at: int | None = None):  # fmt: skip
        """Yields the ids (B,) that follow (B, T >= 1) ids, one position at a time, sampled with a KV cache.

        temperature 0 takes the likeliest id; top_k keeps only the k likeliest (0 = all), top_p of those the likeliest that together have this
        probability (2019's nucleus, 1904.09751). Row b draws from seed + b alone, whatever the other rows are. A row that has said `stop_at` repeats
        it, and when all have, that is the end. A model in training mode is sampled in evaluation mode and put back.
        Raises ValueError for an empty prompt, ConfigError for an objective that looks both ways and for a number out of range."""
        B, T = tokens_BT.shape
        if self.config.objective != "next" and max_new_tokens:
            raise ConfigError(f"objective is {self.config.objective}, which looks both ways; to continue a text it must be next")
        limits = {"temperature": (temperature, 0 <= temperature < math.inf, "at least 0"), "top_k": (top_k, top_k >= 0, "at least 0"),
                  "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1")}  # fmt: skip
        for name, (value, fine, legal) in limits.items():
            if not fine:
                raise ConfigError(f"{name} is {value}; it must be {legal}")
        if T == 0:
            raise ValueError("the prompt is empty; start it with the end-of-text token")
        training, generators = self.training, [torch.Generator(tokens_BT.device).manual_seed(seed + b) for b in range(B)]
        cache, new_BT = Cache(self.config, B, T + max_new_tokens, tokens_BT.device), tokens_BT
        ended_B = torch.zeros_like(tokens_BT[:, 0], dtype=torch.bool)
        self.eval()
        try:
            for _ in range(max_new_tokens):
                with torch.compiler.set_stance("force_eager"):  # or each new length of the cache would be compiled for itself
                    logits_BV = self(new_BT, cache=cache).logits[:, -1, : self.config.vocab_size]
                id_B = picked_tokens(logits_BV, temperature, top_k, top_p, generators)
                if stop_at is not None:
                    id_B = id_B.masked_fill(ended_B, stop_at)
                    ended_B = id_B == stop_at
                yield id_B
                if stop_at is not None and ended_B.all():
                    break
                new_BT = id_B[:, None]
        finally:
            self.train(training)

    def generate(self, tokens_BT: Tensor, max_new_tokens: int, **how) -> Tensor:
        """The prompt (B, T) and what stream() yields after it: (B, T + max_new_tokens), less where all rows stopped before."""
        return torch.cat([tokens_BT, *(id_B[:, None] for id_B in self.stream(tokens_BT, max_new_tokens, **how))], dim=1)

    def for_inference(self) -> "GPT":
        """The model with its matrices in the type of the activations: cast once, not in every forward, to the same bits, in half the memory.
        What it loses is what training would need: do not train or save it."""
        for name, parameter in self.named_parameters():
            if parameter_rule(name).kind in ("matrix", "expert", "head"):
                parameter.data = parameter.data.to(DTYPES[self.config.dtype])
        return self

    # ---- the Hugging Face Hub, see on_the_hub()

    encoding: str | None = None  # data.py's name of the encoding that the ids are of, where it is known

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **kwargs) -> "GPT":
        """The model of a folder that save_pretrained() wrote or of a repository on the Hub, in evaluation mode. kwargs are those of
        huggingface_hub's PyTorchModelHubMixin: revision, token, cache_dir, map_location, ..."""
        return on_the_hub().from_pretrained(name_or_folder, **kwargs)

    def save_pretrained(self, folder: str | Path, card: str = "", files: dict[str, bytes] | None = None, where: str = "", **kwargs):
        """Write config.json, model.safetensors, a model card (README.md) that goes on with `card`, and `files`. The card tells to load the model
        from `where`, by default the folder."""
        return on_the_hub().of(self, card, files or {}).save_pretrained(folder, model_card_kwargs={"where": where or str(folder)}, **kwargs)

    def push_to_hub(self, repo_id: str, card: str = "", files: dict[str, bytes] | None = None, **kwargs) -> str:
        """The same into a repository on the Hub, which is made if it is not there. Returns the commit's address."""
        return on_the_hub().of(self, card, files or {}).push_to_hub(repo_id, model_card_kwargs={"where": HUB + repo_id}, **kwargs)

    # ---- parameters

    def parameter_kinds(self) -> dict[str, str]:
        """Parameter name -> embed, value_embed, head, matrix, expert, router or scalar."""
        return {name: parameter_rule(name).kind for name, _ in self.named_parameters()}

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> "GPT":
        """Give every parameter its value, drawn on the CPU so that any device starts equal. Returns the model.

        A rank that holds some of the experts draws all of them, layer by layer, and keeps its own."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            rule, shape = parameter_rule("tied" if parameter is self.head and self.config.tie_embeddings else name), self.whole_shape(name)
            first = self.ranks.first(shape[0]) if rule.kind == "expert" else 0
            parameter.copy_(rule.init(torch.empty(shape, device="cpu"), generator)[first : first + len(parameter)])
        return self

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape with the experts of all ranks."""
        shape = tuple(self.get_parameter(name).shape)
        return (shape[0] * self.ranks.size, *shape[1:]) if parameter_rule(name).kind == "expert" else shape


def picked_tokens(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, generators: list[torch.Generator]) -> Tensor:
    """(B,): an id for each row, drawn with the row's own generator; see GPT.stream for the rules."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    kept_BK, id_BK = logits_BV.topk(min(top_k, logits_BV.size(1)) or logits_BV.size(1))  # likeliest first
    prob_BK = ((kept_BK - kept_BK[:, :1]) / temperature).softmax(-1)
    prob_BK = prob_BK.masked_fill(prob_BK.cumsum(-1) - prob_BK >= top_p, 0)  # what is likelier has the mass already
    pick_B1 = torch.stack([torch.multinomial(prob_K, 1, generator=generator) for prob_K, generator in zip(prob_BK, generators)])
    return id_BK.gather(1, pick_B1)[:, 0]


def small(p: Tensor, generator: torch.Generator) -> Tensor:
    """GPT-2's: as the embedding is normed, the length matters to the head alone, whose logits then have a standard deviation of 0.02 sqrt(n_embd)."""
    return p.normal_(std=0.02, generator=generator)


def constant(*values):
    return lambda p, generator: p.copy_(torch.tensor(values, device="cpu").expand_as(p))


def normal(p: Tensor, generator: torch.Generator) -> Tensor:
    return p.normal_(generator=generator)


def uniform(p: Tensor, generator: torch.Generator) -> Tensor:
    """Standard deviation half of 1 / sqrt(fan in), per matrix: the fan in is the last dimension (modded-nanogpt record 19)."""
    bound = math.sqrt(3) * 0.5 * p.size(-1) ** -0.5
    return p.uniform_(-bound, bound, generator=generator)


class ParameterRule(NamedTuple):
    kind: str  # which optimizer group it belongs to
    init: callable  # (empty CPU tensor, generator) -> the tensor, filled


PARAMETER_RULES = {  # the end of a parameter's name -> its rule; the zoo, below, has more
    "embed": ParameterRule("embed", normal),
    "tied": ParameterRule("embed", small),  # the embedding, if it is the head too
    "meta_tokens": ParameterRule("embed", normal),
    "ngram_embeds.*": ParameterRule("ngram_embed", constant(0.0)),
    "value_embeds.*": ParameterRule("value_embed", normal),
    "head": ParameterRule("head", constant(0.0)),
    "attention.qkv": ParameterRule("matrix", uniform),
    "attention.out": ParameterRule("matrix", constant(0.0)),
    "ffn.up": ParameterRule("matrix", uniform),
    "ffn.down": ParameterRule("matrix", constant(0.0)),
    "experts.up": ParameterRule("expert", uniform),
    "experts.down": ParameterRule("expert", constant(0.0)),
    "router.gate": ParameterRule("router", constant(0.0)),
    "router.noise": ParameterRule("router", constant(0.0)),
    "attention.value_mix": ParameterRule("scalar", constant(0.5, 0.5)),
    "stream_mix": ParameterRule("scalar", constant(1.0, 0.0)),
    "depth.skip_weights": ParameterRule("scalar", constant(1.0)),
}


def parameter_rule(name: str) -> ParameterRule:
    words = ["*" if word.isdigit() else word for word in name.split(".")]
    for ending, rule in PARAMETER_RULES.items():
        if words[-len(ending.split(".")) :] == ending.split("."):
            return rule
    raise KeyError(f"parameter {name} has no rule in PARAMETER_RULES: give it a kind and an initial value")


# -----------------------------------------------------------------------------
# The zoo: further entries of the tables, which the speedrun does not use

# ---- attention


class SeparateAttention(Attention):
    """What the following share: queries by a matrix of their own."""

    def add_projections(self, config: Config, width: int):
        self.q = nn.Parameter(torch.empty(width, config.n_embd))

    def project(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.queries(x_BTD, ctx), self.keys_values(x_BTD, ctx)

    def queries(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        return self.turned(F.linear(x_BTD, self.q.type_as(x_BTD)).unflatten(-1, (self.n_head, -1)), ctx)


class LatentAttention(SeparateAttention):
    """MLA (DeepSeek-V2, 2405.04434): all heads' values and the half of their keys that stands still are made of one normed vector of
    latent_dim numbers; the half that turns is one key for all heads. These two are all that a cache keeps, so value embeddings stay out."""

    def add_projections(self, config: Config, width: int):
        super().add_projections(config, width)
        D, R = config.n_embd, config.latent_dim
        shapes = {"latent": (R, D), "key": (config.head_dim // 2, D), "key_up": (width // 2, R), "value_up": (width, R)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def keys_values(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        latent_BTR, key = (F.linear(x_BTD, weight.type_as(x_BTD)) for weight in (self.latent, self.key))
        latent_BTR, key = norm(latent_BTR), self.rotary.qk(key[:, :, None], *map(turning_half, (ctx.cos, ctx.sin)))
        if ctx.cache is not None:
            latent_BTR, key = ctx.cache.extend(self, latent_BTR, key)
        still, v = (F.linear(latent_BTR, weight.type_as(x_BTD)).unflatten(-1, (self.n_head, -1)) for weight in (self.key_up, self.value_up))
        a, b = key.expand(-1, -1, self.n_head, -1).chunk(2, dim=-1)
        a_still, b_still = still.chunk(2, dim=-1)
        return self.qk_norm(torch.cat([a, a_still, b, b_still], dim=-1)), v


def turning_half(table: Tensor) -> Tensor:
    """Of a rotary table (..., C) the channels that turn (..., C/2)."""
    a, _, b, _ = table.chunk(4, dim=-1)
    return torch.cat([a, b], dim=-1)


class SharedAttention(SeparateAttention):
    """Queries of its own over the keys and values of the nearest layer before that makes some: MLKV (2406.09297). It needs no cache."""

    def keys_values(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        return ctx.kv


class RoutedAttention(SeparateAttention):
    """SwitchHead (2312.07987): each head has attn_experts matrices for its values and as many for its outputs, and a token meets attn_top_k of
    each, weighted by the sigmoids that chose them. Queries and keys are plain. No value embeddings, and nothing balances the choice."""

    def add_projections(self, config: Config, width: int):
        super().add_projections(config, width)
        H, E, D = config.n_head, config.attn_experts, config.n_embd
        self.top_k = config.attn_top_k
        self.k, self.choice = nn.Parameter(torch.empty(width, D)), nn.Parameter(torch.empty(2, H * E, D))
        self.values = nn.Parameter(torch.empty(H * E, config.head_dim, D))

    def add_output(self, config: Config, width: int):
        self.outputs = nn.Parameter(torch.empty(config.n_head * config.attn_experts, config.n_embd, config.head_dim))

    def choose(self, x_BTD: Tensor, which: int) -> Route:
        """Of every head of every token (T * H,), in this order."""
        score_TX = linear_fp32(x_BTD.flatten(0, 1), self.choice[which])
        weight_NK, expert_NK = score_TX.view(len(score_TX) * self.n_head, -1).sigmoid().topk(self.top_k)
        head_N1 = torch.arange(self.n_head, device=x_BTD.device).repeat(len(score_TX))[:, None]
        return Route(expert_NK + head_N1 * (score_TX.size(1) // self.n_head), weight_NK, score_TX)

    def keys_values(self, x_BTD: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        k = self.turned(F.linear(x_BTD, self.k.type_as(x_BTD)).unflatten(-1, (self.n_head, -1)), ctx)
        source_ND = unnormed(x_BTD, ctx).flatten(0, 1).repeat_interleave(self.n_head, 0)
        v, _ = dispatch(source_ND, self.choose(x_BTD, 0), self.matrices(self.values))
        v = self.rotary.vo(v.view(k.shape), ctx.cos, ctx.sin)
        return (k, v) if ctx.cache is None else ctx.cache.extend(self, k, v)

    def output(self, y_BTHC: Tensor, x_BTD: Tensor) -> Tensor:
        said_ND, _ = dispatch(y_BTHC.flatten(0, 2), self.choose(x_BTD, 1), self.matrices(self.outputs))
        return said_ND.view(*y_BTHC.shape[:3], -1).sum(2)

    def matrices(self, weight_XNK: Tensor):
        return lambda rows, offs: grouped_mm(rows, weight_XNK.type_as(rows), offs)


ATTENTIONS |= {"L": LatentAttention, "S": SharedAttention, "R": RoutedAttention}


def seen_keys(q_position: Tensor, q_doc_BT: Tensor, kv_doc_BS: Tensor, window, meta: int) -> Tensor:
    """How many keys each query sees (B, T): what visible() adds up to."""
    own_BT = q_position - torch.maximum(document_begins(q_doc_BT, kv_doc_BS), q_position - window + 1) + 1
    return torch.where(q_position < meta, q_position + 1, own_BT + meta)


def scalable_softmax(attention: Attention, q_BTHC: Tensor, ctx: Context) -> Tensor:
    """SSMax (2501.19399): scores are multiplied by s log n with n the number of keys that this token sees and s learned for each head, so that
    a score which stands out by more than 1 / s keeps its share of the attention however long the context. After QK-norm, which would undo it."""
    return q_BTHC * (attention.sharpness[:, None] * ctx.log_seen_BT[:, :, None, None]).type_as(q_BTHC)


SOFTMAXES |= {"ssmax": scalable_softmax}

# N: NoPE. V: VO-RoPE (kexue.fm/archives/10862), what is read of a value depends on its distance; B: with queries and keys, as usual.
# W: wavelet-like (after 2502.02004, which finds RoPE to be a wavelet transform of one scale): a layer's frequencies are stretched like its
# window, so that all layers have the same number of turns inside their windows, and the shortest has the frequencies of H.
ROTARIES |= {
    "N": Rotary(unchanged, unchanged, lambda divisor: 1.0),
    "V": Rotary(unchanged, rotate, lambda divisor: 1.0),
    "B": Rotary(rotate, rotate, lambda divisor: 1.0),
    "W": Rotary(rotate, unchanged, lambda divisor: divisor / max(WINDOWS.values())),
}

# R: peri-norm (2502.02737). Mind that norm(a y) = norm(y): what comes after it has forgotten every scale. Gates, routed_scale and zero experts then
# only mix directions: a token with one zero expert and one MLP gets the MLP at full length. And at an output of zeros, which zero-initialised
# projections give, its slope is 1 / sqrt(eps), about 2,900: the first gradients of these projections are as much larger.
# U: MoEUT's (2405.16039): queries, keys and routers see the normed stream, the values of routed attention and the experts the stream itself.
NORMS |= {"R": Norms(norm, norm, lambda ctx, x_BTD: ctx), "U": Norms(norm, unchanged, lambda ctx, x_BTD: ctx._replace(raw_BTD=x_BTD))}
PARAMETER_RULES |= {
    "attention.q": ParameterRule("matrix", uniform),
    "attention.latent": ParameterRule("matrix", uniform),
    "attention.key": ParameterRule("matrix", uniform),
    "attention.key_up": ParameterRule("matrix", uniform),
    "attention.value_up": ParameterRule("matrix", uniform),
    "attention.k": ParameterRule("matrix", uniform),
    "attention.values": ParameterRule("matrix", uniform),
    "attention.choice": ParameterRule("router", constant(0.0)),
    "attention.outputs": ParameterRule("matrix", constant(0.0)),
    "attention.sharpness": ParameterRule("scalar", constant(0.168)),  # the mean of 0.168 log n is 1 up to n = 1,024
}

# ---- routers


class HashRouter(nn.Module):
    """The baseline that learns nothing: token id mod E, further choices spread evenly, uniform gates (Hash Layers, 2106.04426)."""

    def __init__(self, config: Config):
        super().__init__()
        self.top_k, self.num_experts = config.top_k, config.num_experts

    def forward(self, x_BTD: Tensor, ctx: Context) -> Route:
        choice_K = torch.arange(self.top_k, device=x_BTD.device) * (self.num_experts // self.top_k)
        expert_TK = (ctx.token_BT.flatten()[:, None] + choice_K) % self.num_experts
        weight_TK = torch.full_like(expert_TK, 1 / self.top_k, dtype=torch.float32)
        return Route(expert_TK, weight_TK, torch.zeros(len(expert_TK), self.num_experts, device=x_BTD.device))


class MLPRouter(Router):
    """Two layers with ReLU between."""

    def __init__(self, config: Config):
        super().__init__(config, config.router_dim)
        self.up = nn.Parameter(torch.empty(config.router_dim, config.n_embd))

    def logits(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        return linear_fp32(x_BTD.flatten(0, 1), self.up).relu() @ self.gate.T


class ConvRouter(Router):
    """A causal convolution over the last router_kernel tokens of the document: kernel 1 is the linear router. The taps lie side by side in
    one matrix (E, K D), the current token's first."""

    def __init__(self, config: Config):
        super().__init__(config, config.router_kernel * config.n_embd)
        self.kernel = config.router_kernel

    def logits(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        return linear_fp32(taps(self, x_BTD, ctx, self.kernel).flatten(0, 1), self.gate)


def taps(module: nn.Module, x_BTD: Tensor, ctx: Context, kernel: int) -> Tensor:
    """(B, T, kernel * D): each token and those before it, the current one first, zeros beyond the start of its document."""
    T, back = x_BTD.size(1), kernel - 1
    x_BSD = F.pad(x_BTD, (0, 0, back, 0)) if ctx.cache is None else remembered(module, x_BTD, ctx.cache, back)
    follows_BS = F.pad(ctx.follows_BS, (back, 0))[:, -T - back :]
    found, same_BT = [x_BTD], torch.ones_like(follows_BS[:, back:])
    for lag in range(1, kernel):
        same_BT = same_BT & follows_BS[:, back - lag + 1 : back - lag + 1 + T]  # lag steps back without leaving the document
        found.append(torch.where(same_BT[..., None], x_BSD[:, back - lag : back - lag + T], 0))
    return torch.cat(found, dim=-1)


def remembered(module: nn.Module, x_BTD: Tensor, cache: Cache, count: int) -> Tensor:
    """x with the `count` inputs before it in front (zeros before the first), which the cache keeps for the next call."""
    before_BTD = cache.recall(module, x_BTD.new_zeros(x_BTD.size(0), count, x_BTD.size(2)))
    x_BSD = torch.cat([before_BTD, x_BTD], dim=1)
    cache.remember(module, x_BSD[:, x_BSD.size(1) - count :])
    return x_BSD


class RecurrentRouter(Router):
    """A gated linear recurrence over the document, minGRU (2410.01201): h_t = (1 - z_t) h_{t-1} + z_t v_t, z = sigmoid(W_z x), v = W_v x.

    In fp32; a scan of log2(T) steps. A document's first token forgets what came before: its (1 - z) is 0."""

    def __init__(self, config: Config):
        super().__init__(config, config.router_dim)
        self.update, self.value = (nn.Parameter(torch.empty(config.router_dim, config.n_embd)) for _ in range(2))

    def logits(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        B, T, _ = x_BTD.shape
        both = linear_fp32(x_BTD.flatten(0, 1), torch.cat([self.update, self.value])).unflatten(0, (B, T))
        z_BTC, v_BTC = both.chunk(2, dim=-1)
        z_BTC = z_BTC.sigmoid()
        h_BTC = linear_scan((1 - z_BTC) * ctx.follows_BS[:, -T:, None], z_BTC * v_BTC, self.state(B, ctx, z_BTC))
        if ctx.cache is not None:
            ctx.cache.remember(self, h_BTC[:, -1])
        return h_BTC.flatten(0, 1) @ self.gate.T

    def state(self, B: int, ctx: Context, like: Tensor) -> Tensor:
        zeros_BC = like.new_zeros(B, like.size(-1))
        return zeros_BC if ctx.cache is None else ctx.cache.recall(self, zeros_BC)


def linear_scan(a_BTC: Tensor, b_BTC: Tensor, h_BC: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t for all t, from h_BC on: each of log2(T) rounds doubles how far back a token has looked."""
    b_BTC = torch.cat([b_BTC[:, :1] + a_BTC[:, :1] * h_BC[:, None], b_BTC[:, 1:]], dim=1)
    reach, T = 1, a_BTC.size(1)
    while reach < T:
        b_BTC = b_BTC + a_BTC * F.pad(b_BTC, (0, 0, reach, 0))[:, :T]
        a_BTC = a_BTC * F.pad(a_BTC, (0, 0, reach, 0))[:, :T]
        reach *= 2
    return b_BTC


class AttentionRouter(Router):
    """One causal head over what the layer's feed-forward sees, with the layer's own window and documents, scores the experts."""

    def __init__(self, config: Config):
        super().__init__(config, config.router_dim)
        self.qkv = nn.Parameter(torch.empty(3 * config.router_dim, config.n_embd))

    def logits(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        q, k, v = F.linear(x_BTD, self.qkv.type_as(x_BTD)).chunk(3, dim=-1)
        if ctx.cache is not None:
            k, v = ctx.cache.extend(self, k, v)
        y_BTC = ctx.mask.attend(norm(q)[:, None], norm(k)[:, None], v[:, None], q.size(-1) ** 0.5 / 4)[:, 0]
        return linear_fp32(y_BTC.flatten(0, 1), self.gate)


ROUTERS |= {"hash": HashRouter, "mlp": MLPRouter, "conv": ConvRouter, "recurrent": RecurrentRouter, "attention": AttentionRouter}


def sigmoid_gates(logits_TE: Tensor, expert_TK: Tensor, power: float) -> Tensor:
    kept_TK = logits_TE.gather(1, expert_TK).sigmoid()
    return kept_TK / kept_TK.sum(-1, keepdim=True) ** power


def sigmoid_shares(logits_TE: Tensor) -> Tensor:
    score_TE = logits_TE.sigmoid()
    return score_TE / score_TE.sum(-1, keepdim=True)


SCORES |= {"sigmoid": Scores(torch.sigmoid, sigmoid_gates, sigmoid_shares)}  # DeepSeek-V3, 2412.19437


def squared_variation(x_E: Tensor) -> Tensor:
    """The squared coefficient of variation: variance over squared mean."""
    return x_E.var(correction=0) / x_E.mean().square().clamp(min=1e-10)


def smooth_load(logits_TE: Tensor, noisy_TE: Tensor, spread_TE: Tensor, k: int) -> Tensor:
    """(E,): each expert's expected number of tokens if its own noise were drawn anew (1701.06538 eq. 8-10).

    An expert is chosen when it passes the k-th largest of the others: the (k+1)-th of all if it is among the first k, else the k-th."""
    top_TK = noisy_TE.topk(k + 1).values
    passes = noisy_TE > top_TK[:, k:]
    threshold_TE = torch.where(passes, top_TK[:, k:], top_TK[:, k - 1 : k])
    return torch.special.ndtr((logits_TE - threshold_TE) / spread_TE).sum(0)


PARAMETER_RULES |= {
    "router.residual": ParameterRule("router", constant(0.0)),
    "router.up": ParameterRule("router", uniform),
    "router.update": ParameterRule("router", uniform),
    "router.value": ParameterRule("router", uniform),
    "router.qkv": ParameterRule("router", uniform),
}

# ---- experts


class ReLUExperts(MLPExperts):
    """The same with ReLU, as sigma-MoE has it (2310.10837)."""

    activation = staticmethod(torch.relu)


class SwiGLUExperts(nn.Module):
    """silu(gate x) * (up x), then down (2002.05202): three matrices of two thirds of the width."""

    has_matmuls, leaves = True, False

    def __init__(self, config: Config, num_experts: int):
        super().__init__()
        width, _ = self.width(config.hidden_size)
        self.gate, self.up = (nn.Parameter(torch.empty(num_experts, width, config.n_embd)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(num_experts, config.n_embd, width))

    @staticmethod
    def width(hidden_size: int) -> tuple[int, float]:
        width = 8 * round(hidden_size * 2 / 3 / 8)
        return width, 3 * width / (2 * hidden_size)

    def forward(self, rows_RD: Tensor, offs_E: Tensor) -> Tensor:
        gate_RF, up_RF = (grouped_mm(rows_RD, weight.type_as(rows_RD), offs_E) for weight in (self.gate, self.up))
        return grouped_mm(F.silu(gate_RF) * up_RF, self.down.type_as(rows_RD), offs_E)


class KANExperts(nn.Module):
    """Two Kolmogorov-Arnold layers (2404.19756) of cubic B-splines on 5 intervals of [-2, 2], beside silu: each input becomes 9 features
    of a grouped GEMM, so at equal FLOPs the hidden width is a ninth of an MLP's. What is between the layers is normed into the grid."""

    has_matmuls, leaves = True, False
    INTERVALS, REACH = 5, 2.0
    FEATURES = INTERVALS + 3 + 1

    def __init__(self, config: Config, num_experts: int):
        super().__init__()
        width, _ = self.width(config.hidden_size)
        self.up = nn.Parameter(torch.empty(num_experts, width, self.FEATURES * config.n_embd))
        self.down = nn.Parameter(torch.empty(num_experts, config.n_embd, self.FEATURES * width))

    @staticmethod
    def width(hidden_size: int) -> tuple[int, float]:
        width = 8 * round(hidden_size / KANExperts.FEATURES / 8)
        return width, KANExperts.FEATURES * width / hidden_size

    @staticmethod
    def features(x_RD: Tensor) -> Tensor:
        """(R, 9 D): silu(x), then the eight B-splines, which add up to 1 on the grid and vanish beyond its last knots."""
        step = 2 * KANExperts.REACH / KANExperts.INTERVALS
        centres = torch.arange(KANExperts.FEATURES - 1, device=x_RD.device) * step - KANExperts.REACH - step
        far = ((x_RD[:, None].float() - centres[:, None]) / step).abs()  # (R, 8, D), in intervals from each spline's centre
        spline = torch.where(far < 1, 2 / 3 - far.square() * (1 - far / 2), (2 - far).clamp(min=0) ** 3 / 6)
        return torch.cat([F.silu(x_RD)[:, None], spline.type_as(x_RD)], dim=1).flatten(1)

    def forward(self, rows_RD: Tensor, offs_E: Tensor) -> Tensor:
        hidden_RF = grouped_mm(self.features(rows_RD), self.up.type_as(rows_RD), offs_E)
        return grouped_mm(self.features(norm(hidden_RF)), self.down.type_as(rows_RD), offs_E)


class FreeExperts(nn.Module):
    """n experts without matmuls (MoE++, 2410.07348): element by element, in token order, each token weighted by its gate for each of them.

    They see what the MLPs see; a token that did not choose them is replaced by zero before, not after: its output
    and its gradient are exact zeros whatever it holds."""

    has_matmuls, leaves = False, False

    def __init__(self, config: Config, num_experts: int):
        super().__init__()

    def forward(self, x_TD: Tensor, gate_Tn: Tensor, ctx: Context) -> Tensor:
        gate_T1 = gate_Tn.sum(1, keepdim=True).type_as(x_TD)
        return gate_T1 * self.output(torch.where(gate_T1 > 0, x_TD, 0), ctx)

    def output(self, x_TD: Tensor, ctx: Context) -> Tensor:
        raise NotImplementedError


class IdentityExperts(FreeExperts):
    """x itself; MoE++ calls it copy."""

    def output(self, x_TD: Tensor, ctx: Context) -> Tensor:
        return x_TD


class ReLUSquaredExperts(FreeExperts):
    """relu(x)^2 without weights."""

    def output(self, x_TD: Tensor, ctx: Context) -> Tensor:
        return relu_squared(x_TD)


class NoiseExperts(FreeExperts):
    """x and normal noise of variance 1/4 in training; x alone in evaluation. The noise is the router's hash, of other numbers."""

    def output(self, x_TD: Tensor, ctx: Context) -> Tensor:
        seed, step, layer, token_T = ctx.noise_key
        return x_TD + hashed_normal(seed, step, layer + 2**16, token_T, x_TD.size(1)).type_as(x_TD) / 2 if self.training else x_TD


class ZeroExperts(FreeExperts):
    """Nothing: a token that chooses it does less."""

    def forward(self, x_TD: Tensor, gate_Tn: Tensor, ctx: Context) -> Tensor:
        return torch.zeros_like(x_TD)


class ExitExperts(ZeroExperts):
    """Nothing, and with `halt exit` the token leaves the loop after this round. The balance leaves it alone."""

    leaves = True


class ConstantExperts(FreeExperts):
    """a x + b v with a learned vector v and (a, b) = softmax(W x), for each expert its own."""

    def __init__(self, config: Config, num_experts: int):
        super().__init__(config, num_experts)
        self.mix = nn.Parameter(torch.empty(num_experts, 2, config.n_embd))
        self.vector = nn.Parameter(torch.empty(num_experts, config.n_embd))

    def forward(self, x_TD: Tensor, gate_Tn: Tensor, ctx: Context) -> Tensor:
        x_TD = torch.where(gate_Tn.sum(1, keepdim=True) > 0, x_TD, 0)
        a_Tn, b_Tn = softmax(linear_fp32(x_TD, self.mix.flatten(0, 1)).unflatten(1, (-1, 2))).unbind(-1)
        x_gate_T1 = (gate_Tn * a_Tn).sum(1, keepdim=True).type_as(x_TD)
        return x_gate_T1 * x_TD + ((gate_Tn * b_Tn) @ self.vector).type_as(x_TD)


EXPERTS |= {"swiglu": SwiGLUExperts, "kan": KANExperts, "identity": IdentityExperts, "copy": IdentityExperts, "zero": ZeroExperts,
            "noise": NoiseExperts, "relu2": ReLUSquaredExperts, "constant": ConstantExperts, "relu": ReLUExperts, "exit": ExitExperts}  # fmt: skip


class SharedMLP(nn.Module):
    """num_shared_experts ReLU^2 MLPs that every token meets, as one."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.shared_width
        self.up, self.down = nn.Parameter(torch.empty(width, config.n_embd)), nn.Parameter(torch.empty(config.n_embd, width))

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        return F.linear(relu_squared(F.linear(x_BTD, self.up.type_as(x_BTD))), self.down.type_as(x_BTD))


@functools.cache
def routed_scale(config: Config) -> float:
    """Config.routed_scale as a number. auto: the mean of sqrt(shared experts) over the length of a token's gates, for 2^14 tokens of normal
    logits and this router's own rule (kexue.fm/archives/10945): with experts at right angles and of one length, the routed sum is then as
    long as the shared one. Without shared experts it is 1."""
    if config.routed_scale != "auto" or not config.num_shared_experts:
        return 1.0 if config.routed_scale == "auto" else float(config.routed_scale)
    if config.router == "hash":  # equal gates
        return math.sqrt(config.num_shared_experts * config.top_k)
    score, generator = SCORES[config.router_score], torch.Generator("cpu").manual_seed(0)
    logits_TE = torch.randn(2**14, config.num_experts, generator=generator, device="cpu")
    weight_TK = score.gates(logits_TE, score.of(logits_TE).topk(config.top_k).indices, config.norm_topk_prob)
    return (math.sqrt(config.num_shared_experts) / weight_TK.norm(dim=-1)).mean().item()


class SharedConv(nn.Module):
    """BiBo's: down(silu(gate) * up) whose gate is a causal convolution over shared_kernel tokens of the document, of such a width that the
    FLOPs are those of the MLP. The taps lie side by side, so initial values shrink with their number."""

    def __init__(self, config: Config):
        super().__init__()
        self.kernel = config.shared_kernel
        width = 8 * max(1, round(config.shared_width * 2 / (self.kernel + 2) / 8))
        self.gate = nn.Parameter(torch.empty(width, self.kernel * config.n_embd))
        self.up, self.down = nn.Parameter(torch.empty(width, config.n_embd)), nn.Parameter(torch.empty(config.n_embd, width))

    def forward(self, x_BTD: Tensor, ctx: Context) -> Tensor:
        gate_BTF = F.linear(taps(self, x_BTD, ctx, self.kernel), self.gate.type_as(x_BTD))
        return F.linear(F.silu(gate_BTF) * F.linear(x_BTD, self.up.type_as(x_BTD)), self.down.type_as(x_BTD))


SHARED = {"mlp": SharedMLP, "conv": SharedConv}
PARAMETER_RULES |= {
    "shared.gate": ParameterRule("matrix", uniform),
    "shared.up": ParameterRule("matrix", uniform),
    "shared.down": ParameterRule("matrix", constant(0.0)),
    "swiglu.gate": ParameterRule("expert", uniform),
    "swiglu.up": ParameterRule("expert", uniform),
    "swiglu.down": ParameterRule("expert", constant(0.0)),
    "relu.up": ParameterRule("expert", uniform),
    "relu.down": ParameterRule("expert", constant(0.0)),
    "kan.up": ParameterRule("expert", uniform),
    "kan.down": ParameterRule("expert", constant(0.0)),
    "constant.mix": ParameterRule("router", constant(0.0)),
    "constant.vector": ParameterRule("scalar", normal),
}

# ---- experts that ranks share


@torch.compiler.disable
def exchanged(group, fn, rows_RD: Tensor, offs_E: Tensor) -> Tensor:
    """fn over experts that are spread over the ranks of `group`: rows travel to their expert and back.

    One host synchronisation: an all-to-all needs the number of rows on the host. Dropless, so a rank may receive none or all."""
    N = dist.get_world_size(group)
    sent_NE = offs_E.diff(prepend=offs_E.new_zeros(1)).view(N, -1)  # rows from here, for each rank and each of its experts
    received_NE = torch.empty_like(sent_NE)
    dist.all_to_all_single(received_NE, sent_NE.contiguous(), group=group)
    sent_N, received_N = torch.stack([sent_NE.sum(1), received_NE.sum(1)]).tolist()
    expert_R = torch.arange(sent_NE.size(1), dtype=torch.int16, device=rows_RD.device).repeat(N)
    expert_R = expert_R.repeat_interleave(received_NE.flatten(), output_size=sum(received_N))  # rows arrive sorted by (rank, expert)
    by_expert_R = expert_R.argsort(stable=True)
    by_rank_R = torch.empty_like(by_expert_R).scatter_(0, by_expert_R, torch.arange(len(by_expert_R), device=rows_RD.device))
    without_expert = len(rows_RD) - sum(sent_N)  # rows of tokens that do not count are last, and stay
    rows_RD = AllToAll.apply(rows_RD[: sum(sent_N)], sent_N, received_N, group)
    rows_RD = fn(Gather.apply(rows_RD, by_expert_R, by_rank_R[:, None]), received_NE.sum(0).cumsum(0).int())
    rows_RD = AllToAll.apply(Gather.apply(rows_RD, by_rank_R, by_expert_R[:, None]), received_N, sent_N, group)
    return F.pad(rows_RD, (0, 0, 0, without_expert))


class AllToAll(torch.autograd.Function):
    """Send the first sent[0] rows to rank 0, the next sent[1] to rank 1, ...; its backward sends them home."""

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


# ---- objective masked


def visible_both_ways(q_position: Tensor, kv_position: Tensor, q_doc: Tensor, kv_doc: Tensor, window, meta: int = 0) -> Tensor:
    """The same rule for objective masked: later tokens too."""
    return ((q_position - kv_position).abs() < window) & (q_doc == kv_doc) | (kv_position < meta)


class TwoWayMask(DenseMask):
    rule = staticmethod(visible_both_ways)


def hide(model: "GPT", id_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """BERT's question (1810.04805): which tokens are hidden? Of each row mask_share, none of them an end-of-text; of those 8 in 10 become
    mask_token, one any id, one stays. Drawn from seed, step and token number; in evaluation not from the step. What a router or a table is
    told is what is left of them."""
    config, (seed, step, first_token, _) = model.config, model.clock.unbind()
    token_T = token_numbers(first_token, *id_BT.shape, 0)
    counter_BT = hashed_counter(seed, step if model.training else 0 * step - 1, 0 * step - 1, token_T).view(id_BT.shape)
    draw = lambda lane: mix_bits(counter_BT ^ lane) & 0xFFFFFF
    order_BT = draw(1).masked_fill(id_BT == config.eot_token, 2**24)
    first_BN = order_BT.argsort(dim=1, stable=True)[:, : hidden_tokens(config, id_BT.size(1))]
    asked_BT = torch.zeros_like(id_BT, dtype=torch.bool).scatter(1, first_BN, True) & (order_BT < 2**24) & (targets_BT >= 0)
    fate_BT, any_BT = draw(2) / 2**24, draw(3) % config.vocab_size
    hidden_BT = torch.where(fate_BT < 0.8, config.mask_token, torch.where(fate_BT < 0.9, any_BT, id_BT))
    return torch.where(asked_BT, hidden_BT, id_BT), torch.where(asked_BT, id_BT, -1)


def hidden_tokens(config: Config, T: int) -> int:
    return max(1, round(config.mask_share * T))


OBJECTIVES |= {
    "masked": Objective(hide, hidden_tokens, lambda device_type, T: TwoWayMask, visible_both_ways, lambda keys: 2 * keys - 1),
}

# ---- residuals


def into_mean(x: Tensor, y: Tensor, n: Tensor, embedding: Tensor) -> Tensor:
    """The stream is the mean of its n terms, so that all blocks count the same however many there are."""
    return x + (y - x) / (n + 1).type_as(x)


def into_mean_of_the_others(x: Tensor, y: Tensor, n: Tensor, embedding: Tensor) -> Tensor:
    """The embedding, and the mean of the n - 1 terms since."""
    return x + (y - (x - embedding)) / n.type_as(x)


RESIDUALS |= {
    "average": Residual(lambda stream_mix, x, embedding: x, into_mean),
    "average_keep_embedding": Residual(lambda stream_mix, x, embedding: x, into_mean_of_the_others),
}

# ---- loops


def run_blocks(blocks, x_BTD: Tensor, embedding_BTD: Tensor, contexts: list[Context], trail: Trail) -> tuple[Tensor, Trail]:
    for block, ctx in zip(blocks, contexts):
        x_BTD, trail = run_block(block, x_BTD, embedding_BTD, ctx, trail)
    return x_BTD, trail


def merged(runs: list[list[RouteStats]]) -> list[RouteStats]:
    """Of several runs of the same layers: counts add up, means are over all tokens that were routed."""
    return [merged_layer(layer) for layer in zip(*runs)]


def merged_layer(runs: tuple[RouteStats, ...]) -> RouteStats:
    if len(runs) == 1:
        return runs[0]
    tokens, asked = sum(run.tokens for run in runs), [run for run in runs if run.chosen_BE is not None]  # a layer that nobody picked has none
    mean = lambda name: sum(getattr(run, name) * run.tokens for run in runs) / max(tokens, 1)
    return RouteStats(
        sum(run.counts_E for run in runs), mean("prob_E"), mean("z_loss"), mean("entropy"), None, sum(run.local_loss for run in runs), tokens,
        chosen_BE=sum(run.chosen_BE for run in asked) if asked else None, row_tokens_B=sum(run.row_tokens_B for run in asked) if asked else None,
        domain_loss=mean("domain_loss"))  # fmt: skip


def how_many(mask: Tensor) -> int:
    """Are true. On the meta device, where nothing has a value, all."""
    return mask.numel() if mask.is_meta else int(mask.sum())


class LoopKeys:
    """Stands before a cache, or for one, and decides whose keys and values a token sees in which loop. The same in training and decoding:
    a cache with one place per token, which each loop overwrites, would show a later token the end of an earlier one's loops, where
    training shows it the same loop (a test shows how far off that is)."""

    final = False

    def __init__(self, cache: Cache | None):
        self.cache, self.fills, self.loop, self.rows, self.full = cache, cache is not None, 0, None, {}

    def turn(self, loop: int, active_BT: Tensor) -> Tensor | None:
        """Now comes this loop, of these tokens; returns keys (B, S) that nobody sees in it."""
        self.loop, self.rows = loop, None
        return self.hidden(active_BT)

    def extend(self, module: nn.Module, *parts: Tensor) -> tuple[Tensor, ...]:
        """A token that is not in this loop is seen as it was in its last one."""
        self.full[module] = parts if self.rows is None else tuple(map(self.rows.put, self.full[module], parts))
        return self.remembered(module, self.loop)

    def remembered(self, module: nn.Module, loop: int) -> tuple[Tensor, ...]:
        return self.full[module] if self.cache is None else self.cache.extend((module, loop), *self.full[module])

    def recall(self, module: nn.Module, default):
        return default if self.cache is None else self.cache.recall((module, self.loop), default)

    def remember(self, module: nn.Module, value):
        if self.cache is not None:
            self.cache.remember((module, self.loop), value)

    def hidden(self, active_BT: Tensor) -> Tensor | None:
        return None

    def skip(self, loops: range):
        """Nobody is in these loops: a cache notes how they will see the tokens that have left."""
        for loop in loops:
            for module in self.full:
                self.remembered(module, loop)


class OwnLoopKeys(LoopKeys):
    """Only tokens that are in a loop are seen there (Mixture-of-Recursions, 2507.10524: recursion-wise caching)."""

    def hidden(self, active_BT: Tensor) -> Tensor | None:
        if self.cache is not None:
            (active_BT,) = self.cache.extend(("active", self.loop), active_BT)
        return None if how_many(active_BT) == active_BT.numel() else ~active_BT


class FirstLoopKeys(LoopKeys):
    """All loops see the keys and values of the first: one place per token (the same paper: recursive sharing)."""

    def extend(self, module: nn.Module, *parts: Tensor) -> tuple[Tensor, ...]:
        if self.loop == 0:
            self.full[module] = parts
        return self.remembered(module, 0)

    def skip(self, loops: range):
        pass


LOOP_KEYS = {"latest": LoopKeys, "per_loop": OwnLoopKeys, "share_first": FirstLoopKeys}


class Rows:
    """The active tokens of each row, packed: `index_BQ` says where they come from. Where a row has fewer, others fill it up."""

    STEP = 64  # Q is a multiple of it, so that few shapes occur

    def __init__(self, active_BT: Tensor):
        most, T = int(active_BT.sum(1).max()), active_BT.size(1)
        self.count = min(T, -(-most // self.STEP) * self.STEP)
        self.index_BQ = (~active_BT).to(torch.int8).argsort(dim=1, stable=True)[:, : self.count]
        self.valid_BQ = active_BT.gather(1, self.index_BQ)
        flat_BQ = self.index_BQ + torch.arange(len(active_BT), device=active_BT.device)[:, None] * T
        self.all_R, self.valid_R = flat_BQ.flatten(), flat_BQ[self.valid_BQ]

    def take(self, x_BT: Tensor) -> Tensor:
        """(B, T, ...) -> (B, Q, ...)"""
        return x_BT.flatten(0, 1).index_select(0, self.all_R).view(*self.index_BQ.shape, *x_BT.shape[2:])

    def put(self, x_BT: Tensor, part_BQ: Tensor) -> Tensor:
        """x with the active tokens' part in their places."""
        flat = x_BT.flatten(0, 1).index_copy(0, self.valid_R, part_BQ.flatten(0, 1)[self.valid_BQ.flatten()])
        return flat.view(x_BT.shape)


class PickedMask(DenseMask):
    """For some queries of each row. A query sees itself, whatever it is, or nothing would be left for those that only fill up."""

    def __init__(self, place: Place, letter: str, index_BQ: Tensor, hidden_BS: Tensor | None):
        q_position, q_doc = place.position_T[index_BQ][:, None, :, None], place.doc_BT.gather(1, index_BQ)[:, None, :, None]
        self.mask = place.visible(q_position, place.position_S, q_doc, place.doc_BS[:, None, None, :], place.windows[letter], place.meta)
        if hidden_BS is not None:
            self.mask &= ~hidden_BS[:, None, None, :]
        self.mask |= q_position == place.position_S


def picked(ctx: Context, letter: str, rows: Rows, place: Place, hidden_BS: Tensor | None) -> Context:
    """The context of the active tokens alone."""
    B, T = place.doc_BT.shape
    seed, step, layer, token_T = ctx.noise_key
    table = lambda x: rows.take(x.expand(B, *x.shape[-3:]))  # (T, 1, C) or (B, T, 1, C)
    mask = PickedMask(place, letter, rows.index_BQ, hidden_BS)
    return ctx._replace(
        token_BT=None if ctx.token_BT is None else rows.take(ctx.token_BT),
        mask=mask,
        value_embed_BTHC=rows.take(ctx.value_embed_BTHC) if ctx.value_embed_BTHC.ndim else ctx.value_embed_BTHC,
        cos=table(ctx.cos),
        sin=table(ctx.sin),
        noise_key=(seed, step, layer, rows.take(token_T.view(B, T)).flatten()),
        logits_before_TE=None if ctx.logits_before_TE is None else rows.take(ctx.logits_before_TE.view(B, T, -1)).flatten(0, 1),
        valid_BT=rows.valid_BQ if ctx.valid_BT is None else rows.valid_BQ & rows.take(ctx.valid_BT),
        expert_BT=None if ctx.expert_BT is None else rows.take(ctx.expert_BT),
        log_seen_BT=None if ctx.log_seen_BT is None else mask.mask[:, 0].sum(-1).log(),
    )


class Loop(nn.Module):
    """Some layers, then a group of layers `loops` times, then the others: Universal Transformer (1807.03819), MoEUT (2405.16039), AbbIE
    (2507.08567); with the first and the last layer outside, the middle-cycle strategy of Mixture-of-Recursions (2507.10524).

    `eval_loops` may be set to another number than training has."""

    to_compile = ()

    def __init__(self, config: Config):
        super().__init__()
        looped = config.tiled("looped")
        self.group, self.windows = slice(looped.index("o"), looped.rindex("o") + 1), config.tiled("window")
        self.loops, self.eval_loops, self.reinject = config.loops, config.eval_loops or config.loops, config.reinject
        self.keys, self.ponder_coef = LOOP_KEYS[config.loop_keys], config.ponder_coef
        self.needs_keys = config.loop_keys == "share_first" or config.halt != "none"
        self.halt = HALTS[config.halt](config)

    def forward(self, blocks, embedding_BTD: Tensor, contexts: list[Context], place: Place) -> Deep:
        before, group, after = slice(0, self.group.start), self.group, slice(self.group.stop, len(blocks))
        x_BTD, trail = run_blocks(blocks[before], embedding_BTD.clone(), embedding_BTD, contexts[before], Trail())
        states, runs, cost, loops_BT, kv, choices_SBT = self.run_loops(blocks[group], x_BTD, embedding_BTD, contexts[group], place, trail.kv)
        outputs, ends = [], []
        for (x_BTD, weight_BT), loops_so_far_BT in zip(states, self.loops_of(states, loops_BT)):
            contexts_after = [ctx._replace(terms=self.terms(ctx, loops_so_far_BT)) for ctx in contexts[after]]
            x_BTD, end = run_blocks(blocks[after], x_BTD, embedding_BTD, contexts_after, Trail([], kv))
            outputs.append((x_BTD, weight_BT))
            ends.append(end.stats)
        return Deep(outputs, trail.stats + merged(runs) + merged(ends), cost, loops_BT, choices_SBT)

    def loops_of(self, states: list, loops_BT: Tensor) -> list[Tensor]:
        """That tokens have gone through in each state: the one state is that of their ends, several (of halt ponder) come from loop to loop."""
        return [loops_BT] if len(states) == 1 else [torch.full_like(loops_BT, loops) for loops in range(1, len(states) + 1)]

    def terms(self, ctx: Context, loops_BT: Tensor) -> Tensor | None:
        """How many terms the stream has after the loop, where a residual asks: a token that left early has fewer."""
        return more(ctx.terms, (2 * (self.group.stop - self.group.start) * (loops_BT - 1))[..., None])

    def run_loops(self, blocks, x_BTD: Tensor, embedding_BTD: Tensor, contexts: list[Context], place: Place, kv):
        """[(stream, weight in the loss)] to go on with, statistics of each loop, cost, loops of each token, the last keys and values, and choices."""
        begin_BTD, size, runs, store = x_BTD, 2 * len(blocks), [], None
        if self.needs_keys or contexts[0].cache is not None:
            store = self.keys(contexts[0].cache)
        leaving = Leaving.at_the_start(x_BTD)
        loops = self.loops if self.training else self.eval_loops
        for loop in range(loops):
            here = [self.turned(ctx, loop, size, store) for ctx in contexts]
            hidden_BS = None if store is None else store.turn(loop, leaving.active_BT)
            rows = None if leaving.all_are_in and hidden_BS is None else Rows(leaving.active_BT)
            entry_BTD = x_BTD + self.reinject * begin_BTD if loop and self.reinject else x_BTD
            if rows is None:
                new_BTD, trail = run_blocks(blocks, entry_BTD, embedding_BTD, here, Trail([], kv))
            else:
                store.rows = rows
                here = [picked(ctx, letter, rows, place, hidden_BS) for ctx, letter in zip(here, self.windows[self.group])]
                new_BQD, trail = run_blocks(blocks, rows.take(entry_BTD), rows.take(embedding_BTD), here, Trail([], kv))
                new_BTD = rows.put(x_BTD, new_BQD)
            runs.append(trail.stats)
            x_BTD, leaving = self.halt(new_BTD, x_BTD, leaving, loop + 1 == loops, exits_of(trail.stats, rows, x_BTD))
            if leaving.nobody_is_in:
                store.skip(range(loop + 1, loops))
                break
        states = self.halt.states(x_BTD, leaving)
        return states, runs, self.ponder_coef * self.halt.cost(leaving), leaving.loops_BT, trail.kv, None

    def turned(self, ctx: Context, loop: int, size: int, store: LoopKeys | None) -> Context:
        """The context of one loop: noise of its own, and what the stream is made of by then."""
        seed, step, layer, token_T = ctx.noise_key
        return ctx._replace(noise_key=(seed, step, layer + 256 * loop, token_T), terms=more(ctx.terms, size * loop), cache=store)


# ---- routing over layers


class LinearController(nn.Module):
    """One matrix, whose input every step weighs anew, channel by channel. (A bias for each step tells it less: it then ran 0.52 of the programs
    of benchmarks/toys.py where it now runs all.)"""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.weight, self.step = (nn.Parameter(torch.empty(count, config.n_embd)) for count in (choices, steps))

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        """Logits (N, choices) of N tokens in this step, and what the controller remembers until the next."""
        return linear_fp32(x_ND * (1 + self.step[step]).type_as(x_ND), self.weight), None


class MemorylessController(nn.Module):
    """One matrix, without a word about the step: the negative control."""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(choices, config.n_embd))

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        return linear_fp32(x_ND, self.weight), None


class MLPController(nn.Module):
    """Two layers of width controller_dim; the step enters before the ReLU."""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.controller_dim, config.n_embd))
        self.step, self.weight = (nn.Parameter(torch.empty(count, config.controller_dim)) for count in (steps, choices))

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        return (linear_fp32(x_ND, self.up) + self.step[step]).relu() @ self.weight.T, None


class LSTMController(nn.Module):
    """An LSTM over the steps, of width controller_dim: each token has a state of its own, so nothing passes between tokens."""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.cell, self.weight = nn.LSTMCell(config.n_embd, config.controller_dim), nn.Parameter(torch.empty(choices, config.controller_dim))

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        state = self.cell(x_ND.float(), state)
        return state[0] @ self.weight.T, state


class LearnedOrder(nn.Module):
    """One trained weight vector for each step, the same for all tokens: a reference that sees no input."""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.step = nn.Parameter(torch.empty(steps, choices))

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        return self.step[step].expand(len(x_ND), -1), None


class FixedOrder(nn.Module):
    """Layers in turn, and the identities last: the plain transformer, as a reference."""

    def __init__(self, config: Config, steps: int, choices: int):
        super().__init__()
        self.choices = choices

    def forward(self, x_ND: Tensor, step: int, state) -> tuple[Tensor, object]:
        picked = torch.arange(self.choices, device=x_ND.device) == step % self.choices
        return torch.where(picked, 0.0, -1e4).expand(len(x_ND), -1), None


CONTROLLERS = {"linear": LinearController, "memoryless": MemorylessController, "mlp": MLPController, "lstm": LSTMController,
               "learned": LearnedOrder, "fixed": FixedOrder}  # fmt: skip


def by_token(logits_BTN: Tensor, place: Place, cache, key) -> Tensor:
    return logits_BTN


def by_first_token(logits_BTN: Tensor, place: Place, cache, key) -> Tensor:
    """Every token gets the logits of its document's first."""
    if cache is not None:
        (logits_BSN,) = cache.extend(key, logits_BTN)
    else:
        logits_BSN = logits_BTN
    begin_BT = document_begins(place.doc_BT, place.doc_BS)
    return logits_BSN.gather(1, begin_BT[..., None].expand(-1, -1, logits_BTN.size(2)))


ROUTE_BY = {"token": by_token, "first_token": by_first_token}


def one_hot(prob: Tensor) -> Tensor:
    return F.one_hot(prob.argmax(-1), prob.size(-1)).type_as(prob)


ROUTE_TRAINING = {  # (probabilities, how far annealing has gone) -> weights of the pool's members, whose gradients are the probabilities'
    "soft": lambda prob, gone: prob,
    "straight_through": lambda prob, gone: prob + (one_hot(prob) - prob).detach(),
    "anneal": lambda prob, gone: prob + gone * (one_hot(prob) - prob).detach(),
}
STEP_LOSSES = {  # number of steps -> the weight of each step's loss; None: the last alone
    "last": None,
    "mean": lambda steps: [1 / steps] * steps,
    "cumulative": lambda steps: [1.0] * steps,
}


class Routed(Loop):
    """In each of `loops` steps a controller picks one of a pool of layers, or of identities, for every token: h' = sum of w_i F_i(h) while training
    (all members are computed), F_i(h) of the likeliest one in evaluation. There a picked layer makes keys and values of all tokens, and queries
    and MLP rows of those that picked it alone. In evaluation the last step is the answer, whatever step_loss looks at."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.needs_keys, self.identities = True, config.identity_layers
        choices = self.group.stop - self.group.start + self.identities
        self.controller = CONTROLLERS[config.controller](config, max(self.loops, self.eval_loops), choices)
        self.route_by, self.weigh = ROUTE_BY[config.route_by], ROUTE_TRAINING[config.route_training]
        self.step_weights, self.anneal_steps, self.balance_coef = STEP_LOSSES[config.step_loss], config.anneal_steps, config.layer_balance_coef
        self.answers_hard = True  # in evaluation; an analysis may look at the soft mixture too
        self.packs = config.router in ("linear", "hash", "mlp") and (config.num_shared_experts == 0 or config.shared == "mlp")  # no neighbours

    def run_loops(self, blocks, x_BTD: Tensor, embedding_BTD: Tensor, contexts: list[Context], place: Place, kv):
        begin_BTD, runs, memory, choices, probs, steps_after = x_BTD, [], None, [], [], []
        cache, (_, step, *_) = contexts[0].cache, contexts[0].noise_key
        store = None if cache is None else self.keys(cache)
        leaving, loops = Leaving.at_the_start(x_BTD), self.loops if self.training else self.eval_loops
        for loop in range(loops):
            here = [self.turned(ctx, loop, 0, store) for ctx in contexts]
            if store is not None:
                store.turn(loop, leaving.active_BT)
            entry_BTD = x_BTD + self.reinject * begin_BTD if loop and self.reinject else x_BTD
            logits_ND, memory = self.controller(norm(entry_BTD).flatten(0, 1), loop, memory)
            logits_BTN = self.route_by(logits_ND.view(*x_BTD.shape[:2], -1), place, cache, ("route", loop))
            prob_BTN = softmax(logits_BTN)
            probs.append(prob_BTN)
            choices.append(torch.where(leaving.active_BT, prob_BTN.argmax(-1), -1))
            if self.training or not self.answers_hard:
                gone = (step / self.anneal_steps).clamp(max=1)
                weight_BTN = self.weigh(prob_BTN, gone) if self.training else prob_BTN
                new_BTD, stats = self.mixture(blocks, entry_BTD, embedding_BTD, here, weight_BTN)
            else:
                new_BTD, stats = self.picked_layers(blocks, entry_BTD, embedding_BTD, here, place, choices[-1], leaving.active_BT)
            new_BTD = torch.where(leaving.active_BT[..., None], new_BTD, x_BTD)
            runs.append(stats)
            x_BTD, leaving = self.halt(new_BTD, x_BTD, leaving, loop + 1 == loops, None)
            steps_after.append(x_BTD)
            if leaving.nobody_is_in and cache is None:
                break
        states = self.halt.states(x_BTD, leaving)
        if self.training and self.step_weights is not None:
            states = [(x, torch.full(x.shape[:2], w, device=x.device)) for x, w in zip(steps_after, self.step_weights(loops))]
        cost = self.ponder_coef * self.halt.cost(leaving) + self.balance_coef * self.unevenness(torch.stack(probs), torch.stack(choices))
        return states, runs, cost, leaving.loops_BT, None, torch.stack(choices)

    def mixture(self, blocks, x_BTD: Tensor, embedding_BTD: Tensor, contexts: list[Context], weight_BTN: Tensor) -> tuple[Tensor, list[RouteStats]]:
        """All members of the pool, weighted; identities are the stream itself."""
        weight_BTN, all_stats = weight_BTN.type_as(x_BTD), []
        mixed_BTD = weight_BTN[..., len(blocks) :].sum(-1, keepdim=True) * x_BTD
        for i, (block, ctx) in enumerate(zip(blocks, contexts)):
            y_BTD, stats, _ = block(x_BTD, embedding_BTD, ctx)
            mixed_BTD = mixed_BTD + weight_BTN[..., i, None] * y_BTD
            all_stats += stats
        return mixed_BTD, all_stats

    def picked_layers(self, blocks, x_BTD, embedding_BTD, contexts: list[Context], place: Place, choice_BT: Tensor, active_BT: Tensor):
        """Each token's own layer; identities are whoever no layer was picked for. Where routers look at neighbours, a layer is computed for all."""
        new_BTD, all_stats = x_BTD, []
        for i, (block, ctx, letter) in enumerate(zip(blocks, contexts, self.windows[self.group])):
            picked_BT = (choice_BT == i) & active_BT
            if self.packs:
                rows = Rows(picked_BT)
                y_BQD, stats = block_of_some(block, x_BTD, embedding_BTD, ctx, rows, picked(ctx, letter, rows, place, None))
                new_BTD = rows.put(new_BTD, y_BQD)
            else:
                y_BTD, stats, _ = block(x_BTD, embedding_BTD, ctx)
                new_BTD = torch.where(picked_BT[..., None], y_BTD, new_BTD)
            all_stats += stats
        return new_BTD, all_stats

    def unevenness(self, prob_SBTN: Tensor, choice_SBT: Tensor) -> Tensor:
        """n sum of f_i P_i over the pool's real layers, f_i being the share of choices: 1 if layers are used evenly. Of this micro-batch."""
        n, in_SBT1 = self.group.stop - self.group.start, (choice_SBT >= 0)[..., None]
        real_N = (prob_SBTN * in_SBT1).flatten(0, 2).sum(0)[:n]
        share_N = (F.one_hot(choice_SBT.clamp(min=0), prob_SBTN.size(-1)) * in_SBT1).flatten(0, 2).sum(0)[:n].float()
        return n * (share_N / share_N.sum().clamp(min=1e-8) * real_N / real_N.sum().clamp(min=1e-8)).sum()


def block_of_some(block: Block, x_BTD: Tensor, embedding_BTD: Tensor, ctx: Context, rows: Rows, some: Context) -> tuple[Tensor, list[RouteStats]]:
    """What a block makes of the tokens in `rows` (B, Q, D): their queries and their feed-forward, over keys and values of all."""
    enter, take_up = block.residual
    x_BTD = enter(block.stream_mix, x_BTD, embedding_BTD)
    x_BQD, embedding_BQD = rows.take(x_BTD), rows.take(embedding_BTD)
    kv = block.attention.keys_values(block.before(x_BTD), block.tell(ctx, x_BTD))
    if rows.count == 0:
        return x_BQD, [no_stats(ctx)] * isinstance(block.ffn, MoE)
    if kv is not None:
        normed_BQD, told = block.before(x_BQD), block.tell(some, x_BQD)
        y_BQD = block.attention.read(block.attention.queries(normed_BQD, told), kv, normed_BQD, told)
        x_BQD = take_up(x_BQD, block.after(y_BQD), some.terms, embedding_BQD)
    y_BQD, stats = block.ffn(block.before(x_BQD), block.tell(some, x_BQD))
    return take_up(x_BQD, block.after(y_BQD), more(some.terms), embedding_BQD), stats


def no_stats(ctx: Context) -> RouteStats:
    """Of a layer that nobody picked."""
    zeros_E = torch.zeros_like(ctx.bias_E)
    return RouteStats(zeros_E.long(), zeros_E, zeros_E.sum(), zeros_E.sum())


DEPTHS |= {"loop": Loop, "routed": Routed}
PARAMETER_RULES |= {
    "controller.weight": ParameterRule("router", uniform),
    "controller.up": ParameterRule("router", uniform),
    "controller.step": ParameterRule("scalar", constant(0.0)),
    "controller.cell.weight_ih": ParameterRule("router", uniform),
    "controller.cell.weight_hh": ParameterRule("router", uniform),
    "controller.cell.bias_ih": ParameterRule("scalar", constant(0.0)),
    "controller.cell.bias_hh": ParameterRule("scalar", constant(0.0)),
}

# ---- halting


class Leaving(NamedTuple):
    """Who is still in the loop, and what has come of it."""

    active_BT: Tensor
    loops_BT: Tensor  # that each token went through
    sum_BT: Tensor  # of what a rule adds up until a token leaves, fp32
    cost_BT: Tensor  # differentiable, fp32
    output_BTD: Tensor | None = None  # what the loops add up to, for rules that mix them
    states: tuple[tuple[Tensor, Tensor], ...] = ()  # every loop's stream and its weight, for rules whose loss looks at all
    all_are_in: bool = True
    nobody_is_in: bool = False

    @staticmethod
    def at_the_start(x_BTD: Tensor) -> "Leaving":
        zeros_BT = torch.zeros(x_BTD.shape[:2], device=x_BTD.device)
        return Leaving(zeros_BT == 0, zeros_BT.long(), zeros_BT, zeros_BT)


def exits_of(stats: list[RouteStats], rows: Rows | None, x_BTD: Tensor) -> tuple[Tensor, Tensor] | None:
    """Who chose an exit in some layer of this loop (B, T), and how probable the last layer found it; None where there are no exits."""
    chose = [s for s in stats if s.exits_T is not None]
    if not chose:
        return None
    found = torch.stack([s.exits_T for s in chose]).any(0), chose[-1].exit_prob_T
    if rows is None:
        return tuple(part.view(x_BTD.shape[:2]) for part in found)
    return tuple(rows.put(part.new_zeros(x_BTD.shape[:2]), part.view(rows.index_BQ.shape)) for part in found)


class NoHalt(nn.Module):
    """All tokens go through all loops.

    A rule gets the stream after and before a loop, `exits` of exits_of(), and returns the stream to go on with and who leaves."""

    def __init__(self, config: Config):
        super().__init__()

    def forward(self, new_BTD: Tensor, x_BTD: Tensor, so_far: Leaving, last: bool, exits) -> tuple[Tensor, Leaving]:
        return new_BTD, so_far._replace(loops_BT=so_far.loops_BT + 1)

    def states(self, x_BTD: Tensor, so_far: Leaving) -> list[tuple[Tensor, Tensor | None]]:
        return [(x_BTD, None)]

    def cost(self, so_far: Leaving) -> Tensor | float:
        return 0.0


class Halt(NoHalt):
    """What the rules share: a head on the normed stream, whose sigmoid says how much a token wants to leave."""

    threshold = 0.99

    def __init__(self, config: Config):
        super().__init__(config)
        self.weight, self.bias = nn.Parameter(torch.empty(1, config.n_embd)), nn.Parameter(torch.empty(1))
        self.limit, self.prior = config.halt_threshold or self.threshold, config.ponder_prior

    def wish(self, x_BTD: Tensor) -> Tensor:
        return (linear_fp32(norm(x_BTD).flatten(0, 1), self.weight).view(x_BTD.shape[:2]) + self.bias).sigmoid()

    def gone(self, so_far: Leaving, leaves_BT: Tensor, **changes) -> Leaving:
        active_BT = so_far.active_BT & ~leaves_BT
        count = how_many(active_BT)
        return so_far._replace(active_BT=active_BT, loops_BT=so_far.loops_BT + so_far.active_BT, all_are_in=count == active_BT.numel(),
                               nobody_is_in=count == 0, **changes)  # fmt: skip

    def mixed(self, so_far: Leaving, x_BTD: Tensor, weight_BT: Tensor) -> Tensor:
        part_BTD = weight_BT[..., None].type_as(x_BTD) * x_BTD
        return part_BTD if so_far.output_BTD is None else so_far.output_BTD + part_BTD

    def cost(self, so_far: Leaving) -> Tensor:
        return so_far.cost_BT.mean()


class ACT(Halt):
    """Graves's adaptive computation time (1603.08983): wishes add up; who passes the threshold leaves, and what is missing to 1 is its last
    loop's share of the mean that goes on. Cost: loops and that remainder."""

    def forward(self, new_BTD: Tensor, x_BTD: Tensor, so_far: Leaving, last: bool, exits) -> tuple[Tensor, Leaving]:
        wish_BT = self.share(self.wish(new_BTD), so_far.sum_BT)
        leaves_BT = (so_far.sum_BT + wish_BT >= self.limit) | last
        weight_BT = torch.where(leaves_BT, 1 - so_far.sum_BT, wish_BT) * so_far.active_BT
        cost_BT, output_BTD = so_far.cost_BT + self.price(weight_BT, so_far, leaves_BT), self.mixed(so_far, new_BTD, weight_BT)
        return new_BTD, self.gone(so_far, leaves_BT, sum_BT=so_far.sum_BT + weight_BT, cost_BT=cost_BT, output_BTD=output_BTD)

    def share(self, wish_BT: Tensor, sum_BT: Tensor) -> Tensor:
        return wish_BT

    def price(self, weight_BT: Tensor, so_far: Leaving, leaves_BT: Tensor) -> Tensor:
        return so_far.active_BT + weight_BT * leaves_BT

    def states(self, x_BTD: Tensor, so_far: Leaving) -> list[tuple[Tensor, Tensor | None]]:
        return [(so_far.output_BTD, None)]


class StickBreaking(ACT):
    """A wish takes its share of what is left of a stick (SUT, 2310.07096); cost: the expected number of loops."""

    threshold = 0.999

    def share(self, wish_BT: Tensor, sum_BT: Tensor) -> Tensor:
        return wish_BT * (1 - sum_BT)

    def price(self, weight_BT: Tensor, so_far: Leaving, leaves_BT: Tensor) -> Tensor:
        return weight_BT * (so_far.loops_BT + 1)


class Threshold(Halt):
    """Wishes add up to a threshold, and a wish is also how far the loop moves the stream, so that the loss can tell it what to be.
    Cost: what is missing to the threshold, summed over loops."""

    threshold = 1.0

    def forward(self, new_BTD: Tensor, x_BTD: Tensor, so_far: Leaving, last: bool, exits) -> tuple[Tensor, Leaving]:
        wish_BT = self.wish(new_BTD) * so_far.active_BT
        sum_BT = so_far.sum_BT + wish_BT
        leaves_BT = (sum_BT >= self.limit) | last
        cost_BT = so_far.cost_BT + (self.limit - sum_BT).clamp(min=0) * so_far.active_BT
        return x_BTD + wish_BT[..., None].type_as(x_BTD) * (new_BTD - x_BTD), self.gone(so_far, leaves_BT, sum_BT=sum_BT, cost_BT=cost_BT)


class Ponder(Halt):
    """PonderNet (2107.05407): a wish is the chance of leaving now. Training goes on for all and weighs every loop's loss by the chance that it
    is the last; cost: the divergence from a geometric distribution. In evaluation a token leaves when it more likely has left than not."""

    threshold = 0.5

    def forward(self, new_BTD: Tensor, x_BTD: Tensor, so_far: Leaving, last: bool, exits) -> tuple[Tensor, Leaving]:
        chance_BT = self.wish(new_BTD).clamp(min=float(last)) * (1 - so_far.sum_BT)
        sum_BT = so_far.sum_BT + chance_BT * so_far.active_BT
        if self.training:
            prior_BT = max(self.prior, float(last)) * (1 - self.prior) ** so_far.loops_BT.float()  # what is left goes to the last loop
            divergence_BT = chance_BT * (chance_BT.clamp(min=1e-8) / prior_BT).log()
            nobody = torch.zeros_like(so_far.active_BT)
            return new_BTD, self.gone(so_far, nobody, sum_BT=sum_BT, cost_BT=so_far.cost_BT + divergence_BT,
                                      states=(*so_far.states, (new_BTD, chance_BT)))  # fmt: skip
        return new_BTD, self.gone(so_far, (sum_BT >= self.limit) | last, sum_BT=sum_BT)

    def states(self, x_BTD: Tensor, so_far: Leaving) -> list[tuple[Tensor, Tensor | None]]:
        return list(so_far.states) or [(x_BTD, None)]


class ExitHalt(NoHalt):
    """A token leaves after the loop in which it chose an exit among its experts. Cost: the chances of not choosing it, summed over loops."""

    gone, cost = Halt.gone, Halt.cost

    def forward(self, new_BTD: Tensor, x_BTD: Tensor, so_far: Leaving, last: bool, exits) -> tuple[Tensor, Leaving]:
        exits_BT, prob_BT = exits
        return new_BTD, self.gone(so_far, exits_BT | last, cost_BT=so_far.cost_BT + (1 - prob_BT) * so_far.active_BT)


HALTS = {"none": NoHalt, "act": ACT, "stick_breaking": StickBreaking, "ponder": Ponder, "threshold": Threshold, "exit": ExitHalt}
PARAMETER_RULES |= {
    "halt.weight": ParameterRule("router", constant(0.0)),
    "halt.bias": ParameterRule("scalar", constant(-2.0)),
}

# -----------------------------------------------------------------------------
# What a Config must be

# Config's bounds, field by field, and the tables whose keys or letters a field is made of
AT_LEAST_1 = """vocab_size n_layer n_embd n_head num_experts top_k balance_window window_size ngram_rows router_kernel shared_kernel latent_dim loops
                attn_experts attn_top_k controller_dim anneal_steps""".split()
AT_LEAST_0 = """importance_coef load_coef entropy_coef balance_coef z_coef layer_balance_coef ponder_coef bias_update_factor bias_update_threshold
                router_noise router_residual norm_topk_prob num_shared_experts shared_dim num_meta_tokens eval_loops reinject halt_threshold
                identity_layers""".split()
ABOVE_0 = "mlp_ratio attn_scale softcap free_eta".split()
BETWEEN_0_AND_1 = "ponder_prior mask_share".split()
KEYS_OF = {"router": ROUTERS, "router_spread": SPREADS, "router_score": SCORES, "shared": SHARED, "depth": DEPTHS, "head": HEADS, "dtype": DTYPES,
           "attn_softmax": SOFTMAXES, "qk_norm": QK_NORMS, "residual": RESIDUALS, "halt": HALTS, "loop_keys": LOOP_KEYS,
           "controller": CONTROLLERS, "route_by": ROUTE_BY, "route_training": ROUTE_TRAINING, "step_loss": STEP_LOSSES,
           "objective": OBJECTIVES}  # fmt: skip
LETTERS_OF = {"pattern": FEED_FORWARDS, "attention": ATTENTIONS, "window": WINDOWS, "rotary": ROTARIES, "norms": NORMS, "looped": "o."}


def check_config(config: Config):
    """Raises ConfigError, which names the field and the legal values."""

    def check(field: str, fine: bool, legal: str):
        if not fine:
            raise ConfigError(f"{field} is {getattr(config, field)!r}; it must be {legal}")

    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        fits = isinstance(value, field.type) or (field.type is float and type(value) is int)
        check(field.name, fits and (type(value) is bool) == (field.type is bool), f"of type {field.type.__name__}")
    matmuls = [name for name, kind in EXPERTS.items() if kind.has_matmuls]
    listed, names = config.listed_experts, f"names out of {', '.join(EXPERTS)}, each with *n for n of them, separated by commas"
    check("experts", listed and all(name in EXPERTS for name in listed), names)
    check("experts", any(EXPERTS[name].has_matmuls for name in listed), "a list with at least one that has matmuls: " + ", ".join(matmuls))
    if config.counts_experts:
        object.__setattr__(config, "num_experts", len(listed))
    for fields, fine, legal in ((AT_LEAST_1, lambda value: value >= 1, "at least 1"), (AT_LEAST_0, lambda value: value >= 0, "at least 0"),
                                (ABOVE_0, lambda value: value > 0, "above 0"), (BETWEEN_0_AND_1, lambda value: 0 < value < 1, "between 0 and 1")):
        for field in fields:
            check(field, fine(getattr(config, field)), legal)
    for field, table in KEYS_OF.items():
        check(field, getattr(config, field) in table, "one of " + ", ".join(table))
    for field, letters in LETTERS_OF.items():
        value = getattr(config, field)
        check(field, value != "" and set(value) <= set(letters), "a string of the letters " + " ".join(letters))
    for field in (field.name for field in dataclasses.fields(Config) if field.type is float):
        check(field, math.isfinite(getattr(config, field)), "finite")

    # vocabulary and shape
    check("eot_token", 0 <= config.eot_token < config.vocab_size, f"an id below vocab_size = {config.vocab_size}")
    check("ngrams", set(config.ngrams) <= set("23456789"), "a string of digits from 2 to 9")
    check("value_embeds", 0 <= 2 * config.value_embeds <= config.n_layer, f"from 0 to n_layer // 2 = {config.n_layer // 2}")
    check("head_dim", config.head_dim > 0 and config.head_dim % 8 == 0, "a multiple of 8")  # rotary quarters, aligned rows
    check("n_embd", config.n_embd % 8 == 0, "a multiple of 8, for 16-byte rows in bf16")
    check("latent_dim", config.latent_dim % 8 == 0, "a multiple of 8")

    # experts
    check("num_experts", config.num_experts < 2**15, "below 32768, as dispatch sorts 16-bit ids")
    check("top_k", config.top_k <= config.num_experts, f"at most num_experts = {config.num_experts}")
    width = config.mlp_ratio * config.n_embd / config.equal_experts
    check("mlp_ratio", config.hidden_size % 8 == 0 and config.hidden_size > 0, f"such that mlp_ratio * n_embd / {config.equal_experts} = {width}, "
          "the width of one of a token's top_k + num_shared_experts (without those that have a shared_dim), is a multiple of 8")  # fmt: skip
    for name in (name for name in config.expert_counts if EXPERTS[name].has_matmuls):
        width, flops = EXPERTS[name].width(config.hidden_size)
        check("experts", width > 0 and abs(flops - 1) <= 0.05, f"without {name}: next to an mlp of hidden width {config.hidden_size} its own, "
              f"a multiple of 8, would be {width} and its FLOPs {flops:.2f} times; choose a larger mlp_ratio")  # fmt: skip
    check("shared_dim", config.shared_dim % 8 == 0, "a multiple of 8")
    check("shared_dim", config.shared_dim == 0 or config.num_shared_experts > 0, "0 without num_shared_experts")
    check("routed_scale", re.fullmatch(r"auto|\d+\.?\d*|\d*\.\d+", config.routed_scale) is not None, "auto or a number, at least 0")

    # routers
    check("router_dim", config.router_dim > 0 and config.router_dim % 16 == 0, "a multiple of 16")
    for field in ("importance_coef", "load_coef", "entropy_coef"):
        learns = issubclass(ROUTERS[config.router], Router)
        check(field, learns or getattr(config, field) == 0, f"0 with router {config.router}, which learns nothing")
    varies = config.router_noise > 0 and config.top_k < config.num_experts
    check("load_coef", varies or config.load_coef == 0, "0, or there must be router_noise above 0, and fewer than num_experts chosen")

    # attention
    check("attn_top_k", config.attn_top_k <= config.attn_experts, f"at most attn_experts = {config.attn_experts}")
    for layer, maker in config.key_makers.items():
        check("attention", maker is not None, f"without S in layer {layer}: no layer before it has keys to share")
        check("rotary", config.turning(layer) == config.turning(maker), f"the same in layer {layer} as in layer {maker}, whose keys and values it "
              "shares (and so must `window` be where it is W)")  # fmt: skip
    remade = [config.tiled("rotary")[layer] for layer, letter in enumerate(config.tiled("attention")) if letter == "L"]
    check("rotary", not set(remade) & set("VB"), "H, N or W where attention is L, whose values are remade from what a cache keeps")
    if config.objective == "masked":
        check("objective", config.vocab_size < config.padded_vocab_size, f"next with vocab_size = {config.vocab_size}, a multiple of 64: no id is "
              "left for a hidden token")  # fmt: skip
        check("attn_softmax", config.attn_softmax == "plain", "plain with objective masked: ssmax counts the keys before a token")

    # depth
    check("looped", re.fullmatch(r"\.*o+\.*", config.tiled("looped")), "such that the layers of the loop, o, are neighbours, which over "
          f"{config.n_layer} layers, {config.tiled('looped')}, they are not")  # fmt: skip
    can_exit = any(EXPERTS[name].leaves for name in listed) and ("M", "o") in zip(config.tiled("pattern"), config.tiled("looped"))
    check("halt", config.halt != "exit" or can_exit, "another, or there must be an exit among the experts of some layer of the loop")
    looped, leave = config.tiled("looped"), config.depth == "loop" and config.halt != "none"
    borrowed = [layer for layer, maker in config.key_makers.items() if looped[layer] == "." and looped[maker] == "o"]
    check("attention", not (leave and borrowed) or config.loop_keys == "share_first", f"without S in layers {borrowed}, after the loop, next to halt "
          f"{config.halt}: they would see keys of whichever loop a token left in; or loop_keys must be share_first")  # fmt: skip
    check("step_loss", config.step_loss == "last" or config.halt == "none", f"last next to halt {config.halt}, which says itself what to look at")
    stacked = config.router_residual == 0 or config.depth == "stack"
    check("router_residual", stacked, f"0 with depth {config.depth}, where no one layer comes before another")
    if config.depth == "routed":
        check("residual", config.residual == "add", "add with depth routed, whose streams have no number of terms")
        check("loop_keys", config.loop_keys == "latest", "latest with depth routed, where a layer's keys are made of what everyone is by then")
        check("halt", config.halt in ("none", "act", "stick_breaking"), "none, act or stick_breaking with depth routed")
        check("attention", "S" not in config.tiled("attention"), "without S with depth routed: no layer has a layer before it")
    if leave:
        why = f"next to halt {config.halt}, where tokens leave, a kind that looks at no neighbours"
        check("router", config.router not in ("conv", "recurrent"), why)
        check("shared", config.num_shared_experts == 0 or config.shared != "conv", why)
        for field in ("importance_coef", "load_coef"):
            check(field, getattr(config, field) == 0, f"0 next to halt {config.halt}: it looks at all tokens of a micro-batch")


# -----------------------------------------------------------------------------
# Presets


def build(config: Config, ranks: ExpertRanks = ALL_HERE) -> GPT:
    return GPT(config, ranks)


PRESETS = {
    # a laptop: bytes, 2 cores, minutes
    "cpu": Config(vocab_size=257, eot_token=256, n_layer=4, n_embd=192, n_head=2, head_dim=64, mlp_ratio=1.0, attention="K", window="EELE",
                  window_size=2048, value_embeds=2, ngrams="234"),
    # one 24 GB GPU, FP8 not needed
    "small": Config(n_layer=8, n_embd=512, n_head=4, window="LSSS", window_size=1024, value_embeds=2),
    # a trunk of 50M parameters that all tokens meet, and 5 experts of 10M for domains; top-1, whose gate must be the router's own probability
    "100m": Config(n_layer=8, n_embd=512, n_head=4, mlp_ratio=1224 / 512, num_experts=5, top_k=1, norm_topk_prob=0.0, num_shared_experts=1,
                   shared_dim=1952, balance_window=6, attention="K", window="LSSS", window_size=1024, tie_embeddings=True, value_embeds=0),
    # the same on a laptop: bytes, all experts kept
    "100m-cpu": Config(vocab_size=257, eot_token=256, n_layer=4, n_embd=128, n_head=2, head_dim=64, mlp_ratio=304 / 128, num_experts=5, top_k=1,
                       norm_topk_prob=0.0, num_shared_experts=1, shared_dim=488, balance_window=6, attention="K", window="L", window_size=512,
                       tie_embeddings=True, value_embeds=0),
    # 8 GPUs: modded-nanogpt record 21 with experts
    "speedrun": Config(attention="AAAAAAA-AAAA", window="LSSSLSSLSSSL", head="fp8"),
}

# -----------------------------------------------------------------------------
# The model card: what it costs


def count_parameters(config: Config) -> dict[str, int]:
    """Parameters per kind, `total`, and `active`: those that enter one token's forward pass.

    Active are the experts that a token meets at even load, one row of each embedding table, and everything else."""
    with torch.device("meta"):
        model = GPT(config)
    counts, active = dict.fromkeys((rule.kind for rule in PARAMETER_RULES.values()), 0), 0
    for name, parameter in model.named_parameters():
        kind = parameter_rule(name).kind
        counts[kind] += parameter.numel()
        active += round(parameter.numel() * active_share(config, name, len(parameter)))
    return counts | {"total": sum(counts.values()), "active": active}


def active_share(config: Config, name: str, rows: int) -> float:
    """Of a parameter, what one token meets."""
    if name.endswith(("attention.values", "attention.outputs")):
        return config.attn_top_k / config.attn_experts
    kind, tied = parameter_rule(name).kind, name == "embed" and config.tie_embeddings
    return {"expert": config.expert_share}.get(kind, 1 / rows if kind in ("embed", "ngram_embed", "value_embed") and not tied else 1)


def mean_keys(config: Config, letter: str, seq_len: int) -> float:
    """Keys that a query sees on average in a layer of this letter of WINDOWS."""
    reach = min(max(1, config.window_size // WINDOWS[letter]), seq_len)
    return OBJECTIVES[config.objective].keys((reach * (reach + 1) / 2 + (seq_len - reach) * reach) / seq_len)


def flops_per_token(config: Config, seq_len: int) -> float:
    """FLOPs of forward + backward per token at the full window: 6 per active weight of a matmul, 12 per attended key and channel.

    Embeddings, norms, inactive experts and those without matmuls count nothing; attention counts the keys inside the causal window,
    documents ignored. Of a loop all rounds count, though tokens may leave before; of a pool of layers what evaluation computes at even use."""
    weights, keys, runs = 0.0, 0.0, config.layer_runs
    with torch.device("meta"):
        model = GPT(config)
    for name, parameter in model.named_parameters():
        in_matmuls = parameter_rule(name).kind in ("matrix", "head", "router", "expert") or (name == "embed" and config.tie_embeddings)
        share = active_share(config, name, len(parameter)) if in_matmuls else 0.0
        block = re.match(r"blocks\.(\d+)\.(?:attention\.(\w+))?", name)
        times = runs[int(block[1])] if block else config.loops if name.startswith(("depth.controller", "depth.halt")) else 1
        if block and config.depth == "routed" and config.tiled("looped")[int(block[1])] == "o":  # keys and values are made of all tokens
            part = {"qkv": 2 / 3, "latent": 1, "key": 1, "key_up": 1, "value_up": 1, "k": 1, "values": 1}.get(block[2], 0)
            times = part * config.loops + (1 - part) * times
        weights += parameter.numel() * share * times
    head = config.router_dim / (config.n_head * config.head_dim)  # of router attention, in units of a layer's
    for letter, window, ffn, times in zip(config.tiled("attention"), config.tiled("window"), config.tiled("pattern"), runs):
        heads = (letter != "-") + head * (ffn == "M" and config.router == "attention")
        keys += times * heads * (mean_keys(config, window, seq_len) + config.num_meta_tokens)
    per_row = seq_len + config.num_meta_tokens  # what is computed for meta-tokens is shared out among the others
    return (6 * weights + 12 * keys * config.n_head * config.head_dim) * per_row / seq_len


def cache_bytes_per_token(config: Config) -> int:
    """That decoding keeps of each token in all layers together, measured on the meta device."""
    with torch.device("meta"):
        model, cache, ids = GPT(config), Cache(config, 1, 1), torch.zeros(1, 1, dtype=torch.int64)  # training keeps the same and picks nobody
        with torch.no_grad():
            model(ids, cache=cache)
    return sum(part[:, :1].nbytes for parts in cache.kept.values() for part in parts)


def activation_bytes(config: Config, seq_len: int) -> int:
    """Bytes that one row of seq_len tokens keeps for backward, counted tensor by tensor on the meta device.

    T x T tensors (masks, scores) are left out: FlexAttention keeps lists of blocks and recomputes its scores. All others grow in
    proportion to T, so two lengths that no width of the model equals tell the rest."""
    width = config.n_head * config.head_dim
    widths = {config.head_dim, config.n_embd, width, width // 2, config.latent_dim, config.hidden_size, config.hidden_size * config.top_k}
    short, long = [T for T in range(128, 1024, 16) if T + config.num_meta_tokens not in widths][:2]  # FP8 heads want multiples of 16
    few, many = saved_bytes(config, short), saved_bytes(config, long)
    return few + (many - few) * (seq_len - short) // (long - short)


def saved_bytes(config: Config, T: int) -> int:
    """What forward keeps of one row of T tokens, without parameters and T x T tensors."""
    kept, square = {}, (T + config.num_meta_tokens,) * 2

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage, storage.nbytes() * (tensor.shape[-2:] != square))  # held, so that no address is used twice
        return tensor

    with torch.device("meta"):
        model, ids = GPT(config), torch.zeros(1, T, dtype=torch.int64)
        for parameter in model.parameters():
            keep(parameter.detach())
        parameters = set(kept)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids, ids)
    return sum(nbytes for key, (_, nbytes) in kept.items() if key not in parameters)


def model_card(config: Config, seq_len: int) -> str:
    """Parameters total / active / per kind, FLOPs per token, memory, as text."""
    counts = count_parameters(config)
    training = flops_per_token(config, seq_len)
    experts = ", ".join(f"{count} x {EXPERTS[kind].width(config.hidden_size)[0]} wide {kind}" if EXPERTS[kind].has_matmuls else f"{count} x {kind}"
                        for kind, count in config.expert_counts.items())  # fmt: skip
    if config.expert_share * config.num_experts != config.top_k or len(config.expert_counts) > 1:
        meets = config.expert_share * sum(count for kind, count in config.expert_counts.items() if EXPERTS[kind].has_matmuls)
        experts += f" (a token meets {meets:.2f} with matmuls at even load)"
    if config.num_shared_experts:
        experts += f"; {config.num_shared_experts} shared {config.shared}, routed sum x {routed_scale(config):.3f}"
    loops = []
    if config.depth != "stack":
        further = flops_per_token(dataclasses.replace(config, loops=config.loops + 1), seq_len) - training
        loops = [("depth", f"{config.depth}, layers {config.tiled('looped')}, {config.loops} times at most, halt {config.halt}; "
                           f"each time {further / 3:,.0f} FLOPs forward per token, no parameters")]  # fmt: skip
    layers = " ".join(f"{f}{a}{w}" for f, a, w in zip(config.tiled("pattern"), config.tiled("attention"), config.tiled("window")))
    rows = [
        ("layers", f"{config.n_layer} ({layers})"),
        *loops,
        ("width", f"n_embd {config.n_embd}, {config.n_head} heads x {config.head_dim}, vocabulary {config.vocab_size} -> {config.padded_vocab_size}"),
        ("experts", f"{experts}, top-{config.top_k}, router {config.router}"),
        *((f"  {kind}", f"{counts[kind]:,}") for kind in counts if kind not in ("total", "active")),
        ("parameters", f"{counts['total']:,} total, {counts['active']:,} active per token; {counts['total'] - counts['expert']:,} outside experts"
                       + (f", {counts['expert'] // config.num_experts:,} for each of {config.num_experts} experts" if counts["expert"] else "")),
        ("FLOPs per token", f"{training / 3:,.0f} forward, {training:,.0f} training, at {seq_len} tokens per row"),
        ("weights + gradients", f"{8 * counts['total'] / 2**20:,.1f} MiB in fp32"),
        ("KV cache", f"{cache_bytes_per_token(config):,} bytes per token"),
        ("activations", f"{activation_bytes(config, seq_len) / 2**20:,.1f} MiB per row of {seq_len} tokens"),
    ]
    return "\n".join(f"{label:<20} {text}" for label, text in rows)


# -----------------------------------------------------------------------------
# The Hugging Face Hub: huggingface_hub comes with datasets, and is imported only by who asks for it

HUB = "hf://"  # before the name of a repository, where a folder could stand as well
HUB_CARD = """---
{metadata}
---

# {title}

A language model of modded-nanomoe: {kind}, {total:,} parameters, {active:,} of them active per token.
Tokens: encoding `{encoding}`, {vocab_size:,} ids. Trained with windows of up to {window_size:,} tokens.

```python
from model import GPT
from data import get_encoding

model = GPT.from_pretrained("{name}")
encoding = get_encoding(model.encoding)
```

`python model.py --checkpoint {where} --prompt "..."` continues a text. This is a small model of a speedrun: it imitates its corpus, and nothing that
it says need be true.
{more}"""


@functools.cache
def on_the_hub() -> type:
    """GPT with huggingface_hub's PyTorchModelHubMixin, which reads, writes, downloads and uploads. Raises CheckpointError where that is missing."""
    try:
        from huggingface_hub import ModelCard, PyTorchModelHubMixin
    except ImportError:
        from checkpoint import CheckpointError

        raise CheckpointError("the Hub's folders need huggingface_hub and safetensors: `pip install huggingface_hub safetensors`") from None

    class HubGPT(PyTorchModelHubMixin, GPT, library_name="modded-nanomoe", pipeline_tag="text-generation", license="mit", tags=["moe"]):
        def __init__(self, config: Config, encoding: str | None = None):
            super().__init__(config)
            self.encoding, self.card, self.files = encoding, "", {}

        @classmethod
        def of(cls, model: GPT, card: str, files: dict[str, bytes]) -> "HubGPT":
            """The same tensors under this class, to be written."""
            with torch.device("meta"):
                shared = cls(model.config, model.encoding)
            shared.load_state_dict(model.state_dict(), assign=True)
            shared.card, shared.files = card, files
            return shared

        def _save_pretrained(self, folder: Path):
            super()._save_pretrained(folder)
            settings = dataclasses.asdict(self.config) | {"encoding": self.encoding, "model_type": "modded-nanomoe"}
            (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
            (folder / "README.md").unlink(missing_ok=True)  # or the mixin would keep the card of what was there before
            for name, content in self.files.items():
                (folder / name).write_bytes(content)

        @classmethod
        def _from_pretrained(cls, *, strict: bool = True, **kwargs):
            with contextlib.redirect_stdout(io.StringIO()):  # it announces itself
                return super()._from_pretrained(strict=strict, **kwargs)

        def generate_model_card(self, where: str = "...") -> ModelCard:
            config, counts = self.config, count_parameters(self.config)
            experts = f"{config.num_experts} experts, top-{config.top_k}, in {config.routed_layers} of {config.n_layer} layers"
            return ModelCard(HUB_CARD.format(
                metadata=self._hub_mixin_info.model_card_data.to_yaml(), title=where.rpartition("/")[2], name=where.removeprefix(HUB), where=where,
                kind=experts if config.routed_layers else f"{config.n_layer} dense layers", **counts, encoding=self.encoding,
                vocab_size=config.vocab_size, window_size=config.window_size, more=self.card))  # fmt: skip

    return HubGPT


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def load_model(where: str | Path, device: str = "cpu") -> GPT:
    """The trained model in evaluation mode, with its `encoding`, from a run's checkpoint folder, from a folder of save_pretrained(), or from the Hub
    (hf://user/name). Raises CheckpointError."""
    from checkpoint import CheckpointError, load_model_from_run

    name = str(where)
    if not name.startswith(HUB) and not (Path(where) / "model.safetensors").exists():
        return load_model_from_run(Path(where), device)[0]
    mend = "check its name, your connection, and `hf auth login` if it is private" if name.startswith(HUB) else "write it again"
    try:
        return GPT.from_pretrained(name.removeprefix(HUB)).to(device)
    except CheckpointError:
        raise
    except Exception as error:  # the network's, the Hub's, safetensors', or of a configuration that is none of ours
        raise CheckpointError(f"{where} cannot be loaded ({first_line(error)}); {mend}") from error


# -----------------------------------------------------------------------------
# Command line


@functools.cache
def field_notes(fields_of: type) -> dict[str, str]:
    """Field of a dataclass -> the comment behind it in the source."""
    source = "".join(inspect.getsource(part) for part in fields_of.__mro__ if dataclasses.is_dataclass(part))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))


def add_flags(parser: argparse.ArgumentParser, fields_of: type, group: str = "the model"):
    """One flag per field of a dataclass, in both spellings, all defaulting to absent; what it is, is said behind it in the source."""
    said, flags = field_notes(fields_of), parser.add_argument_group(group)
    for field in dataclasses.fields(fields_of):
        names = {f"--{field.name}", f"--{field.name.replace('_', '-')}"}
        note = f"{said[field.name]} " if field.name in said else ""
        flags.add_argument(*sorted(names), type=flag_type(field.type), default=argparse.SUPPRESS, metavar=field.name.upper(),
                           help=f"{note}(default {field.default!r})".replace("%", "%%"))  # fmt: skip


def flag_type(annotation):
    """The parser of a field's type: numbers and strings as they are, true/false for bool, and None for an optional field."""
    options = getattr(annotation, "__args__", (annotation,))

    def parse(text: str):
        if type(None) in options and text.lower() == "none":
            return None
        if bool in options:
            if text.lower() not in ("true", "false", "1", "0"):
                raise ValueError(text)
            return text.lower() in ("true", "1")
        return options[0](text)

    parse.__name__ = "true or false" if bool in options else options[0].__name__
    return parse


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose complaint is one sentence and names the file."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def parse(argv: list[str] | None = None) -> dict:
    """Flags -> their values; under `config`, the preset with the given fields changed. Raises ConfigError."""
    parser = Parser(prog="model.py", description="Print a preset's model card, or sample from a checkpoint, or share it.")
    parser.add_argument("--preset", choices=list(PRESETS), default="speedrun")
    parser.add_argument("--seq_len", "--seq-len", type=positive, help="tokens per row on the card (default: the window)")
    parser.add_argument("--checkpoint", metavar="WHERE", help="a run's checkpoint folder, one of --save_pretrained, or hf://user/name: sample")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=positive, default=256)
    parser.add_argument("--num_samples", "--num-samples", type=positive, default=1, help="continuations of the prompt, made at once")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_p", "--top-p", type=float, default=1.0, help="sample from the likeliest tokens that together have this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore_eot", "--ignore-eot", action="store_true", help="go on after the end of a text")
    parser.add_argument("--save_pretrained", "--save-pretrained", type=Path, metavar="DIR", help="write the checkpoint as a folder for the Hub")
    parser.add_argument("--push_to_hub", "--push-to-hub", metavar="USER/NAME", help="upload it to the Hub (log in with `hf auth login`)")
    parser.add_argument("--routes", type=Path, metavar="FILE", help="write where the tokens of --data's validation text go, as .npz for logger.py")
    parser.add_argument("--data", type=Path, metavar="DIR", help="shards of the checkpoint's encoding")
    parser.add_argument("--tokens", type=positive, default=2**15, help="of them, for --routes")
    add_flags(parser, Config, "the model, for its card; beside --checkpoint only --top_k, which then keeps that many likeliest tokens")
    args = vars(parser.parse_args(argv))
    overrides = {field.name: args[field.name] for field in dataclasses.fields(Config) if field.name in args}
    if args["checkpoint"]:
        for name in overrides.keys() - {"top_k"}:
            raise ConfigError(f"{name} is a preset's, and a checkpoint has its own; leave --{name} or --checkpoint out")
        return args
    return args | {"config": dataclasses.replace(PRESETS[args["preset"]], **overrides)}


def main():
    from checkpoint import CheckpointError

    try:
        args = parse()
        if args["save_pretrained"] or args["push_to_hub"]:
            share(args)
        elif args["routes"]:
            print(routes(args))
        elif args["checkpoint"]:
            sample(args)
        else:
            print(model_card(args["config"], args["seq_len"] or args["config"].window_size))
    except (ConfigError, CheckpointError, OSError) as error:
        sys.exit(f"model.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def sample(args: dict):
    """Print the prompt and its continuations, the first of them as it comes; how fast it went goes to stderr."""
    from checkpoint import CheckpointError
    from data import DataError, get_encoding

    model = load_model(args["checkpoint"], "cuda" if torch.cuda.is_available() else "cpu").for_inference()
    try:
        encoding = get_encoding(model.encoding)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    prompt = [encoding.eot_token, *encoding.encode(args["prompt"]).tolist()]
    tokens_BT = torch.tensor([prompt] * args["num_samples"], device=model.head.device)
    began, times, rows = time.perf_counter(), [], []
    show(args["prompt"])
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in several tokens
    stop_at = None if args["ignore_eot"] else encoding.eot_token
    for id_B in model.stream(tokens_BT, args["max_new_tokens"], args["temperature"], args.get("top_k", 0), args["top_p"], args["seed"], stop_at):
        rows.append(id_B.tolist())
        show(text.decode(encoding.words[rows[-1][0]]))
        times.append(time.perf_counter())
    show(text.decode(b"", True) + "\n")
    for number, ids in enumerate(list(zip(*rows))[1:], start=2):
        show(f"{'-' * 30} {number} of {args['num_samples']}\n{args['prompt']}{encoding.decode(ids)}\n")
    first, rest = times[0] - began, times[-1] - times[0]
    speed = f", {args['num_samples'] * (len(times) - 1) / rest:,.1f} tokens/s" if rest else ""
    print(f"{args['num_samples']} x {len(times)} tokens after {len(prompt)}: the first after {first:.3f} s{speed}", file=sys.stderr)


def show(text: str):
    """Write what a terminal's encoding can show, at once."""
    print(text.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8"), end="", flush=True)


def share(args: dict):
    """Write a checkpoint as the Hub's files, or upload them. Raises CheckpointError where other files are in the way."""
    import logger  # for the run's numbers and curve on the card
    from checkpoint import CheckpointError, checkpoints

    folder = args["save_pretrained"]
    if not args["checkpoint"]:
        raise CheckpointError("--save_pretrained and --push_to_hub need --checkpoint, a run's folder")
    if folder and folder.exists() and any(folder.iterdir()) and not (folder / "model.safetensors").exists():
        raise CheckpointError(f"{folder} already holds other files; name a new folder")
    model, about = load_model(args["checkpoint"]), ("", {})
    steps = checkpoints(Path(args["checkpoint"]))
    if steps and logger.is_run(steps[0].parent.parent):
        about = logger.card(steps[0].parent.parent)
    if folder:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        GPT.save_pretrained(model, partial, *about, where=str(folder))  # also where it is a HubGPT, whose own knows no card
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        print(f"{folder}: " + ", ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in sorted(folder.iterdir())))
    if args["push_to_hub"]:
        try:
            print(GPT.push_to_hub(model, args["push_to_hub"], *about))
        except Exception as error:  # the network's or the Hub's
            raise CheckpointError(f"{args['push_to_hub']} cannot be uploaded ({first_line(error)}); log in with `hf auth login`, "
                                  "or write a folder with --save_pretrained") from error  # fmt: skip


@torch.no_grad()
def collect_routes(model: GPT, batches) -> dict:
    """Arrays that say where tokens went, over batches of data.Batch: layer_SN (with depth routed, the layer of each step, -1 for a token that
    had left), loops_N (with depths that have loops), expert_LTK (the experts of each routed layer; where a layer runs once), token_N (what each
    place was asked for: the token after it, or its own if that was hidden) and right_N (1 if the likeliest id was that, 0 if not, -1 if nothing
    was asked). Meta-tokens are left out."""
    training, meta = model.training, model.config.num_meta_tokens
    seen, once = {"layer_SN": [], "loops_N": [], "token_N": [], "right_N": []}, model.config.depth == "stack"
    experts, hooks = [[] for _ in range(model.config.routed_layers)], []

    def of_depth(module, args, deep: Deep):
        if deep.choices_SBT is not None:  # fewer steps where all tokens have left
            choices_SBT = F.pad(deep.choices_SBT, (0, 0) * 2 + (0, module.eval_loops - len(deep.choices_SBT)), value=-1)
            seen["layer_SN"].append(choices_SBT[..., meta:].flatten(-2))
        if deep.loops_BT is not None:
            seen["loops_N"].append(deep.loops_BT[:, meta:].flatten())

    def of_router(found, module, args, route: Route):
        found.append(route.expert_TK.unflatten(0, args[0].shape[:2])[:, meta:].flatten(0, 1))

    routers = [module.router for module in model.modules() if isinstance(module, MoE)] if once else []
    model.eval()
    try:
        hooks.append(model.depth.register_forward_hook(of_depth))
        hooks += [router.register_forward_hook(functools.partial(of_router, found)) for router, found in zip(routers, experts)]
        for batch in batches:
            ids_BT, targets_BT = OBJECTIVES[model.config.objective].pose(model, batch.inputs_BT, batch.targets_BT)
            with torch.compiler.set_stance("force_eager"):  # a compiled block would run past the hooks
                logits_BTV = model(ids_BT, doc_ids_BT=model.documents(batch.inputs_BT, None, None)).logits
            seen["token_N"].append(torch.where(targets_BT < 0, batch.inputs_BT, targets_BT).flatten())
            seen["right_N"].append(torch.where(targets_BT < 0, -1, logits_BTV.argmax(-1) == targets_BT).to(torch.int8).flatten())
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    arrays = {name: torch.cat(parts, -1).cpu().numpy() for name, parts in seen.items() if parts}
    if routers:
        arrays |= {"expert_LTK": torch.stack([torch.cat(parts) for parts in experts]).cpu().numpy(), "experts": model.config.num_experts}
    pool = model.config.tiled("looped").count("o")
    return arrays | {"layers": pool, "identities": model.config.identity_layers}


def routes_batches(config: Config, folder, tokens: int, device="cpu"):
    """Of the first validation tokens of a folder of shards, rows one by one. Raises data.DataError at the call."""
    import data

    return data.validation_batches(folder, seq_len=min(tokens, config.window_size), rows=1, max_tokens=tokens, vocab_size=config.vocab_size,
                                   device=device)  # fmt: skip


def validation_routes(model: GPT, encoding: str, folder, tokens: int) -> dict:
    """collect_routes() of the first validation tokens of a folder of shards, a row at a time, and where they are problems how hard they are:
    chain_N and sum_N, of data.difficulty. Raises data.DataError."""
    import numpy as np

    import data

    arrays = collect_routes(model, routes_batches(model.config, folder, tokens, model.head.device))
    if encoding == "bytes":
        text = np.where(arrays["token_N"] < 256, arrays["token_N"], ord("\n")).astype(np.uint8).tobytes()
        arrays |= {f"{kind}_N": label for kind, label in data.difficulty(text).items() if label.any()}
    return arrays


def write_routes(path: Path, arrays: dict):
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)


def routes(args: dict) -> str:
    """Raises CheckpointError without a checkpoint or data."""
    import data
    from checkpoint import CheckpointError, load_model_from_run

    if not args["checkpoint"] or not args["data"]:
        raise CheckpointError("--routes needs --checkpoint, a run's folder, and --data, a folder of shards")
    model, manifest = load_model_from_run(args["checkpoint"], "cuda" if torch.cuda.is_available() else "cpu")
    try:
        arrays = validation_routes(model, manifest["encoding"], args["data"], args["tokens"])
    except data.DataError as error:
        raise CheckpointError(str(error)) from None
    write_routes(args["routes"], arrays)
    return f"{args['routes']}: {len(arrays['token_N']):,} tokens; draw them with `python logger.py --routes`"


if __name__ == "__main__":
    import model  # the module that checkpoint.py imports, rather than a second copy of its classes

    model.main()
