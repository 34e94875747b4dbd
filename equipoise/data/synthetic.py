"""MNIST-1D: ten digits drawn as one-dimensional patterns, made hard by padding, shift, noise and shear.

Small enough for a laptop, yet linear models, MLPs and CNNs differ on it clearly. Recipe and constants from Greydanus and
Kobak, "Scaling Down Deep Learning with MNIST-1D", ICML 2024, arXiv:2011.14439. The random numbers are drawn in another order
than by the authors' code, so that the examples follow the same distribution but are not the same ones.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d

from equipoise.data.raw import RawData
from equipoise.errors import check_integer

# One digit a row: the height of a pen stroke at twelve moments.
PATTERNS = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
PADDING = (36, 60)
SCALE, MAX_SHIFT, SHEAR = 0.4, 48, 0.75
SMOOTH_NOISE, SMOOTH_WIDTH, WHITE_NOISE = 0.25, 2.0, 0.02
LENGTH = 40


def mnist1d(num_examples: int = 5000, seed: int = 42) -> RawData:
    """Draw a balanced MNIST-1D set: inputs (N, 1, 40) of mean 0 and standard deviation 1, the last fifth as its test set.

    num_examples: training and test examples together, at least 100; rounded down to a multiple of 10 classes.
    """
    check_integer("num_examples", num_examples, 100)
    check_integer("seed", seed, 0)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(10), num_examples // 10))
    signals = _signals(labels, rng)
    signals = (signals - signals.mean()) / signals.std()
    inputs = torch.from_numpy(signals.astype(np.float32)).unsqueeze(1)
    targets = torch.from_numpy(labels)
    cut = int(0.8 * len(labels))
    names = tuple(map(str, range(10)))
    test = RawData("mnist1d", "sequence", inputs[cut:].clone(), targets[cut:].clone(), names)
    return RawData("mnist1d", "sequence", inputs[:cut].clone(), targets[:cut].clone(), names, test=test)


def _signals(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One signal (40,) for each label."""
    n, width = len(labels), 12 + PADDING[1]
    templates = np.asarray(PATTERNS)
    templates = (templates - templates.mean(1, keepdims=True)) / templates.std(1, keepdims=True)
    templates = (templates - templates[:, :1]) / 6  # a stroke starts at 0, as the padding does
    padded = np.pad(templates, ((0, 0), (0, PADDING[1] + 1)))[labels]

    # Padding to a random length and stretching that to a fixed one is reading the padded signal at evenly spaced positions.
    pad = rng.integers(PADDING[0], PADDING[1] + 1, (n, 1))
    position = np.linspace(0, 1, width) * (11 + pad)
    signal = _interpolate(padded, position) * (1 + SCALE * (rng.random((n, 1)) - 0.5))
    columns = (np.arange(width) - rng.integers(0, MAX_SHIFT, (n, 1))) % width
    signal = np.take_along_axis(signal, columns, 1)
    stroke = np.take_along_axis(position < 12, columns, 1)

    background = gaussian_filter1d(SMOOTH_NOISE * rng.standard_normal((n, width)), SMOOTH_WIDTH, axis=1)
    signal = np.where(stroke, signal, background) + WHITE_NOISE * rng.standard_normal((n, width))
    signal -= SHEAR * (rng.random((n, 1)) - 0.5) * np.linspace(-0.5, 0.5, width)
    return _interpolate(np.pad(signal, ((0, 0), (0, 1))), np.tile(np.linspace(0, width - 1, LENGTH), (n, 1)))


def _interpolate(signals: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Read each row of ``signals`` linearly at its own ``positions`` (in columns)."""
    left = positions.astype(np.int64)
    share = positions - left
    low, high = np.take_along_axis(signals, left, 1), np.take_along_axis(signals, left + 1, 1)
    return (1 - share) * low + share * high
