"""Objectives: what is minimized. One file per method; each sees log-probabilities, never models."""
