"""Guides whose latents belong to data: networks and structured families, in minibatches."""
