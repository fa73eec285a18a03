"""Small helpers without knowledge of pruning: processes, seeds, hashing, tables, example inputs."""
