"""Claims: how a verdict is reached, what is written, and that the evidence on disk is what the claims say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from toy import Toy

from equipoise.comparison import claims
from equipoise.comparison.claims import Claim
from equipoise.comparison.statistics import Estimate
from equipoise.errors import ArgumentError, EquipoiseError

CLAIM = Claim(
    slug="toy",
    number=0,
    claim="Good helps by three points.",
    source="Nobody",
    task=Toy,
    settings={},
    arms=(("cross-entropy", "cross-entropy", {"lr": 0.1}), ("label-smoothing", "label-smoothing", {"lr": 0.1})),
    method="label-smoothing",
    reference="cross-entropy",
    unit="points",
    at_least=3.0,
)
EVIDENCE_KEYS = {
    "slug", "number", "claim", "source", "setting", "expected", "measured", "verdict", "remarks", "command", "versions",
    "seconds", "date",
}  # fmt: skip


@pytest.mark.parametrize(
    ("bounds", "effect", "verdict"),
    [
        ({"at_least": 3.0}, (4.0, 1.0, 7.0), "reproduced"),
        ({"at_least": 3.0}, (4.0, -1.0, 9.0), "not reproduced here"),  # an improvement must exclude zero
        ({"at_least": 3.0}, (2.0, 1.0, 3.0), "not reproduced here"),  # too small
        ({"at_least": 3.0}, (-2.0, -3.0, -1.0), "contradicted"),
        ({"at_least": 3.0}, (-2.0, -5.0, 1.0), "not reproduced here"),
        ({"at_most": -10.0}, (-12.0, -20.0, -4.0), "reproduced"),
        ({"at_most": -10.0}, (12.0, 4.0, 20.0), "contradicted"),
        ({"at_least": -0.5}, (-0.1, -0.4, 0.2), "reproduced"),  # "costs no more than"
        ({"at_least": -0.5}, (-0.3, -1.0, 0.4), "not reproduced here"),  # it may cost more, says the interval
        ({"at_least": 0.0}, (0.1, -1.7, 1.9), "not reproduced here"),
        ({"at_most": 1.0}, (-0.3, -3.5, 2.9), "not reproduced here"),
        ({"at_least": -0.5}, (-0.7, -1.0, -0.4), "not reproduced here"),
        ({"at_least": -0.5}, (-0.9, -1.0, -0.8), "contradicted"),
    ],
)
def test_verdicts(bounds: dict[str, float], effect: tuple[float, float, float], verdict: str) -> None:
    claim = replace(CLAIM, at_least=bounds.get("at_least"), at_most=bounds.get("at_most"))
    assert claim.judge(Estimate(*effect, p=0.01, n=3)) == verdict


def test_an_expectation_is_needed() -> None:
    with pytest.raises(ArgumentError, match="be given one of them"):
        replace(CLAIM, at_least=None)
    with pytest.raises(ArgumentError, match="be given one of them"):
        replace(CLAIM, at_most=1.0)


def test_running_a_claim_twice_gives_the_same_figures(tmp_path: Path) -> None:
    arms = (("cross-entropy", "cross-entropy", {"lr": 0.1}), ("other rate", "cross-entropy", {"lr": 0.2}))
    claim = replace(CLAIM, arms=arms, method="other rate")
    first, second = claim.run(tmp_path / "a"), claim.run(tmp_path / "b")
    assert first["measured"] == second["measured"] and first["values"] == second["values"]
    assert first.keys() >= EVIDENCE_KEYS
    assert first["setting"] == {"task": "toy", "seeds": 3}
    path = claims.write(first, claim, tmp_path / "evidence")
    assert path.name == "toy.json"
    assert json.loads(path.read_text()) == first


def test_a_failed_run_writes_no_evidence(tmp_path: Path) -> None:
    # The toy knows no label smoothing: its runs fail.
    arms = (("cross-entropy", "cross-entropy", {"lr": 0.1}), ("broken", "label-smoothing", {"lr": 0.1}))
    with pytest.raises(EquipoiseError, match="a final run failed"):
        replace(CLAIM, arms=arms, method="broken").run(tmp_path)


def test_select() -> None:
    assert [c.id for c in claims.select(["elr-memorisation"])] == ["elr-memorisation"]
    assert {c.slug for c in claims.select(["ps-kd"])} == {"ps_kd"}
    with pytest.raises(ArgumentError, match="Did you mean 'elr'"):
        claims.select(["elrr"])


def test_evidence_on_disk_belongs_to_claims() -> None:
    known = claims.claims()
    files = sorted(claims.evidence_folder().glob("*.json"))
    assert {path.stem for path in files} == set(known), "every claim has evidence, and nothing else does"
    for path in files:
        document = json.loads(path.read_text())
        claim = known[path.stem]
        assert document.keys() >= EVIDENCE_KEYS
        assert document["claim"] == claim.claim and document["expected"] == claim.expected
        m = document["measured"]
        assert document["verdict"] == claim.judge(Estimate(m["effect"], m["low"], m["high"], 0.0, m["n"]))
        assert document["command"] == f"equipoise reproduce {claim.id}"
