"""What a tab key shows: the exact public names of the objects that users hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpubatch as gb


def public(x: Any) -> set[str]:
    return {name for name in dir(x) if not name.startswith("_")}


NETWORK = """
    layers loss_function loss_name l2 backend dtype seed precision tune
    inputs outputs compute_dtype parameters buffers loss_scale forms
    loss_and_grad step_loss loss evaluate scores predict accuracy probabilities sample_losses summary
    memory memory_parts reserve state_dict load_state_dict
"""
OPTIMIZER = """
    rule backend params state hyper groups set_group frozen lr form t epoch step memory memory_parts
    state_dict load_state_dict
"""
LOADER = """
    at_most augment backend batch_size drop_last dtype feed prefetch prepare rank ranks replacement sample_axis scale
    seed shards shuffle transform window world_size block epoch feeding load_state_dict n_samples order plan state_dict
    stats to_batch
"""


def network() -> gb.Network:
    net = gb.mlp([4, 3, 2], backend="cpu", l2=0.1)
    net.loss_and_grad(np.zeros((5, 4), np.float32), np.zeros(5, int))
    return net


def loader() -> gb.Loader:
    made = gb.Loader(np.zeros((5, 4), np.uint8), np.zeros(5, int), batch_size=2, backend="cpu")
    assert len(list(made)) == 3
    return made


# An object after its first use, and its names.
SURFACES = {
    "Network": (network, NETWORK),
    "mixed Network": (lambda: gb.mlp([4, 3, 2], backend="cpu", precision="mixed"), NETWORK),
    "Optimizer": (lambda: gb.Optimizer(gb.rules.sgd, [np.zeros(3)], lr=0.1), OPTIMIZER),
    "Adam": (lambda: gb.Adam([np.zeros(3)]), OPTIMIZER),
    "Loader": (loader, LOADER),
}


@pytest.mark.parametrize(("make", "names"), SURFACES.values(), ids=SURFACES)
def test_a_tab_key_shows_what_is_documented(make: Any, names: str) -> None:
    x = make()
    assert public(x) == set(names.split())


@pytest.mark.parametrize(("make", "names"), SURFACES.values(), ids=SURFACES)
def test_what_it_shows_says_what_it_is(make: Any, names: str) -> None:
    kind = type(make())
    methods = [name for name in names.split() if name in dir(kind)]
    assert [name for name in methods if not getattr(kind, name).__doc__] == []
