"""A trained network as one file, with the preparation of its samples and the names of its classes."""

from gpubatch.model.export import export_onnx as export_onnx
from gpubatch.model.file import check_path as check_path, check_writable as check_writable
from gpubatch.model.model import Model as Model, load as load, save as save
from gpubatch.model.preparation import Preparation as Preparation
