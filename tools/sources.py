"""Where text comes from: files, the Python source of torch, arithmetic problems, data sets on the Hugging Face hub, FineWeb."""
import argparse
import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import lzma
import os
import re
import shutil
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import DataError, explained, read_shard

# ---------------------------------------------------------------------------------------------------------------------
# Documents: (key, body) pairs. The key's hash chooses the split; the body is bytes of text, or uint16 ids

PIECE = 2**18  # a .txt document longer than this is cut at a line end, so that memory stays bounded
SEPARATOR = b"<|endoftext|>"


def split_hash(key, split_seed=0):
    """First 8 bytes of sha256(key), big-endian; the document is validation if that is 0 mod 50. A seed other than 0 goes before the key."""
    prefix = b"%d:" % split_seed if split_seed else b""
    return int.from_bytes(hashlib.sha256(prefix + key).digest()[:8], "big")


def field_document(row, where, args, encoding):
    """The (key, body) of one row (a dict) of a table, from --tokens_field or --text_field."""
    field = args.tokens_field or args.text_field
    if not isinstance(row, dict) or field not in row:
        there = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has no field {field!r} (it has: {there}): name it with --text_field or --tokens_field")
    if not args.tokens_field:
        if not isinstance(row[field], str):
            raise DataError(f"{where}: field {field!r} holds {type(row[field]).__name__}, not text: name another with --text_field")
        body = row[field].encode("utf-8", "replace")
        return body, body
    wrong = f"{where}: field {field!r} is not a list of ids from 0 to {encoding.vocab_size - 1}: choose another --tokens_field, or the " \
            "--encoding it was made with"
    with explained(wrong, ValueError):  # a ragged list
        ids = np.asarray(row[field])
    if ids.ndim != 1 or (len(ids) and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= encoding.vocab_size)):
        raise DataError(wrong)
    text = np.flatnonzero(ids != encoding.eot_token)  # end-of-text at either end goes: each document gets one in front
    body = ids[text[0] : text[-1] + 1].astype("<u2") if len(text) else np.empty(0, "<u2")
    return body.tobytes(), body


def has_text(document):
    return bool(document[1].strip() if isinstance(document[1], bytes) else len(document[1]))


READ = 2**22  # bytes of a text file at a time
SEPARATOR_LINE = re.compile(rb"^[ \t\r\v\f]*" + re.escape(SEPARATOR) + rb"[ \t\r\v\f]*$\n?", re.MULTILINE)


def text_documents(file, where, args, encoding):
    """A text file is one document, unless lines <|endoftext|> separate several. It is searched in big blocks: line by line, reading took
    as long as tokenising on the other core."""
    if args.tokens_field:
        raise DataError(f"{where} is plain text: --tokens_field needs .jsonl or .parquet")
    text, at_end = b"", False
    read = file.read1 if isinstance(file, io.BufferedReader) else file.read  # a pipe gives what it has, and Ctrl-C is heard in between
    while not at_end:
        block = read(READ)
        text, at_end, start = text + block, not block, 0
        for line in SEPARATOR_LINE.finditer(text, 0, len(text) if at_end else text.rfind(b"\n") + 1):  # not in a line that may go on
            yield from ((body, body) for body in cut(text[start : line.start()], 0))
            start = line.end()
        *pieces, text = cut(text[start:], 0 if at_end else 2 * PIECE + 4)
        yield from ((body, body) for body in pieces)
    yield text, text


def cut(text, rest):
    """[bytes] of which all but the last end at the first line end past PIECE bytes, or, in a longer line, between two characters; the last has
    at least `rest` bytes, if there are so many."""
    pieces, start = [], 0
    while len(text) - start >= max(PIECE, rest):
        line = text.rfind(b"\n", start, start + PIECE - 1) + 1 or start
        end = text.find(b"\n", start + PIECE - 1, line + PIECE) + 1 or min(line + PIECE, len(text))
        while end < len(text) and text[end - 1 : end] != b"\n" and text[end] & 0xC0 == 0x80 and end < line + PIECE + 3:
            end += 1  # inside a UTF-8 character
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def jsonl_documents(file, where, args, encoding):
    for number, line in enumerate(file, 1):
        if line.strip():
            with explained(f"{where}, line {number} is not JSON ({{error}}): mend or remove it", ValueError, RecursionError):
                row = json.loads(line)
            yield field_document(row, f"{where}, line {number}", args, encoding)


def parquet_documents(file, where, args, encoding):
    import pyarrow.parquet
    table = pyarrow.parquet.ParquetFile(file)
    columns = [name for name in (args.tokens_field or args.text_field,) if name in table.schema_arrow.names]
    if not columns:
        field_document(dict.fromkeys(table.schema_arrow.names), where, args, encoding)  # raises with the names there are
    for batch in table.iter_batches(64, columns=columns):
        for row in batch.to_pylist():
            yield field_document(row, where, args, encoding)


def open_zst(path):
    import pyarrow  # comes with datasets, reads zstandard, so no package of its own is needed
    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


