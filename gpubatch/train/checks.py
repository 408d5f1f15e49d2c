"""Whether network, loader and optimizer fit together, and whether their steps can be captured."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubatch.backend import Array, CudaBackend
from gpubatch.errors import ArgumentError, DTypeError
from gpubatch.loader import Loader, epochs_of
from gpubatch.nn import Network, core_of, layers, losses
from gpubatch.optim import MASTER, Optimizer
from gpubatch.own import changed
from gpubatch.parallel import Ranks
from gpubatch.train.loss_scale import LossScale

# The arguments of fit, and how what is given in their place is made one.
REMEDIES = {
    Network: "gb.mlp([inputs, hidden, outputs]) makes one",
    Loader: "gb.Loader(X, Y) makes one, as in fit(net, gb.Loader(X, Y), opt)",
    Optimizer: "gb.Adam(net.parameters) makes one, with groups= where some parameters have settings of their own",
}


def check_parts(net: Network, loader: Loader, opt: Optimizer) -> None:
    """Raise unless the three have the right types and fit together; a loader without a dtype takes the network's."""
    for name, value, kind in (("net", net, Network), ("loader", loader, Loader), ("opt", opt, Optimizer)):
        if not isinstance(value, kind):
            what = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
            raise DTypeError(f"{name} must be a gpubatch.{kind.__name__}, got {what}: {REMEDIES[kind]}")
    if loader.backend != net.backend:
        raise ArgumentError(
            f"loader is on {loader.backend.spec!r}, net on {net.backend.spec!r}; give both one backend="
        )
    if loader.dtype != net.dtype and not epochs_of(loader).columns.dtype_is_given:
        epochs_of(loader).take_dtype(net.dtype)
    if loader.dtype != net.dtype:
        verb = "computes in" if net.loss_scale is None else "stores"
        raise ArgumentError(
            f"loader makes {loader.dtype} batches, net {verb} {net.dtype}; give the loader dtype={net.dtype.name!r}"
        )
    if not epochs_of(loader).columns.labelled:
        raise ArgumentError("loader must have labels: Loader(X, Y), this one has X alone")
    if epochs_of(loader).columns.weights is not None and not core_of(net).loss.takes_weights:
        raise ArgumentError(f"loader has weights, which the loss of net, {net.loss_name}, does not take")
    check_bound(net, opt)
    if net.dtype == np.float16 and MASTER not in opt.state:
        raise ArgumentError(
            "opt must keep the float16 parameters in float32, too, where small steps are not lost in rounding: make it "
            "with master_weights=True"
        )


def check_loader(loader: Loader, ranks: Ranks | None) -> None:
    """Raise unless a loader deals its batches to the ranks of the run."""
    if ranks is loader.ranks:
        return
    if ranks is None:
        raise ArgumentError(f"loader has {loader.ranks}, so fit needs them, too: fit(..., ranks=ranks)")
    if loader.ranks is None and not (ranks.size == 1 and loader.shards is not None):
        raise ArgumentError(
            "loader must deal its batches to the ranks of the run: make it with Loader(..., ranks=ranks)"
            + ("" if loader.world_size == 1 else " in place of rank= and world_size=")
        )
    if loader.ranks is not None and (loader.ranks.rank, loader.ranks.size) != (ranks.rank, ranks.size):
        raise ArgumentError(f"ranks must be those of the loader, {loader.ranks}, got {ranks}")


