"""Who takes part in throughput.py: ours as train_muon.py and train_adamw.py run it, and what users would train instead,
as plain scripts would.

A contender's build(work) returns a function that does optimizer step number i, and the active FLOPs per token (see
throughput.py).

Mixtral: bf16 weights and fused AdamW on them (its best speed: fp32 weights under autocast take 1.1 to 1.2 times as
long), SDPA, no auxiliary loss, its own loss through `labels`. Its experts are SwiGLU, three matrices: at the same
hidden width 1.5 times the FLOPs of ours. Two more for fairness: autocast_mixtral keeps fp32 weights as ours does,
equal_flops_mixtral has its experts narrowed to our FLOPs. nanoGPT: both ways, the faster counts."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import settings  # noqa: E402
import train_adamw  # noqa: E402
import train_muon  # noqa: E402
from benchmarks.floor import dense_twin  # noqa: E402
from data import Batch  # noqa: E402
from distributed import World, keep_freed_memory  # noqa: E402
from logger import PhaseTimer  # noqa: E402
from model import DTYPES, Config, flops_per_token, mean_keys  # noqa: E402
from model import build as build_model  # noqa: E402

CPU = torch.device("cpu")
RECIPES = {"adamw": train_adamw.ADAMW, "muon": train_muon.MUON}


class Work(NamedTuple):
    """What a contender is to do in a step."""

    config: Config
    tokens: int
    seq_len: int
    micro_batch_tokens: int  # of one forward pass of ours

    def batches(self, count: int = 8) -> list[torch.Tensor]:
        """(rows, seq_len + 1) random ids without the end-of-text token: each row is one document."""
        ids = torch.arange(self.config.vocab_size)
        ids = ids[ids != self.config.eot_token]
        shape = (count, self.tokens // self.seq_len, self.seq_len + 1)
        return list(ids[torch.randint(len(ids), shape, generator=torch.Generator().manual_seed(0))])

    def attention_flops(self) -> float:
        """Of all layers, per token, forward and backward."""
        c = self.config
        return 12 * c.n_layer * c.n_head * c.head_dim * mean_keys(c, "L", self.seq_len)


# -----------------------------------------------------------------------------
# Ours


def ours(optimizer: str, shape):
    def build(work: Work):
        # as the scripts do when they start; it makes Mixtral 3% faster and a quarter larger, so it runs without
        keep_freed_memory()
        config, recipe = shape(work.config), RECIPES[optimizer]
        hp = dataclasses.replace(
            recipe.presets["cpu"],
            batch_tokens=work.tokens,
            seq_len=work.seq_len,
            num_iterations=10**5,
            micro_batch_tokens=work.micro_batch_tokens,
            window_start=config.window_size,
        )
        world = World(0, 1, CPU)
        exchange = train_muon.Exchange(build_model(config), world, hp.bucket_mb)
        exchange.attach_optimizers(recipe, hp)
        rows = settings.micro_batch_rows(work.tokens // work.seq_len, hp, world)
        batch = lambda i, ids: Batch(ids[:, :-1], ids[:, 1:], i * rows)
        batches = [[batch(i, part) for i, part in enumerate(ids.split(rows))] for ids in work.batches()]

        session = train_muon.Session(recipe, hp, exchange.model, exchange, PhaseTimer("cpu"))

        def step(i: int):
            train_muon.train_step(session, lambda: batches[i % len(batches)], i)

        return step, flops_per_token(config, work.seq_len)

    return build


# -----------------------------------------------------------------------------
# The others


def plain_step(model: nn.Module, loss_of, work: Work):
    """The step of an ordinary training script: fused AdamW over all parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    batches = work.batches()

    def step(i: int):
        loss_of(batches[i % len(batches)]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def mixtral(experts: str, dtype: str = "bf16", hidden_share: float = 1.0):
    """experts: transformers' experts_implementation; dtype of the weights: other than Config.dtype means autocast to
    that."""

    def build(work: Work):
        from transformers import MixtralConfig, MixtralForCausalLM

        c = work.config
        config = MixtralConfig(
            vocab_size=c.padded_vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=math.ceil(c.hidden_size * hidden_share / 8) * 8,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_head,
            head_dim=c.head_dim,
            num_local_experts=c.num_experts,
            num_experts_per_tok=c.top_k,
            max_position_embeddings=work.seq_len,
            output_router_logits=False,
            use_cache=False,
            attn_implementation="sdpa",
            experts_implementation=experts,
        )
        model = MixtralForCausalLM(config).to(DTYPES[dtype]).train()

        def loss_of(ids):
            with torch.autocast("cpu", DTYPES[c.dtype], enabled=dtype != c.dtype):
                return model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss  # it shifts the labels itself

        active = sum(
            p.numel() * (c.top_k / c.num_experts if ".experts." in name else 1)
            for name, p in model.named_parameters()
            if p.ndim >= 2 and "embed_tokens" not in name
        )
        return plain_step(model, loss_of, work), 6 * active + work.attention_flops()

    return build


class NanoBlock(nn.Module):
    """LayerNorm, causal attention, LayerNorm, GELU MLP four times as wide; no biases."""

    def __init__(self, config: Config):
        super().__init__()
        D, self.n_head = config.n_embd, config.n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x_BTD)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(y.transpose(1, 2).flatten(-2))
        return x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))


