"""Marks for tests that `pytest --slow` runs and plain `pytest` leaves out."""

import pytest


def slow(value):
    """A value of a parametrization, or a tuple of them, for a slow test."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def all_but(fast, values) -> list:
    """Values of a parametrization; the test is slow for all but those in `fast`."""
    return [value if value in fast else slow(value) for value in values]


def but_every(n: int, values) -> list:
    """Values of a parametrization; the test is slow for all but the first and every n-th after it."""
    return [slow(value) if i % n else value for i, value in enumerate(values)]
