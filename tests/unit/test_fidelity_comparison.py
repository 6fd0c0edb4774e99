"""From a journal to findings."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from evosearch.fidelity import statistics
from evosearch.fidelity.comparison import Comparison, compare
from evosearch.fidelity.journal import Journal
from evosearch.measurement import Status
from evosearch.networks import NetworkSpec, load_network
from evosearch.policy import Policy
from evosearch.pruning.groups import trace
from evosearch.pruning.table import GroupTable


@pytest.fixture(scope="module")
def table() -> GroupTable:
    return trace(load_network(NetworkSpec(name="resnet20", input_shape=(3, 32, 32)))).table


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 50)


def compared(
    folder: Path, table: GroupTable, lacking: Iterable[tuple[str, str]] = (), seeds: int = 1
) -> Comparison:
    """Two sets of 12 policies, three variants; of `lacking` sets one policy has no such score."""
    rng = np.random.default_rng(0)
    widths = rng.integers(4, 17, (24, len(table.groups)))
    policies = [Policy(tuple(map(int, row))) for row in widths]
    sets = {"random": policies[:12], "elite": policies[12:]}
    holes = {(name, variant, 3) for name, variant in lacking}
    with Journal.open(folder, {}) as journal:
        for name, mine in sets.items():
            for index, policy in enumerate(mine):
                truth = 1 - sum(policy.keep) / 200
                for variant in "ABC":
                    if (name, variant, index) not in holes:
                        journal.append(
                            "score",
                            variant=variant,
                            keep=policy.keep,
                            status=Status.OK,
                            metrics={"error": truth + 0.1 * rng.random()},
                            seconds=1.0,
                            reason=None,
                        )
                for seed in range(seeds):
                    number = truth + 0.05 * rng.random()
                    numbers = {"held-out.error": number, "held-out.loss": number}
                    journal.append(
                        "truth",
                        keep=policy.keep,
                        seed=seed,
                        numbers=numbers,
                        seconds=1.0,
                        reason=None,
                    )
        return compare(
            journal,
            sets,
            table,
            variants=["A", "B", "C"],
            seeds=seeds,
            parts=["held-out"],
            seed=0,
        )


def transferred(found: Comparison) -> set[str]:
    findings = found.of("elite", "held-out.error")
    return {f.predictor for f in findings if f.metric == "fitted on random"}


def test_what_was_learned_on_one_set_is_tried_on_the_other(
    tmp_path: Path, table: GroupTable
) -> None:
    found = transferred(compared(tmp_path, table))
    assert {"learned: A", "learned: all", "learned: all + widths", "learned: widths"} <= found


@pytest.mark.parametrize("lacking", [[("elite", "B")], [("random", "A"), ("elite", "B")]])
def test_fits_are_not_tried_where_their_numbers_are_missing(
    tmp_path: Path, table: GroupTable, lacking: list[tuple[str, str]]
) -> None:
    found = transferred(compared(tmp_path, table, lacking))
    assert {"learned: C", "learned: widths"} <= found
    assert found.isdisjoint({"learned: all", "learned: all + widths", "learned: B"})


def test_repeated_truths_leave_a_perfect_predictor_more_than_they_agree_to(
    tmp_path: Path, table: GroupTable
) -> None:
    found = compared(tmp_path, table, seeds=2)
    agreed = found.reliability["random", "held-out.error"]
    (said,) = found.remarks("random")
    assert said.startswith("ceiling            tau 0.")
    assert said.endswith(f"agree to {agreed.tau:.3f}")
    assert float(said.split("tau ")[1].split()[0]) > agreed.tau
