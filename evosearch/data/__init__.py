"""Images for calibration, validation, training and the final test, kept apart.

numpy arrays only; turning them into normalised tensors is the network's business.
"""

from evosearch.data.arrays import (
    ImagePool,
    Images,
    Subpool,
    balanced_subset,
    check_classes,
    held_out_mask,
    whole,
)
from evosearch.data.augment import augment
from evosearch.data.sources import DATASETS, DataSource, SourceOptions, open_source

__all__ = [
    "DATASETS",
    "DataSource",
    "ImagePool",
    "Images",
    "SourceOptions",
    "Subpool",
    "augment",
    "balanced_subset",
    "check_classes",
    "held_out_mask",
    "open_source",
    "whole",
]
