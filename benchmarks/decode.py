"""What the KV cache saves: one more token at a context of 512, cached against the full forward, in turns, uncompiled.

    python benchmarks/decode.py --preset cpu small

Weights are random: they do not change the time, except that a trained router may prefer some experts."""

import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cli import Parser, command_line, positive  # noqa: E402
from model import GPT, PRESETS, build  # noqa: E402
from tools import hub  # noqa: E402

TOGETHER = 8


@torch.no_grad()  # as GPT.stream
def cached_and_full(model: GPT, context: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round: of a token after `context` others, cached, the mean of TOGETHER in a row, and of a forward
    of all."""
    device = model.head.device
    ids = torch.randint(0, model.config.vocab_size - 1, (1, context + TOGETHER), device=device)
    cache = model.cache_type(model.config, 1, context + TOGETHER, device)
    model(ids[:, :context], cache=cache)
    filled, cached, full = cache.length, [], []
    for _ in range(rounds + 1):  # the first is a warm-up
        began = time.perf_counter()
        for t in range(context, context + TOGETHER):
            model(ids[:, t : t + 1], cache=cache).logits[:, -1].argmax(-1).item()  # waits for the device
        cached.append((time.perf_counter() - began) / TOGETHER)
        cache.length, began = filled, time.perf_counter()
        model(ids[:, : context + 1]).logits[:, -1].argmax(-1).item()
        full.append(time.perf_counter() - began)
    return cached[1:], full[1:]


@command_line("decode.py")
def main():
    parser = Parser(prog="decode.py", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), default=["cpu", "small"])
    parser.add_argument("--context", type=positive, default=512, help="tokens before the next one")
    parser.add_argument("--rounds", type=positive, default=15)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for preset in args.preset:
        model = hub.for_inference(build(PRESETS[preset]).to(device).eval())
        cached, full = cached_and_full(model, args.context, args.rounds)
        one, whole = (1000 * statistics.median(seconds) for seconds in (cached, full))
        ratio = statistics.median(b / a for a, b in zip(cached, full))
        print(f"{preset}: cached {one:.2f} ms, full {whole:.2f} ms, {ratio:.1f} times", flush=True)


if __name__ == "__main__":
    main()
