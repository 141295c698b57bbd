"""Helpers of the tests of the zoo: tiny models of every option, and all of core_helpers.py."""

import itertools

from core_helpers import *  # noqa: F403
from core_helpers import TINY, shaken

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
