"""Autoregressive models: the probability of each number given those before it, by a network of all of them."""
