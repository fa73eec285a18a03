"""Studies and measurements that take too long for the tests. Each package answers one question.

    benchmarks.quality       What does each method leave of a network, with and without repair?
    benchmarks.zoo           Which of 418 public networks can be pruned, beside torch-pruning?
    benchmarks.methods       Which way of pruning gives the best network for the same training?
    benchmarks.distillation  Does a teacher recover accuracy that pruning lost?
    benchmarks.latency       How close is the predicted latency to the measured one?
    benchmarks.speed         How much time and memory does pruning itself take?
    benchmarks.gpu           Does everything work on a GPU, and what does pruning bring there?
    benchmarks.robustness    Does pruning stay correct in unusual networks, settings and interrupted runs?

``python -m benchmarks.<package> --help`` shows the options of each. Pages are written to ``docs/results``, their
numbers to ``docs/results/data`` and pictures to ``docs/results/figures`` (:mod:`benchmarks.common.pages`).
"""
