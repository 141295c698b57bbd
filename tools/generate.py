"""The command line of model.py: the model card of a preset, sampling from a checkpoint, sharing it, collecting its
routes."""

import codecs
import dataclasses
import sys
import time
from pathlib import Path

import torch

import tokenizer
from cli import Parser, UserError, add_flags, command_line, given_flags, positive, seed_number
from distributed import memory_bytes
from facts import SAMPLE_RULES
from model import PRESETS, Config
from terminal import printable
from tools import cost, hub, routes


@command_line("model.py")
def main(argv: list[str] | None = None):
    args = parse(argv)
    if not args["checkpoint"]:
        print(cost.model_card(args["config"], args["seq_len"] or args["config"].window_size))
    elif args["save_pretrained"] or args["push_to_hub"]:
        hub.share(args["checkpoint"], args["save_pretrained"], args["push_to_hub"])
    elif args["routes"]:
        print(routes.save_validation_routes(args["checkpoint"], args["data"], args["tokens"], args["routes"]))
    else:
        sample(args)


def parse(argv: list[str] | None = None) -> dict:
    """Flags -> their values; under `config`, the preset with the given fields changed. Raises UserError."""
    calls = ("python model.py --preset speedrun", "python model.py --checkpoint logs/muon/checkpoint --prompt 'The '",
             "python model.py --checkpoint logs/muon/checkpoint --push_to_hub user/name")
    about = ("Print a preset's model card, sample from a checkpoint, or share it. Flags of the model change the card.\n"
             "--checkpoint takes only one of them, --top_k: sample from that many likeliest tokens.")
    first = ("preset", "checkpoint", "prompt", "max_new_tokens", "temperature")
    parser = Parser(prog="model.py", description=about, examples=calls, first=first)
    parser.add_argument("--preset", choices=list(PRESETS), default="speedrun", metavar="NAME",
                        help="the model of the card")
    parser.add_argument("--seq_len", "--seq-len", type=positive,
                        help="tokens per row on the card (default: the window)")
    parser.add_argument("--checkpoint", metavar="WHERE",
                        help="a run's folder, a folder of --save_pretrained, or hf://user/name")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=positive, default=256,
                        help="length of the sample")
    parser.add_argument("--num_samples", "--num-samples", type=positive, default=1,
                        help="continuations, sampled at once")
    parser.add_argument("--temperature", type=float, default=SAMPLE_RULES["temperature"],
                        help="0 takes the likeliest token")
    parser.add_argument("--top_p", "--top-p", type=float, default=SAMPLE_RULES["top_p"],
                        help="sample from the likeliest tokens with this total probability")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the sample")
    parser.add_argument("--ignore_eot", "--ignore-eot", action="store_true", help="continue after the end of a text")
    parser.add_argument("--save_pretrained", "--save-pretrained", type=Path, metavar="DIR",
                        help="write the checkpoint as a folder for the Hub")
    parser.add_argument("--push_to_hub", "--push-to-hub", metavar="USER/NAME",
                        help="upload it to the Hub (log in with `hf auth login`)")
    parser.add_argument("--routes", type=Path, metavar="FILE",
                        help="write the routes of --data's validation tokens, as .npz for logger.py")
    parser.add_argument("--data", type=Path, metavar="DIR", help="shards of the checkpoint's encoding")
    parser.add_argument("--tokens", type=positive, default=2**15, help="tokens of --routes")
    add_flags(parser, Config, PRESETS["speedrun"])
    given = given_flags(sys.argv[1:] if argv is None else argv)
    args = vars(parser.parse_args(argv))
    check_flags(given, args)
    changes = {field.name: args[field.name] for field in dataclasses.fields(Config) if field.name in args}
    if not args["checkpoint"]:
        return args | {"config": dataclasses.replace(PRESETS[args["preset"]], **changes)}
    return args


SAMPLING = "prompt max_new_tokens num_samples temperature top_p seed ignore_eot".split()
OF_CARD = ["preset", "seq_len", *(field.name for field in dataclasses.fields(Config) if field.name != "top_k")]


