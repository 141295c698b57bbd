"""Sources of text: files, the Python source of torch, arithmetic problems, the Hugging Face hub, FineWeb's shards.

A document is a pair (key, body): the hash of the key chooses its split, the body is bytes of text or uint16 ids.
A source returns (iterator of documents in a fixed order, dict of entries for meta.json). Some entries are counted while
the iterator is read: `files`, files `left_out` by kind, `empty_documents`, and bytes that are `not_utf8`.
"""
import codecs
import collections
import contextlib
import fnmatch
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
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from cli import UserError
from data import as_data_error, read_shard
from tools.network import hub_answers

# ---------------------------------------------------------------------------------------------------------------------
# Documents

SEPARATOR = b"<|endoftext|>"


def split_hash(key, split_seed=0):
    """First 8 bytes of sha256(key), big-endian: validation if 0 mod 50. A seed that is not 0 precedes the key."""
    prefix = b"%d:" % split_seed if split_seed else b""
    return int.from_bytes(hashlib.sha256(prefix + key).digest()[:8], "big")


def row_document(row, where, encoding, text_field, tokens_field):
    """Document of one row (a dict) of a table: its tokens_field if one is given, else its text_field."""
    field = tokens_field or text_field
    if not isinstance(row, dict) or field not in row:
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} has no field {field!r} (it has: {found}): "
                        "name it with --text_field or --tokens_field")
    if row[field] is None:
        return b"", b""
    if not tokens_field:
        if not isinstance(row[field], (str, bytes)):
            kind = type(row[field]).__name__
            raise UserError(f"{where}: field {field!r} holds {kind}, not text: name another with --text_field")
        body = without_bom(row[field]) if isinstance(row[field], bytes) else to_bytes(row[field])
        return body, body

    wrong = f"{where}: field {field!r} is not a list of ids from 0 to {encoding.vocab_size - 1}: " \
            "choose another --tokens_field, or the --encoding it was made with"
    with as_data_error(wrong, ValueError):  # a ragged list
        ids = np.asarray(row[field])
    if ids.ndim != 1 or len(ids) and not (ids.dtype.kind in "iu" and 0 <= ids.min() <= ids.max() < encoding.vocab_size):
        raise UserError(wrong)
    text = np.flatnonzero(ids != encoding.eot_token)  # end-of-text is stripped: each document gets one in front
    body = ids[text[0] : text[-1] + 1].astype("<u2") if len(text) else np.empty(0, "<u2")
    return body.tobytes(), body


def has_text(document):
    body = document[1]
    return len(body) > 0 and not (isinstance(body, bytes) and body.isspace())


def with_text(documents, where, facts):
    """The documents that hold text. Counts the others in facts["empty_documents"], and bytes that are not UTF-8."""
    for document in documents:
        if has_text(document):
            count_not_utf8(document[1], where, facts)
            yield document
        else:
            facts["empty_documents"] = facts.get("empty_documents", 0) + 1


def count_not_utf8(body, where, facts):
    """Count bytes of a text that are not UTF-8 in facts["not_utf8"], which names the place of the first."""
    try:
        body.decode() if isinstance(body, bytes) else None
    except UnicodeDecodeError:
        found = facts.setdefault("not_utf8", {"bytes": 0, "documents": 0, "first": str(where)})
        found["bytes"] += len(body) - len(body.decode("utf-8", "ignore").encode())
        found["documents"] += 1


