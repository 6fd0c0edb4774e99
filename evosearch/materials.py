"""The dense network of a recipe and its images: what everything else is made from."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evosearch.data import (
    DataSource,
    ImagePool,
    Images,
    SourceOptions,
    Subpool,
    augment,
    balanced_subset,
    open_source,
)
from evosearch.errors import DataError
from evosearch.networks import Network, NetworkSpec, load_network
from evosearch.recipe import DataRecipe, NetworkRecipe, Recipe

__all__ = ["ImageSets", "as_trained", "network_and_images", "network_spec", "source_of"]

# How many are drawn where a recipe says nothing, if there are so many.
_IMAGES = {"calibration": 1000, "validation": 2000}


def network_spec(recipe: NetworkRecipe) -> NetworkSpec:
    """How the recipe's network is made."""
    shape = recipe.input_shape
    return NetworkSpec(
        name=recipe.name,
        num_classes=recipe.num_classes,
        arguments=recipe.arguments,
        weights=recipe.weights,
        input_shape=None if shape is None else (shape[0], shape[1], shape[2]),
        mean=None if recipe.mean is None else tuple(recipe.mean),
        std=None if recipe.std is None else tuple(recipe.std),
        crop_padding=recipe.crop_padding,
        flip=recipe.flip,
    )


def _source(recipe: DataRecipe, spec: NetworkSpec) -> DataSource:
    options = SourceOptions(
        root=Path(recipe.root),
        download=recipe.download,
        test_path=Path(recipe.test) if recipe.test else None,
        held_out=recipe.held_out,
        official_order=recipe.official_order,
        seed=recipe.seed,
    )
    if recipe.name == "image-folder":
        # Files have all sizes: they become what the network takes.
        _, height, width = load_network(spec).input.shape
        options = replace(options, image_size=(height, width))
    return open_source(recipe.name, options)


def source_of(recipe: Recipe) -> DataSource:
    """Where the recipe's images come from; nothing is read yet."""
    return _source(recipe.data, network_spec(recipe.network))


def _draw(recipe: DataRecipe, key: str, pool: ImagePool) -> NDArray[np.int64]:
    """Which images of a pool are used."""
    wanted: int | None = getattr(recipe, key)
    size = min(_IMAGES[key], len(pool.labels)) if wanted is None else wanted
    if not len(pool.labels):
        raise DataError(
            f"data.{key}: {recipe.name} has no image for it; at least 20 are needed, of which "
            "data.held_out are for validation (a tenth if left out)"
        )
    try:
        return balanced_subset(pool.labels, size, recipe.seed)
    except DataError as exc:
        raise DataError(f"data.{key} = {size}: {exc} in that part of {recipe.name}") from exc


def _check_images(recipe: DataRecipe, held_out: ImagePool, taken: NDArray[np.int64]) -> Images:
    """Held-out images beyond those for validation; as many, or what is left."""
    rest = np.setdiff1d(np.arange(len(held_out.labels)), taken)
    wanted = recipe.check
    size = min(len(taken), len(rest)) if wanted is None else wanted
    if not size:
        return held_out.take(rest[:0])
    spare = Subpool(held_out, rest)
    try:
        return spare.take(balanced_subset(spare.labels, size, recipe.seed))
    except DataError as exc:
        raise DataError(
            f"data.check = {size}: {exc} in that part of {recipe.name}, besides the {len(taken)} "
            "for validation"
        ) from exc


@dataclass(frozen=True, kw_only=True)
class ImageSets:
    """The images of a recipe.

    Args:
        calibration: Of the training part, as training showed them to the network.
        validation: Of the held-out part: what a search measures on.
        check: Others of the held-out part, perhaps none.
    """

    calibration: Images
    validation: Images
    check: Images


def network_and_images(recipe: Recipe) -> tuple[Network, ImageSets]:
    """The dense network and its images.

    Raises:
        EvosearchError: One cannot be had, or they do not fit together.
    """
    spec = network_spec(recipe.network)
    source = _source(recipe.data, spec)
    training, held_out = source.training(), source.held_out()
    calibration = training.take(_draw(recipe.data, "calibration", training))
    chosen = _draw(recipe.data, "validation", held_out)
    height, width, channels = calibration.pixels.shape[1:]
    network = load_network(spec, (height, width, channels))
    if network.input.shape != (channels, height, width):
        raise DataError(
            f"{recipe.data.name} has images of shape {(height, width, channels)} (height, width, "
            f"channels), {spec.name} takes {network.input.shape} (channels, height, width); set "
            "network.input_shape or choose other data"
        )
    validation, check = held_out.take(chosen), _check_images(recipe.data, held_out, chosen)
    if recipe.data.mirrored:
        validation, check = validation.with_mirrored(), check.with_mirrored()
    return network, ImageSets(
        calibration=as_trained(calibration, network, recipe.data.seed),
        validation=validation,
        check=check,
    )


def as_trained(calibration: Images, network: Network, seed: int) -> Images:
    """Calibration images as training showed them to the network.

    Batch norm has averaged over cropped and mirrored images. Statistics of plain ones differ, and
    more of them do not help: on the published ResNet-20, uncut, recalibration with 500 plain images
    moves the outputs by a divergence of 0.164, with 500 cropped ones by 0.013.
    """
    rng = np.random.default_rng(seed)
    pixels = augment(calibration.pixels, network.input.crop_padding, network.input.flip, rng)
    return Images(pixels, calibration.labels)
