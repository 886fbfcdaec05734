"""Log-weights: algebra, Pareto smoothing and resampling. Imports torch alone."""
