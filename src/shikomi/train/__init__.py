"""The loop: batches in, steps done; evaluation, logging and saving enter as hooks."""
