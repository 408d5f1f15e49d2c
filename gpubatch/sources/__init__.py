"""Where samples come from: arrays of the host or of a device, files, and anything else that is read by place.

Nothing ever writes to a source. :class:`~gpubatch.loader.Loader` takes arrays as they are, ``np.memmap`` too, which it
does not copy, and whose floats it checks as it reads them. Files that may be larger than memory are opened here:
:func:`npy`, :func:`npz`, :func:`raw`, :func:`idx`, :func:`cifar10`, :func:`parquet`, :func:`arrow`, :func:`hdf5`.
:func:`files` opens a folder, a list or a pattern of such files as one source, and the loader opens the paths that it is
given. It also takes arrays that are read by slices, such as those of zarr, h5py and netCDF4, and sparse matrices of
SciPy. Anything else must be a :class:`Source`.
"""

from gpubatch.sources.arrays import (
    ArraySource,
    check_finite,
    check_rows,
    contiguous,
    convert,
    holds_all,
    is_mapped,
    largest_stored,
    turned,
)
from gpubatch.sources.given import as_source, is_read
from gpubatch.sources.opener import BytesByPlace, LocalFile, Opener, Reopened, opener_of
from gpubatch.sources.parts import files, openers_of, words_of
from gpubatch.sources.reader import InTurn, Part, Reader, Source
from gpubatch.sources.remote import RemoteFile, remote
from gpubatch.sources.rows import cifar10, idx, naming_the_file, npy, npz, raw
from gpubatch.sources.tables import Grouped, ParquetGroups, arrow, hdf5, huggingface, opened_arrow, parquet

__all__ = [
    "ArraySource",
    "BytesByPlace",
    "Grouped",
    "InTurn",
    "LocalFile",
    "Opener",
    "ParquetGroups",
    "Part",
    "Reader",
    "RemoteFile",
    "Reopened",
    "Source",
    "arrow",
    "as_source",
    "check_finite",
    "check_rows",
    "cifar10",
    "contiguous",
    "convert",
    "files",
    "hdf5",
    "holds_all",
    "huggingface",
    "idx",
    "is_mapped",
    "is_read",
    "largest_stored",
    "naming_the_file",
    "npy",
    "npz",
    "opened_arrow",
    "opener_of",
    "openers_of",
    "parquet",
    "raw",
    "remote",
    "turned",
    "words_of",
]
