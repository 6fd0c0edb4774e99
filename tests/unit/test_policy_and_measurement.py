import hashlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evosearch.errors import PolicyError
from evosearch.measurement import METRICS, Measurement, Status
from evosearch.policy import Policy, widths_of

METRIC_VALUES = {
    "error": 0.25,
    "loss": 1.5,
    "margin": 0.5,
    "divergence": 0.125,
    "distortion": 0.0625,
}
POLICY = Policy((8, 16))

keeps = st.lists(st.integers(1, 10_000), max_size=60).map(tuple)


@given(keeps)
def test_policy_survives_json(keep: tuple[int, ...]) -> None:
    policy = Policy(keep)
    again = Policy.from_json(policy.to_json())
    assert again == policy
    assert again.digest == policy.digest


@given(keeps, keeps)
def test_policies_are_equal_exactly_if_their_digests_are(
    one: tuple[int, ...], other: tuple[int, ...]
) -> None:
    assert (Policy(one) == Policy(other)) == (Policy(one).digest == Policy(other).digest)


def test_digest_is_pinned_because_old_ledgers_rest_on_it() -> None:
    text = '{"keep":[8,16]}'
    assert POLICY.to_json() == text
    assert POLICY.digest == hashlib.sha256(text.encode()).hexdigest()[:16] == "1a993cd130b65009"


def test_policy_is_a_key() -> None:
    assert {POLICY: 1}[Policy((8, 16))] == 1


def test_policy_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="keep"):
        POLICY.keep = (1, 1)  # type: ignore[misc]


@pytest.mark.parametrize(("keep", "groups"), [((-1,), "0"), ((3, -1, 0, -2), "1, 3")])
def test_groups_that_keep_fewer_than_none_are_named(keep: tuple[int, ...], groups: str) -> None:
    with pytest.raises(PolicyError, match=rf"groups \[{groups}\] would keep fewer"):
        Policy(keep)


@pytest.mark.parametrize("count", [1.0, "1", None, np.int64(1), math.nan])
def test_policy_keeps_whole_python_integers(count: object) -> None:
    with pytest.raises(PolicyError, match="a policy keeps whole channels"):
        Policy((count,))  # type: ignore[arg-type]


def test_policy_takes_no_booleans() -> None:
    with pytest.raises(PolicyError, match="a policy keeps whole channels"):
        Policy((True, 2))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", "{}", '{"keep": 3}', '{"keep": null}', '{"Keep": [1]}'],
)
def test_text_that_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="not a policy"):
        Policy.from_json(text)


@pytest.mark.parametrize("text", ['{"keep": [1.5]}', '{"keep": ["1"]}', '{"keep": "12"}'])
def test_json_with_other_than_integers_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="a policy keeps whole channels"):
        Policy.from_json(text)


def test_json_of_fewer_channels_than_none_is_refused() -> None:
    assert Policy.from_json('{"keep": [4, 0]}') == Policy((4, 0))
    with pytest.raises(PolicyError, match="would keep fewer channels than none"):
        Policy.from_json('{"keep": [4, -1]}')


# --- blends

BLEND = ((("l1", 2), ("apoz", 4)), ())
pairs = st.dictionaries(st.text(max_size=5), st.integers(1, 20), max_size=3)


@given(st.lists(st.tuples(st.integers(1, 9), pairs), max_size=5))
def test_policy_with_a_blend_survives_json(groups: list[tuple[int, dict[str, int]]]) -> None:
    policy = Policy(tuple(k for k, _ in groups), tuple(tuple(b.items()) for _, b in groups))
    again = Policy.from_json(policy.to_json())
    assert again == policy
    assert again.digest == policy.digest


def test_digest_of_a_blend_is_pinned() -> None:
    text = '{"keep":[8,16],"blend":[{"apoz":2,"l1":1},{}]}'
    assert Policy((8, 16), BLEND).to_json() == text
    assert Policy((8, 16), BLEND).digest == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "blend",
    [
        ((("apoz", 2), ("l1", 1)), ()),
        ((("l1", 10), ("apoz", 20)), ()),
    ],
)
def test_blends_in_equal_shares_are_equal(blend: Any) -> None:
    assert Policy((8, 16), blend) == Policy((8, 16), BLEND)


