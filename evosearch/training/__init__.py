"""Training of dense baselines, and short fine-tuning of pruned networks."""

from evosearch.training.baseline import EpochLog, TrainSettings, top1, train, write_log

__all__ = ["EpochLog", "TrainSettings", "top1", "train", "write_log"]
