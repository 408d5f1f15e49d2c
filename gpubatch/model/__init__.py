"""A trained network as one file, with the preparation of its samples and the names of its classes."""

from gpubatch.model.export import export_onnx
from gpubatch.model.file import check_path, check_writable
from gpubatch.model.model import Model, load, save
from gpubatch.model.preparation import Preparation

__all__ = ["Model", "Preparation", "check_path", "check_writable", "export_onnx", "load", "save"]
