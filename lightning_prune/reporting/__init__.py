"""Reports: run folders, figures, tables, sizes, live curves."""
