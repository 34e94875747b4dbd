"""Generated data with a known bias against intersections of protected attributes.

Every draw is a new sample from one population, so that trials over seeds are independent.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from equipoise.data.raw import RawData
from equipoise.errors import check_integer, check_range


def gerrymandering(num_train: int = 3000, num_test: int = 1000, seed: int = 0) -> RawData:
    """Regression in which only the combination of two fair coins matters: with s1 alone, or s2 alone, nothing is seen.

    ``u = s1 xor s2``. Inputs: three normals x1..x3 and a proxy ``u + 0.5 noise``. Target: ``x1 + 0.5 x2 + u + 0.3 noise``.
    groups: s1, s2. The first ``num_train`` rows are the data, the others its test set.
    """
    rng, n = _start(num_train, num_test, seed)
    s1, s2 = rng.integers(0, 2, n), rng.integers(0, 2, n)
    u = s1 ^ s2
    x = rng.standard_normal((n, 3))
    inputs = pd.DataFrame({"x1": x[:, 0], "x2": x[:, 1], "x3": x[:, 2], "proxy": u + 0.5 * rng.standard_normal(n)})
    target = x[:, 0] + 0.5 * x[:, 1] + u + 0.3 * rng.standard_normal(n)
    groups = pd.DataFrame({"s1": s1, "s2": s2})
    return _raw("gerrymandering", inputs, torch.tensor(target, dtype=torch.float32), None, groups, num_train)


def hiring(num_train: int = 4500, num_test: int = 4500, seed: int = 0, bias: float = 1.0) -> RawData:
    """Past hiring decisions: merit counts, and so do sex, region and age, most of all in combination.

    sex (two values), region (north, south, east with shares 0.5, 0.3, 0.2) and age (20 to 65 years) are drawn independently, and
    three skills are normal. ``P(hired) = sigmoid(1.2 skill1 + 0.8 skill2 + 0.5 skill3 + bias * b)``, where b holds 1.2 for men
    under 42.5 and women above it and -1.2 for the others, -0.8 in the east, and -0.4 per 13 years of age above 42.5.

    Inputs: the skills; and, with noise, what tells the attributes: a name score (sex), a career score (age), and two coordinates
    of the home (region). bias: >= 0; at 0 hiring depends on merit alone.
    """
    check_range("bias", bias, 0)
    rng, n = _start(num_train, num_test, seed)
    male = rng.integers(0, 2, n)
    region = rng.choice(3, n, p=(0.5, 0.3, 0.2))
    age = rng.uniform(20, 65, n)
    years = (age - 42.5) / 13
    skills = rng.standard_normal((n, 3))
    favoured = np.where(male.astype(bool) == (age < 42.5), 1.2, -1.2)
    b = favoured - 0.8 * (region == 2) - 0.4 * years
    logit = skills @ np.array([1.2, 0.8, 0.5]) + bias * b
    hired = rng.random(n) < 1 / (1 + np.exp(-logit))
    homes = np.array([[0.0, 1.5], [0.0, -1.5], [2.0, 0.0]])[region]
    inputs = pd.DataFrame(
        {
            "skill1": skills[:, 0],
            "skill2": skills[:, 1],
            "skill3": skills[:, 2],
            "name_score": 2 * male - 1 + 0.6 * rng.standard_normal(n),
            "career": years + 0.5 * rng.standard_normal(n),
            "home_x": homes[:, 0] + 0.8 * rng.standard_normal(n),
            "home_y": homes[:, 1] + 0.8 * rng.standard_normal(n),
        }
    )
    groups = pd.DataFrame(
        {"sex": np.where(male, "male", "female"), "region": np.array(["north", "south", "east"])[region], "age": age}
    )
    return _raw("hiring", inputs, torch.from_numpy(hired.astype(np.int64)), ("rejected", "hired"), groups, num_train)


def _start(num_train: int, num_test: int, seed: int) -> tuple[np.random.Generator, int]:
    check_integer("num_train", num_train, 10)
    check_integer("num_test", num_test, 10)
    check_integer("seed", seed, 0)
    return np.random.default_rng(seed), num_train + num_test


def _raw(
    name: str,
    inputs: pd.DataFrame,
    targets: torch.Tensor,
    classes: tuple[str, ...] | None,
    groups: pd.DataFrame,
    num_train: int,
) -> RawData:
    parts = [
        (inputs[rows].reset_index(drop=True), targets[rows], groups[rows].reset_index(drop=True))
        for rows in (slice(None, num_train), slice(num_train, None))
    ]
    (x, y, s), (test_x, test_y, test_s) = parts
    return RawData(name, "table", x, y, classes, s, RawData(name, "table", test_x, test_y, classes, test_s))
