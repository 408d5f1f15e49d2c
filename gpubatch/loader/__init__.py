"""How samples become batches: their order, the columns of a batch, the ways to a backend, and the loader.

:class:`Loader` is for users; :func:`epochs_of` a loader and :func:`rows_of` it are for training.
"""

from gpubatch.loader.columns import Columns, captured_dtype
from gpubatch.loader.deals import SHARDS
from gpubatch.loader.device import DeviceFeed
from gpubatch.loader.elsewhere import columns_like, converted
from gpubatch.loader.epochs import Epochs
from gpubatch.loader.feeds import LoaderStats
from gpubatch.loader.loader import Loader, epochs_of, rows_of
from gpubatch.loader.order import WeightedOrder, epoch_order, split
from gpubatch.loader.standardize import Standardize

__all__ = [
    "SHARDS",
    "Columns",
    "DeviceFeed",
    "Epochs",
    "Loader",
    "LoaderStats",
    "Standardize",
    "WeightedOrder",
    "captured_dtype",
    "columns_like",
    "converted",
    "epoch_order",
    "epochs_of",
    "rows_of",
    "split",
]
