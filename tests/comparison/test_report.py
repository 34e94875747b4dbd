"""The report without a browser: what it says, what it escapes, and what it does with runs that failed."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from toy import Dear, Good, Toy

from equipoise.comparison import compare, figures, statistics
from equipoise.comparison.figures import Axis, number, place, ratio, short
from equipoise.comparison.report import (
    TEMPLATES,
    Units,
    headline,
    p_value,
    print_report,
    ranked,
    render,
    terminal_table,
    write_all,
    write_report,
    write_tables,
)
from equipoise.comparison.result import ArmResult, Comparison
from equipoise.errors import StoreError

HOSTILE = """<script>window.hacked=1</script>"><img src=x onerror="window.hacked=1">'&amp; [bold]"""
# name, method, gain on the test metric, multiple of the baseline's FLOPs, how far late epochs memorise wrong labels
NOISY_LABELS = (
    ("cross-entropy", "cross-entropy", 0.0, 1.0, 0.16),
    ("elr", "elr", 0.046, 1.004, 0.02),
    ("generalized-cross-entropy", "generalized-cross-entropy", 0.031, 1.0, 0.05),
    ("ps-kd", "ps-kd", 0.004, 1.21, 0.12),
    ("nested-dropout", "nested-dropout", -0.038, 1.0, 0.14),
    ("elr+", "elr-plus", 0.055, 2.7, 0.0),
    ("label-smoothing", "label-smoothing", 0.011, 1.0, 0.13),
    ("cross-entropy, 2.7x compute", "cross-entropy", 0.019, 2.7, 0.15),
)


class Finished(Comparison):
    """A comparison that needs no store."""

    def runs(self) -> pd.DataFrame:
        rows = [
            {"arm": a.name, "kind": "final", "seed": s, "status": "done", "seconds": 1.5, "last.test_accuracy": v}
            | {f"config.{key}": value for key, value in a.config.items()}
            for a in self.arms
            for s, v in zip(self.seeds, a.values, strict=True)
        ]
        return pd.DataFrame(rows)


