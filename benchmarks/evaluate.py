"""What a trained model knows: bits per byte of any text, questions with choices, and the tasks of EleutherAI's
lm-evaluation-harness.

    python benchmarks/evaluate.py bpb --checkpoint logs/muon/checkpoint --path README.md src/
    python benchmarks/evaluate.py choices --checkpoint logs/muon/checkpoint --path questions.jsonl
    python benchmarks/evaluate.py harness --checkpoint logs/muon/checkpoint --tasks hellaswag arc_easy lambada_openai

--checkpoint is what model.py takes: a run's checkpoint, a folder of --save_pretrained, or hf://user/name. A line of
questions.jsonl is {"context": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}. The harness needs `pip install -r
benchmarks/requirements-harness.txt`, and the internet for its data sets.

Every text starts after an end-of-text token, as in training, and none sees another.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import tokenizer  # noqa: E402
from cli import Parser, UserError, command_line, positive  # noqa: E402
from tools import hub, sources  # noqa: E402

BATCH_TOKENS = 4096  # per forward pass


def context_length(model) -> int:
    """As many tokens as the long layers see, but no more than 2,048: twice the memory, and little to gain."""
    return min(2048, model.config.window_size)


@torch.no_grad()
def stream_nats(model, ids_N: np.ndarray, seq_len: int) -> float:
    """Nats of all tokens of a stream but its end-of-text tokens, each given at least seq_len / 2 tokens before it, or
    all of its document, whose end-of-text token goes ahead (as attention stops there, documents share rows). Windows of
    seq_len + 1 tokens start every seq_len / 2."""
    eot, stride = model.config.eot_token, max(1, seq_len // 2)
    starts = range(0, max(1, len(ids_N) - 1 - seq_len + stride), stride)
    padded_N = np.full(starts[-1] + seq_len + 1, eot, np.int64)
    padded_N[: len(ids_N)] = ids_N
    nats, rows = 0.0, max(1, BATCH_TOKENS // seq_len)
    for first in range(0, len(starts), rows):
        window_BT = np.stack([padded_N[start : start + seq_len + 1] for start in starts[first : first + rows]])
        targets_BT = np.where(window_BT[:, 1:] == eot, -1, window_BT[:, 1:])
        targets_BT[1 if first == 0 else 0 :, : seq_len - stride] = -1  # the window before has said these
        inputs_BT, targets_BT = (torch.tensor(x, device=model.head.device) for x in (window_BT[:, :-1], targets_BT))
        nats += model(inputs_BT, targets_BT).stats["ce"].item() * inputs_BT.numel()
    return nats


def bits_per_byte(model, encoding, documents, seq_len: int) -> tuple[float, int, int]:
    """(bits per byte, bytes, tokens) of documents (bytes). Raises UserError if there is no text."""
    ids, size = [], 0  # bytes of the documents: U+FFFD, which stands for bytes that are not UTF-8, has more
    for text in documents:
        ids.append(np.concatenate(([encoding.eot_token], encoding.encode_bytes(text))))
        size += len(text)
    stream_N = np.concatenate(ids) if ids else np.empty(0, np.int64)
    if size == 0:
        raise UserError("there is no text in it; name other files")
    return (
        stream_nats(model, stream_N, min(seq_len, len(stream_N) - 1)) / math.log(2) / size,
        size,
        len(stream_N) - len(ids),
    )


def encode_pair(encoding, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both as one text, cut after as many as the context has alone, as in the harness; spaces at its end belong
    to the continuation.

    A continuation that only completes the context's last word ("col" + "d") is the last token of both."""
    if not continuation:
        return [encoding.eot_token, *encoding.encode(context).tolist()], []
    text, before = context + continuation, encoding.encode(context.rstrip())
    both = encoding.encode(text).tolist()
    cut = min(len(before), len(both) - 1)
    return [encoding.eot_token, *both[:cut]], both[cut:]


