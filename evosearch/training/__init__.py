"""Training of dense baselines."""

from evosearch.training.baseline import EpochLog, TrainSettings, top1, train, write_log

__all__ = ["EpochLog", "TrainSettings", "top1", "train", "write_log"]
