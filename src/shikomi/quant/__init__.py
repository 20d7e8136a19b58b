"""Base weights: how the frozen linear maps of a model are stored. One file per scheme."""
