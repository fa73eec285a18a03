"""Pages in HTML: one of a run, one of a sweep, each a single file that needs no network."""