def check_last_batch(net: Network, loader: Loader) -> None:
    """Raise if an epoch would end with a batch that is too small for batch norm."""
    epochs, least = epochs_of(loader), core_of(net).least_rows
    in_parts = loader.shards is not None and not core_of(net).in_sync
    fewest = epochs.smallest if in_parts else min(epochs.rows_of(0), epochs.rows_of(len(epochs) - 1))
    if fewest >= least:
        return
    layer = next(type(run.layer).__name__ for run in core_of(net).layers if run.needs.least_rows == least)
    which = "'single'" if fewest == 1 else "True"
    batches = f"{epochs.order.share} samples in batches of {loader.batch_size}"
    remedy = f"take another batch_size, or leave out that batch with Loader(drop_last={which})"
    if loader.batch_size < least or epochs.order.share < least:  # no batch is large enough
        remedy = f"take a batch_size of at least {least}" if epochs.order.share >= least else "there are too few"
    if not in_parts:
        raise ArgumentError(
            f"{layer} needs {least} samples in a training batch, the last one of an epoch has {fewest}: "
            f"{batches}; {remedy}"
        )
    raise ArgumentError(
        f"{layer} needs {least} samples in each part of a training batch, and one has {fewest}: {batches} of "
        f"{loader.shards} parts; {remedy}, or fewer shards"
    )


def drop_last_for(net: Network) -> bool | str:
    """The loader's ``drop_last`` where nobody chose it: a network that cannot take a single sample leaves it out."""
    return "single" if core_of(net).least_rows > 1 else False


def loader_for(net: Network, X: Array, Y: Array, batch_size: int, seed: int, weight: Array | None = None) -> Loader:
    """Batches of arrays that ``net`` takes as they are, none too small for it."""
    where, drop_last = net.backend, drop_last_for(net)
    return Loader(X, Y, batch_size, seed=seed, drop_last=drop_last, backend=where, dtype=net.dtype, weight=weight)


def scale_for(net: Network, loss_scale: LossScale | None) -> LossScale | None:
    """The loss scale of a mixed network, by default a new one; None for another network."""
    if loss_scale is not None and not isinstance(loss_scale, LossScale):
        raise DTypeError(f"loss_scale must be a gpubatch.LossScale, got {type(loss_scale).__name__}")
    if loss_scale is not None and net.loss_scale is None:
        raise ArgumentError(f"loss_scale is for a network with precision='mixed', this one has {net.precision!r}")
    return None if net.loss_scale is None else loss_scale or LossScale()


# A graph replaces every method that a step calls. If a user has overridden one of them, steps are eager, so that it is
# called as often as on a CPU. These are the methods that no step calls.
APART = frozenset(
    "__copy__ __deepcopy__ __init__ __init_subclass__ __reduce__ __repr__ accuracy evaluate groups hyper "
    "load_state_dict memory memory_parts predict scores set_group state_dict to_batch "
    "_common_dtype _loaded_state".split()
)


def why_eager(net: Network, *others: Any) -> str:
    """Why the steps of ``net`` cannot be captured, in words; empty if they can.

    ``others`` also take part in the steps, such as optimizer and loader.
    """
    if not isinstance(net.backend, CudaBackend):
        return f"graphs are for a GPU, the network is on {net.backend.spec!r}"
    products = core_of(net).products
    if not products.capturable:
        return products.reason
    for i, layer in enumerate(net.layers):
        if type(layer).__module__ != layers.__name__:
            return f"layer {i + 1} ({type(layer).__name__}) is not one of gpubatch's, so it may do what a graph cannot"
    if core_of(net).in_sync:
        return "BatchNorm(sync=True) sums over ranks in the middle of a step, which a graph does not hold"
    if type(net.loss_function).__module__ != losses.__name__:
        return (
            f"the loss ({type(net.loss_function).__name__}) is not one of gpubatch's, so it may do what a graph cannot"
        )
    found = (changed(x, APART) for x in (net, *net.layers, net.loss_function, *others))
    return next((f"{name} is not gpubatch's own" for name in found if name), "")


def check_bound(net: Network, opt: Optimizer) -> None:
    """Raise unless ``opt`` updates the parameters of ``net``."""
    if any(opt.params.get(name) is not p for name, p in net.parameters.items()):
        raise ArgumentError(
            "opt must be bound to net.parameters, this one is bound to other arrays: make it with net.parameters; "
            "groups={'W1': {'trainable': False}} leaves some of them as they are"
        )
