"""Text to token shards: the command line of data.py.

    python data.py                                              # FineWeb, GPT-2 tokens: 9 shards of 100M (internet)
    python data.py --source python --encoding bpe               # the Python source of the installed torch: no download
    python data.py --source files --path notes/ more.jsonl.gz   # your own text, .jsonl and .parquet, also .gz .xz .zst
    python data.py --source files --path src/ code.zip --glob "*.py" "*.md"   # files of these names alone
    python data.py --source hf --dataset allenai/c4 --subset en --max_tokens 1_000_000_000
    python data.py --source hf --dataset NAME --tokens_field input_ids   # a data set that already holds GPT-2 ids
    python data.py --source arithmetic --encoding bytes --max_tokens 4_000_000   # problems of known difficulty
    python data.py --source domains                             # math, python, web, science, legal, chat (internet)
    python data.py --source domains --path notes=notes/ code=src/ mail=mail.jsonl.gz   # domains of your own

The result is a folder of shards and a meta.json. With --source domains it is a mixture: one such folder per domain.
"""
import argparse
import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import data
import tokenizer
from cli import Parser, UserError, file_sha256, write_atomically
from data import MARKER, as_data_error, load_meta
from terminal import LastingStream, say
from tokenizer import get_encoding
from tools import sources
from tools.shards import describe, encoding_meta, open_encoding, tokenise

# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    if argv is None:
        sys.stdout, sys.stderr = map(LastingStream, (sys.stdout, sys.stderr))  # a closed terminal ends no preparation
    try:
        print(prepare(args))
    except (UserError, OSError) as error:
        print(f"data.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        install = "`pip install -r requirements.txt`"
        print(f"data.py: error: --source {args.source} needs {error.name}: {install}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("data.py: interrupted; run the same command again", file=sys.stderr)
        sys.exit(130)


def prepare(args):
    """Prepare args.out, in <out>.partial until it is complete. Returns the line to print. Raises UserError."""
    start, out = time.perf_counter(), Path(args.out or f"data/{args.source}")
    target = out.resolve()  # resolved, so that the target of a link is filled and `.` has a name
    if target.is_mount():
        raise UserError(f"{out} is the mount point of a file system and cannot be replaced: "
                        "choose a folder inside it as --out")
    request = requested(args, SOURCES[args.source][1])
    if args.source == "python":
        request["torch"] = sources.torch_version()
    if args.path:
        paths = [word.partition("=")[2] for word in args.path] if args.source == "domains" else args.path
        request["inputs"] = file_stamps(filter(None, paths), args.glob)
    if ready := ready_line(out, request):
        return ready

    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no warning at each retry
    resumable = args.source in ("fineweb", "domains")  # other sources start over
    with claimed(target, resumable) as partial:
        if ready := ready_line(out, request):  # made by another process since
            return ready
        if not resumable:
            remove_earlier(partial, keep=MARKER)
        split_seed = args.split_seed if args.source != "fineweb" else None
        meta = {"source": args.source, "split_seed": split_seed, "request": request}
        meta |= SOURCES[args.source][0](args, partial)
        write_meta(partial, meta)
        with locked(target.parent):
            os.replace(partial, target)
            (target / MARKER).unlink()

    total = lambda key: sum(split[key] or 0 for split in meta["splits"].values())
    tokens, seconds = total("tokens"), time.perf_counter() - start
    line = f"{out}: {total('documents'):,} documents, {tokens:,} tokens ({meta['splits']['val']['tokens']:,} val), " \
           f"{total('bytes'):,} bytes in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
    if meta["compressed_bytes"]:
        line += f"; {meta['compressed_bytes']:,} bytes of validation text: gzip -9 {meta['gzip_bpb']:.3f}, " \
                f"xz -9 {meta['xz_bpb']:.3f} bits per byte"
    return line


def ready_line(out, request):
    """The line to print if the same request has filled `out`; None if nothing is there. Raises UserError for others."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return None
    if (out / "meta.json").exists() and was_requested(meta := data.read_meta_json(out), request):
        parts = [out / name for name in meta.get("domains") or [""]]
        shards = [shard for part in parts for split in ("train", "val") for shard in data.open_split(part, split)]
        tokens = sum(len(tokens) for _, tokens in shards)
        return f"{out} is ready: {tokens:,} tokens, made by this same command"
    raise UserError(f"{out} already exists and was made by another command or of other text: "
                    "remove it or choose another --out")


def parse(argv):
    """Flags as a namespace, defaults filled in. Exits with status 2 for a flag that the source does not take."""
    def at_least(low, high=2**63):
        def number(text):
            if not text.replace("_", "").isdecimal() or not low <= int(text) < high:
                raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high - 1}")
            return int(text)
        return number

    calls = tuple(re.findall(r"^    (python .*)$", __doc__, re.M))
    about = "Text to token shards: a folder of shards and a meta.json, or one such folder for each domain."
    first = ("source", "path", "out", "encoding", "max_tokens")
    parser = Parser(prog="data.py", description=about, examples=calls, first=first)
    add = parser.add_argument
    add("--source", choices=list(SOURCES), default="fineweb", metavar="NAME", help="origin of the text")
    add("--path", nargs="+", metavar="P", help="files: files and folders; domains: name=FILE, instead of the hub")
    add("--out", metavar="DIR", help="folder of the shards (default data/<source>)")
    names = " ".join(tokenizer.ENCODINGS)
    add("--encoding", metavar="NAME", help=f"{names}, bpe (trained here), tokenizer.json (default gpt2)")
    add("--vocab_size", type=at_least(257, 2**16 + 1), metavar="N", help="ids of --encoding bpe (default 2000)")
    add("--max_tokens", type=at_least(2), metavar="N", help="train and val together, for each domain (default all)")
    add = parser.add_argument_group("files and domains").add_argument
    add("--glob", nargs="+", metavar="G", help="names of files to read in folders, such as '*.py' (default all text)")
    add = parser.add_argument_group("domains").add_argument
    add("--domains", nargs="+", metavar="NAME",
        help=f"some of them (default {' '.join(sources.DOMAINS)}, or those of --path)")
    add("--source_tag", action="store_true", default=None, help="put the domain's name before each document")
    hub = parser.add_argument_group("hf")
    hub.add_argument("--dataset", metavar="NAME", help="name on the hub, or a local folder")
    hub.add_argument("--subset", metavar="S", help="its configuration")
    hub.add_argument("--split_name", metavar="S", help="its split to read (default train)")
    field = parser.add_argument_group("hf, jsonl and parquet").add_mutually_exclusive_group()
    field.add_argument("--text_field", metavar="F", help="the field with the text (default text)")
    field.add_argument("--tokens_field", metavar="F", help="a field with ids of --encoding instead")
    add = parser.add_argument_group("shards").add_argument
    add("--shards", type=at_least(1, 104), metavar="N", help="fineweb: training shards of 100M tokens (default 9)")
    add("--shard_tokens", type=at_least(2, 2**31), metavar="N", help="tokens per shard (default 100_000_000)")
    add("--num_proc", type=at_least(1, 1025), metavar="N", help="processes, without gigatoken (default one per core)")
    add("--split_seed", type=at_least(0), metavar="N", help="another choice of validation documents (default 0)")

    argv = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    args = parser.parse_args(argv)
    uses = SOURCES[args.source][1]
    for flag, value in vars(args).items():
        if value is not None and flag not in ("source", "out", *uses):
            parser.error(f"--{flag} does not apply to --source {args.source}, which takes --{', --'.join(uses)}")
    for flag in {"path", "dataset"} & set(uses):
        if not getattr(args, flag) and args.source != "domains":
            parser.error(f"--source {args.source} needs --{flag}")
    if args.vocab_size and args.encoding != "bpe":
        parser.error("--vocab_size applies to --encoding bpe only")
    for flag, value in DEFAULTS.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    return args


def requested(args, flags):
    """What decides the shards: {flag: value} of these and --source."""
    without = {"num_proc"} | ({"glob"} if args.glob is None else set())
    without |= set() if args.encoding == "bpe" else {"vocab_size"}
    request = {flag: getattr(args, flag) for flag in ("source", *flags) if flag not in without}
    if data.is_tokenizer(args.encoding) and Path(args.encoding).exists():
        request["tokenizer_sha256"] = file_sha256(args.encoding)
    return request


def file_stamps(paths, globs=None):
    """{file: [size, time of last change]} of files and folders; it differs if a file has changed since the request."""
    files = [file for path in paths for file in sources.list_files(Path(path), globs)[0]]
    stats = {str(file): file.stat() for file in files if file.exists()}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def was_requested(meta, request):
    """Whether the same request made these shards, of files that are unchanged or gone."""
    made = meta.get("request") or {}
    gone = {file: stamp for file, stamp in made.get("inputs", {}).items() if not Path(file).exists()}
    return made == request | ({"inputs": gone | request["inputs"]} if "inputs" in request else {})


def write_meta(folder, meta):
    """Write meta.json, one entry per line, with its own sha256."""
    meta = meta | {"sha256": data.meta_sha256(meta)}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in meta.items())
    write_atomically(folder / "meta.json", lambda temporary: temporary.write_text("{\n" + lines + "\n}\n"))


# ---------------------------------------------------------------------------------------------------------------------
# The folder <out>.partial, which one process at a time fills


@contextlib.contextmanager
def claimed(target, resumable):
    """Yields <target>.partial, new or of an earlier attempt, and locks it until the end of the block or the process.

    If the block ends without renaming it, the folder is removed, but for what a resumable source can continue with.
    Raises UserError if another process holds the lock, or if data.py did not make the folder."""
    partial = target.with_name(target.name + ".partial")
    new_folders = [folder for folder in target.parents if not folder.exists()]
    cannot = f"{partial} cannot be made or locked ({{error}}): choose another --out"
    with contextlib.ExitStack() as stack:
        with as_data_error(cannot, OSError):
            partial.parent.mkdir(parents=True, exist_ok=True)
            with locked(partial.parent):  # no other process sees the folder without its marker
                marker = stack.enter_context(take(partial))
        try:
            yield partial
        finally:
            with locked(partial.parent):
                leave(partial, resumable)
            marker.close()
            for folder in new_folders:
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()


def take(partial):
    """The open and locked marker of a folder, which is made unless it is there."""
    try:
        partial.mkdir()
    except FileExistsError:
        if not (partial / MARKER).exists():
            raise UserError(f"{partial} was not made by data.py, which would replace it: move it or choose another "
                            "--out") from None
    marker = open(partial / MARKER, "a+")
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        marker.seek(0)
        holder = marker.read() or "another process"
        marker.close()
        raise UserError(f"{partial} is being filled by {holder}: wait until it has ended, stop it, or choose another "
                        "--out") from None
    marker.truncate(0)
    marker.write(f"process {os.getpid()} on {socket.gethostname()}")
    marker.flush()
    return marker


@contextlib.contextmanager
def locked(folder):
    """Locks a folder against other data.py, for moments only."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def leave(partial, resumable):
    """Remove a folder that was not finished, unless the same command can continue with what it holds."""
    if resumable and (data.has_shards(partial) or data.shard_folders(partial) or any(partial.rglob("*.incomplete"))):
        say(f"what is complete stays in {partial}; the same command continues with it")
    elif partial.exists():
        remove_made(partial)


def remove_made(folder, keep=None):
    """Remove from a folder what data.py made, but the file `keep`, and the folder once it is empty.

    Returns whether nothing else is left in it."""
    for path in folder.iterdir():
        if path.name == "download" and (path / ".cache" / "huggingface").exists():
            shutil.rmtree(path)
        elif path.is_dir() and not path.is_symlink():
            remove_made(path)
        elif path.name != keep and MADE.fullmatch(path.name):
            path.unlink()
    left = {path.name for path in folder.iterdir()}
    if not left:
        folder.rmdir()
    return left <= {keep}


MADE = re.compile(r".+_(train|val)_\d+\.bin|\..+\.bin\.\d+|meta\.json|tokenizer\.json|\.meta\.json\.partial\.json|"
                  + re.escape(MARKER))


def remove_earlier(folder, keep=None):
    """Remove the files of an earlier attempt. Raises UserError if others lie among them."""
    if folder.exists() and not remove_made(folder, keep):
        raise UserError(f"{folder} holds files that data.py did not make: move them or choose another --out")


# ---------------------------------------------------------------------------------------------------------------------
# One function per source: fills a folder with shards and returns the entries of its meta.json


def prepare_fineweb(args, folder):
    if args.encoding != "gpt2":
        raise UserError("the FineWeb shards hold gpt2 tokens: leave --encoding out, or tokenise FineWeb with "
                        "--source hf --dataset HuggingFaceFW/fineweb")
    sources.download_fineweb(folder, args.shards)
    try:
        encoding = get_encoding("gpt2")
    except UserError as error:
        print(f"note: no bits per byte, as bytes per token are unknown: {error}", file=sys.stderr)
        encoding = None
    return describe(folder, encoding)


def fill(open_source, args, folder):
    """Tokenise a source, which open_source(encoding) returns."""
    encoding = open_encoding(args, folder, [open_source])
    return tokenise(open_source(encoding), encoding, args, folder)


def prepare_hf(args, folder):
    words = args.dataset, args.subset, args.split_name, args.text_field, args.tokens_field
    return fill(lambda encoding: sources.stream_dataset(encoding, *words), args, folder)


def prepare_files(args, folder):
    fields = args.text_field, args.tokens_field
    return fill(lambda encoding: sources.read_files(args.path, encoding, *fields, args.glob), args, folder)


def prepare_python(args, folder):
    return fill(lambda encoding: sources.read_python_corpus(), args, folder)


def prepare_arithmetic(args, folder):
    if args.max_tokens is None:
        raise UserError("--source arithmetic has no end: say how much of it with --max_tokens, for instance "
                        "--max_tokens 4_000_000")
    return fill(lambda encoding: sources.generate_arithmetic(args.split_seed), args, folder)


def prepare_domains(args, folder):
    """A folder of shards for each domain. Complete ones of an interrupted run are kept."""
    paths = {}
    for word in args.path or []:
        name, equals, path = word.partition("=")
        if not equals or not re.fullmatch(r"\w+", name) or not path:
            raise UserError(f"--path {word}: with --source domains it is name=FILE, and a name has letters, digits "
                            "and _ only")
        paths.setdefault(name, []).append(path)
    legal = paths or sources.DOMAINS
    names = args.domains or list(legal)
    for name in names:
        if name not in legal:
            mend = f"choose among {', '.join(legal)}" + ("" if paths else ", or name its file with --path")
            raise UserError(f"--domains {name}: {mend}")

    max_tokens, metas = args.max_tokens or (None if paths else sources.DOMAIN_TOKENS), {}
    own = {name: argparse.Namespace(**vars(args) | {"source": name, "path": paths.get(name), "max_tokens": max_tokens})
           for name in names}
    encoding = open_encoding(args, folder, [functools.partial(open_domain, own[name]) for name in names])
    for name in names:
        prepare_domain(own[name], encoding, folder / name)
        metas[name] = data.read_meta_json(folder / name)
    for stale in (path for path in folder.glob("*/") if path.name not in names):
        remove_earlier(stale)

    total = lambda split, key: sum(meta["splits"][split][key] for meta in metas.values())
    splits = {split: {key: total(split, key) for key in ("documents", "tokens", "bytes")} for split in ("train", "val")}
    kept = ("splits", "gzip_bpb", "xz_bpb", "request", "datasets", "sha256")
    by_domain = {name: {key: meta[key] for key in kept if key in meta} for name, meta in metas.items()}
    return {**encoding_meta(encoding), "splits": splits, "compressed_bytes": None,
            "token_bytes": encoding.token_bytes().tolist(), "domains": by_domain}


def prepare_domain(args, encoding, folder):
    """Fill the folder of one domain, args.source, unless the same request has filled it."""
    request = requested(args, ("path", "glob", *TOKENISED, "source_tag"))
    request["inputs"] = file_stamps(args.path or [], args.glob)
    if folder.exists() and was_requested(load_meta(folder), request):
        return
    partial = folder.with_name(f"{folder.name}.partial")
    for old in (folder, partial):
        remove_earlier(old)
    meta = {"source": args.source, "split_seed": args.split_seed, "request": request}
    try:
        write_meta(partial, meta | tokenise(open_domain(args, encoding), encoding, args, partial))
        os.replace(partial, folder)
    finally:
        if partial.exists():
            remove_made(partial)


def open_domain(args, encoding):
    """(documents, facts) of one domain, args.source."""
    if args.path:
        source = sources.read_files(args.path, encoding, args.text_field, args.tokens_field, args.glob)
    else:
        source = sources.stream_domain(args.source, encoding)
    return sources.add_tag(source, args.source, encoding) if args.source_tag else source


TOKENISED = ("encoding", "vocab_size", "max_tokens", "shard_tokens", "num_proc", "split_seed")
SOURCES = {  # name: (function of the flags and a folder, the flags it takes)
    "fineweb": (prepare_fineweb, ("encoding", "shards")),
    "hf": (prepare_hf, TOKENISED + ("dataset", "subset", "split_name", "text_field", "tokens_field")),
    "files": (prepare_files, TOKENISED + ("path", "glob", "text_field", "tokens_field")),
    "python": (prepare_python, TOKENISED),
    "arithmetic": (prepare_arithmetic, TOKENISED),
    "domains": (prepare_domains, TOKENISED + ("domains", "path", "glob", "text_field", "tokens_field", "source_tag")),
}
NUM_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
DEFAULTS = {"encoding": "gpt2", "vocab_size": 2000, "shards": 9, "shard_tokens": 100_000_000, "num_proc": NUM_CORES,
            "split_seed": 0, "split_name": "train", "text_field": "text"}
