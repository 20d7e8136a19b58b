"""The numbered steps of a run, in the order in which run.py calls them: prepare, hooks (during), finish."""
