"""Exceptions, warnings, and the checks of arguments.

    GpubatchError
    ├── ArgumentError (ValueError)           argument out of range; the message has its name, range and value
    │   ├── ShapeError                       mismatched shapes
    │   └── DataFormatError                  malformed file
    ├── UnknownArgumentError (TypeError)     unknown keyword argument; the message lists the known ones
    ├── DTypeError (TypeError)               unsupported type or element type
    ├── FormulaError (TypeError)             rule, activation or loss that cannot be traced
    ├── DeviceMismatchError (TypeError)      arrays on different devices, or on the wrong one
    ├── BackendUnavailableError (RuntimeError)   the requested device cannot be used
    ├── InsufficientMemoryError (MemoryError)    not even one sample fits
    ├── CheckpointError (OSError)            a checkpoint cannot be written
    ├── TransferError (OSError)              a file elsewhere cannot be read; the message has the URL and the byte
    ├── CaptureError (RuntimeError)          work that a CUDA graph cannot hold
    ├── InUseError (RuntimeError)            another thread trains the network
    ├── RankError (RuntimeError)             another process of the run has failed; the message says which and why
    └── NonFiniteError (ArithmeticError)     NaN or infinity in data, loss or gradient

    BackendFallbackWarning (UserWarning)     the CPU replaces an unusable device
    CaptureWarning (UserWarning)             captured steps differ from eager ones and are abandoned
    CheckpointWarning (UserWarning)          a corrupt checkpoint is skipped, or one was not written and the run goes on
    CompilerWarning (UserWarning)            NumPy runs a user's formula that could be compiled
    ConversionWarning (UserWarning)          a sparse matrix is copied, since its rows do not lie together
    EpochWarning (UserWarning)               a schedule by epoch stands still: nothing counts the epochs
    FewStepsWarning (UserWarning)            a run has hardly any steps
    IdleWarning (UserWarning)                a run has a learning rate of 0 in every step
    MicroBatchWarning (UserWarning)          memory ran out: batches are split from here on
    ResumeWarning (UserWarning)              a resumed run goes on with other hyper-parameters than it was saved with
    SkippedStepWarning (UserWarning)         a step is skipped: its loss or gradient is not finite
    TableWarning (UserWarning)               columns of a table are left out or hashed, or hold texts that are unknown
    TuningWarning (UserWarning)              saved algorithms of matrix products cannot be used here
    UnscaledWarning (UserWarning)            inputs are not prepared as those that the network was trained on

Each is also the built-in exception that a NumPy user expects.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


class GpubatchError(Exception):
    """Base class of gpubatch's exceptions."""


class ArgumentError(GpubatchError, ValueError):
    """An argument is outside its allowed range."""


class ShapeError(ArgumentError):
    """Two shapes do not match."""


class DataFormatError(ArgumentError):
    """A file does not have the expected format."""


class UnknownArgumentError(GpubatchError, TypeError):
    """The callee has no such keyword argument."""


class DTypeError(GpubatchError, TypeError):
    """An argument has an unsupported type, or an array an unsupported element type."""


class FormulaError(GpubatchError, TypeError):
    """A function declared as a formula cannot be traced."""


class DeviceMismatchError(GpubatchError, TypeError):
    """Arrays are on different devices, or an array is not on the required one."""


class BackendUnavailableError(GpubatchError, RuntimeError):
    """The requested device cannot be used; ``cause`` is one of ``CAUSES``, ``remedy`` says how to fix it."""

    CAUSES = ("not installed", "libraries missing", "driver too old", "no device")

    def __init__(self, message: str, cause: str, remedy: str) -> None:
        RuntimeError.__init__(self, f"{message} Remedy: {remedy}")
        self.message, self.cause, self.remedy = message, cause, remedy

    def __reduce__(self) -> Any:  # by its arguments: a pool of processes waits for ever for an error it cannot unpickle
        return type(self), (self.message, self.cause, self.remedy)


class InsufficientMemoryError(GpubatchError, MemoryError):
    """Memory does not hold even the smallest unit of work."""


