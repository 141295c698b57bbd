"""Speed of encodings: data.py from start to end, and each library by itself in one thread, with equality of ids.

    python benchmarks/tokenise.py --path web.txt python.txt                               # GPT-2
    python benchmarks/tokenise.py --path code/ --encoding data/python/tokenizer.json      # a tokenizer.json

In turns, each round: the whole command `data.py --source files` with gigatoken and without it (reading, encoding,
writing, checksums, gzip and xz of the validation text), then tiktoken, tokenizers, gigatoken and riptoken, those that
are installed, on the same documents in memory. Ids are compared by their sha256: those of data.py with those it makes
without gigatoken, those of a library with tiktoken's, or tokenizers' for a tokenizer.json. The table has medians:
seconds, seconds of CPU (user and system, which another load on the machine changes less), tokens and bytes per second.
Memory is that of all processes together, pages that they share counted once for each, looked up every 50 ms; Linux
only."""

import contextlib
import hashlib
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import tokenizer  # noqa: E402
from cli import Parser, UserError, command_line, positive  # noqa: E402
from tools import sources  # noqa: E402


class Measured(NamedTuple):
    seconds: float
    cpu_seconds: float
    tokens: int
    digests: dict[str, str]  # sha256 of each split's ids
    peak_bytes: int = 0


