"""Every method of the library satisfies the kit (in one process; for two see test_distributed.py)."""

from __future__ import annotations

import pytest
import torch
from kit_library import METHODS, SKIPS, VARIANTS

from equipoise.testing import check_method

torch.set_num_threads(1)


@pytest.mark.parametrize("slug", METHODS)
def test_conformance(slug):
    check_method(METHODS[slug], compile=True, skip=SKIPS.get(slug, {}))


@pytest.mark.parametrize(("slug", "settings", "skips"), VARIANTS, ids=str)
def test_conformance_of_variants(slug, settings, skips):
    check_method(METHODS[slug], settings=settings, skip=SKIPS.get(slug, {}) | skips)


def test_co_teaching_leaves_modes_alone_unless_it_freezes_batch_norm():
    check_method(METHODS["co-teaching"], settings={"freeze_norm": False}, only=["modes"])
