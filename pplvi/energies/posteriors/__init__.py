"""Posteriors of the hidden layers: mean field, TAP, recognition networks, Gibbs chains."""
