"""Small reference models, all with ``forward_features`` and ``forward_head``, and the user's own by import path."""

from equipoise.models.factory import NAMES, build, source_digest
from equipoise.models.reference import MLP, Classifier, ConvNet, Linear

__all__ = ["MLP", "NAMES", "Classifier", "ConvNet", "Linear", "build", "source_digest"]
