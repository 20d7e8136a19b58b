"""A grid of runs on the same data, order and budget, each in a process of its own, and one table of what came of it.

grid (what is varied) -> cells (the recipes) -> check -> engine (one after the other) -> collect -> write
"""
