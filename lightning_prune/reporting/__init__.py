"""Reports of runs: folders, figures, tables, sizes, logs of epochs and live curves."""
