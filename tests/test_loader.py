"""Batches: their order against a Philox written from the paper, their values against float64, their threads counted."""

from __future__ import annotations

import gc
import itertools
import json
import re
import threading
import traceback

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpubatch.loader
from gpubatch.backend import Memory, get_backend
from gpubatch.errors import ArgumentError, DeviceMismatchError, DTypeError, NonFiniteError, ShapeError
from gpubatch.loader import Loader, epoch_order

CPU = get_backend("cpu")


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "gpubatch-loader"]


@pytest.fixture(params=[False, True], ids=["in the caller", "in a thread"])
def threaded(request, monkeypatch):
    """Whether a thread prepares the batches, however small they are."""
    monkeypatch.setattr(gpubatch.loader, "WORTH_A_THREAD", 0 if request.param else 1 << 60)
    return request.param


# --- the order of an epoch ------------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x64-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011)."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    word = 2**64
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x0, word)
        high1, low1 = divmod(0xCA5A826395121157 * x2, word)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % word, (k1 + 0xBB67AE8584CAA73B) % word
    return x0, x1, x2, x3


def random_words(n, seed, epoch):
    blocks = (philox((block, 0, 0, 0), (seed, epoch)) for block in itertools.count(1))  # NumPy counts from 1
    return list(itertools.islice(itertools.chain.from_iterable(blocks), n))


def test_philox_gives_the_published_vectors():  # Random123, examples/kat_vectors
    assert philox((0, 0, 0, 0), (0, 0)) == (
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    )
    ones = 2**64 - 1
    assert philox((ones,) * 4, (ones, ones)) == (
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    )


GOLDEN = {(12, 0, 0): None, (12, 0, 1): None, (12, 7, 0): None, (5, 2**64 - 1, 3): None}
