"""Research options around the core: routers, experts, attention kinds, loops with halting, layer routing, domains.

    import zoo
    gpt = zoo.build(zoo.Config(depth="loop", halt="act"))

Importing zoo adds its entries to the tables of model.py. README.md lists the options, with their papers.
"""

import model
from model import build
from zoo.config import TABLES, Config
from zoo.experts import WITH_MATMULS
from zoo.gpt import GPT, KVCache
from zoo.layer_routing import LayerRoutedGPT
from zoo.loop import LoopGPT
from zoo.routers import ROUTERS

model.ROUTERS |= {name: router for name, router in ROUTERS.items() if name not in model.ROUTERS}
model.EXPERTS |= WITH_MATMULS
model.DEPTHS |= {"loop": LoopGPT, "routed": LayerRoutedGPT}
TABLES["depth"] = model.DEPTHS | {"stack": GPT}

DOMAINS = dict(
    num_experts=5, top_k=1, norm_topk_prob=0.0, num_shared_experts=1, balance_window=6, attention="K",
    tie_embeddings=True, value_embeds=0)  # fmt: skip
PRESETS = {name: Config(**vars(config)) for name, config in model.PRESETS.items()} | {
    # 50M parameters for all tokens and 5 experts of 10M for domains; the gate at top-1 is the router's own probability
    "100m": Config(
        **DOMAINS, n_layer=8, n_embd=512, n_head=4, mlp_ratio=1224 / 512, shared_dim=1952, window="LSSS",
        window_size=1024),
    # the same on a laptop: bytes, all experts kept
    "100m-cpu": Config(
        **DOMAINS, vocab_size=257, eot_token=256, n_layer=4, n_embd=128, n_head=2, head_dim=64, mlp_ratio=304 / 128,
        shared_dim=488, window="L", window_size=512),
}  # fmt: skip

__all__ = ["PRESETS", "Config", "GPT", "KVCache", "build"]
