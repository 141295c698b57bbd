"""zoo.Config: the fields of every option. Each file of the zoo adds its own tables, letters and checks of fields."""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass

import torch

import model
from cli import UserError, require

TABLES = {}  # field -> table of its legal values
LETTERS = {}  # field of one letter per layer -> its legal letters
CHECKS = []  # functions of a Config that raise UserError


@dataclass(frozen=True, kw_only=True)
class Config(model.Config):
    """model.Config and the zoo's fields. Raises UserError, which names the field and its legal values."""

    # experts
    experts: str = "mlp"  # one kind for all num_experts, or a list that sets them: mlp*12,identity,zero
    shared: str = "mlp"  # kind of the shared experts: a key of SHARED
    shared_kernel: int = 3  # tokens in the convolution of shared conv
    routed_scale: float | str = 1.0  # factor on the routed experts' sum; auto: estimated, as large as the shared one
    # routers
    router_score: str = "softmax"  # a key of SCORES: selection and gates from logits
    router_residual: float = 0.0  # weight of the previous MoE layer's logits, through a learned matrix (MoE++)
    router_kernel: int = 3  # tokens in the convolution of router conv
    router_dim: int = 64  # inner width of the routers mlp, recurrent and attention
    # balance
    entropy_coef: float = 0.0  # weight of MoEUT's loss: minus the entropy of a row's mean choice
    importance_coef: float = 0.0  # weight of Shazeer's loss on the sums of gates, per micro-batch
    load_coef: float = 0.0  # weight of his loss on the smooth numbers of tokens, which needs noise
    bias_update_threshold: int = 0  # tokens counted before the selection bias moves again; 0 = every optimizer step
    free_eta: float = 1.0  # balance weight of experts without matmuls: below 1, more load (MoE++: 0.75)
    # depth
    residual: str = "add"  # residual update rule: a key of RESIDUALS
    norms: str = "P"  # tiled over depth: P = before each sub-layer, R = after it too, U = MoEUT's
    looped: str = "o"  # depths loop, routed: tiled over depth: o = in the loop or pool, . = outside it
    loops: int = 2  # iterations of the loop, or steps that pick a layer of the pool, at most
    eval_loops: int = 0  # the same in evaluation; 0 = as in training
    loop_keys: str = "latest"  # keys and values visible in later iterations: a key of LOOP_KEYS
    reinject: float = 0.0  # weight of the loop input re-injected before each iteration
    halt: str = "none"  # halting rule of the loop: a key of HALTS
    halt_threshold: float = 0.0  # sum at which a token halts; 0 = the rule's own
    ponder_coef: float = 0.01  # weight of the cost of further iterations
    ponder_prior: float = 0.2  # halt ponder: prior probability of halting after each iteration
    identity_layers: int = 0  # depth routed: identities in the pool
    controller: str = "linear"  # depth routed: a key of CONTROLLERS
    controller_dim: int = 64  # inner width of the controllers mlp and lstm
    route_by: str = "token"  # token whose state the controller sees: a key of ROUTE_BY
    route_training: str = "soft"  # training weights from the controller: a key of ROUTE_TRAINING
    anneal_steps: int = 1000  # optimizer steps in which route_training anneal goes from soft to one layer
    step_loss: str = "last"  # steps in the training loss: last or mean
    layer_balance_coef: float = 0.0  # weight of a balance loss over the pool's layers
    # attention
    rotary: str = "H"  # tiled: H queries + keys, V values + outputs, B both, N none, W: H by window
    attn_softmax: str = "plain"  # plain or ssmax
    qk_norm: str = "rms"  # rms or none
    latent_dim: int = 64  # width of the latent vector where attention is L
    attn_experts: int = 4  # value and output matrices per head where attention is R
    attn_top_k: int = 2  # of them, used by a token
    num_meta_tokens: int = 0  # learned vectors in front of each row, visible to every token
    # objective
    objective: str = "next"  # next or masked; masked looks both ways and cannot continue a text
    mask_share: float = 0.15  # of the tokens, hidden by objective masked

    def check(self):
        for name in """router_kernel shared_kernel latent_dim loops attn_experts attn_top_k controller_dim
                       anneal_steps""".split():
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in """importance_coef load_coef entropy_coef layer_balance_coef ponder_coef bias_update_threshold
                       router_residual num_meta_tokens eval_loops reinject halt_threshold identity_layers""".split():
            require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in "n_layer loops eval_loops identity_layers num_meta_tokens".split():
            require(self, name, getattr(self, name) <= 10_000, "at most 10,000")
        require(self, "free_eta", self.free_eta > 0, "above 0")
        for name in "ponder_prior mask_share".split():
            require(self, name, 0 < getattr(self, name) < 1, "between 0 and 1")
        super().check()
        for check in CHECKS:
            check(self)

    def tables(self) -> dict[str, dict]:
        tables = super().tables() | TABLES
        del tables["experts"]  # may be a list, checked in moe.py
        return tables

    def letters(self) -> dict:
        return super().letters() | LETTERS

    def describe_experts(self) -> str:
        """The experts on the model card."""
        width = lambda kind: f"{width_of(kind, self.hidden_size)[0]} wide " if has_matmuls(kind) else ""
        kinds = [f"{count} x {width(kind)}{kind}" for kind, count in self.expert_counts.items()]
        text = ", ".join(kinds)
        if self.expert_share * self.num_experts != self.top_k or len(kinds) > 1:
            count = sum(count for kind, count in self.expert_counts.items() if has_matmuls(kind))
            text += f" (a token uses {self.expert_share * count:.2f} with matmuls at even load)"
        if self.num_shared_experts:
            text += f"; {self.num_shared_experts} shared {self.shared}, routed sum x {routed_scale(self):.3f}"
        return text

    def describe_depth(self, seq_len: int) -> str:
        """The loop or pool on the model card."""
        longer = dataclasses.replace(self, loops=self.loops + 1)
        more = model.flops_per_token(longer, seq_len) - model.flops_per_token(self, seq_len)
        looped = f"{self.depth}, layers {self.per_layer('looped')}, {self.loops} times at most, halt {self.halt}"
        return f"{looped}; each time {more / 3:,.0f} FLOPs forward per token, no parameters"

    @property
    def mask_token(self) -> int:
        """Id of a hidden token: the first one past the vocabulary."""
        return self.vocab_size

    @property
    def expert_counts(self) -> dict[str, int]:
        """Kind -> number, in the order in which experts are numbered: kinds with matmuls first, kinds as listed."""
        kinds = listed_kinds(self.experts)
        ordered = sorted(dict.fromkeys(kinds), key=lambda kind: not has_matmuls(kind))
        return {kind: kinds.count(kind) if is_list(self.experts) else self.num_experts for kind in ordered}

    @property
    def expert_etas(self) -> list[float]:
        """Each expert's weight in the balance; loads in proportion to 1 / eta count as even."""
        etas = {kind: 1.0 if has_matmuls(kind) else self.free_eta for kind in self.expert_counts}
        return [etas[kind] for kind, count in self.expert_counts.items() for _ in range(count)]

    @property
    def balanced_experts(self) -> list[float]:
        """1 for each expert whose load is balanced, 0 for an exit."""
        return [float(kind != "exit") for kind, count in self.expert_counts.items() for _ in range(count)]

    @property
    def exits(self) -> tuple[int, int] | None:
        """First and end of the numbers of the exits; None without any."""
        if "exit" not in self.expert_counts:
            return None
        first = self.balanced_experts.index(0.0)
        return first, first + self.expert_counts["exit"]

    @property
    def expert_share(self) -> float:
        """Share of the tokens that an expert with matmuls gets at even load."""
        return self.top_k / sum(1 / eta for eta in self.expert_etas)

    @property
    def layer_runs(self) -> list[float]:
        """Runs of each layer per token: at most, if tokens may halt, and at even use, if layers are picked."""
        pool = self.per_layer("looped").count("o") + self.identity_layers
        runs = {"loop": self.loops, "routed": self.loops / pool}.get(self.depth, 1)
        return [runs if letter == "o" else 1 for letter in self.per_layer("looped")]

    @property
    def key_sources(self) -> dict[int, int | None]:
        """Layer that shares keys and values -> the nearest one before it that computes some."""
        letters = self.per_layer("attention")
        sharing = [layer for layer, letter in enumerate(letters) if letter == "S"]
        earlier = {layer: [other for other in range(layer) if letters[other] not in "S-"] for layer in sharing}
        return {layer: found[-1] if found else None for layer, found in earlier.items()}

    def rope_spec(self, layer: int) -> tuple[str, float]:
        """A layer's letter of ROTARIES, and the factor on its frequencies."""
        letter, windows = self.per_layer("rotary")[layer], self.per_layer("window")
        return letter, LETTERS["rotary"][letter].speed(windows[layer], windows)


