"""The dense model with the options of the zoo, written from its definition: slow, and sharing no code with the
model."""

import functools
import math

import torch
from core_helpers import slow_rows
from helpers import EOT, VOCAB


def rms(z):
    return z / (z.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def slow_forward(net, x):
    """Logits of one document from the definition of the dense model, with nothing of the model but its parameters."""
    config, p, M = net.config, dict(net.named_parameters()), net.config.num_meta_tokens
    T, C, quarter = x.size(1) + M, config.head_dim, config.head_dim // 4
    qk_norm = rms if config.qk_norm == "rms" else lambda z: z
    heads = lambda z: z.unflatten(-1, (config.n_head, -1)).transpose(1, 2)

    def turned(z, speed, back=False):
        theta = speed * torch.arange(T)[:, None] * 1024 ** -(torch.arange(quarter) / (quarter - 1))
        z = torch.complex(*z.chunk(2, dim=-1)) * torch.exp(
            (1j if back else -1j) * torch.cat([theta, torch.zeros(T, quarter)], 1)
        )
        return torch.cat([z.real, z.imag], -1)

    summed = p["embed"][x]
    for table, n in enumerate(map(int, config.ngrams)):
        summed = summed + slow_rows(x, p[f"ngram_embeds.{table}"], n)
    if M:
        summed = torch.cat([p["meta_tokens"].expand(len(x), M, -1), summed], 1)
    x = torch.cat([torch.full((len(x), M), EOT), x], 1)
    embedding, n = rms(summed), config.n_layer
    position, keys = torch.arange(T), [None] * n  # keys and values of each layer, of all tokens
    merge = {
        "add": lambda h, y, terms: h + y,
        "average": lambda h, y, terms: (h * terms + y) / (terms + 1),
        "average_keep_embedding": lambda h, y, terms: embedding + ((h - embedding) * (terms - 1) + y) / terms,
    }[config.residual]

    def layer(i, h, terms, active=None, policy="latest"):
        """Output of layer i for all tokens; the policy decides which keys of inactive ones are visible."""
        if config.residual == "add":
            mix = p[f"blocks.{i}.stream_mix"]
            h = mix[0] * h + mix[1] * embedding
        after = rms if config.per_layer("norms")[i] == "R" else lambda z: z
        letter, rotary, of = (
            config.per_layer("attention")[i],
            config.per_layer("rotary")[i],
            lambda name: p[f"blocks.{i}.attention.{name}"],
        )
        if letter == "-":
            h = merge(h, 0, terms)
        else:
            divisors = [{"L": 1, "S": 2, "Q": 4, "E": 8}[window] for window in config.per_layer("window")]
            divisor, by_window = divisors[i], divisors[i] / max(divisors)
            turn_qk = functools.partial(turned, speed={"W": by_window, "H": 1, "B": 1}.get(rotary, 0))
            turn_vo = functools.partial(turned, speed=rotary in "VB")
            source = rms(h)
            if letter in "AK":
                q, k, v = (heads(source @ part.T) for part in of("qkv"))
                table = {
                    layer: t for t in range(config.value_embeds) for layer in (t, n - config.value_embeds + t)
                }.get(i)
                added = 0 if table is None else heads(p[f"value_embeds.{table}"][x])
                v = turn_vo(of("value_mix")[0] * v + of("value_mix")[1] * added)
                k = turn_qk(qk_norm(k))
            if letter == "L":
                latent, q = rms(source @ of("latent").T), heads(source @ of("q").T)
                still, v = heads(latent @ of("key_up").T), heads(latent @ of("value_up").T)
                shared = (source @ of("key").T)[:, None].expand(-1, config.n_head, -1, -1)
                parts = [part for pair in zip(shared.split(quarter, -1), still.split(quarter, -1)) for part in pair]
                k = turn_qk(qk_norm(torch.cat(parts, -1)))
            if letter == "S":
                q = heads(source @ of("q").T)
                source_layer = next(j for j in range(i - 1, -1, -1) if config.per_layer("attention")[j] not in "S-")
                letter, keys[i] = config.per_layer("attention")[source_layer], keys[source_layer]
            elif keys[i] is None:
                keys[i] = k, v
            elif policy != "share_first":
                keys[i] = tuple(torch.where(active[:, None, :, None], new, old) for new, old in zip((k, v), keys[i]))
            k, v = keys[i]
            if letter == "K":  # channels in the second and in the last quarter come from the token before
                other = position < M
                before = torch.cat(
                    [torch.zeros_like(k[:, :, :1]), k[:, :, :-1] * (other[1:] == other[:-1])[:, None]], 2
                )
                k = torch.where(torch.arange(C) // quarter % 2 == 1, before, k)
            near = position[:, None] - position
            reach = near.abs() if config.objective == "masked" else near + 1e9 * (near < 0)
            near_enough = (reach < config.window_size // divisor) & ((position < M)[:, None] == (position < M))
            seen = near_enough | (position < M) & ((near >= 0) | (config.objective == "masked"))
            if policy == "per_loop" and active is not None:
                seen = seen & active[:, None, None, :] | (near == 0)
            score = turn_qk(qk_norm(q)) @ k.mT * config.attn_scale
            if config.attn_softmax == "ssmax":
                score = score * of("sharpness")[:, None, None] * seen.sum(-1, keepdim=True).log()
            y = turn_vo(score.masked_fill(~seen, -math.inf).softmax(-1) @ v, back=True)
            h = merge(h, after(y.transpose(1, 2).flatten(-2) @ of("out").T), terms)
        return merge(
            h, after((rms(h) @ p[f"blocks.{i}.ffn.up"].T).clamp(min=0) ** 2 @ p[f"blocks.{i}.ffn.down"].T), terms + 1
        )

    h = (slow_loop if config.depth == "loop" else slow_stack)(net, layer, embedding)
    z = rms(h[:, M:]) @ p["head"].T
    return (config.softcap * torch.tanh(z / config.softcap) + config.softcap)[..., :VOCAB]


def slow_stack(net, layer, h):
    n, inputs, outputs = net.config.n_layer, [], []
    half = n - n // 2
    for i in range(n):
        if i >= half:
            h = h + net.skip_weights[i - half] * outputs[n - 1 - i]
        inputs.append(h)
        h = layer(i, h, 2 * i + 1)
        outputs.append(h)
    weight = rms(h) @ net.layer_mix.T / 10
    return h + sum(weight[..., i, None] * (outputs[i] - inputs[i]) for i in range(n))


def slow_loop(net, layer, h):
    """All iterations for all tokens; halted ones are reset to their last state."""
    config, letters, halt = net.config, net.config.per_layer("looped"), net.halt
    first, stop = letters.index("o"), letters.rindex("o") + 1
    loops = config.loops if net.training or not config.eval_loops else config.eval_loops
    for i in range(first):
        h = layer(i, h, 2 * i + 1)
    begin, active, depth, halted_sum, out = (
        h,
        torch.ones(h.shape[:2], dtype=torch.bool),
        torch.zeros(h.shape[:2]),
        torch.zeros(h.shape[:2]),
        0,
    )
    limit = config.halt_threshold or {"act": 0.99, "stick_breaking": 0.999, "ponder": 0.5, "threshold": 1.0}.get(
        config.halt
    )
    for loop in range(loops):
        new = h + config.reinject * begin * (loop > 0)
        for i in range(first, stop):
            made = layer(i, new, 2 * (i + loop * (stop - first)) + 1, active, config.loop_keys)
            new = torch.where(active[..., None], made, new)  # the state of a halted token is never used
        depth = depth + active
        if config.halt == "none":
            h = out = new
            continue
        rms = new / (new.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        prob = torch.sigmoid(rms @ halt.weight[0] + halt.bias)
        share = prob * (1 - halted_sum) if config.halt in ("stick_breaking", "ponder") else prob
        halts = (halted_sum + share >= limit) | torch.tensor(loop == loops - 1)
        if config.halt in ("act", "stick_breaking"):
            share = torch.where(halts, 1 - halted_sum, share)
            out = out + torch.where(active, share, 0)[..., None] * new
        step = share if config.halt == "threshold" else torch.ones_like(share)
        h = torch.where(active[..., None], h + step[..., None] * (new - h), h)
        halted_sum, active = halted_sum + share * active, active & ~halts
    h = out if config.halt in ("none", "act", "stick_breaking") else h
    for i in range(stop, config.n_layer):
        h = layer(i, h, (2 * (i + (depth - 1) * (stop - first)) + 1)[..., None])
    return h
