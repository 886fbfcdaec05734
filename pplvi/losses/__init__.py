"""What Pyro's ``SVI`` sees: an objective on a sampler. Imports ``samplers`` and what stands below."""

from pplvi.losses.base import Loss, WeightedELBO
from pplvi.losses.elbo import ELBO, BetaELBO, ChiELBO, ForwardKL, ImportanceWeightedELBO, RenyiELBO, ThermodynamicELBO
from pplvi.losses.filtering import FilteringELBO
from pplvi.losses.nested import NestedELBO
from pplvi.losses.recognition import RecognitionLoss
from pplvi.losses.wake_sleep import ReweightedWakeSleep, WakeSleep

__all__ = [
    "ELBO",
    "BetaELBO",
    "ChiELBO",
    "FilteringELBO",
    "ForwardKL",
    "ImportanceWeightedELBO",
    "Loss",
    "NestedELBO",
    "RecognitionLoss",
    "RenyiELBO",
    "ReweightedWakeSleep",
    "ThermodynamicELBO",
    "WakeSleep",
    "WeightedELBO",
]
