"""Mixtures of domains: a folder with a sub-folder of shards per domain, and the loader that mixes them in given shares.

A plain folder of shards is a mixture of one domain named "", with the batches of data.Loader.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
from cli import UserError
from data import ShardRows, as_data_error, has_shards

# ---------------------------------------------------------------------------------------------------------------------
# A folder of domains


def domains(folder):
    """{name: folder of shards}, in the order of meta.json, else sorted by name; {"": folder} for a plain folder.

    Raises UserError if there are no shards."""
    folder = Path(folder)
    if has_shards(folder):
        return {"": folder}
    found = {path.name: path for path in data.shard_folders(folder)}
    if not found:
        raise UserError(data.describe_missing(folder))
    names = list(data.read_meta_json(folder).get("domains") or found)
    for name in names:
        if name not in found:
            missing = f"{folder}/{name}, a domain in meta.json, holds no token shards"
            raise UserError(f"{missing}: remove {folder} and prepare it again")
    return {name: found[name] for name in names}


def load_meta(folder):
    """meta.json of a mixture as a dict: the encoding that all domains share, token_bytes if any domain has them.

    Raises UserError if the folder holds no shards, a meta.json is damaged, or encodings differ."""
    parts = domains(folder)
    metas = {name: data.load_meta(part) for name, part in parts.items()}
    first, *others = metas
    for name in others:
        if any(metas[name][key] != metas[first][key] for key in data.GPT2_META):
            found = f"domain {name} has encoding {metas[name]['encoding']}, {first} has {metas[first]['encoding']}"
            raise UserError(f"{folder}: {found}: prepare both with the same --encoding, or pass one of them as --data")
    if "" in metas:
        return metas[""]
    token_bytes = next((meta["token_bytes"] for meta in metas.values() if meta["token_bytes"]), None)
    encoding = {key: metas[first][key] for key in data.GPT2_META}
    return data.UNKNOWN_META | encoding | {"token_bytes": token_bytes} | data.read_meta_json(Path(folder))


def verify(folder, rank=0, world_size=1):
    """data.verify of each domain."""
    for part in domains(folder).values():
        data.verify(part, rank, world_size)


def fingerprint(folder):
    """data.fingerprint of all domains; keys are paths relative to the folder."""
    found = {name: data.fingerprint(part) for name, part in domains(folder).items()}
    return {(Path(name) / shard).as_posix(): value for name, shards in found.items() for shard, value in shards.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class MixtureBatch(NamedTuple):
    """data.Batch with the domain of each row."""

    inputs_BT: Tensor
    targets_BT: Tensor
    first_row: int  # validation: within the domain's split
    domain_B: Tensor  # int64, index into domains()


class MixtureLoader(data.Loader):
    """data.Loader over all domains of a mixture; `mix` sets their shares.

    Rows of one domain come in an order of their own, epoch after epoch. Raises UserError as data.Loader does, for an
    invalid mix, and if the limits of epochs allow fewer than `steps` steps."""

    def __init__(self, folder, split="train", *, mix, steps=0, **options):
        self.mix, self.steps = mix, steps  # the base class opens the shards, which needs both
        super().__init__(folder, split, **options)

    def _open(self, folder, split, vocab_size):  # called by the base class
        parts = domains(folder)
        self.rows_D = [ShardRows(part, split, self.seq_len, vocab_size, tails=False) for part in parts.values()]
        for rows in self.rows_D:
            rows.require(self.batch_rows if len(parts) == 1 else 1)
        self.row_counts = [rows.total for rows in self.rows_D]
        token_counts = [sum(len(tokens) for _, tokens in rows.shards) for rows in self.rows_D]
        self.mixture = Mixture(self.mix, list(parts), self.row_counts, token_counts, self.batch_rows)
        self.mixture.extend_to(max(0, self.steps * self.batch_rows - 1))

    def _read_batch(self, number_N, first_row):
        domain_N, nth_N = self.mixture.assign(number_N)
        inputs, targets = np.empty((2, len(number_N), self.seq_len), np.int64)
        for d in np.unique(domain_N):
            own = domain_N == d
            seed = (self.seed + int(d) * 0x9E3779B97F4A7C15) % 2**64
            inputs[own], targets[own] = self.rows_D[d].read_shuffled(nth_N[own], seed)
        return MixtureBatch(torch.from_numpy(inputs), torch.from_numpy(targets), first_row, torch.from_numpy(domain_N))


def mixture_validation_batches(folder, *, max_tokens=None, device="cpu", **options):
    """Generator of MixtureBatch: data.validation_batches of each domain in turn, each with an equal part of max_tokens.

    Raises UserError at the call if a domain has no validation row, or its part of max_tokens is below seq_len."""
    parts = domains(folder)
    share = None if max_tokens is None else max_tokens // len(parts)
    if len(parts) > 1 and share is not None and share < options["seq_len"]:
        legal = f"at least {options['seq_len']} for each of {len(parts)} domains: raise --val_tokens or --routes_tokens"
        raise UserError(f"{max_tokens} validation tokens are too few; it must be {legal}")
    streams = [data.validation_batches(part, max_tokens=share, device=device, **options) for part in parts.values()]
    label = lambda batch, d: MixtureBatch(*batch, torch.full((len(batch.inputs_BT),), d, device=device))
    return (label(batch, d) for d, stream in enumerate(streams) for batch in stream)


# ---------------------------------------------------------------------------------------------------------------------
# The order of domains


class Mix(NamedTuple):
    """Shares of the domains in training."""

    weights: str = ""  # name=number,...; domains that are not named get 0; "": in proportion to their tokens
    temperature: float = 1.0  # shares are weights ** (1 / temperature): 1: unchanged; towards infinity: uniform
    epochs: str = ""  # limit of passes over a domain: a number for all, or name=number,...; "": no limit
    round_robin_steps: int = 0  # first steps, whose batches have one domain each, in turn; later batches mix all


PERIOD = 4096  # rows after which the order of domains repeats; shares are exact to less than one row in it


class Mixture:
    """Domain of each row of the training stream, and the row's number within its domain: functions of the row number.

    A domain drops out at its limit of epochs, and the others divide its share. Raises UserError for an invalid mix.

    Args:
        row_counts, token_counts: of each domain; the tokens are the default weights"""

    def __init__(self, mix, names, row_counts, token_counts, batch_rows):
        self.names, self.batch_rows = names, batch_rows
        weights = parse_numbers(mix.weights, names, "domain_weights")
        weight_D = np.array([weights.get(name, 0.0) for name in names] if weights else token_counts, float)
        if not 0 < mix.temperature < float("inf"):
            raise UserError(f"--domain_temperature is {mix.temperature}; it must be above 0")
        if weight_D.max() == 0:
            raise UserError(f"--domain_weights {mix.weights}: all are 0; give at least one domain some")
        with np.errstate(divide="ignore"):
            self.share_D = np.exp((np.log(weight_D) - np.log(weight_D.max())) / mix.temperature)
        self.share_D /= self.share_D.sum()

        epochs = parse_numbers(mix.epochs, names, "domain_epochs")
        limit = lambda name, rows: int(epochs[name] * rows) if name in epochs else None
        self.max_rows_D = [limit(name, rows) for name, rows in zip(names, row_counts)]
        self.round_robin_rows = mix.round_robin_steps * batch_rows
        self.segments = [self._next_segment(0, np.zeros(len(names), np.int64))]

    def assign(self, number_N):
        """(domain_N, nth_N): domain of each row, and the number of earlier rows of the same domain.

        Raises UserError if all domains have reached their limit."""
        self.extend_to(int(number_N.max()))
        domain_N, nth_N = np.empty((2, len(number_N)), np.int64)
        starts = [segment.start for segment in self.segments]
        segment_N = np.searchsorted(starts, number_N, "right") - 1
        for i in np.unique(segment_N):
            domain_N[segment_N == i], nth_N[segment_N == i] = self.segments[i].assign(number_N[segment_N == i])
        return domain_N, nth_N

    def extend_to(self, number):
        """Append segments up to row `number`. Raises UserError if all domains have reached their limit before it."""
        while self.segments[-1].stop is not None and self.segments[-1].stop <= number:
            last = self.segments[-1]
            self.segments.append(self._next_segment(last.stop, last.count_before(last.stop)))

    def _next_segment(self, start, before_D):
        in_turn = start < self.round_robin_rows
        needed = self.batch_rows if in_turn else 1
        has_rows = lambda d: self.max_rows_D[d] is None or self.max_rows_D[d] - before_D[d] >= needed
        left = [d for d, share in enumerate(self.share_D) if share > 0 and has_rows(d)]
        if not left and in_turn:  # no domain can fill a batch
            self.round_robin_rows = start
            return self._next_segment(start, before_D)
        if not left:
            mend = "allow more, prepare more text, or train for fewer steps"
            raise UserError(f"all domains have reached their --domain_epochs after {start} rows: {mend}")

        if in_turn:
            table = np.repeat(left, self.batch_rows)
        else:
            table = np.array(left)[interleave(self.share_D[left] / self.share_D[left].sum())]
        for d in set(left) - set(table.tolist()):
            share = f"{self.share_D[d]:.1e} of the mixture, less than one row in {PERIOD:,}"
            raise UserError(f"domain {self.names[d]} is {share}: give it more with --domain_weights, or 0")

        segment = Segment(start, table, before_D)
        limited = [d for d in left if self.max_rows_D[d] is not None]
        stops = [segment.find_row(d, self.max_rows_D[d] - before_D[d]) for d in limited]
        if in_turn:  # a domain drops out before a batch that it cannot fill
            stops = [stop // self.batch_rows * self.batch_rows for stop in stops] + [self.round_robin_rows]
        segment.stop = min(stops, default=None)
        return segment


class Segment:
    """Rows from `start` to `stop` (None: no end) whose domains repeat a table; before_D: earlier rows by domain."""

    def __init__(self, start, table, before_D):
        self.start, self.stop, self.table, self.before_D = start, None, table, before_D
        self.count_PD = np.cumsum(table[:, None] == np.arange(len(before_D)), axis=0)  # rows by domain up to each slot

    def assign(self, number_N):
        """As Mixture.assign, for rows of this segment."""
        repeats_N, slot_N = np.divmod(number_N - self.start, len(self.table))
        domain_N = self.table[slot_N]
        within_N = repeats_N * self.count_PD[-1, domain_N] + self.count_PD[slot_N, domain_N] - 1
        return domain_N, self.before_D[domain_N] + within_N

    def find_row(self, domain, nth):
        """Number of the domain's nth row in this segment, counted from 0. The table must contain the domain."""
        repeats, rest = divmod(nth, int(self.count_PD[-1, domain]))
        return self.start + repeats * len(self.table) + int(np.searchsorted(self.count_PD[:, domain], rest + 1))

    def count_before(self, number):
        """Rows of each domain before row `number`."""
        repeats, slot = divmod(number - self.start, len(self.table))
        return self.before_D + repeats * self.count_PD[-1] + (self.count_PD[slot - 1] if slot else 0)


def interleave(share_D):
    """(PERIOD,) domains in the given shares, evenly spaced: each slot takes the domain furthest behind its share."""
    if len(share_D) == 1:
        return np.zeros(1, np.int64)
    table, count_D = np.empty(PERIOD, np.int64), np.zeros(len(share_D))
    for slot in range(PERIOD):
        table[slot] = np.argmax(np.round(share_D * (slot + 1) - count_D, 9))  # rounded: a tie goes to the first domain
        count_D[table[slot]] += 1
    return table


def parse_numbers(text, names, flag):
    """{name: number} of "name=number,..."; a number alone applies to all names. Raises UserError naming the flag."""
    numbers = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, number = part.rpartition("=")
        if name and name not in names:
            legal = f"choose among {', '.join(names)}" if any(names) else "the data are a single domain; leave it out"
            raise UserError(f"--{flag} {text}: there is no domain {name!r}; {legal}")
        with as_data_error(f"--{flag} {text}: {part!r} is not a number at least 0, nor name=number", ValueError):
            if not 0 <= (value := float(number)) < float("inf"):
                raise ValueError
        numbers |= {name: value} if name else dict.fromkeys(names, value)
    return numbers
