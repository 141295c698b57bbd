"""Settings of a run before anything is allocated: completed from data and machine, checked with one another, and
compared with those of the run to resume. `hp` is a TrainConfig of train_muon.py."""

import argparse
import dataclasses
from pathlib import Path

import model
from checkpoint import class_name, current_fields
from cli import UserError
from distributed import World
from facts import cpu_has_bf16
from model import Config

# -----------------------------------------------------------------------------
# Data and machine


def resolve_config(config: Config, hp, recipe, args: argparse.Namespace, device) -> Config:
    """The configuration with the data's vocabulary, and fp32 on a CPU without bf16, unless flags set them."""
    meta, changes = recipe.data.load_meta(hp.data), {}
    if "vocab_size" not in args:
        changes |= {"vocab_size": meta["vocab_size"], "eot_token": getattr(args, "eot_token", meta["eot_token"])}
    elif config.vocab_size < meta["vocab_size"]:
        legal = f"at least {meta['vocab_size']}, the vocabulary of {hp.data}"
        raise UserError(f"vocab_size is {config.vocab_size}; it must be {legal}")
    if device.type == "cpu" and "dtype" not in args and not cpu_has_bf16():
        changes["dtype"] = "fp32"
    return dataclasses.replace(config, **changes)


def check(config: Config, hp, world_size: int, device_type: str):
    """Raises UserError for settings that do not go together."""
    parts = hp.expert_parallel
    if world_size % parts or config.num_experts % parts:
        legal = f"divide both the {world_size} ranks and num_experts = {config.num_experts}"
        raise UserError(f"expert_parallel is {parts}; it must {legal}")
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
    block, max_masked = model.FlexMask.BLOCK, 8192  # tokens of a row whose pairs all fit into a mask
    if row_tokens % block and row_tokens > max_masked:
        name = "seq_len" if row_tokens == hp.seq_len else "seq_len + num_meta_tokens"
        legal = f"on CUDA it must be a multiple of {block} beyond {max_masked}"
        raise UserError(f"{name} is {row_tokens}; {legal}, or attention would hold a mask of all pairs")


def micro_batch_rows(rows: int, hp, world: World) -> int:
    """Rows per forward pass: the most that fit micro_batch_tokens and divide this rank's share of the batch."""
    if rows % world.size:
        raise UserError(f"batch_tokens / seq_len = {rows} rows per step do not divide over {world.size} ranks; "
                       "change --batch_tokens or --nproc_per_node")  # fmt: skip
    own_rows, max_rows = rows // world.size, max(1, hp.micro_batch_tokens // hp.seq_len)
    return max(n for n in range(1, own_rows + 1) if own_rows % n == 0 and n <= max_rows)


# -----------------------------------------------------------------------------
# The run to resume

MAY_CHANGE_ON_RESUME = set("""data out_dir device compile micro_batch_tokens val_every val_tokens checkpoint_every
    sample_tokens warmup_steps expert_parallel bucket_mb overlap stuck_after""".split())  # fmt: skip


def check_same_run(manifest: dict, config: Config, hp, path: Path):
    """Raises UserError, which names the first field that differs from the run that was saved."""
    here = class_name(config)
    saved_class = manifest.get("config_class", here)
    if saved_class != here:
        raise UserError(f"{path} was saved with a {saved_class}, not a {here}; resume with the script that began")
    now = dataclasses.asdict(config) | dataclasses.asdict(hp)
    then = current_fields(manifest["model"]) | manifest["hyperparameters"]
    for field, value in now.items():
        was = then.get(field)
        if field not in MAY_CHANGE_ON_RESUME and was != value:
            mend = f"pass --{field} {was}, or another --experiment_name"
            raise UserError(f"{path} was saved with {field} = {was}, not {value}; {mend}")
