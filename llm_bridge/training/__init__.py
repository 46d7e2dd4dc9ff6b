"""Training policies by the package's losses: one loop for all methods, judges, files of comparisons, run folders."""
