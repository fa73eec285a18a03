"""Make a network physically smaller while it trains."""

__version__ = "0.1.0"
