"""Every method of the library satisfies the kit (in one process; for two see test_distributed.py)."""

from __future__ import annotations

import pytest
import torch
from library import METHODS, SKIPS

from equipoise.testing import check_method

torch.set_num_threads(1)


@pytest.mark.parametrize("slug", METHODS)
def test_conformance(slug):
    check_method(METHODS[slug], compile=True, skip=SKIPS.get(slug, {}))


def test_co_teaching_leaves_modes_alone_unless_it_freezes_batch_norm():
    check_method(METHODS["co-teaching"], settings={"freeze_norm": False}, only=["modes"])
