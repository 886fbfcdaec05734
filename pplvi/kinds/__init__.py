"""Kinds of argument, and the check that a call keeps to its signature. Imports nothing."""

from pplvi.kinds.checked import check_values, checked
from pplvi.kinds.kinds import Condition, Count, Number, Positive, Probability, Seed

__all__ = ["Condition", "Count", "Number", "Positive", "Probability", "Seed", "check_values", "checked"]
