"""On a GPU nothing waits layer by layer: shown without one, by tensors that have no numbers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_TRIES = 4


def printed(script: str, *arguments: str) -> Any:
    """What a script found."""
    command = [sys.executable, "-m", f"tests.unit.{script}", *arguments]
    for _ in range(_TRIES):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        # Fake tensors are experimental: now and then a process of theirs dies of its memory. What
        # this test is about fails every time.
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_candidate_asks_a_gpu_for_nothing_but_its_answers() -> None:
    found = printed("fake_gpu", "resnet20,all", "resnet32,cut")
    # Outputs and distortion of two batches come back, whatever the depth, and whatever is fitted.
    assert [counts["cuda to cpu"] for counts in found] == [4] * 2
    # Indices of the cut, both compensations and the fit go there; the classifier's target.
    (there,) = {counts["cpu to cuda"] for counts in found}
    assert there <= 8


def test_training_asks_a_gpu_for_nothing_before_the_epoch_is_over() -> None:
    short, long = printed("fake_gpu_training")
    # Whether the loss is finite, its mean, and top-1: once, however many steps there were.
    assert short["numbers"] == long["numbers"] == 3
    # Images, their mean and scale, and labels of each step go there, and nothing comes back.
    assert (short.pop("cpu to cuda"), long.pop("cpu to cuda")) == (2 * 4, 5 * 4)
    assert short == long == {"numbers": 3}
