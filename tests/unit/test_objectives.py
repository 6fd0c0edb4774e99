import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evosearch.errors import BudgetUnreachable, ConfigError
from evosearch.measurement import METRICS
from evosearch.scoring.objectives import (
    COSTS,
    Constraint,
    Goals,
    reference_point,
    worst_metrics,
)

NAMES = (*METRICS, *COSTS)
VALUES = {
    "error": 0.2,
    "loss": 0.9,
    "margin": 0.4,
    "divergence": 0.1,
    "distortion": 0.3,
    "macs": 0.5,
    "params": 0.25,
}


@pytest.mark.parametrize(
    ("text", "name", "bound"),
    [
        ("macs <= 0.5", "macs", 0.5),
        ("macs<=0.5", "macs", 0.5),
        ("  error  <=  1  ", "error", 1.0),
        ("params <= .25", "params", 0.25),
        ("loss <= 2.5e-1", "loss", 0.25),
        ("divergence <= +1E1", "divergence", 10.0),
    ],
)
def test_constraint_is_read(text: str, name: str, bound: float) -> None:
    assert Constraint.parse(text) == Constraint(name=name, bound=bound)


@given(st.sampled_from(NAMES), st.floats(1e-3, 1e3))
def test_constraint_survives_its_text(name: str, bound: float) -> None:
    rounded = Constraint(name=name, bound=float(f"{bound:g}"))
    assert Constraint.parse(str(rounded)) == rounded


@pytest.mark.parametrize(
    "text",
    [
        "",
        "macs",
        "macs <=",
        "<= 0.5",
        "macs < 0.5",
        "macs >= 0.5",
        "macs = 0.5",
        "0.5 >= macs",
        "macs <= half",
        "macs <= nan",
        "macs <= 0.5 %",
        "macs <= 1.2.3",
        "macs <= 0.5, params <= 0.5",
        "MACs <= 0.5",
    ],
)
def test_constraint_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"must read like 'macs <= 0.5'; names are error, loss"):
        Constraint.parse(text)


def test_constraint_on_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'flops <= 0.5': unknown 'flops'; there are error, .*"):
        Constraint.parse("flops <= 0.5")


@pytest.mark.parametrize("bound", ["0", "-0.5", "-0.0"])
def test_constraint_that_nothing_satisfies_is_refused(bound: str) -> None:
    with pytest.raises(ConfigError, match=r"the bound must be positive"):
        Constraint.parse(f"macs <= {bound}")


def test_goals_name_each_objective_once() -> None:
    with pytest.raises(ConfigError, match=r"at least one, each once, got \('error', 'error'\)"):
        Goals(objectives=("error", "error"))


def test_goals_name_at_least_one_objective() -> None:
    with pytest.raises(ConfigError, match=r"at least one, each once, got \(\)"):
        Goals(objectives=())


def test_goals_refuse_an_unknown_objective() -> None:
    with pytest.raises(ConfigError, match=r"search\.objectives: unknown 'accuracy'; there are"):
        Goals(objectives=("error", "accuracy"))


def test_vector_keeps_the_order_of_the_objectives() -> None:
    goals = Goals(objectives=("params", "error", "macs"))
    assert goals.vector(VALUES).tolist() == [0.25, 0.2, 0.5]


def goals_with(*constraints: str) -> Goals:
    return Goals(objectives=("error",), constraints=tuple(map(Constraint.parse, constraints)))


@pytest.mark.parametrize(
    ("constraint", "violation"),
    [
        ("macs <= 0.4", 0.25),
        ("macs <= 0.5", 0.0),
        ("macs <= 1", -0.5),
        ("error <= 0.1", 1.0),
        ("loss <= 1.8", -0.5),
    ],
)
def test_violation_is_relative_to_the_bound(constraint: str, violation: float) -> None:
    assert goals_with(constraint).violations(VALUES) == pytest.approx([violation])


def test_missing_value_violates_its_constraint() -> None:
    goals = goals_with("error <= 0.3", "macs <= 0.5")
    assert goals.violations({"macs": 0.25, "params": 0.25}).tolist() == [1.0, -0.5]


def test_no_constraints_are_no_violations() -> None:
    assert goals_with().violations(VALUES).shape == (0,)


@pytest.mark.parametrize(("macs", "answer"), [(0.5, True), (0.5 + 1e-12, False), (0.1, True)])
def test_affordable_is_what_costs_allow(macs: float, answer: bool) -> None:
    goals = goals_with("macs <= 0.5", "params <= 0.9", "error <= 0.0001")
    assert goals.affordable({"macs": macs, "params": 0.9}) is answer


def test_constraints_on_metrics_leave_everything_affordable() -> None:
    assert goals_with("error <= 0.1").affordable({"macs": 1.0, "params": 1.0})


def test_budget_below_the_cheapest_policy_names_the_reachable_range() -> None:
    sentence = r"params <= 0\.01 is out of reach; .* params can be 0\.0200 to 0\.9000 of dense"
    with pytest.raises(BudgetUnreachable, match=sentence):
        goals_with("macs <= 0.5", "params <= 0.01").check_reachable(
            {"macs": 0.1, "params": 0.02}, {"macs": 1.0, "params": 0.9}
        )


@pytest.mark.parametrize("bound", ["0.1", "0.5", "7"])
def test_budget_that_the_cheapest_policy_meets_is_reachable(bound: str) -> None:
    costs = {"macs": 0.1, "params": 0.1}
    goals_with(f"macs <= {bound}", "error <= 0.001").check_reachable(costs, costs)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_worst_metrics_are_those_of_uniform_outputs(classes: int) -> None:
    rng = np.random.default_rng(classes)
    logits = rng.normal(0, 3, (50, classes)).astype(np.float32)
    p = np.exp(logits.astype(float))
    p /= p.sum(axis=1, keepdims=True)
    uniform = np.full(classes, 1 / classes)
    worst = worst_metrics(logits)
    assert worst["error"] == pytest.approx(1 - 1 / classes)
    assert worst["loss"] == pytest.approx(-np.log(uniform[0]))
    assert worst["divergence"] == pytest.approx((p * np.log(p / uniform)).sum(axis=1).mean())


def test_worst_metrics_survive_huge_logits() -> None:
    logits = np.array([[1e4, -1e4, 0.0], [0.0, 3e38, 0.0]], dtype=np.float32)
    worst = worst_metrics(logits)
    assert set(worst) == set(METRICS)
    assert np.isfinite(list(worst.values())).all()
    assert worst["divergence"] == pytest.approx(np.log(3))


def test_worst_metrics_leave_logits_as_they_were() -> None:
    logits = np.ones((2, 3), dtype=np.float32)
    logits.setflags(write=False)
    assert worst_metrics(logits)["divergence"] == pytest.approx(0, abs=1e-12)


def test_reference_point_is_dense_for_costs_and_worst_for_metrics() -> None:
    worst = {"error": 0.9, "loss": 2.3, "divergence": 2.1}
    point = reference_point(("macs", "divergence", "error", "params"), worst)
    assert point.tolist() == [1.0, 2.1, 0.9, 1.0]
