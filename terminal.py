"""What a program prints while it works: a note when long work begins, and the progress of a run.

All of it goes to stderr. stdout holds the lines of run.log and results, so it can be piped and compared. Imports the
standard library only."""

import os
import sys
import time
from datetime import timedelta

REDRAW_SECONDS = 0.2  # on a terminal
LINE_SECONDS = 30.0  # elsewhere


def say(note: str, active: bool = True):
    """Print a line that names the work that begins."""
    if active:
        clear_line()
        print(note, file=sys.stderr, flush=True)


def is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def clear_line():
    """Erase the live line, so that a permanent line can take its place."""
    if is_terminal():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def printable(text: str, stream) -> str:
    """The text with replacements for characters that the stream's encoding lacks."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


class LastingStream:
    """A standard stream that outlives its reader: after a closed pipe or terminal it drops text and raises nothing."""

    def __init__(self, stream):
        self.stream = stream if stream is not None else open(os.devnull, "w")

    def write(self, text: str) -> int:
        self.attempt(lambda: self.stream.write(printable(text, self.stream)))
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action):
        try:
            action()
        except (OSError, ValueError):  # ValueError: the file object is closed
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class Progress:
    """The progress of a run: one live line on a terminal, a line every 30 seconds elsewhere."""

    def __init__(self, total_steps: int, tokens_per_step: int, active: bool = True):
        self.total_steps, self.tokens_per_step, self.active = total_steps, tokens_per_step, active
        self.first_step, self.began, self.step_seconds = None, time.monotonic(), None
        self.due = self.began + (0.0 if is_terminal() else LINE_SECONDS)

    def update(self, step: int, loss: float, seconds: float, peak_bytes: int):
        """Show the state after `step` steps, the last of which took so many seconds."""
        now = time.monotonic()
        if self.first_step is None:
            self.first_step, self.began, self.step_seconds = step, now, seconds
        self.step_seconds += 0.1 * (seconds - self.step_seconds)
        if self.active and now >= self.due:
            text = f"step {step}/{self.total_steps}  loss {loss:.4f}  {self.tokens_per_step / self.step_seconds:,.0f} "
            text += f"tokens/s  {self.time_left(step, now)} left  {peak_bytes / 2**20:,.0f} MiB"
            self.due = now + (REDRAW_SECONDS if is_terminal() else LINE_SECONDS)
            (redraw if is_terminal() else say)(text)

    def time_left(self, step: int, now: float) -> timedelta:
        """At the mean pace of this run, evaluations and checkpoints included."""
        done = step - self.first_step
        pace = (now - self.began) / done if done else self.step_seconds
        return timedelta(seconds=round(pace * (self.total_steps - step)))

    def pause(self, work: str):
        """Name the work between steps on the live line."""
        if self.active and is_terminal():
            redraw(work)

    def close(self):
        if self.active:
            clear_line()


def redraw(text: str):
    """Put a text in place of the live line, cut at the width of the terminal."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0 where the size is unknown
    except OSError:
        columns = 80
    print(f"\r\x1b[K{text[: columns - 1]}", end="", file=sys.stderr, flush=True)
