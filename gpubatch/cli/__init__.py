"""The command line: a file for each command. Results go to standard output, progress and errors to standard error."""

# In the order in which --help lists them: a file adds its command to the application when it is imported.
from gpubatch.cli import train, models, info, gradients, landscape, sweep, memory  # isort: skip
from gpubatch.cli.shared import app

__all__ = ["app", "gradients", "info", "landscape", "memory", "models", "sweep", "train"]
