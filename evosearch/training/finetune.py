"""Short fine-tuning of a pruned network: what a proxy tries to predict.

The steps are those of the baselines, without a warm-up: one cosine from the peak down to zero.
Equal networks with equal settings give equal numbers on one machine: one thread, and every random
choice follows from the seed.
"""

import torch
from torch import nn
from torch.nn import functional as F

from evosearch.data import Images
from evosearch.networks import Network, like_a_cpu
from evosearch.networks.threads import on_threads
from evosearch.training.baseline import (
    TrainSettings,
    channels_last,
    check_trains,
    make_optimiser,
    train_epoch,
    trainable,
)

__all__ = ["evaluate", "finetune"]


def finetune(
    network: Network, images: Images, settings: TrainSettings, teacher: nn.Module | None = None
) -> None:
    """Trains a network in place, and leaves it in evaluation mode.

    Args:
        network: Its parameters become trainable float32.
        images: To train on; at least one batch.
        settings: How.
        teacher: Whose outputs the loss follows, as far as the settings say.

    Raises:
        ConfigError: The loss became infinite.
        NetworkError: The network does not run in training mode.
    """
    module = channels_last(trainable(network.module))
    if teacher is not None:
        channels_last(teacher)
    try:
        with on_threads(settings.threads):
            check_trains(network)
            optimiser = make_optimiser(module, settings)
            for epoch in range(settings.epochs):
                train_epoch(network, images, optimiser, settings, epoch, teacher)
    finally:
        module.eval()


@torch.inference_mode()
def evaluate(network: Network, images: Images, batch_size: int = 128) -> dict[str, float]:
    """Top-1 error and mean cross-entropy on images as they are, in float32, on one thread."""
    network.module.eval()
    device = next(network.module.parameters()).device
    wrong, loss = 0, 0.0
    with on_threads(1):
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            with like_a_cpu(device):
                logits = network.module(network.normalise(images.pixels[part], device)).double()
            labels = torch.from_numpy(images.labels[part]).to(device)
            wrong += int((logits.argmax(1) != labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"error": wrong / len(images), "loss": loss / len(images)}
