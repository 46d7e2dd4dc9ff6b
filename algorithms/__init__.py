"""Provable algorithms, one file a method, on top of `planning` (exact solvers) and `estimation` (fits, posteriors)."""

if __name__ != "preflab.algorithms":
    raise ImportError("import preflab.algorithms: under the bare name 'algorithms' every class would exist twice")
