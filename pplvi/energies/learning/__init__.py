"""Training machines: chains, statistics, penalties, pretraining and classifiers."""