READERS = {".txt": text_documents, ".md": text_documents, ".jsonl": jsonl_documents, ".parquet": parquet_documents}
OPENERS = {"": lambda path: open(path, "rb"), ".gz": gzip.open, ".xz": lzma.open, ".zst": open_zst}
FILE_NAME = re.compile(r".*?(\.txt|\.md|\.jsonl|\.parquet(?=$))(|\.gz|\.xz|\.zst)", re.DOTALL)

# ---------------------------------------------------------------------------------------------------------------------
# Sources: each gives the documents in a fixed order, and facts for meta.json

TORCH_CORPUS = {"2.13.0": "02e0de8d652b659a7ed1a9482f8afdefb99feeccd8d16dfbfabe63b16496d15f"}


def python_corpus(site_packages):
    """The *.py files below torch, in the order of their path, and the sha256 of it all: path, NUL, contents, for each file.
    Files named version.py differ between builds of one version, so they are left out."""
    files = {path.relative_to(site_packages).as_posix(): path for path in Path(site_packages, "torch").rglob("*.py") if path.name != "version.py"}
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes())
    return [(name, files[name]) for name in sorted(files)], digest.hexdigest()


def python_documents(args, encoding):
    """Each file is one document, empty ones too; its path relative to site-packages chooses the split."""
    site_packages = Path(importlib.util.find_spec("torch").origin).parents[1]
    files, digest = python_corpus(site_packages)
    pinned = TORCH_CORPUS.get(version := torch_version())
    if digest != pinned:
        state = f"differs from the pinned corpus of torch {version}" if pinned else f"is of torch {version}, which is not pinned"
        print(f"note: the Python source in {site_packages} {state} ({', '.join(TORCH_CORPUS)}): "
              "losses are not comparable with published ones", file=sys.stderr)
    return ((name.encode(), path.read_bytes()) for name, path in files), \
        {"torch": version, "corpus_sha256": digest, "corpus_is_pinned": digest == pinned}


