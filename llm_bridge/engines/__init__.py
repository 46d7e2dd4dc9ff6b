"""Other people's engines: our losses, estimators and samples in their plug points, each held to the truth."""
