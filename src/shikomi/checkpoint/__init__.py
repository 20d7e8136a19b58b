"""Run directories, checkpoints that survive a kill at any instant, and adapters in PEFT's format."""
