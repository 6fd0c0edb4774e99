"""Choosing images, and every source they come from."""

import json
import os
import pickle
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image

from evosearch.data import (
    DATASETS,
    DataSource,
    Images,
    SourceOptions,
    augment,
    balanced_subset,
    held_out_mask,
    open_source,
)
from evosearch.errors import DataError

PARTS = {"calibration": 1000, "validation": 2000, "test": 2000}

some_labels = hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 4))
seeds = st.integers(0, 5)
# Repeatable, and patient with a busy machine.
steady = settings(deadline=None, derandomize=True)


@st.composite
def labels_and_size(draw: st.DrawFn) -> tuple[NDArray[np.int64], int]:
    labels = draw(some_labels)
    return labels, draw(st.integers(1, len(labels)))


def images(n: int = 20, size: int = 4) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return {"images": pixels, "labels": np.arange(n) % 4}


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


# --- balanced_subset


@steady
@given(labels_and_size(), seeds)
def test_chosen_indices_are_distinct_and_as_many_as_wanted(
    case: tuple[NDArray[np.int64], int], seed: int
) -> None:
    labels, size = case
    chosen = balanced_subset(labels, size, seed)
    assert len(set(chosen.tolist())) == size
    assert chosen.min() >= 0
    assert chosen.max() < len(labels)


@steady
@given(labels_and_size(), seeds)
def test_chosen_classes_differ_by_at_most_one_unless_a_class_is_used_up(
    case: tuple[NDArray[np.int64], int], seed: int
) -> None:
    labels, size = case
    taken = np.bincount(labels[balanced_subset(labels, size, seed)], minlength=5)
    there = np.bincount(labels, minlength=5)
    left = taken[taken < there]
    assert taken.max() - left.min(initial=taken.max()) <= 1


@steady
@given(labels_and_size(), seeds)
def test_equal_arguments_choose_equal_indices(
    case: tuple[NDArray[np.int64], int], seed: int
) -> None:
    first, second = balanced_subset(*case, seed), balanced_subset(*case, seed)
    assert np.array_equal(first, second)


@steady
@given(some_labels)
def test_choosing_does_not_change_the_labels(labels: NDArray[np.int64]) -> None:
    before = labels.copy()
    balanced_subset(labels, 1, 0)
    assert np.array_equal(labels, before)


def test_another_seed_chooses_other_indices() -> None:
    labels = np.arange(1000) % 10
    assert not np.array_equal(balanced_subset(labels, 100, 0), balanced_subset(labels, 100, 1))


def test_chosen_order_mixes_the_classes() -> None:
    labels = np.repeat(np.arange(10), 50)
    chosen = labels[balanced_subset(labels, 200, 0)]
    assert len(np.unique(chosen[:40])) == 10


def test_all_images_can_be_chosen() -> None:
    assert sorted(balanced_subset(np.array([2, 2, 0]), 3, 0).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("size", [-1, 0, 4])
def test_choosing_none_or_too_many_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=f"wanted {size} images of the 3 there are"):
        balanced_subset(np.array([0, 1, 2]), size, 0)


def test_choosing_from_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="wanted 1 images of the 0 there are"):
        balanced_subset(np.array([], dtype=np.int64), 1, 0)


# --- held_out_mask


@steady
@given(labels_and_size(), seeds, st.booleans())
def test_as_many_images_are_held_out_as_wanted(
    case: tuple[NDArray[np.int64], int], seed: int, official: bool
) -> None:
    labels, size = case
    mask = held_out_mask(labels, size - 1, official_order=official, seed=seed)
    assert mask.dtype == np.bool_
    assert (len(mask), mask.sum()) == (len(labels), size - 1)


@steady
@given(labels_and_size(), seeds)
def test_equal_arguments_hold_out_equal_images(
    case: tuple[NDArray[np.int64], int], seed: int
) -> None:
    labels, size = case
    masks = [held_out_mask(labels, size - 1, official_order=False, seed=seed) for _ in range(2)]
    assert np.array_equal(*masks)


def test_official_order_holds_out_the_last_images() -> None:
    mask = held_out_mask(np.zeros(5, dtype=np.int64), 2, official_order=True, seed=0)
    assert mask.tolist() == [False, False, False, True, True]


