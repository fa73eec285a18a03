"""Base class and helpers of the LightningModules of all tasks."""