@torch.no_grad()
def score(model, pairs: list[tuple[list[int], list[int]]], longest: int) -> list[tuple[float, bool]]:
    """For each (ids before, ids after): the log probability of those after, in nats, and whether they are the likeliest
    throughout; 0 and True if there are none after. Of what is before, the last tokens that fit into `longest` count.

    Ids after that do not fit are scored in parts of half as many. Raises ValueError for an empty first part."""
    if any(not before for before, _ in pairs):
        raise ValueError("a context has at least one token")
    half = max(1, longest // 2)
    parts = [in_parts(pair, half if len(pair[1]) > longest else longest) for pair in pairs]
    scores = iter(score_parts(model, [part for own in parts for part in own], longest))
    found = [[next(scores) for _ in own] for own in parts]
    return [(sum(nats for nats, _ in own), all(likeliest for _, likeliest in own)) for own in found]


def in_parts(pair: tuple[list[int], list[int]], size: int) -> list[tuple[list[int], list[int]]]:
    """Pairs (ids before, at most `size` ids); their second parts, one after another, are that of the given pair."""
    before, after = pair
    return [(before + after[:start], after[start : start + size]) for start in range(0, len(after), size)]


def score_parts(model, pairs: list[tuple[list[int], list[int]]], longest: int) -> list[tuple[float, bool]]:
    """As score(), of pairs with a second part that is not empty and fits."""
    found, order = [None] * len(pairs), sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    while order:
        width = min(longest, sum(map(len, pairs[order[0]])) - 1)
        batch, order = order[: max(1, BATCH_TOKENS // width)], order[max(1, BATCH_TOKENS // width) :]
        rows = [(pairs[i][0] + pairs[i][1])[-width - 1 :] for i in batch]
        inputs_BT = torch.full((len(batch), width), model.config.eot_token, device=model.head.device)
        for row_T, ids in zip(inputs_BT, rows):
            row_T[: len(ids) - 1] = torch.tensor(ids[:-1])
        log_prob_BTV = model(inputs_BT).logits.log_softmax(-1)
        for i, ids, log_prob_TV in zip(batch, rows, log_prob_BTV):
            after_N = torch.tensor(pairs[i][1], device=log_prob_TV.device)
            log_prob_NV = log_prob_TV[len(ids) - 1 - len(after_N) : len(ids) - 1]
            found[i] = (
                log_prob_NV.gather(1, after_N[:, None]).sum().item(),
                bool((log_prob_NV.argmax(-1) == after_N).all()),
            )
    return found


def answer_questions(model, encoding, questions: list[dict]) -> dict[str, float]:
    """Shares of questions answered right, as in the harness: the right choice has the largest probability (acc), or the
    largest log probability per character (acc_norm)."""
    pairs = [
        encode_pair(encoding, question["context"], choice) for question in questions for choice in question["choices"]
    ]
    scores, right = iter(score(model, pairs, context_length(model))), {"acc": 0, "acc_norm": 0}
    for question in questions:
        nats = np.array([next(scores)[0] for _ in question["choices"]])
        right["acc"] += int(nats.argmax()) == question["answer"]
        right["acc_norm"] += (
            int((nats / [len(choice) for choice in question["choices"]]).argmax()) == question["answer"]
        )
    return {name: count / len(questions) for name, count in right.items()}


def read_questions(path: Path) -> list[dict]:
    """Raises UserError where a line is not a question."""
    questions = []
    cannot = f"{path} cannot be read ({{error}}): name a .jsonl file in UTF-8"
    with data.as_data_error(cannot, OSError, UnicodeError):
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut at U+2028 in a text too
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        mend = f"{path}, line {number} is no question ({{error}}): mend or remove it"
        with data.as_data_error(mend, ValueError, KeyError, TypeError, AttributeError):
            question = json.loads(line)
            if not (
                isinstance(question["context"], str)
                and all(isinstance(choice, str) and choice for choice in question["choices"])
            ):
                raise ValueError("context is a text, choices are texts that are not empty")
            if not (isinstance(question["answer"], int) and 0 <= question["answer"] < len(question["choices"])):
                raise ValueError("answer is the number of a choice, from 0")
            questions.append(question)
    if not questions:
        raise UserError(f"{path} has no questions: name another file")
    return questions


def harness_model(model, encoding):
    """The model as the harness wants it. Raises UserError where that is not installed."""
    with data.as_data_error(
        "the harness is not installed: `pip install -r benchmarks/requirements-harness.txt`", ImportError
    ):
        from lm_eval.api.model import TemplateLM

    longest = context_length(model)

    class Adapter(TemplateLM):
        @property
        def eot_token_id(self):
            return encoding.eot_token

        def tok_encode(self, string, **kwargs):
            return encoding.encode(string).tolist()

        def loglikelihood(self, requests, disable_tqdm=False):
            """The base class's, which fails for an empty continuation, and for one that completes a word."""
            return score(model, [encode_pair(encoding, *request.args) for request in requests], longest)

        def _loglikelihood_tokens(self, requests, **kwargs):
            start = [encoding.eot_token]
            return score(
                model,
                [(before if before[:1] == start else start + before, after) for _, before, after in requests],
                longest,
            )

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            texts = [np.array([encoding.eot_token, *self.tok_encode(request.args[0])]) for request in requests]
            return [
                -stream_nats(model, ids_N, min(longest, len(ids_N) - 1)) if len(ids_N) > 1 else 0.0 for ids_N in texts
            ]

        def generate_until(self, requests, disable_tqdm=False):
            prompts = [self.tok_encode(request.args[0]) for request in requests]
            hows = [{"max_gen_toks": 256} | request.args[1] for request in requests]
            room = longest - 1  # beside the end-of-text token
            cut = {f"prompts are cut to their last {room} tokens": sum(len(prompt) > room for prompt in prompts),
                   f"answers to {longest} tokens": sum(how["max_gen_toks"] > longest for how in hows)}  # fmt: skip
            for what, count in cut.items():
                if count:
                    print(f"note: {count} of {len(requests)} {what}", file=sys.stderr, flush=True)
            return [self.one_answer(prompt[max(0, len(prompt) - room) :], how) for prompt, how in zip(prompts, hows)]

        def one_answer(self, prompt: list[int], how: dict) -> str:
            """The continuation of a prompt that fits; the windows of attention move on with it."""
            until = [how["until"]] if isinstance(how.get("until"), str) else how.get("until") or []
            most = min(how["max_gen_toks"], longest)
            tokens = torch.tensor([[encoding.eot_token, *prompt]], device=model.head.device)
            temperature = how.get("temperature", 0.0) if how.get("do_sample") else 0.0
            ids = []
            for id_B in model.stream(
                tokens, most, temperature, top_p=how.get("top_p", 1.0), stop_at=encoding.eot_token
            ):
                ids.append(id_B.item())
                text = encoding.decode(ids)
                ends = [text.index(stop) for stop in until if stop in text]
                if ends:
                    return text[: min(ends)]
            return encoding.decode(ids)

    return Adapter()


# -----------------------------------------------------------------------------
# The script


def measure_bpb(model, encoding, args):
    for path in args.path:
        began = time.perf_counter()
        documents, _ = sources.read_files([path], encoding, args.text_field)
        try:
            bits, size, tokens = bits_per_byte(
                model, encoding, (text for _, text in documents), args.seq_len or context_length(model)
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        seconds = time.perf_counter() - began
        print(f"{path}: {bits:.4f} bits per byte, {size:,} bytes, {tokens:,} tokens in {seconds:.1f} s", flush=True)


def measure_choices(model, encoding, args):
    for path in map(Path, args.path):
        questions = read_questions(path)
        shares = answer_questions(model, encoding, questions)
        chance = sum(1 / len(question["choices"]) for question in questions) / len(questions)
        found = f"acc {shares['acc']:.4f}, acc_norm {shares['acc_norm']:.4f} (chance {chance:.4f})"
        print(f"{path}: {len(questions):,} questions, {found}")


def measure_harness(model, encoding, args):
    adapter = harness_model(model, encoding)
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    found = lm_eval.simple_evaluate(
        model=adapter,
        tasks=args.tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        bootstrap_iters=1000,
        task_manager=TaskManager(include_path=args.include_path),
    )
    print(make_table(found))


MEASURES = {
    "bpb": ("bits per byte of files and folders", measure_bpb),
    "choices": ("questions of a .jsonl file", measure_choices),
    "harness": ("tasks of lm-evaluation-harness", measure_harness),
}


def parse(argv=None):
    parser = Parser(prog="evaluate.py", description=__doc__)
    which = parser.add_subparsers(required=True, metavar="bpb|choices|harness")
    for name, (what, measure) in MEASURES.items():
        part = which.add_parser(name, help=what, description=what)
        part.set_defaults(measure=measure)
        part.add_argument("--checkpoint", required=True, metavar="WHERE")
        if measure is not measure_harness:
            part.add_argument("--path", nargs="+", required=True)
    which.choices["bpb"].add_argument("--text_field", default="text", help="of .jsonl and .parquet files")
    which.choices["bpb"].add_argument(
        "--seq_len", type=positive, help="tokens of a window (default: that of the long layers)"
    )
    harness = which.choices["harness"]
    harness.add_argument("--tasks", nargs="+", required=True)
    harness.add_argument("--include_path", help="a folder with tasks of your own")
    harness.add_argument("--num_fewshot", type=int)
    harness.add_argument("--limit", type=int, help="questions of each task at most")
    return parser.parse_args(argv)


@command_line("evaluate.py")
def main():
    args = parse()
    model = hub.load(args.checkpoint, hub.device())
    objective = getattr(model.config, "objective", "next")
    if objective != "next":
        raise UserError(f"objective is {objective}; only a model of the next token can be evaluated")
    args.measure(hub.for_inference(model), tokenizer.get_encoding(model.encoding), args)


if __name__ == "__main__":
    main()
