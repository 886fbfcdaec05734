"""Objectives as pure functions of weighted steps. Imports ``weights``."""
