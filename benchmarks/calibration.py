"""Is a verdict of `equipoise compare` wrong as seldom as it says, and do its intervals cover what they say they cover?

    python benchmarks/calibration.py           # simulated trials, half a minute
    python benchmarks/calibration.py --real    # and real ones: the same training entered twice, on digits; some minutes

Every simulated trial is judged by the functions that judge a user's trial (`equipoise.comparison.statistics`):

- **independent**: each seed brings test data of its own. Arms share what a seed does to all of them (common random numbers).
  "A/A": all arms are equal. "effect": the first arm beats the baseline by a known amount, the others equal it. A false
  positive is a trial in which an arm that equals the baseline is called better or worse, or one that is better is called
  worse. Required: 95 % intervals cover the truth in [93, 97] %; the share of trials with a false positive, nominally 5 %, lies
  in [3, 6] % for A/A and is at most 6 % with an effect (Holm's procedure spends part of its 5 % on the arm that is better, so
  that a share below 3 % is right there).
- **collapses**: the first arm is better by 0.01, but every arm other than the baseline loses 0.1 in one run of ten, so that the
  first equals the baseline on average. Five seeds often hold no such run, and no statistic can then know of it. A limit, shown
  so that nobody believes there is none; nothing is required.
- **resampled**: seeds re-split one finite data set of 300 examples into 240 and 60; the truth is over all data sets of that
  size. Each arm is a nearest-centroid classifier that sees its own block of features, in a problem that is the same in
  every block, so that true differences are exactly 0 and yet differ on every data set. Shown with Nadeau and Bengio's
  correction and without.
- **real**: a pool of trainings on re-split digits. A comparison draws five splits and, in each, two trainings that differ in
  their seed. Given the split both are equal in expectation, so that the overlap of splits does no harm here, and the
  corrected test is right to be more careful than its nominal level, never less.

Exit code 1 if a requirement is not met.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from equipoise.comparison.statistics import holm, paired_difference, verdict

Values = np.ndarray  # (arms, seeds), the baseline first
FALSE_POSITIVES = (0.03, 0.06)
COVERAGE = (0.93, 0.97)
ALL = (0.0, 1.0)


@dataclass
class Tally:
    """What became of many trials of one kind."""

    name: str
    arms: int
    seeds: int
    limits: tuple[tuple[float, float], tuple[float, float]] = (ALL, ALL)
    trials: int = 0
    false_positives: int = 0
    covered: int = 0
    intervals: int = 0
    found: int = 0
    effects: int = 0

    def add(self, values: Values, truth: Values, correction: float = 0.0) -> None:
        """Judge one trial; ``truth`` (arms - 1,) holds the true differences from the baseline."""
        estimates = [paired_difference(arm, values[0], correction=correction) for arm in values[1:]]
        adjusted = holm([estimate.p for estimate in estimates])
        wrong = False
        for estimate, p, true in zip(estimates, adjusted, truth, strict=True):
            said = verdict(estimate, p, higher_is_better=True)
            right = "better" if true > 0 else "worse" if true < 0 else "no difference seen"
            wrong |= said not in (right, "no difference seen")
            self.covered += estimate.low <= true <= estimate.high
            self.found += true != 0 and said == right
            self.effects += true != 0
        self.trials += 1
        self.intervals += len(truth)
        self.false_positives += wrong

    @property
    def rate(self) -> float:
        """Share of trials with a false positive."""
        return self.false_positives / self.trials

    @property
    def coverage(self) -> float:
        """Share of intervals that hold the true difference."""
        return self.covered / self.intervals

    @property
    def required(self) -> bool:
        return self.limits != (ALL, ALL)

    @property
    def passed(self) -> bool:
        (low, high), (least, most) = self.limits
        return low <= self.rate <= high and least <= self.coverage <= most

    def __str__(self) -> str:
        found = f"{100 * self.found / self.effects:5.1f}" if self.effects else "    -"
        # Intervals of one trial share a baseline: the error counts trials, which is the careful choice.
        errors = [100 * math.sqrt(x * (1 - x) / self.trials) for x in (self.rate, self.coverage)]
        return (
            f"{self.name:<42} {self.arms:>4} {self.seeds:>5} {self.trials:>7}   {100 * self.rate:5.2f} ± {errors[0]:.2f}"
            f"   {100 * self.coverage:6.2f} ± {errors[1]:.2f}  {found}   "
            + ("" if not self.required else "ok" if self.passed else "OUTSIDE")
        )


HEADER = (
    f"{'kind':<42} {'arms':>4} {'seeds':>5} {'trials':>7}   {'false +, %':>12}   {'coverage, %':>13}  found   required"
)


# -- simulated trials -----------------------------------------------------------------------------------------------------
def independent(
    rng: np.random.Generator, trials: int, arms: int, seeds: int, effect: float, kind: str
) -> Iterator[tuple[Values, Values]]:
    """Accuracies of arms that share each seed's difficulty, with test data of their own for every seed.

    kind: "normal"; "counts", the share of right answers to 360 test questions; "collapses", see above.
    effect: of the first arm, in accuracy. Yields values (arms, seeds) and true differences (arms - 1,).
    """
    truth = np.zeros(arms - 1)
    truth[0] = effect
    for _ in range(trials):
        values = 0.85 + 0.03 * rng.standard_normal(seeds) + 0.01 * rng.standard_normal((arms, seeds))
        values[1:] += truth[:, None]
        expected = truth
        if kind == "counts":
            values = rng.binomial(360, np.clip(values, 0.0, 1.0)) / 360
        elif kind == "collapses":
            values[1:] -= 0.1 * (rng.random((arms - 1, seeds)) < 0.1)
            expected = truth - 0.01
        yield values, expected


def resampled(rng: np.random.Generator, trials: int, arms: int, seeds: int) -> Iterator[tuple[Values, Values]]:
    """Accuracies of nearest-centroid classifiers, one for each block of features, on splits of one data set a trial."""
    examples, held_out, width = 300, 60, 4
    for _ in range(trials):
        labels = rng.choice([-1.0, 1.0], examples)
        inputs = rng.standard_normal((arms, examples, width)) + 0.4 * labels[:, None]
        values = np.empty((arms, seeds))
        for seed in range(seeds):
            order = rng.permutation(examples)
            test, train = order[:held_out], order[held_out:]
            positive = labels[train] > 0
            up, down = inputs[:, train[positive]].mean(1), inputs[:, train[~positive]].mean(1)
            scores = np.einsum("anw,aw->an", inputs[:, test] - ((up + down) / 2)[:, None], up - down)
            values[:, seed] = (np.sign(scores) == labels[test]).mean(1)
        yield values, np.zeros(arms - 1)


def simulate(trials: int, seed: int = 0) -> list[Tally]:
    """All simulated kinds, ``trials`` of each."""
    tallies: list[Tally] = []

    def judge(tally: Tally, effect: float, kind: str) -> None:
        rng = np.random.default_rng([seed, len(tallies)])
        for values, truth in independent(rng, trials, tally.arms, tally.seeds, effect, kind):
            tally.add(values, truth)
        tallies.append(tally)

    for kind in ("normal", "counts"):
        for effect in (0.0, 0.02):
            for arms in (3, 4):
                for seeds in (5, 10):
                    limits = ((0.0, FALSE_POSITIVES[1]) if effect else FALSE_POSITIVES, COVERAGE)
                    name = f"independent, {kind}, {'effect' if effect else 'A/A'}"
                    judge(Tally(name, arms, seeds, limits), effect, kind)
    for seeds in (5, 10):
        judge(Tally("collapses (a limit)", 3, seeds), 0.01, "collapses")
    for seeds in (5, 10):
        rng = np.random.default_rng([seed, len(tallies)])
        with_correction = Tally("resampled, corrected", 3, seeds)
        without = Tally("resampled, not corrected", 3, seeds)
        for values, truth in resampled(rng, trials, 3, seeds):
            with_correction.add(values, truth, correction=60 / 240)
            without.add(values, truth)
        tallies += [with_correction, without]
    return tallies


# -- real trials ------------------------------------------------------------------------------------------------------------
def train(split: int, seed: int, epochs: int = 10) -> float:
    """Test accuracy of a small network on one split of digits (1437 training and 360 test images)."""
    import torch
    from sklearn.datasets import load_digits

    from equipoise.training import fit

    torch.set_num_threads(1)
    digits = load_digits()
    inputs = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(split))
    test, training = order[:360], order[360:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    run = fit(model, (inputs[training], labels[training]), epochs=epochs, batch_size=64, seed=seed)
    prediction, targets = run.predict((inputs[test], labels[test]))
    return float((prediction.argmax(1) == targets).double().mean())


def pool(splits: int, seeds: int, jobs: int) -> Values:
    """Test accuracies (splits, seeds) of real trainings."""
    import joblib

    runs = (joblib.delayed(train)(split, seed) for split in range(splits) for seed in range(seeds))
    return np.array(joblib.Parallel(n_jobs=jobs)(runs)).reshape(splits, seeds)


def real(accuracies: Values, trials: int, seeds: int, arms: int, seed: int = 0) -> list[Tally]:
    """Trials drawn from a pool: ``arms`` different trainings in each of ``seeds`` different splits, the baseline first."""
    rng = np.random.default_rng(seed)
    with_correction = Tally("real A/A, corrected", arms, seeds, ((0.0, FALSE_POSITIVES[1]), (COVERAGE[0], 1.0)))
    without = Tally("real A/A, not corrected", arms, seeds)
    for _ in range(trials):
        splits = rng.choice(len(accuracies), seeds, replace=False)
        values = np.stack([accuracies[s, rng.choice(accuracies.shape[1], arms, replace=False)] for s in splits], axis=1)
        with_correction.add(values, np.zeros(arms - 1), correction=360 / 1437)
        without.add(values, np.zeros(arms - 1))
    return [with_correction, without]


def main(arguments: list[str] | None = None) -> int:
    """Run the calibration, print the table, return the exit code."""
    parser = argparse.ArgumentParser(description="Error rates and coverage of the comparison's statistics.")
    parser.add_argument(
        "--trials", type=int, default=10_000, help="simulated trials of each kind (default: %(default)s)"
    )
    parser.add_argument("--real", action="store_true", help="train real networks too")
    parser.add_argument("--splits", type=int, default=200, help="splits of the real pool (default: %(default)s)")
    parser.add_argument("--trainings", type=int, default=6, help="trainings on each split (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time (default: %(default)s)")
    options = parser.parse_args(arguments)

    start = time.perf_counter()
    print(HEADER)
    tallies = simulate(options.trials)
    print("\n".join(map(str, tallies)))
    if options.real:
        accuracies = pool(options.splits, options.trainings, options.jobs)
        found = [t for arms in (2, 3) for t in real(accuracies, 2_000, 5, arms)]
        print("\n".join(map(str, found)))
        within = accuracies.std(1, ddof=1).mean()
        print(
            f"\nThe pool: {accuracies.size} trainings on {len(accuracies)} splits, mean accuracy {accuracies.mean():.4f}, standard "
            f"deviation {within:.4f} within a split and {accuracies.mean(1).std(ddof=1):.4f} between splits. Trials drawn from it "
            "share trainings, so that the errors shown for them are too small."
        )
        tallies += found
    passed = all(tally.passed for tally in tallies)
    print(
        f"\n{'All requirements met' if passed else 'A requirement is NOT met'} ({time.perf_counter() - start:.0f} s)."
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
