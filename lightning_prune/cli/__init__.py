"""The command line: a Hydra application with its subcommands."""
