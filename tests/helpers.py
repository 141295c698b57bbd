"""Helpers of the tests of the zoo: tiny models of every option, and all of core_helpers.py."""

import itertools

import torch
from core_helpers import *  # noqa: F403
from core_helpers import SEED, STEP, TINY, logits, rng, shaken

import model
import zoo

NEEDS_IDS = {"hash"}  # routers that cannot run on embeddings
BUILDS = [
    dict(router=r, depth=d, pattern=p, attention=a)
    for r, d, p, a in itertools.product(("linear", "hash"), sorted(model.DEPTHS), ("M", "DM"), ("A", "A-"))
]
BUILDS.append(dict(router="linear", attention="KA-K", ngrams="24", ngram_rows=128))
BUILDS += [dict(router=r, depth=d, experts="mlp*2,swiglu,kan,identity,zero,noise,relu2,constant*2", mlp_ratio=4.5)
           for r, d in itertools.product(sorted(model.ROUTERS), sorted(model.DEPTHS))]  # fmt: skip
BUILDS += [dict(router="linear") | options for options in (
    dict(attention="AS-S"), dict(attention="LSKS", window="L"), dict(attention="AKLA", rotary="NBWV"),
    dict(attention="AAAS", rotary="BWWW", window="LSSS"), dict(attention="KL", attn_softmax="ssmax", qk_norm="none"),
    dict(norms="RP", attention="A-"), dict(attention="L", num_meta_tokens=1),
    dict(router="hash", attention="K", num_meta_tokens=14),
    dict(router="attention", attn_softmax="ssmax", num_meta_tokens=3, ngrams="3", ngram_rows=128),
    dict(router="recurrent", attention="AS", num_meta_tokens=2, rotary="B"),
    dict(router="conv", norms="R", num_meta_tokens=2),
    dict(attention="RS", norms="UP", window="L"),
    dict(attention="RA", norms="U", experts="relu*3,mlp,exit", attn_experts=3, attn_top_k=1, rotary="B"))]  # fmt: skip
BUILDS += [dict(router="linear", num_shared_experts=n, shared=kind, mlp_ratio=2.0 + n, routed_scale="auto")
           for kind, n in (("mlp", 1), ("conv", 2))]  # fmt: skip


def zoo_fields(**changes) -> dict:
    """Fields of a tiny zoo.Config; a list of experts decides their number."""
    fields = TINY | changes
    if zoo.config.is_list(fields.get("experts", "")):
        fields["num_experts"] = len(zoo.config.listed_kinds(fields["experts"]))
    return fields


def tiny(seed: int = 0, **changes):
    """A tiny model of the zoo."""
    return shaken(zoo.build(zoo.Config(**zoo_fields(**changes))), seed)


# -----------------------------------------------------------------------------
# Inputs of a single layer of the zoo


def row_context(config: zoo.Config, T: int, starts=()) -> zoo.block.Context:
    """The context of one row of T tokens whose documents start at these."""
    doc_BT, position = torch.zeros(1, T, dtype=torch.int64), torch.arange(T)
    doc_BT[0, list(starts)] = 1
    doc_BT = doc_BT.cumsum(1)
    mask = model.DenseMask(position, position, doc_BT, doc_BT, torch.tensor(config.window_size))
    same_doc_BS = torch.nn.functional.pad(doc_BT, (1, -1), value=-1) == doc_BT
    noise_key = (torch.tensor(SEED), torch.tensor(STEP), torch.tensor(0), position)
    bias_E = torch.zeros(config.num_experts)
    return zoo.block.Context(None, mask, None, None, None, same_doc_BS, noise_key, bias_E, None)


def document_starts(starts, T: int) -> list[int]:
    """The first token of each token's document."""
    return [max(start for start in [0, *starts] if start <= t) for t in range(T)]


def trunk_of(net, x) -> zoo.gpt.TrunkOutput:
    """Output of the block stack for these tokens, from a zoo model."""
    trunks, run_blocks = [], net.run_blocks
    net.run_blocks = lambda *inputs: trunks.append(run_blocks(*inputs)) or trunks[-1]
    logits(net, x)
    del net.run_blocks
    return trunks[0]


POOL = dict(depth="routed", loops=3, identity_layers=1)


def random_controller(seed: int = 0, **changes) -> zoo.GPT:
    """A model with routing over layers whose tokens choose different ones."""
    net = tiny(seed, **POOL | changes)
    with torch.no_grad():
        for p in net.controller.parameters():
            p.normal_(generator=rng(seed)).mul_(3 * p.size(-1) ** -0.5)
    return net
