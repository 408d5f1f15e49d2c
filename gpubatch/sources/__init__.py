"""Where samples come from: arrays of the host or of a device, files, and whatever else can be read by place.

A source is read and never changed. Arrays go to :class:`~gpubatch.loader.Loader` as they are, ``np.memmap`` too: it is
not copied, and its floating values are looked at as they are read. Files that may be larger than memory are opened
here: :func:`npy`, :func:`npz`, :func:`raw`, :func:`idx`, :func:`cifar10`, :func:`parquet`, :func:`arrow`,
:func:`hdf5`; and folders, lists and patterns of such files, as one source, by :func:`files`. A path that goes to the
loader itself is opened by that. Arrays that are read by slices, as zarr's, h5py's and netCDF4's are, go to the loader
as they are, too, and so do sparse matrices of SciPy's. Anything else has to be a :class:`Source`.
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
