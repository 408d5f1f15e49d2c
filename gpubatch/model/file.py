"""Model files: a network, its preparation and its class names in one safetensors file.

The tensors are the network's parameters and buffers, ``parameters.W1``, ``buffers.running_mean1``, as gpubatch names
them, and arrays among the arguments of its layers. The metadata of the header, text by name, are

    format      "gpubatch model"
    version     of the format, "1"; a reader refuses a later one
    model       JSON: {"network": {...}, "preparation": {...} or null, "classes": [...] or null, "columns": {...}}
    digest      the SHA-256 of "model" and of all tensors, in the order of their names
    versions    JSON: those of gpubatch, NumPy and Python that wrote the file

"network" has layers and loss as :mod:`gpubatch.model.describe` has them, the l2 weight, dtype, precision, seed, tune
and dropout_step. "preparation" has what becomes of raw samples before they go to the network (:class:`Preparation`). Of
a table it also has the columns by name and kind, whose numbers are the float64 tensors ``table.median``,
``table.mean`` and ``table.deviation``, one for each column of numbers; and which rows it was trained on. "columns" are
the names of those of the frames that it was trained on, or null.
Nothing in a file is executed: formulas are recorded from their text, classes are looked up among those that there are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpubatch.backend import Backend
from gpubatch.checkpoint import HEADER_LIMIT, open_tensors, versions, write_tensors
from gpubatch.errors import ArgumentError, DataFormatError, DTypeError, GpubatchError, check_int
from gpubatch.inputs import ColumnNames
from gpubatch.model.describe import Decoder, Encoder, differences
from gpubatch.model.preparation import Preparation
from gpubatch.nn import Network, core_of, parameter_names, stacked

FORMAT, VERSION = "gpubatch model", 1
# What a network's description has, besides its dropout_step.
NETWORK: dict[str, Any] = {
    "layers": list,
    "loss": dict,
    "l2": (int, float),
    "dtype": str,
    "precision": str,
    "seed": int,
    "tune": bool,
}


def check_path(path: Any, suffix: str = ".safetensors") -> Path:
    """``path``, which must end in ``suffix``."""
    if not isinstance(path, (str, os.PathLike)):
        raise DTypeError(f"path must be a path, got {path!r}")
    if Path(path).suffix != suffix:
        raise ArgumentError(f"path must end in {suffix}, got {str(path)!r}")
    return Path(os.path.expanduser(path))


def check_writable(path: Any) -> None:
    """Raise OSError unless a model can be saved as ``path``."""
    target = Path(os.path.realpath(check_path(path)))
    if target.is_dir():
        raise IsADirectoryError(f"a model cannot be saved as {path}: it is a folder")
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise type(error)(f"a model cannot be saved as {path}: {error.strerror}") from error


def describe(net: Network, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A network as JSON, without its parameters; arrays among the arguments of its layers go to ``arrays``."""
    write = Encoder(net.compute_dtype, arrays)
    return {
        "layers": [write.layer(layer, place) for place, layer in enumerate(net.layers)],
        "loss": write.loss(net.loss_function),
        "l2": net.l2,
        "dtype": net.compute_dtype.name,
        "precision": net.precision,
        "seed": net.seed,
        "tune": net.tune,
    }


def write_file(
    path: Path, net: Network, preparation: Preparation | None, classes: list[Any] | None, columns: ColumnNames
) -> None:
    """Write a model file, or leave what is there as it is."""
    arrays: dict[str, np.ndarray] = {}
    network = describe(net, arrays)
    _check_made_again(net, network, arrays)
    state = net.state_dict()
    for kind in ("parameters", "buffers"):
        for name, value in state[kind].items():
            arrays[f"{kind}.{name}"] = np.ascontiguousarray(net.backend.to_numpy(value))
    network["dropout_step"] = state["dropout_step"]
    if "products" in state:
        network["products"] = state["products"]
    ready = None if preparation is None else preparation.to_json(arrays)
    whole = {"network": network, "preparation": ready, "classes": classes, "columns": dataclasses.asdict(columns)}
    model = json.dumps(whole, allow_nan=False)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": model,
        "digest": digest_of(model, arrays),
        "versions": versions(),
    }
    length = sum(len(json.dumps(text)) for text in metadata.values()) + 256 * len(arrays)
    if length > HEADER_LIMIT:
        raise ArgumentError(f"the model needs a header of {length} bytes, more than {HEADER_LIMIT}")
    write_tensors(Path(os.path.realpath(path)), arrays, metadata)