def test_other_orders_hold_out_every_class_alike() -> None:
    labels = np.repeat(np.arange(4), 25)
    mask = held_out_mask(labels, 20, official_order=False, seed=0)
    assert np.bincount(labels[mask]).tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("size", [-1, 3, 4])
def test_holding_out_everything_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=f"cannot hold out {size} of 3 training images"):
        held_out_mask(np.array([0, 1, 2]), size, official_order=True, seed=0)


# --- Images


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int64), r"got uint8 of shape \(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 3)), np.zeros(2, np.int64), "got float64 of shape"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64), r"shape \(2,\), got int64"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int32), "labels must be int64"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, -1]), "labels must be >= 0, found -1"),
    ],
)
def test_arrays_that_are_no_labelled_images_are_refused(
    pixels: NDArray[Any], labels: NDArray[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Images(pixels, labels)


def test_no_images_at_all_are_images() -> None:
    assert len(Images(np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, np.int64))) == 0


def test_taken_images_are_a_copy() -> None:
    pool = Images(np.zeros((2, 1, 1, 3), np.uint8), np.zeros(2, np.int64))
    pool.take(np.array([0])).pixels[:] = 9
    assert not pool.pixels.any()


def test_equal_images_have_equal_digests() -> None:
    first, second = (
        Images(**{"pixels": i["images"], "labels": i["labels"]}) for i in [images()] * 2
    )
    assert first.digest() == second.digest()


def test_digest_sees_pixels_labels_order_and_shape() -> None:
    base = Images(images()["images"], images()["labels"])
    other = base.pixels.copy()
    other[0, 0, 0, 0] ^= 1
    variants = [
        base,
        Images(other, base.labels),
        Images(base.pixels, base.labels[::-1]),
        base.take(np.arange(20)[::-1]),
        Images(base.pixels.reshape(20, 2, 8, 3), base.labels),
    ]
    assert len({variant.digest() for variant in variants}) == len(variants)


# --- augment


def test_augmentation_can_be_switched_off() -> None:
    pixels = images()["images"]
    assert np.array_equal(augment(pixels, 0, False, np.random.default_rng(0)), pixels)


def test_every_crop_is_a_window_of_the_padded_image() -> None:
    pixels = images(8)["images"]
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [padded[:, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    cropped = augment(pixels, 1, False, np.random.default_rng(0))
    found = [(cropped == window).all(axis=(1, 2, 3)) for window in windows]
    assert np.any(found, axis=0).all()


def test_about_half_of_the_images_are_mirrored() -> None:
    pixels = images(400)["images"]
    flipped = augment(pixels, 0, True, np.random.default_rng(0))
    mirrored = (flipped == pixels[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (flipped == pixels).all(axis=(1, 2, 3))
    assert (mirrored | same).all()
    assert 150 < mirrored.sum() < 250


def test_augmentation_leaves_its_input_alone() -> None:
    pixels = images()["images"]
    before = pixels.copy()
    augment(pixels, 2, True, np.random.default_rng(0))
    assert np.array_equal(pixels, before)


# --- the shipped sample


@pytest.fixture(scope="module")
def sample() -> dict[str, Images]:
    source = open_source("cifar10-sample")
    pools = (source.training(), source.held_out(), source.test())
    return {
        part: pool.take(np.arange(PARTS[part])) for part, pool in zip(PARTS, pools, strict=True)
    }


@pytest.fixture(scope="module")
def index() -> dict[str, Any]:
    folder = resources.files("evosearch.data") / "samples" / "cifar10"
    content: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return content


@pytest.mark.parametrize("part", PARTS)
def test_sample_part_has_its_size_and_shape(sample: dict[str, Images], part: str) -> None:
    assert sample[part].pixels.shape == (PARTS[part], 32, 32, 3)


@pytest.mark.parametrize("part", PARTS)
def test_sample_part_has_as_many_images_of_each_class(sample: dict[str, Images], part: str) -> None:
    assert np.bincount(sample[part].labels).tolist() == [PARTS[part] // 10] * 10


@pytest.mark.parametrize("part", PARTS)
def test_sample_part_has_no_image_twice(
    sample: dict[str, Images], index: dict[str, Any], part: str
) -> None:
    assert len(set(index[part]["indices"])) == PARTS[part]
    assert len(np.unique(sample[part].pixels.reshape(PARTS[part], -1), axis=0)) == PARTS[part]


def test_sample_calibrates_on_the_first_45000_training_images(index: dict[str, Any]) -> None:
    indices = np.array(index["calibration"]["indices"])
    assert indices.min() >= 0
    assert indices.max() < 45_000


def test_sample_validates_on_the_last_5000_training_images(index: dict[str, Any]) -> None:
    indices = np.array(index["validation"]["indices"])
    assert indices.min() >= 45_000
    assert indices.max() < 50_000


def test_sample_tests_on_the_test_images(index: dict[str, Any]) -> None:
    indices = np.array(index["test"]["indices"])
    assert indices.min() >= 0
    assert indices.max() < 10_000


def test_sample_parts_share_no_image(sample: dict[str, Images]) -> None:
    pixels = np.concatenate([part.pixels.reshape(len(part), -1) for part in sample.values()])
    assert len(np.unique(pixels, axis=0)) == sum(PARTS.values())


def test_sample_labels_are_those_of_the_index(
    sample: dict[str, Images], index: dict[str, Any]
) -> None:
    assert all(sample[part].labels.tolist() == index[part]["labels"] for part in PARTS)


@pytest.mark.parametrize("axis", [1, 2])
def test_sample_images_are_cut_along_their_borders(sample: dict[str, Images], axis: int) -> None:
    # Cut in the wrong places, tiles would not be smooth: neighbours then differ as strangers do.
    pixels = sample["validation"].pixels.astype(float)
    neighbours = np.abs(np.diff(pixels, axis=axis)).mean()
    strangers = np.abs(pixels - pixels[:, :, ::-1][::-1]).mean()
    assert neighbours < strangers / 4


# --- npz files


def test_npz_is_divided_into_parts_that_share_no_image(tmp_path: Path) -> None:
    arrays = images(40)
    source = open_source(npz(tmp_path / "d.npz", **arrays))
    training, held = source.training(), source.held_out()
    assert (len(training.labels), len(held.labels)) == (36, 4)
    taken = [*training.take(np.arange(36)).pixels, *held.take(np.arange(4)).pixels]
    assert len({pixels.tobytes() for pixels in taken}) == 40


def test_npz_holds_out_classes_alike(tmp_path: Path) -> None:
    options = SourceOptions(held_out=8)
    source = open_source(npz(tmp_path / "d.npz", **images(40)), options)
    assert np.bincount(source.held_out().labels).tolist() == [2, 2, 2, 2]


def test_npz_of_official_order_holds_out_its_end(tmp_path: Path) -> None:
    arrays = images(40)
    options = SourceOptions(held_out=3, official_order=True)
    held = open_source(npz(tmp_path / "d.npz", **arrays), options).held_out()
    assert np.array_equal(held.take(np.arange(3)).pixels, arrays["images"][-3:])


def test_npz_keeps_images_and_labels_together(tmp_path: Path) -> None:
    labels = np.arange(30) % 3
    pixels = np.broadcast_to(labels[:, None, None, None], (30, 2, 2, 3)).astype(np.uint8)
    training = open_source(npz(tmp_path / "d.npz", images=pixels, labels=labels)).training()
    taken = training.take(np.array([5, 0, 11]))
    assert np.array_equal(taken.pixels[:, 0, 0, 0], taken.labels)
    assert np.array_equal(taken.labels, training.labels[[5, 0, 11]])


def test_npz_test_images_are_a_file_of_their_own(tmp_path: Path) -> None:
    npz(tmp_path / "test.npz", **images(6))
    options = SourceOptions(test_path=tmp_path / "test.npz")
    source = open_source(npz(tmp_path / "d.npz", **images()), options)
    assert len(source.test().labels) == 6


def test_npz_without_test_images_says_how_to_name_them(tmp_path: Path) -> None:
    source = open_source(npz(tmp_path / "d.npz", **images()))
    with pytest.raises(DataError, match=r"d.npz has no test images; .*\(data.test\)"):
        source.test()


def test_grey_npz_images_get_a_channel(tmp_path: Path) -> None:
    source = open_source(
        npz(tmp_path / "d.npz", images=images()["images"][..., 0], labels=images()["labels"])
    )
    assert source.training().take(np.arange(2)).pixels.shape == (2, 4, 4, 1)


def test_npz_labels_may_be_small_integers(tmp_path: Path) -> None:
    arrays = images() | {"labels": images()["labels"].astype(np.uint8)}
    assert open_source(npz(tmp_path / "d.npz", **arrays)).training().labels.dtype == np.int64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "has no array images and no labels; wanted .* found nothing"),
        ({"images": images()["images"]}, "has no array labels; wanted .* found images"),
        (images() | {"labels": np.ones(20)}, "must be integers, got float64; labels.astype"),
        (images() | {"labels": np.arange(20) - 1}, "labels must be >= 0, found -1"),
        (images() | {"labels": np.arange(19)}, r"labels must be int64 of shape \(20,\)"),
        (images() | {"labels": np.ones((20, 2), int)}, r"got int64 of shape \(20, 2\)"),
        (images() | {"images": np.ones((20, 4, 4, 3))}, "images must be uint8 .* got float64"),
        (images() | {"images": np.ones(20, np.uint8)}, r"got uint8 of shape \(20,\)"),
        (images() | {"labels": np.array([{}] * 20)}, "an array holds objects; wanted numbers"),
        (images(0), "cannot hold out 0 of 0 training images"),
    ],
)
def test_npz_of_other_content_is_refused(
    tmp_path: Path, arrays: dict[str, NDArray[Any]], message: str
) -> None:
    source = open_source(npz(tmp_path / "d.npz", **arrays))
    with pytest.raises(DataError, match=message):
        source.training()


def test_further_arrays_in_an_npz_do_no_harm(tmp_path: Path) -> None:
    source = open_source(npz(tmp_path / "d.npz", names=np.array(["a"]), **images()))
    assert len(source.training().labels) == 18


def test_missing_npz_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data file {tmp_path}/d.npz does not exist"):
        open_source(f"{tmp_path}/d.npz").training()


def test_folder_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "d.npz").mkdir()
    with pytest.raises(DataError, match=r"d.npz is not a readable .npz file"):
        open_source(f"{tmp_path}/d.npz").training()


@pytest.mark.parametrize("content", [b"some text", pickle.dumps({"images": 1})])
def test_file_that_is_no_npz_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"d.npz is not a readable .npz file"):
        open_source(f"{tmp_path}/d.npz").training()


def test_empty_file_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "d.npz").touch()
    with pytest.raises(DataError, match=r"d.npz is not a readable .npz file"):
        open_source(f"{tmp_path}/d.npz").training()


