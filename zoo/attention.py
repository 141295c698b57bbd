"""Attention kinds: latent (MLA), shared keys, routed (SwitchHead); rotary and softmax variants.

Keys and values are returned beside the output, so a later layer can share them. Letters A, K and - are those of
model.py, here with every option of the zoo."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
import ops
from cli import require
from model import PARAMETER_RULES, WINDOWS, KVCache, ParameterRule, constant, init_uniform, offset_keys
from ops import linear_fp32, norm
from zoo.config import CHECKS, LETTERS, TABLES, Config
from zoo.routers import Route


class Rotary(NamedTuple):
    """Tensors that a layer rotates, and whether its frequencies are stretched like its window."""

    qk: bool = False
    vo: bool = False
    by_window: bool = False

    def speed(self, window_letter: str, window_letters: str) -> float:
        """Factor on the frequencies; if they are stretched, the shortest window of all layers has 1."""
        return WINDOWS[window_letter] / max(WINDOWS[letter] for letter in window_letters) if self.by_window else 1.0


ROTARIES = {
    "H": Rotary(qk=True),
    "N": Rotary(),  # NoPE
    "V": Rotary(vo=True),  # VO-RoPE (kexue.fm/archives/10862): the value read depends on its distance
    "B": Rotary(qk=True, vo=True),
    "W": Rotary(qk=True, by_window=True),  # wavelet-like (after 2502.02004): equal turns inside every window
}
QK_NORMS = ("rms", "none")  # without a norm attn_scale should be about 1 / sqrt(head_dim)
SOFTMAXES = ("plain", "ssmax")


class Attention(nn.Module):
    """model.Attention with the zoo's options. Returns the output and the keys and values that were attended to."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        width = config.n_head * config.head_dim
        self.n_head, self.scale, self.normed_qk = config.n_head, config.attn_scale, config.qk_norm == "rms"
        self.rotary = ROTARIES[config.per_layer("rotary")[layer]]
        self.add_projections(config, width)
        self.add_output(config, width)
        self.sharpness = nn.Parameter(torch.empty(config.n_head)) if config.attn_softmax == "ssmax" else None

    def add_projections(self, config: Config, width: int):
        self.qkv, self.value_mix = nn.Parameter(torch.empty(3, width, config.n_embd)), nn.Parameter(torch.empty(2))

    def add_output(self, config: Config, width: int):
        self.out = nn.Parameter(torch.empty(config.n_embd, width))

    def forward(self, x_BTD: Tensor, ctx) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, kv = self.project(x_BTD, ctx)
        return self.attend(q, kv, x_BTD, ctx), kv

    def project(self, x_BTD: Tensor, ctx) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Queries (B, T, H, C) of the new tokens, keys and values (B, S, H, C) of all tokens so far."""
        q, k, v = F.linear(x_BTD, self.qkv.flatten(0, 1).type_as(x_BTD)).unflatten(-1, (3, self.n_head, -1)).unbind(2)
        return self.normed_rotated(q, ctx), self.append_to_cache(k, v, ctx)

    def queries(self, x_BTD: Tensor, ctx) -> Tensor:
        return self.normed_rotated(F.linear(x_BTD, self.qkv[0].type_as(x_BTD)).unflatten(-1, (self.n_head, -1)), ctx)

    def keys_values(self, x_BTD: Tensor, ctx) -> tuple[Tensor, Tensor]:
        k, v = F.linear(x_BTD, self.qkv[1:].flatten(0, 1).type_as(x_BTD)).unflatten(-1, (2, self.n_head, -1)).unbind(2)
        return self.append_to_cache(k, v, ctx)

    def normed_rotated(self, x_BTHC: Tensor, ctx) -> Tensor:
        x_BTHC = norm(x_BTHC) if self.normed_qk else x_BTHC
        return ops.rotate(x_BTHC, ctx.cos, ctx.sin) if self.rotary.qk else x_BTHC

    def rotate_values(self, v_BTHC: Tensor, ctx) -> Tensor:
        return ops.rotate(v_BTHC, ctx.cos, ctx.sin) if self.rotary.vo else v_BTHC

    def append_to_cache(self, k: Tensor, v: Tensor, ctx) -> tuple[Tensor, Tensor]:
        k, v = self.normed_rotated(k, ctx), ops.blend(self.value_mix, v, ctx.value_embed_BTHC)
        v = self.rotate_values(v, ctx)
        return (k, v) if ctx.cache is None else ctx.cache.append(self, k, v)

    def attend(self, q_BTHC: Tensor, kv: tuple[Tensor, Tensor], x_BTD: Tensor, ctx) -> Tensor:
        """Output (B, T, D) of the queries over these keys and values."""
        if self.sharpness is not None:
            q_BTHC = scale_queries(self.sharpness, q_BTHC, ctx)
        k, v = kv
        y = ctx.mask.attend(q_BTHC.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.scale).transpose(1, 2)
        return self.output(ops.rotate(y, ctx.cos, -ctx.sin) if self.rotary.vo else y, x_BTD)

    def output(self, y_BTHC: Tensor, x_BTD: Tensor) -> Tensor:
        return F.linear(y_BTHC.flatten(-2), self.out.type_as(x_BTD))


def scale_queries(sharpness_H: Tensor, q_BTHC: Tensor, ctx) -> Tensor:
    """SSMax (2501.19399): scores times s log n, n the number of visible keys and s learned per head, after QK-norm.

    A score that exceeds the others by 1 / s keeps its share of the attention however long the context."""
    return q_BTHC * (sharpness_H[:, None] * ctx.log_visible_BT[:, :, None, None]).type_as(q_BTHC)


class KeyOffsetAttention(Attention):
    """model.KeyOffsetAttention: the static channels of a key come from the previous token."""

    def append_to_cache(self, k: Tensor, v: Tensor, ctx) -> tuple[Tensor, Tensor]:
        if isinstance(ctx.cache, KVCache):  # its keys never change: shift before storing
            k, v = self.normed_rotated(k, ctx), ops.blend(self.value_mix, v, ctx.value_embed_BTHC)
            v = self.rotate_values(v, ctx)
            return ctx.cache.append(self, self.shift_new_keys(k, ctx), v)
        k, v = super().append_to_cache(k, v, ctx)
        return offset_keys(k, ctx.same_doc_BS), v

    def shift_new_keys(self, k_BTHC: Tensor, ctx) -> Tensor:
        return model.offset_new_keys(self, k_BTHC, ctx)


class NoAttention(nn.Module):
    """A layer without attention."""

    def __init__(self, config: Config, layer: int):
        super().__init__()

    def forward(self, x_BTD: Tensor, ctx) -> tuple[Tensor, None]:
        return x_BTD.new_zeros(x_BTD.size(-1)), None

    def keys_values(self, x_BTD: Tensor, ctx) -> None:
        return None


class SeparateAttention(Attention):
    """Base of the kinds whose queries have a matrix of their own."""

    def add_projections(self, config: Config, width: int):
        self.q = nn.Parameter(torch.empty(width, config.n_embd))

    def project(self, x_BTD: Tensor, ctx) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.queries(x_BTD, ctx), self.keys_values(x_BTD, ctx)

    def queries(self, x_BTD: Tensor, ctx) -> Tensor:
        return self.normed_rotated(F.linear(x_BTD, self.q.type_as(x_BTD)).unflatten(-1, (self.n_head, -1)), ctx)


class LatentAttention(SeparateAttention):
    """MLA (DeepSeek-V2, 2405.04434): all heads' values and static key channels come from one normed latent vector.

    The vector has latent_dim entries. The rotating key channels are one key for all heads. A cache keeps these two
    alone, so there are no value embeddings."""

    def add_projections(self, config: Config, width: int):
        super().add_projections(config, width)
        D, R = config.n_embd, config.latent_dim
        shapes = {"latent": (R, D), "key": (config.head_dim // 2, D), "key_up": (width // 2, R), "value_up": (width, R)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def keys_values(self, x_BTD: Tensor, ctx) -> tuple[Tensor, Tensor]:
        latent_BTR, key = (F.linear(x_BTD, weight.type_as(x_BTD)) for weight in (self.latent, self.key))
        latent_BTR, key = norm(latent_BTR), key[:, :, None]
        if self.rotary.qk:
            key = ops.rotate(key, *map(rotating_half, (ctx.cos, ctx.sin)))
        if ctx.cache is not None:
            latent_BTR, key = ctx.cache.append(self, latent_BTR, key)
        heads = (self.n_head, -1)
        static, v = (F.linear(latent_BTR, w.type_as(x_BTD)).unflatten(-1, heads) for w in (self.key_up, self.value_up))
        a, b = key.expand(-1, -1, self.n_head, -1).chunk(2, dim=-1)
        a_static, b_static = static.chunk(2, dim=-1)
        k = torch.cat([a, a_static, b, b_static], dim=-1)
        return norm(k) if self.normed_qk else k, v


def rotating_half(table: Tensor) -> Tensor:
    """Channels (..., C/2) of a rotary table (..., C) that rotate."""
    a, _, b, _ = table.chunk(4, dim=-1)
    return torch.cat([a, b], dim=-1)


class SharedAttention(SeparateAttention):
    """MLKV (2406.09297): own queries over keys and values of the nearest earlier layer that computes some; no cache."""

    def keys_values(self, x_BTD: Tensor, ctx) -> tuple[Tensor, Tensor]:
        return ctx.kv


class RoutedAttention(SeparateAttention):
    """SwitchHead (2312.07987): attn_experts value and output matrices per head, of which a token uses attn_top_k.

    Their weights are the sigmoids of their scores. Queries and keys are plain. There are no value embeddings and no
    load balancing."""

    def add_projections(self, config: Config, width: int):
        super().add_projections(config, width)
        H, E, D = config.n_head, config.attn_experts, config.n_embd
        self.top_k = config.attn_top_k
        self.k, self.choice = nn.Parameter(torch.empty(width, D)), nn.Parameter(torch.empty(2, H * E, D))
        self.values = nn.Parameter(torch.empty(H * E, config.head_dim, D))

    def add_output(self, config: Config, width: int):
        self.outputs = nn.Parameter(torch.empty(config.n_head * config.attn_experts, config.n_embd, config.head_dim))

    def choose(self, x_BTD: Tensor, which: int) -> Route:
        """Route of every head of every token (T * H,), in this order."""
        score_TX = linear_fp32(x_BTD.flatten(0, 1), self.choice[which])
        weight_NK, expert_NK = score_TX.view(len(score_TX) * self.n_head, -1).sigmoid().topk(self.top_k)
        head_N1 = torch.arange(self.n_head, device=x_BTD.device).repeat(len(score_TX))[:, None]
        return Route(expert_NK + head_N1 * (score_TX.size(1) // self.n_head), weight_NK, score_TX)

    def keys_values(self, x_BTD: Tensor, ctx) -> tuple[Tensor, Tensor]:
        k = self.normed_rotated(F.linear(x_BTD, self.k.type_as(x_BTD)).unflatten(-1, (self.n_head, -1)), ctx)
        source_BTD = x_BTD if ctx.raw_BTD is None else ctx.raw_BTD
        source_ND = source_BTD.flatten(0, 1).repeat_interleave(self.n_head, 0)
        v, _ = model.dispatch(source_ND, self.choose(x_BTD, 0), matrices(self.values))
        v = self.rotate_values(v.view(k.shape), ctx)
        return (k, v) if ctx.cache is None else ctx.cache.append(self, k, v)

    def output(self, y_BTHC: Tensor, x_BTD: Tensor) -> Tensor:
        out_ND, _ = model.dispatch(y_BTHC.flatten(0, 2), self.choose(x_BTD, 1), matrices(self.outputs))
        return out_ND.view(*y_BTHC.shape[:3], -1).sum(2)


def matrices(weight_XNK: Tensor):
    """Experts of one matrix each, as a function for dispatch."""
    return lambda rows, ends: ops.grouped_mm(rows, weight_XNK.type_as(rows), ends)


ATTENTIONS = {"A": Attention, "K": KeyOffsetAttention, "L": LatentAttention, "S": SharedAttention, "R": RoutedAttention,
              "-": NoAttention}  # fmt: skip
LETTERS |= {"attention": ATTENTIONS, "rotary": ROTARIES}
TABLES |= {"attn_softmax": SOFTMAXES, "qk_norm": QK_NORMS}
PARAMETER_RULES |= {
    "attention.q": ParameterRule("matrix", init_uniform),
    "attention.latent": ParameterRule("matrix", init_uniform),
    "attention.key": ParameterRule("matrix", init_uniform),
    "attention.key_up": ParameterRule("matrix", init_uniform),
    "attention.value_up": ParameterRule("matrix", init_uniform),
    "attention.k": ParameterRule("matrix", init_uniform),
    "attention.values": ParameterRule("matrix", init_uniform),
    "attention.choice": ParameterRule("router", constant(0.0)),
    "attention.outputs": ParameterRule("matrix", constant(0.0)),
    "attention.sharpness": ParameterRule("scalar", constant(0.168)),  # the mean of 0.168 log n is 1 up to n = 1,024
}


def check(config: Config):
    require(config, "latent_dim", config.latent_dim % 8 == 0, "a multiple of 8")
    legal = f"at most attn_experts = {config.attn_experts}"
    require(config, "attn_top_k", config.attn_top_k <= config.attn_experts, legal)
    for layer, source in config.key_sources.items():
        legal = f"without S in layer {layer}: no layer before it has keys to share"
        require(config, "attention", source is not None, legal)
        shared = f"the same in layer {layer} as in layer {source}, whose keys and values it shares"
        legal = f"{shared} (and so must `window` be where it is W)"
        require(config, "rotary", config.rope_spec(layer) == config.rope_spec(source), legal)
    letters = zip(config.per_layer("rotary"), config.per_layer("attention"))
    latent = {rotary for rotary, attention in letters if attention == "L"}
    legal = "H, N or W where attention is L, whose values are recomputed from the cached vector"
    require(config, "rotary", not latent & set("VB"), legal)


CHECKS.append(check)
