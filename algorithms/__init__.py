"""Provable algorithms, one file a method; `planning` solves known models, `estimation` fits preferences."""

if __name__ != "preflab.algorithms":
    raise ImportError("import preflab.algorithms: a bare import would make a second copy of every class")
