"""Settings of a run before anything is allocated: completed from data and machine, checked with one another, and
compared with those of the run to resume. `hp` is a TrainConfig of train_muon.py."""

import argparse
import dataclasses
import os
import shlex
from pathlib import Path

import logger
import model
from checkpoint import checkpoints, class_name, current_fields
from cli import UserError
from distributed import World, memory_bytes
from facts import cpu_has_bf16
from model import Config
from terminal import say

# -----------------------------------------------------------------------------
# Data and machine


def resolve(config: Config, hp, recipe, args: argparse.Namespace, device) -> tuple:
    """Both configurations with the data's vocabulary, and fp32 on a CPU without bf16, unless flags set them.

    Raises UserError for a vocabulary smaller than the data's."""
    meta = recipe.data.load_meta(hp.data)
    changes = {name: meta[name] for name in ("vocab_size", "eot_token") if name not in args}
    if "vocab_size" in args and config.vocab_size < meta["vocab_size"]:
        legal = f"at least {meta['vocab_size']}, the vocabulary of {hp.data}"
        raise UserError(f"vocab_size is {config.vocab_size}; it must be {legal}")
    if device.type == "cpu" and not cpu_has_bf16():
        changes |= {} if "dtype" in args else {"dtype": "fp32"}
        if hasattr(hp, "ns_dtype") and "ns_dtype" not in args:  # Newton-Schulz in emulated bf16 takes 8 times as long
            hp = dataclasses.replace(hp, ns_dtype="fp32")
    return dataclasses.replace(config, **changes), hp


def check(config: Config, hp, world_size: int, device_type: str):
    """Raises UserError for settings that do not go together."""
    parts = hp.expert_parallel
    if world_size % parts or config.num_experts % parts:
        legal = f"divide both the {world_size} ranks and num_experts = {config.num_experts}"
        raise UserError(f"expert_parallel is {parts}; it must {legal}")
    needed, there = 4 * model.count_parameters(config)["total"] / parts, memory_bytes(device_type)
    if needed > there:
        raise UserError(f"the model's parameters take {needed / 2**30:,.0f} GiB of the {there / 2**30:,.0f} here")
    if device_type == "cuda":
        check_for_cuda(config, hp, hp.seq_len)


def check_for_cuda(config: Config, hp, row_tokens: int):
    """Raises UserError for shapes that matmuls and FlexAttention cannot take on a GPU."""
    for name, value in {"seq_len": hp.seq_len, "n_embd": config.n_embd}.items():
        if config.head == "fp8" and value % 16:
            legal = "with head fp8 on CUDA it must be a multiple of 16, or pass --head bf16"
            raise UserError(f"{name} is {value}; {legal}")
    if config.head_dim < 16:
        raise UserError(f"head_dim is {config.head_dim}; on CUDA it must be at least 16")
    block, max_masked = model.FlexMask.BLOCK, 8192  # tokens of a row; a mask of all its pairs still fits
    if row_tokens % block and row_tokens > max_masked:
        name = "seq_len" if row_tokens == hp.seq_len else "seq_len + num_meta_tokens"
        legal = f"on CUDA it must be a multiple of {block} beyond {max_masked}"
        raise UserError(f"{name} is {row_tokens}; {legal}, or attention would hold a mask of all pairs")


def micro_batch_rows(rows: int, hp, world: World) -> int:
    """Rows per forward pass: the most that fit micro_batch_tokens and divide this rank's share of the batch."""
    if rows % world.size:
        raise UserError(f"batch_tokens / seq_len = {rows} rows per step do not divide over {world.size} ranks; "
                       "change --batch_tokens, --seq_len or --nproc_per_node")  # fmt: skip
    own_rows, max_rows = rows // world.size, max(1, hp.micro_batch_tokens // hp.seq_len)
    return max(n for n in range(1, min(own_rows, max_rows) + 1) if own_rows % n == 0)


# -----------------------------------------------------------------------------
# The run to resume

MAY_CHANGE_ON_RESUME = set("""data out_dir device compile micro_batch_tokens val_every val_tokens checkpoint_every
    sample_tokens warmup_steps expert_parallel bucket_mb overlap stuck_after""".split())  # fmt: skip
