"""Data-parallel training: a plate over the ranks of a process group. Imports what ``training`` may import."""

from pplvi.programs.ranks import RankLostError, RanksLeftError, join

__all__ = ["RankLostError", "RanksLeftError", "join"]
