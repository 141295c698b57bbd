"""Checkpoints of a run: write, verify, read, and continue at any number of ranks.

A folder per step: each rank's file holds the slabs that it owns, by name; manifest.json holds the configuration and
the size and sha256 of every file. The folder is renamed into place when all of it is on the disk."""

import dataclasses
import hashlib
import importlib
import json
import os
import re
import shutil
import threading
from pathlib import Path

import torch
from torch import Tensor

import model
from cli import UserError, file_sha256
from data import TOKENIZER, in_folder, is_tokenizer
from distributed import World, slab_view
from guards import OTHER_RATES, Ended, gather_objects
from logger import Run
from model import GPT, Config

# -----------------------------------------------------------------------------
# Earlier versions

RENAMED_SLABS = {r"depth\.(.+)": r"\1"}  # parameters of earlier versions -> their names of today
RETIRED_BUFFERS = {"counted_LE"}  # that a model may lack today
RETIRED_FIELDS = {"router_spread"}  # of the model's configuration


def with_current_names(slabs: dict, names) -> dict:
    """Slabs under the names of today's parameters and buffers, without retired ones."""
    current = {}
    for slab, tensors in slabs.items():
        base, bracket, part = slab.partition("[")
        for old, new in RENAMED_SLABS.items():
            renamed = re.sub(f"^{old}$", new, base)
            base = renamed if renamed in names else base
        if base in names or base not in RETIRED_BUFFERS:
            current[base + bracket + part] = tensors
    return current


# -----------------------------------------------------------------------------
# Reading


def checkpoints(folder: Path) -> list[Path]:
    """The steps saved inside `folder`, newest first (or `folder` itself if it is one step's)."""
    if (folder / "manifest.json").exists():
        return [folder]
    return sorted(folder.glob("step_??????"), reverse=True)  # without half-written step_NNNNNN.partial


def latest_checkpoint(folder: Path) -> Path:
    """The newest step inside `folder`. Raises UserError if there is none."""
    steps = checkpoints(folder)
    if not steps:
        raise UserError(f"{folder} holds no checkpoint; train first, or name another folder")
    return steps[0]


def manifest_sha256(manifest: dict) -> str:
    """Digest of a manifest without its entry "sha256"."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(manifest)), sort_keys=True).encode()).hexdigest()


def verified_manifest(folder: Path, rank: int = 0, world_size: int = 1) -> dict:
    """The manifest of one step, once the size and sha256 of every file are verified.

    Of several ranks each verifies every world_size-th file. Raises UserError."""
    mend = f"remove {folder} to fall back on the previous step, or start over under another name"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest.pop("sha256") != manifest_sha256(manifest):
            raise ValueError("it does not match its own sha256")
        files = sorted(manifest["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/manifest.json cannot be read ({error}); {mend}") from None
    for name, expected in files[rank::world_size]:
        path = folder / name
        if not path.exists() or path.stat().st_size != expected["bytes"]:
            raise UserError(f"{path} is missing or cut short; {mend}")
        if file_sha256(path) != expected["sha256"]:
            raise UserError(f"{path} does not match its sha256; {mend}")
    return manifest


def read_slabs(folder: Path, manifest: dict) -> dict[str, dict[str, Tensor]]:
    """Slab name -> its value and optimizer state, memory-mapped: unused slabs are not read."""
    slabs = {}
    for name in (name for name in manifest["files"] if name.endswith(".pt")):
        slabs |= torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
    return slabs


def read_checkpoint(folder: Path) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """Manifest and slabs of one step; every file is verified before any is opened. Raises UserError."""
    manifest = verified_manifest(folder)
    return manifest, read_slabs(folder, manifest)


def class_name(config: Config) -> str:
    """The manifest's name of a configuration's class."""
    return f"{type(config).__module__}.{type(config).__qualname__}"


def config_of(manifest: dict) -> Config:
    """The run's model configuration, of the class that its manifest names. Raises UserError."""
    fields, named = current_fields(manifest["model"]), manifest.get("config_class")
    core = {field.name: fields[field.name] for field in dataclasses.fields(Config) if field.name in fields}
    if named == "model.Config" or fields.keys() == core.keys():
        try:
            return Config(**core)
        except UserError as error:
            mend = "if a file of your own adds it, import that file first (docs/extending.md)"
            raise UserError(f"{error}; {mend}") from error
    if named and not named.startswith("zoo."):
        raise UserError(f"the manifest names the class {named}; only those of model and zoo are known")
    zoo = importlib.import_module("zoo")
    config = zoo.Config(**fields)
    in_core = named is None and config == zoo.Config(**core)  # an earlier version, which had one class for both
    return Config(**core) if in_core and config.experts == "mlp" else config


def current_fields(fields: dict) -> dict:
    """Fields of a model configuration as today's classes take them, given those of any version."""
    fields = {name: value for name, value in fields.items() if name not in RETIRED_FIELDS}
    if isinstance(fields.get("routed_scale"), str) and fields["routed_scale"] != "auto":
        fields["routed_scale"] = float(fields["routed_scale"])
    return fields