SCHEDULERS = {"SLURM_JOB_ID": "Slurm", "PBS_JOBID": "PBS", "LSB_JOBID": "LSF"}  # variable of a job -> its scheduler


def is_resumed(folder: Path, resume: bool, world: World) -> bool:
    """Whether the run in `folder` continues: with --resume, or if torchrun restarted this process.

    A job's first attempt may have ended before it made the folder, so with --resume of nothing a scheduler's job starts
    the run. Raises UserError for it elsewhere, as the name is likely mistyped, and for a folder that cannot be made."""
    logger.check_writable(folder)
    if resume and not folder.exists():
        scheduler = next((name for variable, name in SCHEDULERS.items() if os.environ.get(variable)), None)
        if scheduler is None:
            raise UserError(f"there is no {folder} to resume; start the run without --resume, "
                           "or correct --experiment_name or --out_dir")  # fmt: skip
        say(f"there is no {folder} to resume yet, so this {scheduler} job starts the run", world.rank == 0)
    return folder.exists() and (resume or world.restarted)


def saved_fields(folder: Path, recipe) -> dict:
    """Every field of the run in `folder`, but its out_dir; {} without a config.json. Raises UserError."""
    saved = logger.read_config(folder)
    check_same_script(saved, recipe, folder / "config.json")
    fields = current_fields(saved.get("model", {})) | saved.get("hyperparameters", {})
    return {field: value for field, value in fields.items() if field != "out_dir"}


def check_resumable(folder: Path, config: Config, hp, recipe):
    """Raises UserError for a run that has ended and lost its checkpoint, and for one that began with other settings."""
    if saved := logger.read_config(folder):
        check_same_run(saved, config, hp, recipe, folder / "config.json")
    if logger.has_ended(folder) and not checkpoints(folder / "checkpoint"):
        mend = f"restore {folder}/checkpoint, or start another --experiment_name"
        raise UserError(f"{folder} has ended, and its checkpoint is gone, so nothing can be resumed; {mend}")


def check_same_run(saved: dict, config: Config, hp, recipe, path: Path):
    """Raises UserError, which names the first difference from the saved run; its num_iterations may grow.

    saved: contents of `path`, a config.json or manifest.json. Earlier versions saved no class and no shards."""
    check_same_script(saved, recipe, path)
    here = class_name(config)
    if saved.get("config_class", here) != here:
        raise UserError(f"{path} is of a {saved['config_class']}, not a {here}; resume with the script that began")
    now = dataclasses.asdict(config) | dataclasses.asdict(hp)
    then = current_fields(saved.get("model", {})) | saved.get("hyperparameters", {})
    for field, value in now.items():
        was = then.get(field)
        grows = field == "num_iterations" and isinstance(was, int) and value > was
        if field not in MAY_CHANGE_ON_RESUME and was != value and not grows:
            legal = f"{was} or more" if field == "num_iterations" else shlex.quote(str(was))
            mend = f"pass --{field} {legal}, or" if field in then else f"it is older than --{field}; choose"
            raise UserError(f"{path} has {field} = {was}, not {value}; {mend} another --experiment_name")
    shards = recipe.data.fingerprint(hp.data)
    for name in sorted(shards.keys() | saved.get("shards", shards).keys()):
        was, value = (contents.get(name, "absent") for contents in (saved.get("shards", shards), shards))
        if was != value:
            raise UserError(f"{path} is of other data: {name} was {was} and is {value} in {hp.data}; pass the --data "
                           "that the run began with, or another --experiment_name")  # fmt: skip


def extension(saved: dict, hp) -> list[str]:
    """A sentence for the log if the run is longer than the saved one, else nothing."""
    steps = saved["hyperparameters"]["num_iterations"]
    if hp.num_iterations == steps:
        return []
    return [f"extended from {steps} to {hp.num_iterations} steps: rates and window go on as in a run of that length, "
            f"with a new cooldown over its last {hp.cooldown_frac:.0%}"]  # fmt: skip


def check_same_script(saved: dict, recipe, path: Path):
    """Raises UserError if the run was trained with another optimizer."""
    optimizer = saved.get("optimizer", recipe.name)
    if optimizer != recipe.name:
        raise UserError(f"{path} is of a run with {optimizer}, not {recipe.name}; resume with the script that began, "
                       "or choose another --experiment_name")  # fmt: skip