def to_bytes(text):
    """UTF-8 of a text. Surrogates that stand for bytes become these, and others bytes that are not UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
        codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}  # UTF-32-LE begins as UTF-16-LE does


def without_bom(text):
    """Bytes of a text as UTF-8 without its byte order mark, if it begins with one; else as they are."""
    for bom, name in BOMS.items():
        if text.startswith(bom):
            return text[len(bom) :] if name == "utf-8" else to_bytes(text[len(bom) :].decode(name, "surrogatepass"))
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_files(paths, encoding, text_field="text", tokens_field=None, globs=None):
    """Documents of files, and of those below folders and in .zip and .whl archives: .jsonl, .parquet, any other text.

    Raises UserError for a path that is not there, and for a named file that is not text, unless the encoding is
    `bytes`."""
    files, left_out = [], collections.Counter()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--path {path} is not a file or folder: correct the path")
        found, others = in_archives(*list_files(path, globs), globs)
        if not found:
            seen = f" (left out: {count_kinds(others)})" if others else ""
            raise UserError(f"--path {path} holds no file to read{seen}: name other files or folders")
        files, left_out = files + found, left_out + others
    facts = {"files": 0, "left_out": left_out}
    named, as_bytes = {Path(path) for path in paths}, encoding.name == "bytes"
    fields = dict(encoding=encoding, text_field=text_field, tokens_field=tokens_field)
    unreadable = (OSError, EOFError, lzma.LZMAError, zlib.error, ImportError, ValueError, *NO_ARCHIVE)

    def documents():
        for path in files:
            read, is_named = reader_of(path), path in named
            mend = f"{path} cannot be read ({{error}}): mend it or leave it out of --path"
            with as_data_error(mend, *unreadable), open_file(path) as file:
                kind = "text" if read is read_parquet else kind_of(file.peek(SNIFFED_BYTES)[:SNIFFED_BYTES])
                if read is read_text and tokens_field and not is_named:
                    kind = "without fields"
                if kind == "text" or as_bytes and (kind == "not UTF-8" or kind == "binary" and is_named):
                    facts["files"] += 1
                    utf8 = file if read is read_parquet else as_utf8(file)
                    yield from with_text(read(utf8, path, **fields), path, facts)
                elif is_named and kind != "empty":
                    raise UserError(f"{path} is not UTF-8 text: leave it out, convert it (`iconv -t UTF-8 -f` and its "
                                    "encoding), or keep its bytes as they are with --encoding bytes")
                else:
                    left_out[kind] += 1

    return documents(), facts


def list_files(path, globs=None):
    """([the file itself, or the files below a folder, sorted], Counter of what is left out, by kind).

    globs: patterns of the names to read, or of paths below the folder if they hold a slash. Archives are kept."""
    files, left_out = [], collections.Counter()
    if not path.is_dir():
        return [path], left_out
    for folder, folders, names in os.walk(path, onerror=raise_error):
        folder = Path(folder)
        if is_prepared(folder, names):
            left_out["folders of shards"] += data.MARKER not in names
            folders.clear()
            continue
        left_out["hidden folders"] += sum(name.startswith(".") for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        left_out["links to folders"] += sum((folder / name).is_symlink() for name in folders)
        for name in names:
            below = (folder / name).relative_to(path).as_posix()
            if name.startswith("."):
                left_out["hidden files"] += 1
            elif not (folder / name).is_file():
                left_out["special files or broken links"] += 1
            elif not (is_archive(folder / name) or matches(below, globs)):
                left_out["outside --glob"] += 1
            else:
                files.append(folder / name)
    return sorted(files), +left_out


def matches(path, globs):
    """Whether one of the patterns, if there are any, matches the name, or the whole path where it holds a slash."""
    name = path.rpartition("/")[2]
    return not globs or any(fnmatch.fnmatchcase(path if "/" in glob else name, glob) for glob in globs)


NO_ARCHIVE = (zipfile.BadZipFile, RuntimeError)  # damaged; encrypted, or compressed in a way unknown to Python


def is_archive(path):
    return path.suffix.lower() in (".zip", ".whl")


def in_archives(files, left_out, globs=None):
    """list_files' result with the members of each archive, sorted by name, in its place."""
    found, left_out = [], left_out.copy()
    for path in files:
        if not is_archive(path):
            found.append(path)
            continue
        mend = f"{path} cannot be read ({{error}}): mend it or leave it out of --path"
        with as_data_error(mend, OSError, *NO_ARCHIVE):
            archive = zipfile.Path(path)
        for name in sorted(name for name in archive.root.namelist() if not name.endswith("/")):
            if any(part.startswith(".") for part in name.split("/")):
                left_out["hidden files"] += 1
            elif not matches(name, globs):
                left_out["outside --glob"] += 1
            else:
                found.append(archive / name)
    return found, +left_out


