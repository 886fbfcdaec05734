"""Training machines: bound, chains, penalties, pretraining, classifiers. Imports ``posteriors`` and ``machines``."""

from pplvi.energies.learning.boltzmann_elbo import BoltzmannELBO
from pplvi.energies.learning.chains import (
    Chains,
    ContrastiveDivergence,
    EveryState,
    FastPersistentChains,
    MeanFieldContrastiveDivergence,
    PersistentChains,
    TemperedChains,
)
from pplvi.energies.learning.classifier import BoltzmannClassifier, to_classifier
from pplvi.energies.learning.multi_prediction import MultiPrediction
from pplvi.energies.learning.pretraining import pretrain
from pplvi.energies.learning.sparsity import SparsityPenalty
from pplvi.energies.learning.stacking import Stage, stages
from pplvi.energies.learning.up_down import UpDown

__all__ = [
    "BoltzmannClassifier",
    "BoltzmannELBO",
    "Chains",
    "ContrastiveDivergence",
    "EveryState",
    "FastPersistentChains",
    "MeanFieldContrastiveDivergence",
    "MultiPrediction",
    "PersistentChains",
    "SparsityPenalty",
    "Stage",
    "TemperedChains",
    "UpDown",
    "pretrain",
    "stages",
    "to_classifier",
]
