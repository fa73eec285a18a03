"""Code shared by all benchmarks: result files, resumable studies, memory, and the description of the machine."""
