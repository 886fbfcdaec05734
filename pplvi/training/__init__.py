"""The training loop: steps, restarts, stopping, checkpoints. Imports ``compile`` and what stands below."""
