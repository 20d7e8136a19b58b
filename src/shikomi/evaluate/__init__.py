"""Is it better? Baselines, the comparison on the same rows, and the report."""
