"""Criteria that look at gradients of the loss, on calibration images, batch norm frozen.

The loss is the cross-entropy to the images' labels; or, label-free, to classes drawn from the
network's own outputs, under which the squared gradients estimate the Fisher information. (With the
outputs themselves as soft targets every gradient would be zero: the network agrees with itself.)

References:
    [Molchanov2019] P. Molchanov et al., "Importance Estimation for Neural Network Pruning",
        CVPR 2019 (first-order Taylor expansions).
    [LeCun1990] Y. LeCun, J. Denker, S. Solla, "Optimal Brain Damage", NIPS 1989.
    [Theis2018] L. Theis et al., "Faster gaze prediction with dense networks and Fisher pruning",
        arXiv:1801.05787 (squared gradients for the diagonal of the Hessian).
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from evosearch.pruning.criteria.view import GroupView
from evosearch.pruning.criteria.weights import need_norms

__all__ = ["NORM_GRADIENTS", "WEIGHT_GRADIENTS", "bn_taylor", "obd", "weight_taylor"]

WEIGHT_GRADIENTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight-product": lambda weight, gradient: (weight * gradient).flatten(1).sum(dim=1),
    "weight-curvature": lambda weight, gradient: (weight * gradient).flatten(1).square().sum(dim=1),
}
"""From weight and gradient of a producer `(out, ...)` to `(out,)`, per batch."""

NORM_GRADIENTS: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "norm-product": lambda gamma, beta, d_gamma, d_beta: gamma * d_gamma + beta * d_beta,
}
"""From scale, shift and their gradients `(channels,)` to `(channels,)`, per batch."""


def bn_taylor(view: GroupView) -> Tensor:
    """Squared first-order change of the loss when the norm's output is zeroed [Molchanov2019].

    (gamma dL/dgamma + beta dL/dbeta)^2, mean over batches.

    Raises:
        NetworkError: No batch norm with a scale follows the group.
    """
    need_norms(view, "bn-taylor")
    return view.combine(product.square().mean(dim=0) for product in view.seen("norm-product"))


def weight_taylor(view: GroupView) -> Tensor:
    """Squared first-order change of the loss when the filter is zeroed [Molchanov2019].

    (sum over the filter of w dL/dw)^2, mean over batches.
    """
    return view.combine(product.square().mean(dim=0) for product in view.seen("weight-product"))


def obd(view: GroupView) -> Tensor:
    """Second-order rise of the loss when the filter is zeroed: sum of h w^2 / 2 [LeCun1990].

    The diagonal h of the Hessian is that of the Fisher information, estimated by squared gradients
    of batches [Theis2018]; a common factor, the batch size, is left out.
    """
    return view.combine(curve.mean(dim=0) / 2 for curve in view.seen("weight-curvature"))
