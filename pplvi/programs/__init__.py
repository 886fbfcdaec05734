"""Running Pyro programs and knowing what they do. Imports ``weights``."""
