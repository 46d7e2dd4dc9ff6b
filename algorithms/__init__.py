"""Provable algorithms, one file a method, on top of `planning` (exact solvers) and `estimation` (fits, posteriors)."""
