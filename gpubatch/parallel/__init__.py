"""The processes of a data-parallel run, and what they do together: :class:`Ranks` over an engine, such as MPI."""

from gpubatch.parallel.launchers import launched, launched_rank
from gpubatch.parallel.ranks import Ranks, check_ranks

__all__ = ["Ranks", "check_ranks", "launched", "launched_rank"]
