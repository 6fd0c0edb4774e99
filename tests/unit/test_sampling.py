"""Reading layers at positions: what is read is what the layer computes with."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from evosearch.pruning.sampling import (
    Sampler,
    drawn_positions,
    flat_weight,
    output_size,
    shaped_weight,
)

sides = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    kernel=sides,
    stride=sides,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    channels=st.integers(1, 4),
    last=st.booleans(),
)
def test_patches_times_weight_are_the_outputs(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    channels: int,
    last: bool,
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 5, kernel, stride, padding, dilation)
    x = torch.randn(3, channels, 8, 7)
    if last:
        x = x.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        output = layer(x)
        positions = drawn_positions("layer", (output.shape[2], output.shape[3]), 6)
        sampler = Sampler(positions)
        rows = sampler.patches(x, layer)
        found = rows @ flat_weight(layer.weight).T + layer.bias
        wanted = sampler.outputs(output)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        by_hand = output[:, :, positions[:, 0], positions[:, 1]].transpose(1, 2).reshape(-1, 5)
        assert torch.equal(wanted, by_hand)
        assert torch.equal(shaped_weight(flat_weight(layer.weight), layer.weight), layer.weight)
        # Another batch of another size is not read with the indices of the first.
        assert torch.equal(sampler.patches(x[:2], layer), rows[: 2 * len(positions)])


def test_positions_are_distinct_and_inside() -> None:
    found = drawn_positions("a", (4, 6), 10)
    assert len({tuple(p) for p in found}) == 10
    assert (found < (4, 6)).all()
    assert np.array_equal(found, drawn_positions("a", (4, 6), 10))
    assert not np.array_equal(found, drawn_positions("b", (4, 6), 10))
    assert len(drawn_positions("a", (2, 2), 10)) == 4


def test_outputs_are_a_copy() -> None:
    output = torch.ones(2, 3)
    read = Sampler(None).outputs(output)
    output.zero_()
    assert read.eq(1).all()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
def test_size_of_the_output_is_that_of_the_convolution(
    stride: int, padding: int, dilation: int
) -> None:
    layer = nn.Conv2d(3, 4, (3, 2), stride=stride, padding=padding, dilation=dilation)
    x = torch.zeros(1, 3, 13, 16)
    assert output_size(layer, x) == tuple(layer(x).shape[2:])


def test_a_sampler_reads_maps_of_one_size_after_those_of_another() -> None:
    positions = np.array([[0, 1], [3, 2], [4, 4]])
    layer = nn.Conv2d(2, 3, 3, padding=1)
    kept = Sampler(positions)
    for shape in ((4, 2, 6, 5), (2, 2, 6, 5), (4, 2, 5, 6), (4, 2, 6, 5)):
        maps, fresh = torch.randn(shape), Sampler(positions)
        assert torch.equal(kept.outputs(maps), fresh.outputs(maps))
        assert torch.equal(kept.patches(maps, layer), fresh.patches(maps, layer))
    kept = Sampler(np.array([[0], [2]]))
    for shape in ((4, 3, 8), (2, 3, 8), (2, 5, 8)):
        tokens, fresh = torch.randn(shape), Sampler(np.array([[0], [2]]))
        assert torch.equal(kept.outputs(tokens), fresh.outputs(tokens))
