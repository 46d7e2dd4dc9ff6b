"""Claims about the algorithms as objects that a computer checks and tries to break."""

if __name__ != "preflab.theory":
    raise ImportError("import preflab.theory: under the bare name 'theory' every class would exist twice")