def torch_version():
    with explained("--source python reads the source of torch, which is not installed: `pip install torch`", ImportError):
        return importlib.metadata.version("torch").split("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 hold the same files


def files_in(path):
    """A file, or the files of known kinds in a folder."""
    return sorted(p for p in path.rglob("*") if p.is_file() and FILE_NAME.fullmatch(p.name)) if path.is_dir() else [path]


def files_documents(args, encoding):
    paths = []
    for path in map(Path, args.path):
        inside = files_in(path)
        if not path.exists() or not inside or not FILE_NAME.fullmatch(inside[0].name):
            raise DataError(f"--path {path} is not a file or folder of {', '.join(READERS)} (text and jsonl also .gz, .xz, .zst)")
        paths += inside

    def documents():
        for path in paths:
            kind, compression = FILE_NAME.fullmatch(path.name).groups()
            with explained(f"{path} cannot be read ({{error}}): mend it or leave it out of --path",
                           OSError, EOFError, lzma.LZMAError, zlib.error, ImportError, ValueError), OPENERS[compression](path) as file:
                yield from filter(has_text, READERS[kind](file, path, args, encoding))

    return documents(), {}


# The toy: a document is one problem. `7sdn=6` is a chain of steps mod 11 with digits 0 to 9 and a, `58+967=1025` a sum of two numbers.
STEPS = {"s": lambda v: v + 1, "d": lambda v: 2 * v, "n": lambda v: -v, "e": lambda v: v}  # successor, double, negate, equal
DIGITS = "0123456789a"
MOST_STEPS, MOST_DIGITS = 8, 4
PROBLEM = re.compile(rb"[0-9a]([sdne]+)=([0-9a])|([0-9]+)\+([0-9]+)=([0-9]+)")


def chain(rng):
    """1 to 8 steps, equally often."""
    value = rng.integers(len(DIGITS))
    text = DIGITS[value]
    for step in rng.choice(list(STEPS), rng.integers(1, MOST_STEPS + 1)):
        text, value = text + step, STEPS[step](value) % len(DIGITS)
    return f"{text}={DIGITS[value]}"


def addition(rng):
    """Of 1 to 4 digits each, equally often."""
    a, b = (rng.integers(10 ** rng.integers(1, MOST_DIGITS + 1)) for _ in range(2))
    return f"{a}+{b}={a + b}"


def difficulty(text):
    """How many operations it takes to know each byte of the answers in text (bytes): for a `chain` its steps that change something, for a
    `sum` its columns. {"chain": int64 (len(text),), "sum": the same}, 0 elsewhere. Of tokens of encoding bytes, replace 256 by a newline."""
    labels = {"chain": np.zeros(len(text), np.int64), "sum": np.zeros(len(text), np.int64)}
    for match in PROBLEM.finditer(text):
        steps, _, *numbers, _ = match.groups()
        if steps is not None:
            labels["chain"][slice(*match.span(2))] = len(steps) - steps.count(b"e")
        else:
            labels["sum"][slice(*match.span(5))] = max(map(len, numbers))
    return labels


def arithmetic_documents(args, encoding):
    """Chains and sums in turn, drawn from split_seed without end. The text chooses the split, so validation has problems that training never has."""
    if args.max_tokens is None:
        raise DataError("--source arithmetic has no end: say how much of it with --max_tokens, for instance --max_tokens 4_000_000")

    def documents():
        rng = np.random.default_rng(args.split_seed)
        while True:
            for problem in (chain(rng), addition(rng)):
                yield problem.encode(), problem.encode()

    return documents(), {}


class Part(NamedTuple):
    """A data set on the Hugging Face hub that streams without code of its own."""
    dataset: str
    subset: "str | None"
    fields: tuple  # whose texts make a document, one below the other


# Six domains. Where the notes that they come from name what is no data set on the hub, or one that needs code or permission, the nearest:
# deepmind's math_dataset (code) -> OpenWebMath, the-stack-v2 (ids without files) -> CodeParrot, case_law (on request) -> the Common Pile's copy of
# the same cases, google/flan (none) -> the collection as Muennighoff keeps it. GSM8K, Dolly and OASST are short and come first.
DOMAINS = {
    "math": (Part("openai/gsm8k", "main", ("question", "answer")), Part("open-web-math/open-web-math", None, ("text",))),
    "python": (Part("codeparrot/codeparrot-clean", None, ("content",)),),
    "web": (Part("HuggingFaceFW/fineweb", "sample-10BT", ("text",)),),
    "science": (Part("ccdv/arxiv-summarization", "document", ("article",)),),
    "legal": (Part("common-pile/caselaw_access_project", None, ("text",)), Part("NortheasternUniversity/big_patent", "all", ("description",))),
    "chat": (Part("databricks/databricks-dolly-15k", None, ("instruction", "context", "response")), Part("OpenAssistant/oasst1", None, ("text",)),
             Part("Muennighoff/flan", None, ("inputs", "targets"))),
}
DOMAIN_TOKENS = 20_000_000  # of each, from the hub, without --max_tokens


def hub_documents(parts):
    """Documents of some data sets, one after another."""
    def source(args, encoding):
        import datasets

        def documents():
            for part in parts:
                with explained(f"data set {part.dataset} cannot be read ({{error}}): check the network, or bring text of your own with "
                               f"--path {args.source}=FILE", Exception):  # hub, network and parser errors share no base class
                    for number, row in enumerate(datasets.load_dataset(part.dataset, part.subset, split="train", streaming=True), 1):
                        fields = [argparse.Namespace(text_field=field, tokens_field=None) for field in part.fields]
                        bodies = [field_document(row, f"{part.dataset}, row {number}", field, encoding)[1] for field in fields]
                        body = b"\n".join(body for body in bodies if body)
                        if has_text((body, body)):
                            yield body, body

        return documents(), {"datasets": [part.dataset for part in parts]}
    return source


def tagged(source, tag):
    """The same documents with a line in front of each. Their split stays as it was."""
    def with_tag(args, encoding):
        documents, facts = source(args, encoding)
        line = f"{tag}\n"
        front = {bytes: line.encode(), np.ndarray: encoding.encode(line)}
        join = lambda body: front[bytes] + body if isinstance(body, bytes) else np.concatenate((front[np.ndarray], body))
        return ((key, join(body)) for key, body in documents), facts | {"source_tag": line}
    return with_tag


def hf_documents(args, encoding):
    import datasets

    def documents():
        with explained(f"data set {args.dataset} cannot be read ({{error}}): check --dataset, --subset, --split_name and the network, or use "
                       "--source python, which needs none", Exception):  # hub, network and parser errors share no base class
            stream = datasets.load_dataset(args.dataset, args.subset, split=args.split_name, streaming=True)
            rows = (field_document(row, f"{args.dataset}, row {number}", args, encoding) for number, row in enumerate(stream, 1))
            yield from filter(has_text, rows)

    return documents(), {}


def download_fineweb(args, folder):
    """Download FineWeb's ready shards; each is checked before it gets its name, so an interrupted run continues."""
    if args.encoding != "gpt2":
        raise DataError("the FineWeb shards hold gpt2 tokens: leave --encoding out, or tokenise it with --source hf --dataset HuggingFaceFW/fineweb")
    import huggingface_hub
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"fineweb_{'train' if number else 'val'}_{number:06d}.bin" for number in range(args.shards + 1)]
    for path in {*folder.glob("*.bin")} - {folder / name for name in names}:
        path.unlink()  # of an interrupted run with more shards
    for name in names:
        with contextlib.suppress(DataError):
            read_shard(folder / name)
            continue
        with explained(f"{name} cannot be downloaded ({{error}}): check the network and run the same command again to continue, or use "
                       "--source python, which needs none", Exception):  # hub and network errors share no base class
            file = huggingface_hub.hf_hub_download("kjj0/fineweb10B-gpt2", name, repo_type="dataset", local_dir=folder / "download")
        try:
            read_shard(file)
        except DataError:
            os.unlink(file)  # or the next run would take it for downloaded
            raise
        os.replace(file, folder / name)
    shutil.rmtree(folder / "download", ignore_errors=True)