class CheckpointError(GpubatchError, OSError):
    """A checkpoint cannot be written; earlier ones are intact."""


class TransferError(GpubatchError, OSError):
    """A file elsewhere cannot be read; the message has its URL without secrets, and from which byte on."""


class CaptureError(GpubatchError, RuntimeError):
    """A CUDA graph cannot hold this work."""


class InUseError(GpubatchError, RuntimeError):
    """Another thread trains the network meanwhile."""


class RankError(GpubatchError, RuntimeError):
    """Another process of a data-parallel run has failed, which ends this one, too."""


class NonFiniteError(GpubatchError, ArithmeticError):
    """NaN or infinity where a finite number is required."""


class BackendFallbackWarning(UserWarning):
    """The CPU replaces a device that cannot be used."""


class CaptureWarning(UserWarning):
    """Captured steps differ from eager ones; the run continues eagerly."""


class CheckpointWarning(UserWarning):
    """A torn or corrupt checkpoint is skipped, or one was not written and training continues."""


class CompilerWarning(UserWarning):
    """NumPy runs a formula of the user's own, because no compiler is found, or the one that is found fails."""


class ConversionWarning(UserWarning):
    """A sparse matrix is copied to one of rows (CSR), since its own rows do not lie together."""


class EpochWarning(UserWarning):
    """A schedule by epoch stands still: no batch is a loader's, and nobody assigns the optimizer's epoch."""


class FewStepsWarning(UserWarning):
    """A run has so few steps that hardly any network learns in them."""


class IdleWarning(UserWarning):
    """A run has a learning rate of 0 in every step."""


class MicroBatchWarning(UserWarning):
    """A training step ran out of memory: batches are split from here on, and their gradients accumulated."""


class ResumeWarning(UserWarning):
    """A resumed run goes on with other hyper-parameters than it was saved with."""


class SkippedStepWarning(UserWarning):
    """A training step is skipped because its loss or gradient is not finite."""


class TableWarning(UserWarning):
    """Columns of a table are left out or hashed without being told to, or hold texts that training rows had not."""


class TuningWarning(UserWarning):
    """Saved algorithms of matrix products cannot be used here; results may differ in the last bits."""


class UnscaledWarning(UserWarning):
    """Inputs are not prepared as those of training: far larger than what a Loader scaled, or by another Loader."""


def check_real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """``value`` as a Python float; it must be finite and between ``low`` and ``high``."""
    left = "(" if open_low or low == -math.inf else "["
    right = ")" if open_high or high == math.inf else "]"
    inside = f"{left}{low:g}, {high:g}{right}"
    if getattr(value, "shape", None) == () and not isinstance(value, numbers.Real):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise DTypeError(f"{name} must be a real number in {inside}, got {value!r} of type {type(value).__name__}")
    number = float(value)
    below = number <= low if open_low else number < low
    above = number >= high if open_high else number > high
    if not math.isfinite(number) or below or above:
        raise ArgumentError(f"{name} must be finite and in {inside}, got {number!r}")
    return number


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as a Python int; it must be between ``low`` and ``high``, both included."""
    inside = f">= {low}" if high is None else f"between {low} and {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise DTypeError(f"{name} must be an integer {inside}, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ArgumentError(f"{name} must be an integer {inside}, got {number}")
    return number


def check_bool(name: str, value: Any) -> bool:
    """``value`` as a Python bool; it must be True or False, NumPy's too."""
    if not isinstance(value, (bool, np.bool_)):
        raise DTypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """``value``, which must be one of ``choices``; the error lists them and suggests the nearest."""
    known = list(choices)
    if isinstance(value, str) and value in known:
        return value
    raise ArgumentError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}{nearest(value, known)}")


