"""The command line: a file for each command. Results go to standard output, progress and errors to standard error."""

from gpubatch.cli.shared import COMMANDS as COMMANDS, app as app, command_named as command_named
