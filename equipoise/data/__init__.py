"""Data: embedded sets, the user's own files, splits, and corruptions with exact definitions."""

from equipoise.data import corruptions
from equipoise.data.embedded import available, load
from equipoise.data.raw import RawData
from equipoise.data.splits import Splits, leakage, split
from equipoise.data.synthetic import mnist1d
from equipoise.data.user import fingerprint, read

__all__ = [
    "RawData",
    "Splits",
    "available",
    "corruptions",
    "fingerprint",
    "leakage",
    "load",
    "mnist1d",
    "read",
    "split",
]
