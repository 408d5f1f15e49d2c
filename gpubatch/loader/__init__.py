"""How samples become batches: their order, the columns of a batch, and how they get to a device."""

from gpubatch.loader.feeding import DeviceFeed, needed
from gpubatch.loader.loader import Loader, LoaderStats
from gpubatch.loader.order import WindowOrder, epoch_order

__all__ = ["DeviceFeed", "Loader", "LoaderStats", "WindowOrder", "epoch_order", "needed"]
