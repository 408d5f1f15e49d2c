"""The command line: a file for each command. Results go to standard output, progress and errors to standard error."""

from gpubatch.cli.shared import COMMANDS, app, command_named

__all__ = ["COMMANDS", "app", "command_named"]