def _check_made_again(net: Network, network: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Raise unless what a file will say makes the same layers and loss: a constructor may change its arguments."""
    read = Decoder(
        "the file", net.compute_dtype, arrays.__getitem__, [type(x) for x in (*net.layers, net.loss_function)]
    )
    write = Encoder(net.compute_dtype, {})
    layers = [write.layer(read.layer(found, i), i) for i, found in enumerate(network["layers"])]
    again = {**network, "layers": layers, "loss": write.loss(read.loss(network["loss"]))}
    if found := differences(parts_of(network), parts_of(again)):
        raise ArgumentError(
            f"the model cannot be saved: made again by its constructor, {found[0].replace(' in the file', ' now')}; "
            "an attribute must hold what the constructor was given"
        )


def digest_of(model: str, arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of the description and of all arrays, which shows damage and changes."""
    found = hashlib.sha256(model.encode())
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype.name} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def read_file(
    path: Path, backend: str | Backend, custom: Iterable[Any] | Mapping[str, Any], into: Network | None
) -> tuple[Network, Preparation | None, list[Any] | None, dict[str, str]]:
    """The network of a file, or ``into`` with the file's parameters; the preparation, the classes and the versions."""
    with open_tensors(path, HEADER_LIMIT, "a model file") as content:
        metadata = content.metadata() or {}
        _check_format(path, metadata)
        model = json.loads(metadata["model"])
        if not isinstance(model, dict) or not isinstance(network := model.get("network"), dict):
            raise DataFormatError(f"{path} is damaged: it describes no network")
        for key, kind in NETWORK.items():
            if not isinstance(network.get(key), kind):
                raise DataFormatError(f"{path} is damaged: {key} of its network is {str(network.get(key))[:99]}")
        if network["dtype"] not in ("float32", "float64"):
            raise DataFormatError(f"{path} is damaged: its network has the dtype {network['dtype']!r}")
        read = Decoder(path, np.dtype(network["dtype"]), content.get_tensor, custom)
        layers = [read.layer(found, place) for place, found in enumerate(network["layers"])]
        loss = read.loss(network["loss"])
        names = _check_arrays(path, layers, content)
        arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  no mapping
        if digest_of(metadata["model"], arrays) != metadata["digest"]:
            raise DataFormatError(f"{path} is damaged or was changed: its contents do not match their digest")
        preparation, classes = None, _checked_classes(path, model.get("classes"))
        if model.get("preparation") is not None:
            preparation = Preparation.from_json(model["preparation"], path, arrays, read.custom, classes)
        columns = _checked_columns(path, model.get("columns"))
        if into is None:
            options = network["l2"], backend, network["dtype"], network["seed"], network["precision"], network["tune"]
            net = Network(layers, loss, *options)
        else:
            net = into
            if len(layers) != len(net.layers):
                raise ArgumentError(f"{path} is of another network, of {len(layers)} layers, not {len(net.layers)}")
            if found := differences(parts_of(network), parts_of(describe(net, {}))):
                raise ArgumentError(f"{path} is of another network: {'; '.join(found[:3])}")
        step = check_int("dropout_step", network.get("dropout_step"), 0)
        state = {kind: {name: arrays[f"{kind}.{name}"] for name in names[kind]} for kind in names}
        more = {"products": network["products"]} if "products" in network else {}
        net.load_state_dict({**state, "dropout_step": step, **more})
        core_of(net).batches.columns = columns
        written = json.loads(metadata["versions"])
        return net, preparation, classes, written


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise unless this gpubatch reads such files."""
    if metadata.get("format") != FORMAT:
        hint = " It is a checkpoint: load it with Checkpoints(folder).newest()." if "state" in metadata else ""
        raise DataFormatError(f"{path} is no file that gb.save wrote.{hint}")
    version = metadata["version"]
    if not version.isdecimal() or len(version) > 9:
        raise DataFormatError(f"{path} is damaged: the version of its format is {version[:99]!r}")
    if int(version) != VERSION:
        raise DataFormatError(
            f"{path} has version {version} of the format, this gpubatch reads version {VERSION}: install a later one; "
            f"it was written by {metadata.get('versions', 'an unknown one')[:200]}"
        )


def _check_arrays(path: Path, layers: list[Any], content: Any) -> dict[str, list[str]]:
    """Raise unless the file has the arrays that its layers need; before anything of their size is allocated.

    Returns the names of parameters and of buffers.
    """
    try:
        stack = stacked(layers)
        names = parameter_names(stack)
    except GpubatchError as error:
        raise DataFormatError(f"{path}: its layers do not fit together: {error}") from error
    found: dict[str, list[str]] = {"parameters": [], "buffers": []}
    there = set(content.keys())
    for run, own in zip(stack, names, strict=True):
        for kind, wanted in (("parameters", run.needs.parameters), ("buffers", run.needs.buffers)):
            for name, parameter in wanted.items():
                full = f"{kind}.{own[name]}"
                if full not in there:
                    raise DataFormatError(f"{path}: {full}, of layer {run.place + 1}, is missing")
                shape = tuple(content.get_slice(full).get_shape())
                if shape != tuple(parameter.shape):
                    raise DataFormatError(
                        f"{path}: {full} has shape {shape}, layer {run.place + 1} needs {tuple(parameter.shape)}"
                    )
                found[kind].append(own[name])
    known = {f"{kind}.{name}" for kind in found for name in found[kind]}
    if more := sorted(name for name in there - known if name.startswith(("parameters.", "buffers."))):
        raise DataFormatError(f"{path}: {more[0]} belongs to none of its layers")
    return found


def _checked_classes(path: Path, classes: Any) -> list[Any] | None:
    if classes is not None and not (isinstance(classes, list) and all(isinstance(x, (str, int)) for x in classes)):
        raise DataFormatError(f"{path} is damaged: its class names are {str(classes)[:99]}")
    return classes


def _checked_columns(path: Path, found: Any) -> ColumnNames:
    """The names of the columns of frames, which files of before these were kept do not have."""
    try:
        return ColumnNames() if found is None else ColumnNames.from_json(found)
    except (DTypeError, TypeError, LookupError) as error:
        raise DataFormatError(f"{path} is damaged: the names of its columns: {error}") from error


def parts_of(network: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a description that networks with the same parameters share, by their names in messages."""
    layers = {f"layer {place + 1}": layer for place, layer in enumerate(network["layers"])}
    return {**layers, "loss": network["loss"], "l2": network["l2"]}
