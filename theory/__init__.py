"""Claims about the algorithms as objects that a computer checks and tries to break."""

if __name__ != "preflab.theory":
    raise ImportError("import preflab.theory: a bare import would make a second copy of every class")