def test_npy_file_of_another_name_is_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", images()["images"])
    (tmp_path / "d.npy").rename(tmp_path / "d.npz")
    with pytest.raises(DataError, match=r"d.npz"):
        open_source(f"{tmp_path}/d.npz").training()


def test_damaged_compressed_npz_is_named(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", **images(200))
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[2000:2400] = b"\xff" * 400
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"d.npz is not a readable .npz file"):
        open_source(f"{tmp_path}/d.npz").training()


def test_opening_a_source_reads_nothing_yet() -> None:
    open_source("nowhere.npz")


# --- image folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of ten upright rectangles for training, two of each for the test."""
    for part, count in (("train", 10), ("test", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.full((20, 10, 3), 80 * label + number, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


def folder_source(root: Path, **settings: Any) -> DataSource:
    return open_source("image-folder", SourceOptions(root=root, **settings))


def test_image_folder_is_divided_class_by_class(folder: Path) -> None:
    source = folder_source(folder, held_out=6)
    assert np.bincount(source.training().labels).tolist() == [8, 8, 8]
    assert np.bincount(source.held_out().labels).tolist() == [2, 2, 2]
    assert np.bincount(source.test().labels).tolist() == [2, 2, 2]


def test_image_folder_parts_share_no_image(folder: Path) -> None:
    source = folder_source(folder, held_out=6)
    taken = [
        tuple(pool.take(np.arange(n)).pixels[:, 0, 0, 0].tolist())
        for pool, n in ((source.training(), 24), (source.held_out(), 6))
    ]
    assert len(set(taken[0]) | set(taken[1])) == 30


def test_image_files_are_resized_and_keep_their_labels(folder: Path) -> None:
    pool = folder_source(folder, image_size=(6, 8)).training()
    taken = pool.take(np.array([0, len(pool.labels) - 1]))
    assert taken.pixels.shape == (2, 6, 8, 3)
    assert (taken.pixels[:, 0, 0, 0] // 80).tolist() == taken.labels.tolist() == [0, 2]


def test_image_files_are_cropped_to_the_wanted_aspect_not_squeezed(folder: Path) -> None:
    stripes = np.zeros((20, 10, 3), dtype=np.uint8)
    stripes[5:15] = 200  # the middle square of an upright image
    Image.fromarray(stripes).save(folder / "train" / "ant" / "0.png")
    pool = folder_source(folder, image_size=(10, 10), held_out=0).training()
    assert (pool.take(np.array([0])).pixels == 200).all()


def test_grey_and_transparent_files_become_colour(folder: Path) -> None:
    Image.new("L", (10, 10), 7).save(folder / "train" / "ant" / "0.png")
    Image.new("RGBA", (10, 10), (7, 7, 7, 0)).save(folder / "train" / "ant" / "1.png")
    pool = folder_source(folder, held_out=0).training()
    assert (pool.take(np.arange(2)).pixels == 7).all()


def test_missing_image_folder_says_what_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}/train does not exist; wanted .*/train/CLASS"):
        folder_source(tmp_path).training()


def test_image_folder_without_a_test_part_still_trains(folder: Path) -> None:
    (folder / "test").rename(folder / "other")
    source = folder_source(folder)
    assert len(source.training().labels) == 27
    with pytest.raises(DataError, match=r"/test does not exist"):
        source.test()


def test_image_folder_without_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"image folder .*train: Couldn't find any class folder"):
        folder_source(tmp_path).training()


def test_class_without_images_is_named(folder: Path) -> None:
    (folder / "train" / "dog").mkdir()
    with pytest.raises(DataError, match=r"no valid file for the classes dog"):
        folder_source(folder).training()


def test_file_that_is_no_image_is_named_when_it_is_read(folder: Path) -> None:
    (folder / "train" / "ant" / "0.png").write_text("no image")
    pool = folder_source(folder, held_out=0).training()
    with pytest.raises(DataError, match=r"ant/0.png is not a readable image"):
        pool.take(np.array([0]))


def test_truncated_image_is_named_when_it_is_read(folder: Path) -> None:
    path = folder / "train" / "ant" / "0.png"
    Image.fromarray(images(1, 64)["images"][0]).save(path)
    os.truncate(path, 3000)
    pool = folder_source(folder, held_out=0).training()
    with pytest.raises(DataError, match=r"ant/0.png is not a readable image"):
        pool.take(np.array([0]))


def test_damaged_png_is_named_when_it_is_read(folder: Path) -> None:
    path = folder / "train" / "ant" / "0.png"
    Image.fromarray(images(1, 256)["images"][0]).save(path)
    content = bytearray(path.read_bytes())
    second = content.index(b"IDAT", content.index(b"IDAT") + 4)
    content[second : second + 4] = b"\xff" * 4
    path.write_bytes(content)
    pool = folder_source(folder, held_out=0).training()
    with pytest.raises(DataError, match=r"ant/0.png is not a readable image"):
        pool.take(np.array([0]))


def test_class_missing_from_the_test_part_does_not_shift_the_others(folder: Path) -> None:
    (folder / "test" / "bee").rename(folder / "bee")
    test = folder_source(folder).test()
    taken = test.take(np.arange(len(test.labels)))
    assert taken.labels.tolist() == (taken.pixels[:, 0, 0, 0] // 80).tolist()


# --- torchvision, and names


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist"])
def test_missing_torchvision_data_is_named_without_a_download(tmp_path: Path, name: str) -> None:
    source = open_source(name, SourceOptions(root=tmp_path / "data"))
    with pytest.raises(DataError, match=rf"{tmp_path}/data: .*; set download = true"):
        source.training()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_missing_torchvision_test_images_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"; set download = true to fetch it, or name another"):
        open_source(name, SourceOptions(root=tmp_path)).test()


def test_unknown_source_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"no data set 'frob'; there are cifar10-sample, .*\.npz"):
        open_source("frob")


def test_every_source_has_a_line_of_prose() -> None:
    assert all(title for title, _ in DATASETS.values())
