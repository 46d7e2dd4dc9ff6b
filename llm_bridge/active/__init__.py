"""Active querying on language models: PR-LSVI's posterior and query rule on the features of a frozen trunk."""
