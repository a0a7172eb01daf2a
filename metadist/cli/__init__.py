"""`metadist COMMAND`: a file here for each command, imported when it is called.

The one package that knows all layers. Everything that is trained is named by class path and built
by jsonargparse from YAML and flags; the config is kept in the run folder.

A command's file has `parser()`, its options, and `run(config)`, which returns the exit code. Where
the options need no torch or Ray, neither is imported before `run`: the help must come at once.

Exit codes: 0 done; 1 the run or the check failed; 2 the input was refused, nothing was started;
130 stopped by Ctrl-C, 143 by SIGTERM or SIGUSR1, 129 by SIGHUP, with a checkpoint written.
"""

from metadist.cli.commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]
