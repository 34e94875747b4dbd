"""Every method of the library satisfies the kit (in one process; for two see test_distributed.py)."""

from __future__ import annotations

import pytest
import torch
from kit_library import CASES, METHODS, PROBLEMS, VARIANTS, Case, case_of, missing

from equipoise.testing import check_method

torch.set_num_threads(1)


def check(slug: str, case: Case, *, compile: bool = False) -> None:
    if (package := missing(slug)) is not None:
        pytest.skip(f"{package} is not installed")
    check_method(METHODS[slug], settings=case.settings, problem=PROBLEMS[case.problem], skip=case.skip, compile=compile)


@pytest.mark.parametrize("slug", METHODS)
def test_conformance(slug):
    check(slug, case_of(slug), compile=True)


@pytest.mark.parametrize(("slug", "case"), VARIANTS, ids=lambda value: str(getattr(value, "settings", value)))
def test_conformance_of_variants(slug, case):
    check(slug, case)


def test_cases_are_those_of_methods_that_exist():
    assert CASES.keys() <= METHODS.keys()


def test_co_teaching_leaves_modes_alone_unless_it_freezes_batch_norm():
    check_method(METHODS["co-teaching"], settings={"freeze_norm": False}, only=["modes"])
