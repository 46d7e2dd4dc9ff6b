"""Provable algorithms, one file a method, on `planning` (exact solvers) and `estimation` (fits, posteriors)."""

if __name__ != "preflab.algorithms":
    raise ImportError("import preflab.algorithms: a bare import would make a second copy of every class")
