"""Damage every kind of file that the package writes, and check that nothing wrong is read in silence."""
