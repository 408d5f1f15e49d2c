"""The processes of a data-parallel run, and what they do together: :class:`Ranks` over an engine, such as MPI."""

from gpubatch.parallel.launchers import launched as launched, launched_rank as launched_rank
from gpubatch.parallel.ranks import Ranks as Ranks, check_ranks as check_ranks, first_of as first_of