def as_zoo(config: model.Config) -> Config:
    """The same configuration with the zoo's fields at their defaults, so the zoo's classes fit the core's slots."""
    return config if isinstance(config, Config) else Config(**vars(config))


MAX_EXPERTS = 2**15  # as dispatch sorts 16-bit ids


def listed_kinds(experts: str) -> list[str]:
    """The kinds in a list such as "mlp*12,identity", each repeated n times for *n; [] if it is no such list.

    Raises UserError for more experts than a layer can have."""
    parts = [re.fullmatch(r"\s*(\w+)\s*(?:\*\s*0*(\d+))?\s*", part) for part in experts.split(",")]
    if not all(parts):
        return []
    if any(len(part[2] or "") > 5 for part in parts) or sum(int(part[2] or 1) for part in parts) >= MAX_EXPERTS:
        raise UserError(f"experts is {experts[:60]!r}; it must list fewer than {MAX_EXPERTS:,} experts")
    return [part[1] for part in parts for _ in range(int(part[2] or 1))]


def is_list(experts: str) -> bool:
    """Whether `experts` is a list, which sets the number of experts."""
    return bool(set(experts) & set("*,"))


def width_of(kind: str, hidden_size: int) -> tuple[int, float]:
    """Hidden width of a kind of about the FLOPs of an MLP of hidden_size, and its FLOPs over the MLP's."""
    width = getattr(TABLES["experts"][kind], "width", None)
    return width(hidden_size) if width else (hidden_size, 1.0)


def has_matmuls(kind: str) -> bool:
    return getattr(TABLES["experts"][kind], "has_matmuls", True)


@functools.cache
def routed_scale(config: Config) -> float:
    """Factor on the sum of the routed experts. auto makes that sum as long as the shared one (kexue.fm/archives/10945).

    auto is the mean of sqrt(shared experts) / |gates| over 2^14 tokens with normal logits, by this router's own rule.
    It assumes that outputs of experts are orthogonal and equally long. Without shared experts it is 1."""
    if config.routed_scale != "auto":
        return config.routed_scale
    if not config.num_shared_experts:
        return 1.0
    if config.router == "hash":  # equal gates
        return math.sqrt(config.num_shared_experts * config.top_k)
    score, generator = TABLES["router_score"][config.router_score], torch.Generator("cpu").manual_seed(0)
    logits_TE = torch.randn(2**14, config.num_experts, generator=generator, device="cpu")
    weight_TK = score.gates(logits_TE, score.of(logits_TE).topk(config.top_k).indices, config.norm_topk_prob)
    return (math.sqrt(config.num_shared_experts) / weight_TK.norm(dim=-1)).mean().item()