def test_blend_of_nothing_is_no_blend() -> None:
    assert Policy((8, 16), ((), ())) == POLICY
    assert Policy((8, 16), ((), ())).digest == POLICY.digest


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        (((("l1", 1),),), "a policy of 2 groups has 1 blends"),
        (((("l1", 0),), ()), "group 0: .* a whole weight above 0"),
        (((), (("l1", 0.5),)), "group 1: .* a whole weight above 0"),
        (((), (("l1", True),)), "group 1: .* a whole weight above 0"),
        (((("l1", 1), ("l1", 2)), ()), "names each criterion once"),
    ],
)
def test_blend_that_is_none_is_refused(blend: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy((8, 16), blend)


@pytest.mark.parametrize("text", ['{"keep":[1],"blend":3}', '{"keep":[1],"blend":[7]}'])
def test_json_of_a_blend_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(PolicyError, match="not a policy"):
        Policy.from_json(text)


def test_measurement_with_all_metrics_is_ok() -> None:
    measurement = Measurement(policy=POLICY, status=Status.OK, metrics=METRIC_VALUES)
    assert measurement.ok
    assert measurement.metrics == METRIC_VALUES


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", METRICS)
def test_ok_measurement_with_a_number_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"finite .*; bad: \['{name}'\]"):
        Measurement(policy=POLICY, status=Status.OK, metrics={**METRIC_VALUES, name: value})


def test_ok_measurement_names_all_metrics_that_it_lacks() -> None:
    with pytest.raises(ValueError, match=r"bad: \['loss', 'margin', 'divergence', 'distortion'\]"):
        Measurement(policy=POLICY, status=Status.OK, metrics={"error": 0.5})


failures = pytest.mark.parametrize(
    "status", [s for s in Status if s not in (Status.OK, Status.DROPPED)]
)


@failures
def test_failure_with_a_reason_has_no_metrics(status: Status) -> None:
    measurement = Measurement(policy=POLICY, status=status, reason="it burnt")
    assert not measurement.ok
    assert measurement.metrics == {}


@failures
@pytest.mark.parametrize("reason", [None, ""])
def test_failure_without_a_reason_is_refused(status: Status, reason: str | None) -> None:
    with pytest.raises(ValueError, match=rf"a {status} measurement has a reason"):
        Measurement(policy=POLICY, status=status, reason=reason)


@failures
def test_failure_with_metrics_is_refused(status: Status) -> None:
    with pytest.raises(ValueError, match=rf"a {status} measurement has no metrics"):
        Measurement(policy=POLICY, status=status, metrics=METRIC_VALUES, reason="it burnt")


def test_dropped_measurement_has_estimates_and_a_reason() -> None:
    measurement = Measurement(
        policy=POLICY, status=Status.DROPPED, metrics=METRIC_VALUES, reason="worse", images=128
    )
    assert not measurement.ok
    assert not measurement.failed
    with pytest.raises(ValueError, match="finite"):
        Measurement(policy=POLICY, status=Status.DROPPED, reason="worse")
    with pytest.raises(ValueError, match="has a reason"):
        Measurement(policy=POLICY, status=Status.DROPPED, metrics=METRIC_VALUES)


def test_status_reads_as_in_the_ledger() -> None:
    names = ["ok", "dropped", "failed", "timeout", "out-of-memory", "worker-lost"]
    assert [str(status) for status in Status] == names
    assert Status("out-of-memory") is Status.OUT_OF_MEMORY


def test_widths_of_no_policies_have_columns_all_the_same() -> None:
    assert widths_of([], 3).shape == (0, 3)
    assert widths_of([Policy((1, 2, 3))], 3).tolist() == [[1, 2, 3]]