def raise_error(error):
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): mend it or name other folders") from error


def is_prepared(folder, names):
    """Whether a folder with files of these names is one that data.py has filled or is filling."""
    return data.MARKER in names or any(map(data.split_of, names)) or \
        "meta.json" in names and bool(data.shard_folders(folder))


def count_kinds(counts):
    return ", ".join(f"{kind} {count:,}" for kind, count in sorted(counts.items()))


SNIFFED_BYTES = 2**13  # of the beginning of a file, to see whether it is text
CONTROL_BYTES = bytes({*range(32), 127} - {*b"\b\t\n\v\f\r\x1b"})


def kind_of(head):
    """Kind of a file by its first bytes: `empty`, `binary`, `text` or `not UTF-8`, which is text of another encoding.

    Binary files hold a NUL or 5% of control characters. Text is UTF-8 to 70%, or follows a byte order mark."""
    if not head:
        return "empty"
    if head.startswith(tuple(BOMS)):
        return "text"
    if b"\0" in head or len(head.translate(None, CONTROL_BYTES)) < 0.95 * len(head):
        return "binary"
    legal = len(head.decode("utf-8", "ignore").encode())
    return "text" if legal >= 0.7 * len(head) - 3 else "not UTF-8"  # 3: a character cut at the end


class AsUtf8(io.RawIOBase):
    """UTF-8 of a file in another encoding."""

    def __init__(self, file, encoding):
        self.text, self.pending = io.TextIOWrapper(file, encoding, "surrogatepass", newline=""), b""

    def readable(self):
        return True

    def readinto(self, buffer):
        piece = self.pending or to_bytes(self.text.read(len(buffer)))
        size = min(len(piece), len(buffer))
        buffer[:size], self.pending = piece[:size], piece[size:]
        return size


def as_utf8(file):
    """The file behind its byte order mark, as UTF-8."""
    head = file.peek(4)
    bom, encoding = next(((bom, name) for bom, name in BOMS.items() if head.startswith(bom)), (b"", "utf-8"))
    file.read(len(bom))
    return file if encoding == "utf-8" else io.BufferedReader(AsUtf8(file, encoding))


def read_jsonl(file, where, **fields):
    for number, line in enumerate(file, 1):
        if line.strip():
            mend = f"{where}, line {number} is not JSON ({{error}}): mend or remove it"
            with as_data_error(mend, ValueError, RecursionError):
                row = json.loads(line.decode("utf-8", "surrogateescape"))
            yield row_document(row, f"{where}, line {number}", **fields)


def read_parquet(file, where, **fields):
    import pyarrow.parquet
    table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)  # a buffer would hold the file up to the current row
    columns = [name for name in (fields["tokens_field"] or fields["text_field"],) if name in table.schema_arrow.names]
    if not columns:
        row_document(dict.fromkeys(table.schema_arrow.names), where, **fields)  # raises with the names of all fields
    for batch in table.iter_batches(64, columns=columns):
        for row in batch.to_pylist():
            yield row_document(row, where, **fields)


READ_BYTES = 2**22   # block of a text file; reading line by line took as long as tokenising on the other core
PIECE_BYTES = 2**18  # a longer document is cut at a line end, so that memory is bounded
SEPARATOR_LINE = re.compile(rb"^[ \t\r\v\f]*" + re.escape(SEPARATOR) + rb"[ \t\r\v\f]*$\n?", re.MULTILINE)


