"""The networks of the second zoo, one module per field; see :mod:`benchmarks.zoo.more`."""