def load_model_from_run(folder: Path, device: str = "cpu") -> tuple[GPT, dict]:
    """The trained model of a run's checkpoint folder, in evaluation mode, and its manifest. Raises UserError."""
    path = latest_checkpoint(Path(folder))
    manifest, slabs = read_checkpoint(path)
    net = model.build(config_of(manifest))
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    with torch.no_grad():
        for name, slab in with_current_names(slabs, tensors).items():
            slab_view(tensors, name).copy_(slab["value"])
    net.encoding = in_folder(manifest, path)["encoding"]
    return net.to(device).eval(), manifest


# -----------------------------------------------------------------------------
# Writing


class Saver:
    """Writes checkpoints in a thread: save() copies the slabs of this rank, and training goes on meanwhile.

    An error of the thread (a full disk, values that are not finite) is raised by the next save() or wait().
    Collectives belong to the training thread, so the threads of all ranks exchange reports through the store."""

    def __init__(self, folder: Path, exchange, world: World, encoding: str = "bytes"):
        self.folder, self.exchange, self.world, self.store = folder, exchange, world, world.store()
        self.tokenizer = Path(encoding).read_bytes() if is_tokenizer(encoding) else None  # a file of each checkpoint
        self.thread, self.error, self.last_good, self.abandoned = None, None, None, threading.Event()

    def save(self, step: int, facts: dict, log: Run):
        """facts: the manifest's entries besides the files (model, hyperparameters, loader position, clock ...)."""
        self.wait()
        slabs = snapshot(self.exchange, self.world)
        copied = torch.cuda.Event() if self.world.device.type == "cuda" else None
        if copied:
            copied.record()
        self.thread = threading.Thread(target=self.run, args=(step, slabs, copied, facts, log), daemon=True)
        self.thread.start()

    def run(self, step: int, slabs: dict, copied, facts: dict, log: Run):
        try:
            if copied:
                copied.synchronize()
            self.last_good = write_checkpoint(self.folder, step, slabs, facts, self.world, self, log.sync)
        except BaseException as error:  # raised again by wait(), in the thread that can stop the run
            self.error = error

    @property
    def failed(self) -> bool:
        return self.error is not None

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        if kind is not None and self.thread is not None:
            peer_lost = issubclass(kind, RuntimeError)  # a collective failed; that rank would never report
            self.thread.join(0 if peer_lost else 30)
            self.abandoned.set()
        self.join()

    def join(self):
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def wait(self):
        """Wait until the checkpoint is on the disk. Raises the thread's error."""
        self.join()
        if isinstance(self.error, UserError):
            raise Ended(str(self.error))
        if self.error is not None:
            raise self.error

    def describe_last_good(self) -> str:
        last = next((f"the last good checkpoint is {path}" for path in checkpoints(self.folder)), None)
        return last or "there is no checkpoint"

    def post(self, key: str, report: str):
        self.store.set(key, report)

    def wait_for(self, keys: list[str]) -> list[str]:
        """Reports of other threads. Polls, as a thread inside a blocking read could not end with its process."""
        while not self.store.check(keys):
            if self.abandoned.wait(0.02):
                raise UserError("the run ended while a checkpoint was being written; the one before is complete")
        return [self.store.get(key).decode() for key in keys]


def snapshot(exchange, world: World) -> dict[str, dict[str, Tensor]]:
    """Slab name -> host copies of value and optimizer state, for the slabs of this rank; rank 0 adds the buffers."""
    slabs = {local.slab.name: {"value": local.value} for local in exchange.owned}
    for transfer in exchange.transfers:
        for local in transfer.owned:
            for optimizer in transfer.optimizers:
                slabs[local.slab.name] |= optimizer.state.get(local.value, {})
    if world.rank == 0:
        buffers = dict(exchange.model.named_buffers())
        slabs |= {name: {"value": buffers[name]} for name in exchange.model.state_dict() if name in buffers}
    to_host = lambda value: value.to("cpu", non_blocking=True, copy=True)  # behind the step's kernels on CUDA
    return {name: {key: to_host(value) for key, value in slab.items()} for name, slab in slabs.items()}