def _curves(rng: np.random.Generator, seeds: int, final: np.ndarray, memorised: float, epochs: int) -> pd.DataFrame:
    epoch = np.arange(epochs)
    frames = []
    for seed in range(seeds):
        late = np.clip((epoch - epochs * 0.3) / (epochs * 0.7), 0, 1) ** 1.2
        rise = 1 - np.exp(-(epoch + 0.6) / (epochs * 0.06))
        peak = final[seed] + 0.3 * memorised + rng.normal(0, 0.006)
        test = 0.1 + (peak - 0.1) * rise - 0.3 * memorised * late + rng.normal(0, 0.004, epochs)
        loss = 2.35 * np.exp(-epoch / (epochs * 0.35)) * (0.45 + 0.3 * (1 - memorised)) + 0.9 - 3 * memorised * late / 2
        frames.append(
            pd.DataFrame(
                {
                    "seed": seed,
                    "epoch": epoch,
                    "train_loss": loss + rng.normal(0, 0.02, epochs),
                    "validation_accuracy": 0.62 * test + 0.03 + rng.normal(0, 0.012, epochs),
                    "test_accuracy": test,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def make_comparison(
    arms: tuple[tuple[str, str, float, float, float], ...] = NOISY_LABELS,
    *,
    seeds: int = 5,
    folder: Path = Path("equipoise-results/noisy-labels"),
    epochs: int = 50,
    failing: tuple[str, ...] = (),
    **changes: Any,
) -> Finished:
    """A trial as `equipoise compare noisy-labels` would leave it, from made-up numbers and the real statistics."""
    rng = np.random.default_rng(7)
    shared, correction = rng.normal(0, 0.012, seeds), 0.25
    values = {name: 0.868 + gain + shared + rng.normal(0, 0.006, seeds) for name, _, gain, _, _ in arms}
    for name in failing:
        values[name] = np.where(np.arange(seeds) == 1, np.nan, values[name])
    baseline = arms[0][0]

    def estimate(name: str, other: str) -> statistics.Estimate | None:
        if not (np.isfinite(values[name]).all() and np.isfinite(values[other]).all()):
            return None
        return statistics.paired_difference(list(values[name]), list(values[other]), correction=correction)

    found = {name: estimate(name, baseline) for name, *_ in arms[1:]}
    holm = dict(zip(found, statistics.holm([e.p if e else None for e in found.values()]), strict=True))
    results = []
    for name, method, _, flops, memorised in arms:
        e, mine = found.get(name), values[name]
        finite = mine[np.isfinite(mine)]
        verdict = statistics.verdict(e, holm[name], True) if e else None
        sentence = (
            f"{name} is the tuned baseline"
            if name == baseline
            else f"{name}: no verdict, 1 of {seeds} final runs failed"
        )
        if e and verdict:
            sentence = statistics.sentence(name, baseline, e, verdict, "accuracy", p_holm=holm[name], percent=True)
        matched = None
        control = next((a[0] for a in arms if a[3] == flops and a[1] == arms[0][1]), None)
        if flops > 1.5 and control not in (None, name) and (m := estimate(name, control)):
            judged = statistics.verdict(m, m.p, True)
            said = statistics.sentence(name, control, m, judged, "accuracy", p_holm=m.p, percent=True)
            matched = {"name": control, "difference": m.difference, "low": m.low, "high": m.high, "p": m.p}
            matched |= {"verdict": judged, "sentence": said}
        config = {"lr": 0.0832, "weight_decay": 3.1e-4, "early_stopping": True, f"{method}.strength": 0.7}
        if flops == 2.7 and method == "cross-entropy":
            config |= {"compute": "ensemble", "compute_ratio": 2.7}
        tuning: list[dict[str, Any]] = []
        for i in range(8):
            tried = (
                config if i == 3 else config | {"lr": float(np.exp(rng.uniform(-5, -1))), "early_stopping": bool(i % 2)}
            )
            score = float(0.585 + 0.3 * (np.nanmean(mine) - 0.868) - (0 if i == 3 else rng.exponential(0.02)))
            tuning.append({"config": tried, "score": score, "status": "done"})
        if name in failing:
            tuning[6] |= {"score": None, "status": "NonFiniteError: step 3: the task's loss is nan"}
        curves = _curves(rng, seeds, np.nan_to_num(mine, nan=0.8), memorised, epochs)
        metrics = {
            "seed": range(seeds),
            "validation_accuracy": mine * 0.65,
            "test_accuracy": mine,
            "test_nll": 0.5 - 0.1 * mine,
        }
        results.append(
            ArmResult(
                name=name,
                baseline=name == baseline,
                method=method,
                mean=float(finite.mean()),
                iqm=statistics.interquartile_mean(list(finite)),
                sd=float(finite.std(ddof=1)),
                difference=e.difference if e else None,
                low=e.low if e else None,
                high=e.high if e else None,
                p=holm.get(name),
                verdict=verdict,
                sentence=sentence,
                flops_ratio=flops,
                step_time_ratio=flops * 1.07,
                peak_memory_ratio=1 + (flops - 1) * 0.8,
                inference_parameters=26_122 * math.ceil(flops - 0.3),
                config=config,
                values=[float(v) for v in mine],
                differences=[float(d) for d in mine - values[baseline]],
                tuning=tuning,
                edges=["elr.lam"] if name == "elr" else [],
                matched=matched,
                curves=curves,
                metrics=pd.DataFrame(metrics),
                failed=int(np.isnan(mine).sum()),
            )
        )
    edges = "elr: elr.lam (a wider space may do better)"
    fields: dict[str, Any] = {
        "task": "noisy-labels",
        "task_summary": "Classification when part of the training labels is wrong; tested on clean labels.",
        "settings": {
            "dataset": "digits",
            "noise": "symmetric",
            "rate": 0.4,
            "model": "mlp",
            "epochs": epochs,
            "data": None,
        },
        "metric": "accuracy",
        "higher_is_better": True,
        "percent": True,
        "counted": "best or last",
        "seeds": list(range(seeds)),
        "configs": 8,
        "correction": correction,
        "arms": results,
        "warnings": [f"no best setting on the edge of its space: {edges}"],
        "checks": [
            (
                "no leakage between splits",
                True,
                "0 distinct rows of the test set of seed 0 also occur in its training data",
            ),
            ("every arm trained", True, "all are better than chance"),
            ("no best setting on the edge of its space", False, edges),
            ("no final run failed", not failing, "all 40 finished" if not failing else f"{', '.join(failing)}: 1"),
            ("one version of everything", True, "all runs share versions and machine"),
        ],
        "versions": {"equipoise": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "machine": "Linux x86_64, AVX512"},
        "store": folder / "store.sqlite",
        "report": folder / "report.html",
        "seconds": 132.4,
        "command": "equipoise compare noisy-labels --dataset digits --noise symmetric --rate 0.4 --jobs 2",
    }
    return Finished(**fields | changes)


def many_arms() -> Finished:
    """Twenty arms with long names on ten seeds."""
    rng = np.random.default_rng(3)
    long = "a-method-with-a-name-that-was-chosen-without-any-thought-of-tables-number-"
    extra = [
        (f"{long}{i}", f"m{i}", float(rng.normal(0.01, 0.02)), float(rng.choice([1, 1.02, 4, 12])), 0.1)
        for i in range(19)
    ]
    return make_comparison((NOISY_LABELS[0], *extra), seeds=10, epochs=12)


def bare() -> Finished:
    """A baseline and one arm of which nothing is known but one failed run."""
    found = make_comparison(NOISY_LABELS[:2], failing=("elr",), warnings=[], checks=[], command="", versions={})
    unknown: dict[str, Any] = dict.fromkeys(
        ("flops_ratio", "step_time_ratio", "peak_memory_ratio", "inference_parameters")
    )
    empty = {"curves": pd.DataFrame(), "metrics": pd.DataFrame(), "tuning": [], "edges": []}
    found.arms = [replace(arm, **unknown, **empty) for arm in found.arms]
    nothing: dict[str, Any] = {
        "mean": None,
        "iqm": None,
        "sd": None,
        "values": [math.nan] * 5,
        "differences": [math.nan] * 5,
    }
    found.arms[1] = replace(found.arms[1], **nothing, config={}, failed=5)
    return found


class Outline(HTMLParser):
    """Tags, heading levels and unclosed elements of a page."""

    VOID = frozenset(("meta", "link", "br", "img", "hr", "input"))

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.errors: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()}")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


CASES = {
    "usual": make_comparison,
    "failing": lambda: make_comparison(failing=("elr", "ps-kd")),
    "failing baseline": lambda: make_comparison(failing=("cross-entropy",)),
    "one arm": lambda: make_comparison(NOISY_LABELS[:2]),
    "two seeds": lambda: make_comparison(seeds=2, epochs=1),
    "many": many_arms,
    "bare": bare,
    "hostile": lambda: make_comparison(
        (NOISY_LABELS[0], (HOSTILE, HOSTILE, 0.05, 3.0, 0.1)), task_summary=HOSTILE, command=HOSTILE
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_case_gives_a_whole_page(case: str) -> None:
    comparison = CASES[case]()
    page = render(comparison)
    outline = Outline(page)
    assert not outline.errors
    assert not outline.open
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"] for a in outline.all("a")} <= {f"#{i}" for i in ids}
    assert {a["aria-labelledby"] for _, a in outline.tags if "aria-labelledby" in a} <= set(ids)
    assert all(len(p.get("aria-label") or "") > 10 for p in outline.all("svg") if p.get("role") == "img")
    assert "nan" not in re.sub(
        r"<script>.*?</script>", "", page.lower().replace("nonfinite", "").replace("loss is nan", ""), flags=re.S
    )
    assert "None" not in page.replace("None of", "").replace("<td>None</td>", "")
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(comparison, console)
    assert all(len(text) <= 80 for text in console.export_text().splitlines() if "report" not in text)


def test_asks_for_nothing_and_runs_only_its_own_script() -> None:
    page = render(make_comparison())
    assert "default-src 'none'" in page
    assert "unsafe" not in page
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!#|data:,)[^\"'\s>]+", page.split("</style>")[1])
    assert "http" not in page.replace("http-equiv", "")
    assert " style=" not in page  # the policy forbids it
    assert render(make_comparison()) == page


def test_escapes_what_users_named() -> None:
    page = render(CASES["hostile"]())
    outline = Outline(page)
    assert len(outline.all("script")) == 1
    assert not outline.all("img")
    assert "onerror=&#34;" in page
    assert 'onerror="' not in page
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(CASES["hostile"](), console)
    assert "[bold]" in console.export_text()  # shown, not obeyed


def test_the_answer_says_who_wins_by_how_much_and_at_what_cost() -> None:
    title, lines = headline(make_comparison())
    assert title == "Four of six methods beat tuned cross-entropy"
    assert lines[0].startswith(
        "elr+ raises accuracy by 5.3 points (95\u00a0% interval 3.7 to 6.8) at 2.70× the training compute."
    )
    assert "Against cross-entropy, 2.7x compute, it is still better: +3.2 points [2.4, 4.0]." in lines[0]
    assert lines[1].startswith("elr raises accuracy by 4.7 points")
    assert lines[1].endswith("at the same training compute.")
    assert lines[3:] == [
        "It is also beaten, by less, by label-smoothing.",
        "No difference was seen for ps-kd.",
        "Worse than it: nested-dropout.",
    ]
    assert any("12 methods" in text for text in headline(many_arms())[1])
    assert headline(make_comparison(NOISY_LABELS[:2]))[0] == "elr beats tuned cross-entropy"
    same = (NOISY_LABELS[0], ("twin", "twin", 0.0, 1.0, 0.1))
    title, lines = headline(make_comparison(same))
    assert title == "No difference seen between twin and tuned cross-entropy"
    assert lines[0].startswith("The data are compatible with anything from −")
    worse = (NOISY_LABELS[0], ("bad", "bad", -0.1, 1.0, 0.1))
    assert headline(make_comparison(worse))[0] == "bad does worse than tuned cross-entropy"
    assert headline(bare())[0] == "No verdict on elr: runs failed"
    assert headline(make_comparison((*worse, same[1])))[0] == "None of two methods was seen to beat tuned cross-entropy"
    assert headline(make_comparison(failing=("cross-entropy",)))[0] == "No verdict on six methods: runs failed"
    assert headline(make_comparison(failing=("elr",)))[1][-1] == "No verdict on elr: runs failed."
    assert "elr beats cross-entropy" in render(bare_but_judged())


def bare_but_judged() -> Finished:
    found = make_comparison(NOISY_LABELS[:2])
    found.arms = [replace(arm, tuning=[]) for arm in found.arms]
    return found


def test_lower_may_be_better() -> None:
    found = make_comparison(metric="nll", higher_is_better=False, percent=False)
    found.arms = [
        replace(arm, verdict={"better": "worse", "worse": "better"}.get(str(arm.verdict), arm.verdict))
        for arm in found.arms
    ]
    title, lines = headline(found)
    assert title == "One of six methods beats tuned cross-entropy"
    assert lines[0].startswith("nested-dropout lowers nll by 0.0")
    assert "points" not in " ".join(lines)
    assert ranked(found, found.arms)[0].name == "nested-dropout"
    page = render(found)
    assert "← better" in page
    assert "Down and left" in page
    assert 'aria-sort="ascending">Mean nll' in page
    assert "%" not in headline(found)[1][1]


def test_terminal_table_fits_and_grows() -> None:
    found = make_comparison()
    narrow, wide = terminal_table(found, 80), terminal_table(found, 140)
    assert len(narrow.columns) == 5
    assert len(wide.columns) == 9
    assert narrow.row_count == len(found.arms)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(narrow)
    text = console.export_text()
    assert "no difference seen" in text
    assert re.search(r"generalized-cross- +better", text)  # broken at its hyphen
    slim = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    slim.print(terminal_table(found, 60))
    assert "+4.7 [3.5, 5.8]" in slim.export_text()
    assert re.search(r"elr +better +91\.1 +\+4\.7 \[3\.5, 5\.8\] +1\.00×", text)


def test_writes_tables_of_a_real_comparison(tmp_path: Path) -> None:
    found = compare(Toy(), [Good, Dear], seeds=3, configs=3, out=tmp_path)
    paths = write_all(found, tmp_path / "elsewhere")
    assert [p.name for p in paths] == ["report.html", "results.csv", "results.parquet", "summary.csv"]
    runs, again = pd.read_csv(paths[1]), pd.read_parquet(paths[2])
    assert len(runs) == len(again) == len(found.runs())
    assert list(pd.read_csv(paths[3]).name) == [arm.name for arm in found.arms]
    page = paths[0].read_text()
    assert "At equal compute" in page
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)


def test_tables_hold_columns_of_several_types(tmp_path: Path) -> None:
    found = make_comparison(NOISY_LABELS[:3])
    for arm, mixed in zip(found.arms, (True, "auto", [1, 2]), strict=True):
        arm.config["mixed"] = mixed
    runs = pd.read_parquet(write_tables(found, tmp_path)[1])
    assert list(runs["config.mixed"].unique()) == ["true", "auto", "[1, 2]"]


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"report\.html' cannot be written"):
        write_report(make_comparison(NOISY_LABELS[:2]), tmp_path / "file")
    # A page that could not be moved into place leaves no part of itself behind.
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StoreError, match="equipoise report"):
        write_report(make_comparison(NOISY_LABELS[:2]), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "report.html"]


def test_names_that_are_no_unicode_can_be_written(tmp_path: Path) -> None:
    found = make_comparison(NOISY_LABELS[:2], command="equipoise compare --data caf\udce9.csv")
    assert "caf?.csv" in write_report(found, tmp_path).read_text(encoding="utf-8")


def test_needs_no_torch() -> None:
    code = "import sys, equipoise.comparison.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TEMPLATES.parents[2]).returncode == 0


def _luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(c * 2 for c in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_both_backgrounds(mode: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", (TEMPLATES / "report.css").read_text(), flags=re.S)
    colours = dict(re.findall(r"--(\w+): (#\w+);", blocks[mode]))
    for ink in ("ink", "soft", "better", "worse", "flag"):
        for paper in ("page", "raised"):
            a, b = sorted((_luminance(colours[ink]), _luminance(colours[paper])))
            assert (b + 0.05) / (a + 0.05) >= 4.5, (ink, paper)


def test_numbers_are_written_for_readers() -> None:
    assert number(-0.0123, 1, 100, sign="+") == "−1.2"
    assert number(0.0004, 2) == "0.0004"
    assert number(0.0, 2) == "0.00"
    assert number(None) == number(math.nan) == number(math.inf) == "–"
    assert ratio(1.0) == "1.00×"
    assert ratio(9.997) == "10×"
    assert ratio(27.31) == "27.3×"
    assert ratio(None) == "–"
    assert p_value(0.0001) == "< 0.001"
    assert p_value(0.04996) == "0.04996"
    assert p_value(None) == "–"
    assert short("x" * 80) == "x" * 20 + "…" + "x" * 9
    assert Units.of(make_comparison(percent=False, metric="rmse")).label == "rmse"


def test_a_front_holds_what_nothing_beats_in_both() -> None:
    points = [(0.1, 0.5), (0.2, 0.8), (0.2, 0.7), (0.3, 0.75), (0.4, 0.9), (0.1, 0.4)]
    assert figures.front(points, False, True) == [(0.1, 0.5), (0.2, 0.8), (0.4, 0.9)]
    assert figures.front(points, True, True) == [(0.4, 0.9)]
    assert figures.front(points, True, False) == [(0.4, 0.9), (0.3, 0.75), (0.2, 0.7), (0.1, 0.4)]


def test_the_trade_off_is_drawn_where_a_task_names_one() -> None:
    plain = make_comparison()
    assert figures.trade_off(plain, plain.arms) is None and "trade-off" not in render(plain)
    told = {"x": "gap", "y": "accuracy", "x_higher": False, "y_higher": True}
    for i, arm in enumerate(plain.arms):
        arm.metrics = pd.DataFrame({"seed": [0, 1], "test_gap": [0.1 + 0.02 * i, 0.3], "test_accuracy": [0.8, 0.9]})
        arm.tried = pd.DataFrame({"config": ["a", "b"], "test_gap": [0.02, math.nan], "test_accuracy": [0.7, 0.8]})
    comparison = replace(plain, trade_off=told)
    figure = figures.trade_off(comparison, comparison.arms)
    assert figure is not None and figure.title == "Accuracy against gap"
    assert figure.rows[0] == ["cross-entropy", "0.2000", "0.8500", "yes"] and figure.rows[1][3] == "no"
    svg = str(figure.panels[0].svg)
    assert svg.count('class="dot"') == len(plain.arms) and svg.count('class="front"') == 2
    assert 'id="trade-off-figure"' in render(comparison)


def test_axes_have_few_round_ticks_inside() -> None:
    for values in (
        [0.0, 1.0],
        [-3.2, 0.1],
        [91.23, 91.26],
        [1e-9, 2e-9],
        [5.0, 5.0],
        [0.0, 0.0],
        [],
        [1e8, 3e8],
        [math.nan, 1.0],
    ):
        axis = Axis.around(values)
        assert 1 <= len(axis.ticks) <= 6
        assert all(axis.low <= t <= axis.high for t in axis.ticks)
        assert all(axis.low < v < axis.high for v in values if math.isfinite(v))
        assert len({axis.text(t) for t in axis.ticks}) == len(axis.ticks)
    assert Axis.ratios([1.0, 1.0]).log is False
    assert Axis.ratios([1.0, 12.0]).ticks == (1.0, 2.0, 5.0, 10.0)
    assert 2 <= len(Axis.ratios([0.01, 5000.0]).ticks) <= 6


def test_labels_keep_their_distance_and_stay_inside() -> None:
    points = [(0.1, 100.0), (0.1, 100.0), (0.1, 101.0), (0.3, 117.0), (0.9, 5.0), (0.9, 199.0), (0.8, 198.0)]
    placed = list(place(points, range(7), 200).values())
    assert min(np.diff(sorted(placed))) >= 17
    assert min(placed) >= 8.5
    assert max(placed) <= 191.5
    assert placed[0] == pytest.approx(100, abs=1)
    assert all(abs(y - 117) >= 12 for y in placed[:3])  # the mark to their right is not covered
    assert len(place([(0.5, 50.0)] * 40, range(40), 100)) == 40  # too many to fit: drawn all the same


def test_bands_leave_out_what_is_not_finite() -> None:
    frame = pd.DataFrame({"seed": [0, 1, 0, 1], "epoch": [0, 0, 1, 1], "train_loss": [1.0, 3.0, math.nan, math.inf]})
    assert figures.band(frame, "train_loss", 1.0) == [(0, 2.0, 1.0, 3.0)]
    assert figures.band(frame, "other", 1.0) == []
    assert figures.band(pd.DataFrame(), "train_loss", 1.0) == []
