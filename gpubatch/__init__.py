"""Train models by mini-batches on NumPy or CuPy arrays.

Update rules are formulas that are written once, batches are sized to fit, and a training step allocates nothing. The
same code runs with ``backend="cuda"`` on a GPU and ``backend="cpu"`` in a test.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Every public name and the module that has it, which is imported when the name is first used: so importing gpubatch
# costs nothing worth mentioning, whatever it grows to.
EXPORTS = {
    "averages": "EWMA ewma",
    "backend": "Backend Memory array_namespace available_backends get_backend",
    "checkpoint": "Checkpoints",
    "errors": """
        ArgumentError BackendFallbackWarning BackendUnavailableError CaptureError CaptureWarning CheckpointError
        CheckpointWarning CompilerWarning ConversionWarning DTypeError DataFormatError DeviceMismatchError EpochWarning
        FewStepsWarning FormulaError GpubatchError IdleWarning InUseError InsufficientMemoryError MicroBatchWarning
        NonFiniteError RankError ResumeWarning ShapeError SkippedStepWarning TableWarning TransferError
        TuningWarning UnknownArgumentError UnscaledWarning
    """,
    "explore": """
        GradientCheck batch_size_sweep gradient_check loss_slice numerical_gradient random_local_search
        random_search step_size_sweep
    """,
    "formula": "activation max_abs mean norm normal_cdf rule rules score_loss",
    "loader": "Loader Standardize WeightedOrder",
    "model": "Model export_onnx load save",
    "nn": """
        GELU SVM BatchNorm Context CrammerSinger Dense Dropout Elementwise KLDivergence Layer LeakyReLU Loss Needs
        Network Parameter ReLU Sigmoid SigmoidCrossEntropy SoftmaxCrossEntropy SoftmaxFocal Step Tanh losses mlp
        no_decay
    """,
    "optim": """
        LAMB LARS SGD AdaBelief Adadelta Adagrad Adam AdamW Adamax HeavyBall Lion Momentum NAdam Optimizer RAdam RMSProp
        StepResult Yogi clip_by_global_norm
    """,
    "parallel": "Ranks",
    "params": "Parameters",
    "schedules": """
        CosineDecay CosineRestarts Cyclic ExponentialDecay InverseTimeDecay LinearDecay OneCycle Piecewise
        PolynomialDecay SqrtDecay StepDecay chain product
    """,
    "tables": "Table read_table",
    "sizing": "BatchPlan choose_batch_size find_batch_size",
    "train": """
        BestWeights CSVLog CapturedStep ClipByValue EarlyStopping GradientNoise History Logging LossScale
        ReduceOnPlateau StopTraining TensorBoard TrainingInterrupted TrainingState TrainingTerminated WeightAverage fit
    """,
}
MODULES = tuple(
    """
    averages backend checkpoint datasets errors explore formula launch loader metrics model nn
    optim parallel params plot schedules sizing sklearn sources tables torch train
    """.split()
)
HOMES = {name: module for module, names in EXPORTS.items() for name in names.split()}

__all__ = [*HOMES, "datasets", "explore", "metrics", "plot"]

if TYPE_CHECKING:  # the same once more, for type checkers
    from gpubatch import datasets as datasets, explore as explore, metrics as metrics, plot as plot
    from gpubatch.averages import EWMA as EWMA, ewma as ewma
    from gpubatch.backend import (
        Backend as Backend,
        Memory as Memory,
        array_namespace as array_namespace,
        available_backends as available_backends,
        get_backend as get_backend,
    )
    from gpubatch.checkpoint import Checkpoints as Checkpoints
    from gpubatch.errors import (
        ArgumentError as ArgumentError,
        BackendFallbackWarning as BackendFallbackWarning,
        BackendUnavailableError as BackendUnavailableError,
        CaptureError as CaptureError,
        CaptureWarning as CaptureWarning,
        CheckpointError as CheckpointError,
        CheckpointWarning as CheckpointWarning,
        CompilerWarning as CompilerWarning,
        ConversionWarning as ConversionWarning,
        DataFormatError as DataFormatError,
        DeviceMismatchError as DeviceMismatchError,
        DTypeError as DTypeError,
        EpochWarning as EpochWarning,
        FewStepsWarning as FewStepsWarning,
        FormulaError as FormulaError,
        GpubatchError as GpubatchError,
        IdleWarning as IdleWarning,
        InsufficientMemoryError as InsufficientMemoryError,
        InUseError as InUseError,
        MicroBatchWarning as MicroBatchWarning,
        NonFiniteError as NonFiniteError,
        RankError as RankError,
        ResumeWarning as ResumeWarning,
        ShapeError as ShapeError,
        SkippedStepWarning as SkippedStepWarning,
        TableWarning as TableWarning,
        TransferError as TransferError,
        TuningWarning as TuningWarning,
        UnknownArgumentError as UnknownArgumentError,
        UnscaledWarning as UnscaledWarning,
    )
    from gpubatch.explore import (
        GradientCheck as GradientCheck,
        batch_size_sweep as batch_size_sweep,
        gradient_check as gradient_check,
        loss_slice as loss_slice,
        numerical_gradient as numerical_gradient,
        random_local_search as random_local_search,
        random_search as random_search,
        step_size_sweep as step_size_sweep,
    )
    from gpubatch.formula import (
        activation as activation,
        max_abs as max_abs,
        mean as mean,
        norm as norm,
        normal_cdf as normal_cdf,
        rule as rule,
        rules as rules,
        score_loss as score_loss,
    )
    from gpubatch.loader import Loader as Loader, Standardize as Standardize, WeightedOrder as WeightedOrder
    from gpubatch.model import Model as Model, export_onnx as export_onnx, load as load, save as save
    from gpubatch.nn import (
        GELU as GELU,
        SVM as SVM,
        BatchNorm as BatchNorm,
        Context as Context,
        CrammerSinger as CrammerSinger,
        Dense as Dense,
        Dropout as Dropout,
        Elementwise as Elementwise,
        KLDivergence as KLDivergence,
        Layer as Layer,
        LeakyReLU as LeakyReLU,
        Loss as Loss,
        Needs as Needs,
        Network as Network,
        Parameter as Parameter,
        ReLU as ReLU,
        Sigmoid as Sigmoid,
        SigmoidCrossEntropy as SigmoidCrossEntropy,
        SoftmaxCrossEntropy as SoftmaxCrossEntropy,
        SoftmaxFocal as SoftmaxFocal,
        Step as Step,
        Tanh as Tanh,
        losses as losses,
        mlp as mlp,
        no_decay as no_decay,
    )
    from gpubatch.optim import (
        LAMB as LAMB,
        LARS as LARS,
        SGD as SGD,
        AdaBelief as AdaBelief,
        Adadelta as Adadelta,
        Adagrad as Adagrad,
        Adam as Adam,
        Adamax as Adamax,
        AdamW as AdamW,
        HeavyBall as HeavyBall,
        Lion as Lion,
        Momentum as Momentum,
        NAdam as NAdam,
        Optimizer as Optimizer,
        RAdam as RAdam,
        RMSProp as RMSProp,
        StepResult as StepResult,
        Yogi as Yogi,
        clip_by_global_norm as clip_by_global_norm,
    )
    from gpubatch.parallel import Ranks as Ranks
    from gpubatch.params import Parameters as Parameters
    from gpubatch.schedules import (
        CosineDecay as CosineDecay,
        CosineRestarts as CosineRestarts,
        Cyclic as Cyclic,
        ExponentialDecay as ExponentialDecay,
        InverseTimeDecay as InverseTimeDecay,
        LinearDecay as LinearDecay,
        OneCycle as OneCycle,
        Piecewise as Piecewise,
        PolynomialDecay as PolynomialDecay,
        SqrtDecay as SqrtDecay,
        StepDecay as StepDecay,
        chain as chain,
        product as product,
    )
    from gpubatch.sizing import (
        BatchPlan as BatchPlan,
        choose_batch_size as choose_batch_size,
        find_batch_size as find_batch_size,
    )
    from gpubatch.tables import Table as Table, read_table as read_table
    from gpubatch.train import (
        BestWeights as BestWeights,
        CapturedStep as CapturedStep,
        ClipByValue as ClipByValue,
        CSVLog as CSVLog,
        EarlyStopping as EarlyStopping,
        GradientNoise as GradientNoise,
        History as History,
        Logging as Logging,
        LossScale as LossScale,
        ReduceOnPlateau as ReduceOnPlateau,
        StopTraining as StopTraining,
        TensorBoard as TensorBoard,
        TrainingInterrupted as TrainingInterrupted,
        TrainingState as TrainingState,
        TrainingTerminated as TrainingTerminated,
        WeightAverage as WeightAverage,
        fit as fit,
    )


if not TYPE_CHECKING:  # a type checker would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name in MODULES:
            return importlib.import_module(f"gpubatch.{name}")
        if name not in HOMES:
            from gpubatch.errors import nearest

            raise AttributeError(f"module 'gpubatch' has no attribute {name!r}{nearest(name, __all__)}")
        value = globals()[name] = getattr(importlib.import_module(f"gpubatch.{HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