def check_flags(given: set[str], args: dict):
    """Raises UserError for flags that do not go together: the card, sampling, sharing and routes are separate."""
    actions = [flag for flag in ("save_pretrained", "push_to_hub", "routes") if args[flag]]
    if not args["checkpoint"]:
        for flag in [*actions, *SAMPLING]:
            if flag in given:
                raise UserError(f"--{flag} needs --checkpoint, a run's folder such as logs/muon; without it model.py "
                                "prints the card of a preset")  # fmt: skip
    else:
        for flag in OF_CARD:
            if flag in given:
                what = "--preset names a model" if flag == "preset" else f"{flag} is a field of a preset's card"
                raise UserError(f"{what}, and a checkpoint has its own; leave --{flag} or --checkpoint out")
    for flag in SAMPLING if actions else ():
        if flag in given:
            raise UserError(f"--{flag} samples a text, and --{actions[0]} does not; give one of them")
    for flag in ("data", "tokens"):
        if flag in given and not args["routes"]:
            raise UserError(f"--{flag} goes with --routes; leave it out")
    if args["routes"] and not args["data"]:
        raise UserError("--routes needs --data, a folder of shards")


def sample(args: dict):
    """Print the prompt and its continuations, the first of them token by token; the speed goes to stderr."""
    net = hub.for_inference(hub.load(args["checkpoint"], hub.device()))
    encoding = tokenizer.get_encoding(net.encoding)
    prompt = [encoding.eot_token, *encoding.encode(args["prompt"]).tolist()]
    check_memory(net, args["num_samples"], len(prompt), args["max_new_tokens"])
    tokens_BT = torch.tensor([prompt] * args["num_samples"], device=net.head.device)
    start, times, rows = time.perf_counter(), [], []
    show(args["prompt"])
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span several tokens
    stop_at = None if args["ignore_eot"] else encoding.eot_token
    rules = dict(temperature=args["temperature"], top_k=args.get("top_k", 0), top_p=args["top_p"], seed=args["seed"])
    for id_B in net.stream(tokens_BT, args["max_new_tokens"], **rules, stop_at=stop_at):
        rows.append(id_B.tolist())
        show(decoder.decode(encoding.vocab[rows[-1][0]]))
        times.append(time.perf_counter())
    show(decoder.decode(b"", True) + "\n")
    for number, ids in enumerate(list(zip(*rows))[1:], start=2):
        show(f"{'-' * 30} {number} of {args['num_samples']}\n{args['prompt']}{encoding.decode(ids)}\n")
    first, rest = times[0] - start, times[-1] - times[0]
    speed = f", {args['num_samples'] * (len(times) - 1) / rest:,.1f} tokens/s" if rest else ""
    counts = f"{args['num_samples']} x {len(times)} tokens after {len(prompt)}"
    print(f"{counts}: the first after {first:.3f} s{speed}", file=sys.stderr)


def check_memory(net, rows: int, prompt_tokens: int, new_tokens: int):
    """Raises UserError if the cache of all tokens and the logits of the prompt exceed the memory of the device."""
    tokens, logits = prompt_tokens + new_tokens, 12 * net.config.padded_vocab_size  # three times in fp32
    cached = 16 + cost.cache_bytes_per_token(net.config)  # and two ids
    needed, there = rows * (tokens * cached + prompt_tokens * logits), memory_bytes(net.head.device.type)
    if needed > there:
        raise UserError(f"the keys and values of {rows:,} x {tokens:,} tokens take {needed / 2**30:,.0f} GiB, and "
                        f"this device has {there / 2**30:,.0f}; lower --max_new_tokens or --num_samples, or shorten "
                        "the prompt")  # fmt: skip


def show(text: str):
    """Print at once, with replacements for characters that the terminal's encoding lacks."""
    print(printable(text, sys.stdout), end="", flush=True)