def resident_bytes(pid: int) -> int:
    """Of a process and all below it."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):  # it has ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(int(child)) for child in children)


def cpu_seconds(of: int) -> float:
    used = resource.getrusage(of)
    return used.ru_utime + used.ru_stime


def measure_command(args, folder: Path, with_gigatoken: bool) -> Measured:
    """One run of data.py."""
    environment = os.environ.copy()
    if not with_gigatoken:
        (folder / "gigatoken.py").write_text("raise ImportError\n")
        environment["PYTHONPATH"] = str(folder)
    words = [sys.executable, "data.py", "--source", "files", "--encoding", args.encoding, "--out", str(folder / "out")]
    words += ["--num_proc", str(args.num_proc)] if args.num_proc else []
    words += ["--path", *args.path]
    cpu_before, began, peak = cpu_seconds(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    done = threading.Event()
    threading.Thread(target=lambda: (process.wait(), done.set()), daemon=True).start()
    while not done.wait(0.05):
        peak = max(peak, resident_bytes(process.pid))
    seconds, used = time.perf_counter() - began, cpu_seconds(resource.RUSAGE_CHILDREN) - cpu_before
    if process.returncode:
        raise UserError(f"data.py ended with status {process.returncode}: run `{' '.join(words)}` to see why")
    digests, tokens = {}, 0
    for split in ("train", "val"):
        digest = hashlib.sha256()
        for _, ids in data.open_split(folder / "out", split):
            digest.update(ids.tobytes())
            tokens += len(ids)
        digests[split] = digest.hexdigest()
    return Measured(seconds, used, tokens, digests, peak)


def measure_library(encode, documents: list, eot_token: int) -> Measured:
    """One document after another in this thread; documents: (split, text)."""
    digests, tokens, seconds, used = {"train": hashlib.sha256(), "val": hashlib.sha256()}, 0, 0.0, 0.0
    for split, text in documents:
        began, cpu_began = time.perf_counter(), time.thread_time()
        ids = encode(text)
        seconds, used = seconds + time.perf_counter() - began, used + time.thread_time() - cpu_began
        tokens += 1 + len(ids)
        digests[split].update(np.array([eot_token, *ids] if isinstance(ids, list) else np.r_[eot_token, ids], "<u2"))
    return Measured(seconds, used, tokens, {split: digest.hexdigest() for split, digest in digests.items()})


def loaders(encoding: tokenizer.Encoding) -> dict:
    """{library: function that loads the encoding and returns its encoder, of a str}, of the installed ones."""
    found = {}
    with contextlib.suppress(ImportError):
        import tokenizers

        state = json.loads(encoding.json) if encoding.json else ranks_as_json(encoding)

        def load_tokenizers():
            made = tokenizers.Tokenizer.from_str(json.dumps(state))
            made.encode_special_tokens = True
            return lambda text: made.encode(text, add_special_tokens=False).ids

        found["tokenizers"] = load_tokenizers
    with contextlib.suppress(ImportError):
        import gigatoken

        if encoding.json:
            ordinary = json.dumps(state | {"added_tokens": [t for t in state["added_tokens"] if not t["special"]]})
            found["gigatoken"] = lambda: gigatoken.Tokenizer.from_json(ordinary).encode
        else:
            load = tokenizer.rank_loader(encoding.vocab)
            found["gigatoken"] = lambda: load(gigatoken).encode
    for name in ("tiktoken", "riptoken") if not encoding.json else ():
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            found[name] = lambda module=module: module.get_encoding(encoding.name).encode_ordinary
    return found


def ranks_as_json(encoding: tokenizer.Encoding) -> dict:
    """Contents of a tokenizer.json with the ids of an encoding of tiktoken: ids are in the order of merges."""
    ranks = {text: i for i, text in enumerate(encoding.vocab) if text}
    stand_in = {byte: character for character, byte in tokenizer.STAND_INS.items()}
    written = lambda text: "".join(stand_in[byte] for byte in text)

    def halves(token):
        """The two tokens that its bytes become by merges of lower ranks."""
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, len(encoding.vocab)) for left, right in zip(parts, parts[1:])]
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [*map(written, parts)]

    state = json.loads(tokenizer.train_bpe([], 257))
    state["model"]["vocab"] = {written(text): i for text, i in ranks.items()}
    state["model"]["merges"] = [halves(text) for text in ranks if len(text) > 1]
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return state | {"added_tokens": []}


def read_documents(paths: list[str], encoding: tokenizer.Encoding) -> list[tuple[str, str]]:
    """(split, text) of each."""
    documents, _ = sources.read_files(paths, encoding)
    split = lambda key: "train" if sources.split_hash(key) % 50 else "val"
    return [(split(key), body.decode("utf-8", "replace")) for key, body in documents]


def table(results: dict[str, list[Measured]], num_bytes: int) -> str:
    """Markdown, medians of the rounds."""
    columns = ("libraries in one thread", "seconds", "CPU seconds", "million tokens/s", "MB/s", "MiB", "ids")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    library = next((name for name in ("tiktoken", "tokenizers") if name in results), REFERENCE)
    for name, rounds in results.items():
        expected = results[REFERENCE if name.startswith("data.py") else library][0].digests
        seconds, used = (statistics.median(getattr(r, key) for r in rounds) for key in ("seconds", "cpu_seconds"))
        ids = "equal ids" if all(r.digests == expected for r in rounds) else "other ids"
        memory = f"{max(r.peak_bytes for r in rounds) / 2**20:,.0f}" if rounds[0].peak_bytes else ""
        lines.append(f"| {name} | {seconds:.2f} | {used:.2f} | {rounds[0].tokens / seconds / 1e6:.2f} | "
                     f"{num_bytes / seconds / 1e6:.1f} | {memory} | {ids} |")  # fmt: skip
    return "\n".join(lines)


REFERENCE = "data.py without gigatoken"


@command_line("tokenise.py")
def main():
    parser = Parser(prog="tokenise.py", description="data.py and libraries of tokenizers, in turns.")
    parser.add_argument("--path", nargs="+", required=True, help="text files or folders")
    parser.add_argument("--encoding", default="gpt2", help="of tiktoken, or the path of a tokenizer.json")
    parser.add_argument("--num_proc", type=positive, help="of data.py without gigatoken (default one per core)")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--commands_alone", action="store_true", help="measure data.py alone, without the libraries")
    args = parser.parse_args()
    args.path = [str(Path(path).resolve()) for path in args.path]
    args.encoding = str(Path(args.encoding).resolve()) if data.is_tokenizer(args.encoding) else args.encoding
    results = {}
    encoding = tokenizer.get_encoding(args.encoding)
    documents = read_documents(args.path, encoding)
    num_bytes = sum(len(text.encode()) for _, text in documents)
    libraries = {} if args.commands_alone else loaders(encoding)
    for i in range(args.rounds):
        for name in ("data.py", REFERENCE):
            with tempfile.TemporaryDirectory() as folder:
                measured = measure_command(args, Path(folder), with_gigatoken=name != REFERENCE)
            results.setdefault(name, []).append(measured)
        for name, load in libraries.items():
            measured = measure_library(load(), documents, encoding.eot_token)
            results.setdefault(name, []).append(measured)
        print(f"round {i}: load average {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    print(f"{num_bytes:,} bytes, {results[REFERENCE][0].tokens:,} tokens, {len(documents):,} documents")
    print(table(results, num_bytes))
    if results["data.py"][0].digests != results[REFERENCE][0].digests:
        raise UserError("the ids of data.py differ with gigatoken: this is a bug of data.py")


if __name__ == "__main__":
    main()
