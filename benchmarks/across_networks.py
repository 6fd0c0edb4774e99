"""Which proxy orders policies best over all networks, and does a combination of two or three?

Scores and errors after fine-tuning are those of six studies of `evosearch fidelity`
(`results/fidelity-*-policies.csv`); nothing is measured anew. A row is one number of one proxy: its
mean tau over the networks, with a 95% bootstrap interval (policies are drawn anew within each
network), how far that is ahead of what is done by hand, L1, recalibration and top-1, and of what a
recipe does by default, on the same draws, and the lowest of the networks. Then the best number,
pair and triple (sums of logarithms, so no weights are fitted) are chosen on five networks and
judged on the sixth, which they have not seen; beside that, the mean of the one chosen on all six.

    python benchmarks/across_networks.py
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from common import RESULTS, parser, show, write
from numpy.typing import NDArray

NETWORKS = (
    "resnet20",
    "resnet56",
    "small-vgg",
    "small-resnext",
    "small-mobilenet",
    "resnet20-cifar100",
)
METRICS = ("error", "loss", "margin", "divergence", "distortion")
BY_HAND = "recalibrated-l1.error"
DEFAULT = "reconstructed.distortion"
RESAMPLES = 1000
# Scores may be zero; far below any that differ.
SMALLEST = 1e-6

Numbers = tuple[str, ...]
"""Names of the numbers that a combination sums the logarithms of."""


def study(network: str) -> pd.DataFrame:
    """Random policies of a study that were fine-tuned."""
    table = pd.read_csv(RESULTS / f"fidelity-{network}-policies.csv")
    return table[table["set"] == "random"].dropna(subset=["test.error"]).reset_index(drop=True)


def ordered(table: pd.DataFrame, numbers: Numbers) -> NDArray[np.float64]:
    """`(n, n)` signs of all differences of the sums of logarithms."""
    score = sum(np.log(np.maximum(table[name].to_numpy(), SMALLEST)) for name in numbers)
    signs: NDArray[np.float64] = np.sign(np.subtract.outer(score, score))
    return signs


def taus_of(
    score: NDArray[np.float64], truth: NDArray[np.float64], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`(resamples,)` Kendall's tau-b of signs, each policy taken so many times; 0 where constant.

    Copies of one policy are ties in both, so a resample's tau is a ratio of quadratic forms.
    """
    concordant, by_score, by_truth = (
        np.einsum("ri,ij,rj->r", counts, signs, counts, optimize=True)
        for signs in (score * truth, np.abs(score), np.abs(truth))
    )
    pairs = np.sqrt(by_score * by_truth)
    taus: NDArray[np.float64] = np.zeros_like(pairs)
    np.divide(concordant, pairs, out=taus, where=pairs > 0)
    return taus


def interval(values: NDArray[np.float64]) -> list[float]:
    """Ends of the central 95%."""
    return [float(end) for end in np.quantile(values, [0.025, 0.975])]


def ends(found: list[float]) -> str:
    """An interval in words."""
    return " to ".join(f"{end:.2f}" for end in found)


def held_out(taus: dict[Numbers, NDArray[np.float64]]) -> tuple[list[float], list[str]]:
    """For each network, tau of the combination that is best on the others, and its name."""
    names, table = list(taus), np.array(list(taus.values()))
    found, chosen = [], []
    for index in range(len(NETWORKS)):
        best = int(np.delete(table, index, axis=1).mean(axis=1).argmax())
        found.append(float(table[best, index]))
        chosen.append(" + ".join(names[best]))
    return found, chosen


@dataclass(frozen=True, eq=False)
class Studies:
    """What the studies found, one table for each network."""

    tables: list[pd.DataFrame]

    @property
    def numbers(self) -> list[str]:
        """Names of all that was read of every policy in every study."""
        everywhere = map(str, set.intersection(*(set(table.columns) for table in self.tables)))
        return sorted(
            name
            for name in everywhere
            if name in ("free.l1", "free.l2")
            or (name.rpartition(".")[2] in METRICS and not name.startswith(("test.", "held-out.")))
        )

    def taus(self, numbers: Numbers, counts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """`(networks, resamples)`, each policy of a network taken so many times."""
        return np.stack(
            [
                taus_of(ordered(table, numbers), ordered(table, ("test.error",)), mine)
                for table, mine in zip(self.tables, counts, strict=True)
            ]
        )

    def once(self, numbers: Numbers) -> NDArray[np.float64]:
        """`(networks,)` taus of the policies as they are."""
        return self.taus(numbers, [np.ones((1, len(table))) for table in self.tables])[:, 0]

    def rows(self) -> list[dict[str, Any]]:
        """Each number by itself, the best first."""
        generator = np.random.default_rng(0)
        draws = [
            generator.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)
            for n in map(len, self.tables)
        ]
        drawn = {name: self.taus((name,), draws).mean(axis=0) for name in self.numbers}
        rows: list[dict[str, Any]] = []
        for name, means in drawn.items():
            each = self.once((name,))
            rows.append(
                {
                    "number": name,
                    "taus": each.tolist(),
                    "mean": float(each.mean()),
                    "interval": interval(means),
                    "lowest": float(each.min()),
                    "ahead_of_by_hand": interval(means - drawn[BY_HAND]),
                    "ahead_of_default": interval(means - drawn[DEFAULT]),
                }
            )
        return sorted(rows, key=lambda row: -row["mean"])

    def combinations(self) -> list[dict[str, Any]]:
        """The best of so many numbers together, chosen with and without the network at hand."""
        found = []
        for terms in (1, 2, 3):
            taus = {
                numbers: self.once(numbers)
                for numbers in itertools.combinations(self.numbers, terms)
            }
            apart, chosen = held_out(taus)
            found.append(
                {
                    "terms": terms,
                    "mean": float(np.mean(apart)),
                    "chosen_on_all": max(float(each.mean()) for each in taus.values()),
                    "taus": apart,
                    "chosen": chosen,
                }
            )
        return found


def main() -> None:
    options = parser(__doc__).parse_args()
    studies = Studies([study(network) for network in NETWORKS])
    policies = [len(table) for table in studies.tables]
    rows, together = studies.rows(), studies.combinations()
    intervals = ("interval", "ahead_of_by_hand", "ahead_of_default")
    show(
        f"tau over {len(NETWORKS)} networks, {sum(policies)} policies",
        ["number", "mean", "95%", "ahead of by hand", "of the default", "lowest"],
        [
            [row["number"], row["mean"], *(ends(row[name]) for name in intervals), row["lowest"]]
            for row in rows
        ],
    )
    show(
        "chosen on five networks, judged on the sixth",
        ["terms", "mean", "chosen on all", *NETWORKS],
        [[str(c["terms"]), c["mean"], c["chosen_on_all"], *c["taus"]] for c in together],
    )
    write(
        "across_networks",
        options.json,
        {
            "networks": list(NETWORKS),
            "policies": policies,
            "resamples": RESAMPLES,
            "rows": rows,
            "held_out": together,
        },
    )


if __name__ == "__main__":
    main()