def write_checkpoint(folder: Path, step: int, slabs: dict, facts: dict, world: World, saver: Saver,
                     sync_log=lambda: None) -> Path:  # fmt: skip
    """Write this rank's file, and on rank 0 the manifest once all files are there; returns the step's folder.

    sync_log() is called first, so no checkpoint is ahead of the log on the disk. The step before is kept.
    Raises UserError on every rank if one could not write; earlier checkpoints stay."""
    target, partial, key = folder / f"step_{step:06d}", folder / f"step_{step:06d}.partial", f"checkpoint/{step}"
    try:
        sync_log()
        partial.mkdir(parents=True, exist_ok=True)
        report = {"files": write_file(partial / f"rank{world.rank}.pt", lambda file: torch.save(slabs, file))}
        if world.rank == 0 and saver.tokenizer:
            report["files"] |= write_file(partial / TOKENIZER, lambda file: file.write(saver.tokenizer))
        bad = [name for name, slab in slabs.items() if not all(value.isfinite().all() for value in slab.values())]
        if bad:
            report = {"failure": f"{bad[0]} is not finite"}
    except Exception as error:  # the other ranks wait for a report
        free = f"; {shutil.disk_usage(partial).free / 2**20:,.0f} MiB are free there" if partial.exists() else ""
        report = {"failure": f"{error or type(error).__name__}{free}"}  # torch.save names no reason on a full disk
    saver.post(f"{key}/{world.rank}", json.dumps(report))

    if world.rank == 0:
        reports = [json.loads(report) for report in saver.wait_for([f"{key}/{rank}" for rank in range(world.size)])]
        failures = [report["failure"] for report in reports if "failure" in report]
        if not failures:
            files = {name: file for report in reports for name, file in report["files"].items()}
            try:
                finish_checkpoint(partial, target, {"step": step, **facts, "files": files})
            except OSError as error:
                failures = [str(error)]
        if failures:
            shutil.rmtree(partial, ignore_errors=True)
        saver.post(f"{key}/outcome", " ".join(failures[:1]))

    [failure] = saver.wait_for([f"{key}/outcome"])
    if failure:
        mend = OTHER_RATES if failure.endswith("is not finite") else "mend that, then go on with --resume"
        where = f"{folder} ({failure}); {saver.describe_last_good()}"
        raise UserError(f"the checkpoint of step {step} could not be written to {where}; {mend}")
    return target


def finish_checkpoint(partial: Path, target: Path, manifest: dict):
    """Write the manifest, rename the folder into place, remove all but this step and the one before."""
    manifest["sha256"] = manifest_sha256(manifest)
    write_file(partial / "manifest.json", lambda file: file.write(json.dumps(manifest, indent=1).encode()))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    sync_folder(target.parent)
    saved = checkpoints(target.parent)
    for old in set(saved) - set([path for path in saved if path <= target][:2]):  # newer ones are damaged
        shutil.rmtree(old)


def write_file(path: Path, write) -> dict[str, dict]:
    """Write a file through write(file) and flush it to the disk; returns {name: size and sha256}."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}}


def sync_folder(folder: Path):
    """Flush a rename inside a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -----------------------------------------------------------------------------
# Resuming


def latest_valid_checkpoint(folder: Path, world: World) -> tuple[Path | None, dict, list[str]]:
    """The newest checkpoint with files that match its manifest, that manifest, and the faults of newer checkpoints.

    (None, {}, []) if there is no checkpoint. The ranks share the work. Raises Ended if there are some and none is
    valid."""
    faults = []
    for path in checkpoints(folder):
        manifest, fault = {}, ""
        try:
            manifest = verified_manifest(path, world.rank, world.size)
        except UserError as error:
            fault = str(error).partition(";")[0]
        found = [fault for fault in gather_objects(fault, world) if fault]
        if not found:
            return path, manifest, faults
        faults += found[:1]
    if faults:
        mend = "start over under another --experiment_name"
        raise Ended(f"{'; '.join(faults)}; no checkpoint in {folder} is sound, so {mend}")
    return None, {}, []


def load_checkpoint(path: Path, manifest: dict, exchange):
    """Copy a verified checkpoint's values and optimizer state into the model and optimizers of an Exchange.

    Slabs are found by name, so the numbers of ranks and of expert parts may differ from those of the run that saved.
    Raises UserError if one is missing."""
    parameters, buffers = dict(exchange.model.named_parameters()), dict(exchange.model.named_buffers())
    slabs = with_current_names(read_slabs(path, manifest), parameters.keys() | buffers.keys())
    kept_buffers = exchange.model.state_dict().keys() & buffers.keys()
    needed = [local.slab.name for transfer in exchange.transfers for local in transfer.slabs] + sorted(kept_buffers)
    for name in needed:
        if name not in slabs:
            raise UserError(f"{path} lacks {name}, so another version of this code wrote it; resume with that, "
                           "or start another --experiment_name")  # fmt: skip

    for name in kept_buffers:
        buffers[name].copy_(slabs[name]["value"])
    for transfer in exchange.transfers:
        groups = [(optimizer, group) for optimizer in transfer.optimizers for group in optimizer.param_groups]
        owner_of = {tensor: optimizer for optimizer, group in groups for tensor in group["params"]}
        for local in transfer.slabs:
            local.value.copy_(slabs[local.slab.name]["value"])
        for local in transfer.owned:
            saved = {key: value for key, value in slabs[local.slab.name].items() if key != "value"}
            if saved:
                state = {key: value.to(local.value.device, copy=True) for key, value in saved.items()}
                owner_of[local.value].state[local.value] = state
