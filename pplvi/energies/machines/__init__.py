"""Energies, their units and couplings, and the machines made of them."""
