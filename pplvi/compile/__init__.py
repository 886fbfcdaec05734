"""Training steps recorded once and compiled. Imports ``losses`` and what stands below."""
