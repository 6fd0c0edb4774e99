"""What exceptions of others come to."""

import pytest
import torch

from evosearch.errors import first_line, out_of_memory


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  two \n"), "two"),
        (ValueError(), "ValueError()"),
        (AssertionError(""), "AssertionError('')"),
    ],
)
def test_first_line_is_never_nothing(error: Exception, said: str) -> None:
    assert first_line(error) == said


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA: none left"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_short_memory_is_known_by_type_or_words(error: Exception, is_it: bool) -> None:
    assert out_of_memory(error) is is_it