def check_known(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise UnknownArgumentError for the first keyword argument in ``given`` that ``owner`` does not take."""
    names = list(known)
    for name in given:
        if name not in names:
            raise UnknownArgumentError(f"{owner} takes {', '.join(names)}; got {name!r}{nearest(name, names)}")


def unexpected(path: Any, expected: Any, found: Any) -> DataFormatError:
    """What to raise for the file ``path``, which has something other than was expected."""
    return DataFormatError(f"{path}: expected {expected}, found {found}")


def needed(module: str, what: str, extra: str) -> Any:
    """The optional ``module``. Without it raises ArgumentError: ``what`` needs it, the ``extra`` of gpubatch has it."""
    try:
        return sys.modules.get(module) or importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ArgumentError(
            f"{what} needs {library}, which is not installed: pip install 'gpubatch[{extra}]'"
        ) from error


def suggesting(function: Function) -> Function:
    """A decorator: a keyword argument that the function does not have is told with the one that may be meant."""
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    owner = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def called(*given: Any, **named: Any) -> Any:
        if not named.keys() <= taken:
            check_known(owner, named, [name for name in names if name != "self"])
        return function(*given, **named)

    taken = frozenset(names)
    return called  # type: ignore[return-value]


def no_attribute(x: Any, name: str, elsewhere: Mapping[str, str]) -> str:
    """What to say of an attribute that the dataclass ``x`` does not have; ``elsewhere``: where others have it."""
    kind = type(x).__name__
    if name.startswith("__") or name not in elsewhere:
        known = [field.name for field in dataclasses.fields(x)]
        return f"a {kind} has {', '.join(known)}; got {name!r}{nearest(name, known)}"
    return f"a {kind} has no {name!r}: take {elsewhere[name]}"


# What other libraries call a thing that has another name here: arguments, devices, losses, first weights, what to
# watch, and the methods of callbacks.
ELSEWHERE = {
    elsewhere: name
    for name, others in {
        "lr": "learning_rate",
        "eps": "epsilon",
        "rho": "alpha beta2",
        "beta1": "betas",
        "mu": "momentum",
        "restore_best": "restore_best_weights",
        "cuda": "gpu cupy",
        "cpu": "numpy",
        "softmax_cross_entropy": "cross_entropy categorical_crossentropy sparse_categorical_crossentropy nll nll_loss",
        "sigmoid_cross_entropy": "bce binary_crossentropy binary_cross_entropy log_loss bce_with_logits",
        "mse": "mean_squared_error squared_error l2",
        "mae": "mean_absolute_error absolute_error l1",
        "huber": "smooth_l1",
        "sigmoid": "logistic",
        "he": "he_normal kaiming kaiming_normal",
        "he_uniform": "kaiming_uniform",
        "xavier": "glorot glorot_normal xavier_normal",
        "xavier_uniform": "glorot_uniform",
        "lecun": "lecun_normal",
        "validation_accuracy": "accuracy acc val_acc",
        "validation": "validation_data validation_split",
        "progress": "verbose",
        "weight": "sample_weight",
        "rate": "p",
        "outputs": "units out_features",
        "inputs": "in_features",
        "total": "T_max decay_steps",
        "every": "step_size",
        "Dense": "Linear FullyConnected",
        "Network": "Sequential",
        "mlp": "MLP",
        "BatchNorm": "BatchNorm1d BatchNormalization",
        "Loader": "DataLoader Dataset",
        "on_start": "on_train_begin on_train_start on_fit_start",
        "on_gradient": "on_before_optimizer_step",
        "on_step": "on_batch_end on_train_batch_end",
        "on_validation": "on_test_end on_validation_end on_validation_epoch_end",
        "on_epoch": "on_train_epoch_end",
        "on_end": "on_train_end on_fit_end",
    }.items()
    for elsewhere in others.split()
}


def nearest(value: Any, known: list[str]) -> str:
    """The end of a message: the name of ``known`` that may be meant, if any is like ``value``."""
    import difflib  # imported for error messages only

    if not isinstance(value, str):
        return ""
    meant = ELSEWHERE.get(value, ELSEWHERE.get(value.lower()))
    near = [meant] if meant in known else [name for name in known if name.strip().lower() == value.strip().lower()]
    near = near or difflib.get_close_matches(value, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
