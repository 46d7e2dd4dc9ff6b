"""The bridge to language models: the same objects on policies, lattices and trainers of transformers."""

if __name__ != "preflab.llm_bridge":
    raise ImportError("import preflab.llm_bridge: a bare import would make a second copy of every class")
