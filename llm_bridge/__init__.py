"""The bridge to language models: policies, lattices, trainers and conformance for the algorithm objects of the lab."""
