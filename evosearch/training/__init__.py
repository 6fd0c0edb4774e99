"""Training of dense networks, and short fine-tuning of pruned networks."""

from evosearch.training.baseline import (
    Checkpoint,
    EpochLog,
    TrainSettings,
    top1,
    train,
    write_log,
)

__all__ = ["Checkpoint", "EpochLog", "TrainSettings", "top1", "train", "write_log"]
