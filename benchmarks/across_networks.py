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


def held_out(taus: dict[Numbers, NDArray[np.float64]], terms: int) -> tuple[list[float], list[str]]:
    """For each network, tau of the combination that is best on the others, and its name."""
    names = [numbers for numbers in taus if len(numbers) == terms]
    table = np.array([taus[numbers] for numbers in names])
    found, chosen = [], []
    for index in range(len(NETWORKS)):
        best = int(np.delete(table, index, axis=1).mean(axis=1).argmax())
        found.append(float(table[best, index]))
        chosen.append(" + ".join(names[best]))
    return found, chosen


def main() -> None:
    options = parser(__doc__).parse_args()
    tables = [study(network) for network in NETWORKS]
    everywhere = set.intersection(*(set(table.columns) for table in tables))
    numbers = sorted(
        name
        for name in map(str, everywhere)
        if name.rpartition(".")[2] in METRICS and not name.startswith(("test.", "held-out."))
    )
    free = sorted(name for name in map(str, everywhere) if name in ("free.l1", "free.l2"))
    truths = [ordered(table, ("test.error",)) for table in tables]
    generator = np.random.default_rng(0)
    draws = [
        generator.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)
        for n in map(len, tables)
    ]
    once = [np.ones((1, len(table))) for table in tables]

    def judged(chosen: Numbers, counts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """`(networks, resamples)` taus."""
        scores = [ordered(table, chosen) for table in tables]
        return np.stack(list(map(taus_of, scores, truths, counts)))

    drawn = {name: judged((name,), draws).mean(axis=0) for name in (*numbers, *free)}
    rows: list[dict[str, Any]] = []
    for name in (*numbers, *free):
        each = judged((name,), once)[:, 0]
        rows.append(
            {
                "number": name,
                "taus": each.tolist(),
                "mean": float(each.mean()),
                "interval": interval(drawn[name]),
                "lowest": float(each.min()),
                "ahead_of_by_hand": interval(drawn[name] - drawn[BY_HAND]),
                "ahead_of_default": interval(drawn[name] - drawn[DEFAULT]),
            }
        )
    rows.sort(key=lambda row: -row["mean"])
    taus = {
        chosen: judged(chosen, once)[:, 0]
        for terms in (1, 2, 3)
        for chosen in itertools.combinations([*numbers, *free], terms)
    }
    apart = {terms: held_out(taus, terms) for terms in (1, 2, 3)}
    flattered = {
        terms: max(float(found.mean()) for chosen, found in taus.items() if len(chosen) == terms)
        for terms in apart
    }
    show(
        f"tau over {len(NETWORKS)} networks, {sum(map(len, tables))} policies",
        ["number", "mean", "95%", "ahead of by hand", "of the default", "lowest"],
        [
            [
                row["number"],
                row["mean"],
                *(ends(row[name]) for name in ("interval", "ahead_of_by_hand", "ahead_of_default")),
                row["lowest"],
            ]
            for row in rows
        ],
    )
    show(
        "chosen on five networks, judged on the sixth",
        ["terms", "mean", "chosen on all", *NETWORKS],
        [
            [str(terms), float(np.mean(found)), flattered[terms], *found]
            for terms, (found, _) in apart.items()
        ],
    )
    write(
        "across_networks",
        options.json,
        {
            "networks": list(NETWORKS),
            "policies": [len(table) for table in tables],
            "resamples": RESAMPLES,
            "rows": rows,
            "held_out": [
                {
                    "terms": terms,
                    "mean": float(np.mean(found)),
                    "chosen_on_all": flattered[terms],
                    "taus": found,
                    "chosen": chosen,
                }
                for terms, (found, chosen) in apart.items()
            ],
        },
    )


if __name__ == "__main__":
    main()
