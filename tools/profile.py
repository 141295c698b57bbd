"""A profile of some training steps, for --enable_profiling of the training scripts."""

import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from distributed import World
from facts import matmul_rate, peak_bytes, synchronize
from model import Config, flops_per_token
from terminal import say

WAIT_STEPS, STEPS = 20, 3  # on a CPU each new number of rows of an expert costs a new primitive for a while


def profile(folder: Path, step_function, config: Config, hp, world: World):
    """Profile three steps: trace.json for Perfetto or chrome://tracing, and summary.txt with the top operators."""
    folder.mkdir(parents=True, exist_ok=True)
    cuda = world.device.type == "cuda"
    say(f"profiling: {WAIT_STEPS} steps to settle, then {STEPS} under the profiler", world.rank == 0)
    for step in range(WAIT_STEPS):
        step_function(step)
    synchronize(world.device)
    if cuda:
        torch.cuda.memory._record_memory_history()

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        began = time.perf_counter()
        for step in range(WAIT_STEPS, WAIT_STEPS + STEPS):
            step_function(step)
        synchronize(world.device)
        seconds = (time.perf_counter() - began) / STEPS

    if world.rank > 0:
        return
    say("writing the trace")
    profiler.export_chrome_trace(str(folder / "trace.json"))
    if cuda:
        torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    summary = summary_text(profiler.key_averages(), seconds, config, hp, world)
    summary += f"\ntrace: {folder / 'trace.json'} (open it in https://ui.perfetto.dev or chrome://tracing)"
    (folder / "summary.txt").write_text(summary + "\n")
    print(summary)


def summary_text(events, seconds: float, config: Config, hp, world: World) -> str:
    """Speed, memory, share of each phase, and the ten most expensive operators."""
    phases = phase_seconds(events)
    rate = hp.batch_tokens * flops_per_token(config, hp.seq_len) / seconds
    shares = ", ".join(f"{name} {100 * t / sum(phases.values()):.1f}%" for name, t in phases.items())
    order = "self_device_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
    lines = [
        f"{seconds * 1000:.1f} ms per step under the profiler, {hp.batch_tokens / seconds:,.0f} tokens/s",
        f"MFU {100 * rate / world.size / matmul_rate(world.device, config.dtype):.1f}% on active parameters",
        f"peak memory {peak_bytes(world.device) / 2**20:,.0f} MiB",
        f"share of the host's time: {shares}",
        events.table(sort_by=order, row_limit=10, max_name_column_width=45),
    ]
    return "\n".join(lines)


def phase_seconds(events) -> dict[str, float]:
    """Host seconds of each phase of a step. On CUDA each name has a second entry, of the device, which is left out."""
    names, host = ("data", "forward", "backward", "communication", "optimizer"), torch.autograd.DeviceType.CPU
    return {e.key: e.cpu_time_total / 1e6 for e in events if e.key in names and e.device_type == host}
