"""The bridge to language models: policies, lattices, trainers and conformance for the algorithm objects of the lab."""

if __name__ != "preflab.llm_bridge":
    raise ImportError("import preflab.llm_bridge: under the bare name 'llm_bridge' every class would exist twice")
