"""How fast data.py turns local text into GPT-2 tokens, in how much memory, beside plain tiktoken in one thread.

    python benchmarks/tokenise.py --path web.txt python.txt math.txt

In turns: the whole command `data.py --source files` (reading, tokenising on every core, writing, checksums, gzip and xz
of the validation text), and one thread that reads the same documents and calls tiktoken's encode_ordinary. Both streams
of ids are compared by their sha256. Memory is that of all processes together, pages that they share counted once for
each, looked up every 50 ms; Linux only."""

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import tokenizer  # noqa: E402
from cli import Parser, UserError, command_line, positive  # noqa: E402
from tools import sources  # noqa: E402


def resident_bytes(pid: int) -> int:
    """Of a process and all below it."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):  # it has ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(int(child)) for child in children)


def ours(paths: list[str], encoding: str, num_proc: int | None, out: Path) -> tuple[float, int, dict[str, str]]:
    """Seconds, peak bytes and sha256 of each split's ids of one run of data.py."""
    words = [
        sys.executable,
        "data.py",
        "--source",
        "files",
        "--encoding",
        encoding,
        "--out",
        str(out),
        "--path",
        *paths,
    ]
    began, peak = time.perf_counter(), 0
    words += ["--num_proc", str(num_proc)] if num_proc else []
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    done = threading.Event()
    threading.Thread(target=lambda: (process.wait(), done.set()), daemon=True).start()
    while not done.wait(0.05):
        peak = max(peak, resident_bytes(process.pid))
    seconds = time.perf_counter() - began
    if process.returncode:
        raise UserError(f"data.py ended with status {process.returncode}: run `{' '.join(words)}` to see why")
    digests = {}
    for split in ("train", "val"):
        digest = hashlib.sha256()
        for _, tokens in data.open_split(out, split):
            digest.update(tokens.tobytes())
        digests[split] = digest.hexdigest()
    return seconds, peak, digests


def plain(paths: list[str], encoding: str) -> tuple[float, int, dict[str, str]]:
    """Seconds, tokens and sha256 of each split's ids, one document after another in this thread."""
    import tiktoken

    bpe, known = tiktoken.get_encoding(encoding), tokenizer.get_encoding(encoding)
    documents, _ = sources.read_files(paths, known)
    digests, tokens, seconds = {"train": hashlib.sha256(), "val": hashlib.sha256()}, 0, 0.0
    for key, body in documents:
        text = body.decode("utf-8", "replace")
        began = time.perf_counter()
        ids = [bpe.eot_token, *bpe.encode_ordinary(text)]
        seconds += time.perf_counter() - began
        tokens += len(ids)
        digests["train" if sources.split_hash(key) % 50 else "val"].update(np.array(ids, "<u2").tobytes())
    return seconds, tokens, {split: digest.hexdigest() for split, digest in digests.items()}


@command_line("tokenise.py")
def main():
    parser = Parser(prog="tokenise.py", description="data.py beside plain tiktoken in one thread.")
    parser.add_argument("--path", nargs="+", required=True, help="text files or folders")
    parser.add_argument("--encoding", default="gpt2", help="of tiktoken")
    parser.add_argument("--num_proc", type=positive, help="processes (default one per core)")
    parser.add_argument("--rounds", type=positive, default=3)
    args = parser.parse_args()
    paths = [str(Path(path).resolve()) for path in args.path]
    for i in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds, peak, ids = ours(paths, args.encoding, args.num_proc, Path(folder) / "out")
        plain_seconds, tokens, plain_ids = plain(paths, args.encoding)
        if ids != plain_ids:
            raise UserError("the ids differ from tiktoken's: this is a bug of data.py")
        print(
            f"round {i}: {tokens:,} tokens, equal ids; data.py {tokens / seconds:,.0f} tokens/s in all ({seconds:.1f} s, "
            f"{peak / 2**20:,.0f} MiB); tiktoken in one thread {tokens / plain_seconds:,.0f} tokens/s; "
            f"ratio {plain_seconds / seconds:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