def read_text(file, where, tokens_field=None, **_):
    """Documents of a text file: one, unless lines <|endoftext|> separate several."""
    if tokens_field:
        raise UserError(f"{where} is plain text: --tokens_field needs .jsonl or .parquet")
    text, at_end = b"", False
    read = file.read1 if isinstance(file, io.BufferedReader) else file.read  # read1 does not wait for a pipe to fill
    while not at_end:
        block = read(READ_BYTES)
        text, at_end, start = text + block, not block, 0
        searched = len(text) if at_end else text.rfind(b"\n") + 1  # the last line may continue in the next block
        for line in separator_lines(text, searched):
            yield from ((body, body) for body in cut(text[start : line.start()], 0))
            start = line.end()
        *pieces, text = cut(text[start:], 0 if at_end else 2 * PIECE_BYTES + 4)
        yield from ((body, body) for body in pieces)
    if text:
        yield text, text


def separator_lines(text, end):
    """Matches of SEPARATOR_LINE in text[:end], as finditer gives them; finding the separator first is faster."""
    searched, separator = 0, text.find(SEPARATOR, 0, end)
    while separator >= 0:
        newline = text.rfind(b"\n", searched, separator)
        if newline >= 0 or searched == 0:  # else another separator precedes it in its line
            yield from filter(None, [SEPARATOR_LINE.match(text, newline + 1, end)])
        searched = separator + len(SEPARATOR)
        separator = text.find(SEPARATOR, searched, end)


def cut(text, rest):
    """Pieces of text (bytes): all but the last end at the first line end past PIECE_BYTES, or between two characters of
    a longer line. The last has at least `rest` bytes, if the text has."""
    pieces, start = [], 0
    while len(text) - start >= max(PIECE_BYTES, rest):
        line = text.rfind(b"\n", start, start + PIECE_BYTES - 1) + 1 or start
        end = text.find(b"\n", start + PIECE_BYTES - 1, line + PIECE_BYTES) + 1 or min(line + PIECE_BYTES, len(text))
        latest = min(len(text), line + PIECE_BYTES + 3)
        while end < latest and text[end - 1 : end] != b"\n" and text[end] & 0xC0 == 0x80:
            end += 1  # inside a UTF-8 character
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def open_zst(file):
    import pyarrow  # a dependency of datasets; it reads zstandard
    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))


READERS = {".jsonl": read_jsonl, ".parquet": read_parquet}  # of other names: read_text
OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".zst": open_zst}


@contextlib.contextmanager
def open_file(path):
    """A file or a member of an archive, decompressed; its peek reaches SNIFFED_BYTES."""
    raw = path.open("rb")
    file = io.BufferedReader(raw, SNIFFED_BYTES) if isinstance(path, zipfile.Path) else raw
    with file, OPENERS.get(path.suffix.lower(), contextlib.nullcontext)(file) as text:
        yield text


def reader_of(path):
    name = path.stem if path.suffix.lower() in OPENERS else path.name
    return READERS.get(Path(name).suffix.lower(), read_text)


# ---------------------------------------------------------------------------------------------------------------------
# The Python source of the installed torch

TORCH_CORPUS = {"2.13.0": "02e0de8d652b659a7ed1a9482f8afdefb99feeccd8d16dfbfabe63b16496d15f"}  # sha256 by version


def read_python_corpus():
    """One document per file, empty ones too; the path relative to site-packages chooses the split."""
    site_packages = Path(importlib.util.find_spec("torch").origin).parents[1]
    files, digest = list_python_corpus(site_packages)
    pinned = TORCH_CORPUS.get(version := torch_version())
    if digest != pinned:
        state = "differs from the pinned corpus of" if pinned else "is not pinned for"
        print(f"note: the Python source in {site_packages} {state} torch {version} "
              f"(pinned: {', '.join(TORCH_CORPUS)}): losses are not comparable with published ones", file=sys.stderr)
    facts = {"torch": version, "corpus_sha256": digest, "corpus_is_pinned": digest == pinned}

    def documents():
        for name, path in files:
            body = path.read_bytes()
            count_not_utf8(body, name, facts)
            yield name.encode(), body

    return documents(), facts


