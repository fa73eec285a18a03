"""The command line: a Hydra application that trains and prunes, and commands for finished runs."""