class NanoGPT(nn.Module):
    """Learned positions, head tied to the embedding."""

    def __init__(self, config: Config, seq_len: int):
        super().__init__()
        self.embed, self.position = (
            nn.Embedding(config.padded_vocab_size, config.n_embd),
            nn.Embedding(seq_len, config.n_embd),
        )
        self.blocks = nn.Sequential(*(NanoBlock(config) for _ in range(config.n_layer)))
        self.norm = nn.LayerNorm(config.n_embd, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of (B, T + 1) ids."""
        x_BTD = self.embed(ids[:, :-1]) + self.position.weight
        logits = F.linear(self.norm(self.blocks(x_BTD)), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def nanogpt(dtype: str):
    """dtype of the weights: other than Config.dtype means autocast to that."""

    def build(work: Work):
        model = NanoGPT(work.config, work.seq_len).to(DTYPES[dtype])

        def loss_of(ids):
            with torch.autocast("cpu", DTYPES[work.config.dtype], enabled=dtype != work.config.dtype):
                return model(ids)

        active = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "position" not in name)
        return plain_step(model, loss_of, work), 6 * active + work.attention_flops()

    return build


# -----------------------------------------------------------------------------
# All of them


class Contender(NamedTuple):
    build: callable
    imports: str = "torch"  # before memory is looked at
    shape: object = None  # config -> the config of its floor, of ours
    optimizer: str = ""  # of its floor


same = lambda config: config
more = lambda config: dataclasses.replace(
    config, num_experts=8 * config.num_experts
)  # of the same hidden width, as many per token
finer = lambda config: dataclasses.replace(
    config, num_experts=8 * config.num_experts, top_k=8 * config.top_k
)  # each cut into eight
HF = "transformers.models.mixtral.modeling_mixtral"

CONTENDERS = {
    **{
        f"{name}_{optimizer}": Contender(ours(optimizer, shape), "torch", shape, optimizer)
        for name, shape in (("moe", same), ("dense", dense_twin), ("more", more), ("finer", finer))
        for optimizer in RECIPES
    },
    **{f"mixtral_{experts}": Contender(mixtral(experts), HF) for experts in ("eager", "batched_mm", "grouped_mm")},
    "autocast_mixtral": Contender(mixtral("eager", "fp32"), HF),
    "equal_flops_mixtral": Contender(mixtral("grouped_mm", hidden_share=2 / 3), HF),
    "nanogpt_autocast": Contender(nanogpt("fp32")),
    "nanogpt_bf16": Contender(nanogpt("bf16")),
}

if __name__ == "__main__":
    sys.exit("contenders.py: error: this is a part of throughput.py; see `python benchmarks/throughput.py --help`")