def list_python_corpus(site_packages):
    """([(name, path)], sha256) of the *.py files below torch, sorted by name; the hash: name, NUL, contents of each.

    version.py is left out, because builds of one version differ in it."""
    paths = [path for path in Path(site_packages, "torch").rglob("*.py") if path.name != "version.py"]
    files = sorted((path.relative_to(site_packages).as_posix(), path) for path in paths)
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return files, digest.hexdigest()


def torch_version():
    missing = "--source python reads the source of torch, which is not installed: `pip install torch`"
    with as_data_error(missing, ImportError):
        return importlib.metadata.version("torch").split("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 hold the same files


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic problems of known difficulty: a chain of steps mod 11 as `7sdn=6`, a sum as `58+967=1025`

STEPS = {"s": lambda v: v + 1, "d": lambda v: 2 * v, "n": lambda v: -v, "e": lambda v: v}  # e changes nothing
DIGITS = "0123456789a"
MAX_STEPS, MAX_DIGITS = 8, 4
PROBLEM = re.compile(rb"[0-9a]([sdne]+)=([0-9a])|([0-9]+)\+([0-9]+)=([0-9]+)")


def generate_arithmetic(seed):
    """Chains and sums in turn, without end. The text chooses the split, so validation problems are never trained on."""
    def documents():
        rng = np.random.default_rng(seed)
        while True:
            for problem in (make_chain(rng), make_sum(rng)):
                yield problem.encode(), problem.encode()

    return documents(), {}


def make_chain(rng):
    """A chain of 1 to MAX_STEPS steps, each length equally likely."""
    value = rng.integers(len(DIGITS))
    text = DIGITS[value]
    for step in rng.choice(list(STEPS), rng.integers(1, MAX_STEPS + 1)):
        text, value = text + step, STEPS[step](value) % len(DIGITS)
    return f"{text}={DIGITS[value]}"


def make_sum(rng):
    """A sum of two numbers, each below a power of ten from 10 to 10 ** MAX_DIGITS, each power equally likely."""
    a, b = (rng.integers(10 ** rng.integers(1, MAX_DIGITS + 1)) for _ in range(2))
    return f"{a}+{b}={a + b}"


def difficulty(text):
    """{"chain", "sum"}: number of operations behind each byte of an answer in text, int64 (len(text),), 0 elsewhere.

    A chain counts steps that change its value, a sum its columns. The text is bytes; end-of-text is a newline."""
    labels = {"chain": np.zeros(len(text), np.int64), "sum": np.zeros(len(text), np.int64)}
    for match in PROBLEM.finditer(text):
        steps, _, *numbers, _ = match.groups()
        if steps is not None:
            labels["chain"][slice(*match.span(2))] = len(steps) - steps.count(b"e")
        else:
            labels["sum"][slice(*match.span(5))] = max(map(len, numbers))
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# The Hugging Face hub


def stream_dataset(encoding, dataset, subset, split_name, text_field="text", tokens_field=None):
    """Documents of a data set on the hub, or in a local folder."""
    if not os.path.exists(dataset):
        hub_answers()  # or the libraries below would try for long
    import datasets
    mend = f"data set {dataset} cannot be read ({{error}}): check --dataset, --subset, --split_name and the network, " \
           "or use --source python, which needs none"
    facts = {}

    def documents():
        with as_data_error(mend, Exception):  # hub, network and parser errors share no base class
            stream = datasets.load_dataset(dataset, subset, split=split_name, streaming=True)
            rows = (row_document(row, f"{dataset}, row {number}", encoding, text_field, tokens_field)
                    for number, row in enumerate(stream, 1))
            yield from with_text(rows, dataset, facts)

    return documents(), facts


class Part(NamedTuple):
    """A data set on the hub that streams without code of its own. Its fields, joined by newlines, are a document."""
    dataset: str
    subset: "str | None"
    fields: tuple


# Where a well-known data set needs code or permission, the nearest open one stands in: OpenWebMath for deepmind's
# math_dataset, CodeParrot for the-stack-v2, the Common Pile for case_law, Muennighoff's copy for google/flan.
# Short data sets come first.
DOMAINS = {
    "math": (Part("openai/gsm8k", "main", ("question", "answer")),
             Part("open-web-math/open-web-math", None, ("text",))),
    "python": (Part("codeparrot/codeparrot-clean", None, ("content",)),),
    "web": (Part("HuggingFaceFW/fineweb", "sample-10BT", ("text",)),),
    "science": (Part("ccdv/arxiv-summarization", "document", ("article",)),),
    "legal": (Part("common-pile/caselaw_access_project", None, ("text",)),
              Part("NortheasternUniversity/big_patent", "all", ("description",))),
    "chat": (Part("databricks/databricks-dolly-15k", None, ("instruction", "context", "response")),
             Part("OpenAssistant/oasst1", None, ("text",)), Part("Muennighoff/flan", None, ("inputs", "targets"))),
}
DOMAIN_TOKENS = 20_000_000  # of each domain, without --max_tokens


def stream_domain(name, encoding):
    """Documents of the data sets of one of DOMAINS, one after another."""
    hub_answers()
    import datasets
    facts = {"datasets": [part.dataset for part in DOMAINS[name]]}

    def documents():
        for part in DOMAINS[name]:
            mend = f"data set {part.dataset} cannot be read ({{error}}): check the network, or bring text of your " \
                   f"own with --path {name}=FILE"
            with as_data_error(mend, Exception):  # hub, network and parser errors share no base class
                stream = datasets.load_dataset(part.dataset, part.subset, split="train", streaming=True)
                rows = (joined_fields(row, f"{part.dataset}, row {number}", encoding, part.fields)
                        for number, row in enumerate(stream, 1))
                yield from with_text(rows, part.dataset, facts)

    return documents(), facts


def joined_fields(row, where, encoding, fields):
    """Document of several fields of a row, those without text left out."""
    bodies = [row_document(row, where, encoding, field, None)[1] for field in fields]
    body = b"\n".join(filter(None, bodies))
    return body, body


def add_tag(source, tag, encoding):
    """The source with a line in front of each document; the split of a document stays the same."""
    documents, facts = source
    line = f"{tag}\n"
    text, ids = line.encode(), encoding.encode(line)
    join = lambda body: text + body if isinstance(body, bytes) else np.concatenate((ids, body))
    facts["source_tag"] = line
    return ((key, join(body)) for key, body in documents), facts


# ---------------------------------------------------------------------------------------------------------------------
# FineWeb, as ready shards


def download_fineweb(folder, num_shards):
    """Download num_shards train shards and the validation shard of FineWeb-10B into a folder.

    A shard gets its name after it has been read, so an interrupted download continues. Raises UserError."""
    hub_answers()
    import huggingface_hub
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"fineweb_{'train' if number else 'val'}_{number:06d}.bin" for number in range(num_shards + 1)]
    for path in {*folder.glob("fineweb_*.bin")} - {folder / name for name in names}:
        path.unlink()  # of an interrupted run with more shards
    for name in names:
        with contextlib.suppress(UserError):
            read_shard(folder / name)
            continue
        mend = f"{name} cannot be downloaded ({{error}}): check the network and run the same command again to " \
               "continue, or use --source python, which needs none"
        with as_data_error(mend, Exception):  # hub and network errors share no base class
            file = huggingface_hub.hf_hub_download("kjj0/fineweb10B-gpt2", name, repo_type="dataset",
                                                   local_dir=folder / "download")
        try:
            read_shard(file)
        except UserError:
            os.unlink(file)  # the next run downloads it again
            raise
        os.replace(file, folder / name)
    shutil.rmtree(folder / "download", ignore_errors=True)
