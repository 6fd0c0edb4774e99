"""What a channel is worth: criteria that score the channels of a group.

A criterion maps a view of a group to one number per channel, larger = more important. A group
with several producers (or norms, or consumers) gets the mean, maximum or sum over them: norms and
gradients of weights look at producers, batch-norm criteria at norms, feature maps at consumers.
`registry` has the names; `view` says what a criterion sees; `evidence` collects from images what
the requested ones need, in one pass; `scores` puts it together.
"""

from evosearch.pruning.criteria.evidence import Samples
from evosearch.pruning.criteria.registry import (
    CRITERIA,
    Criterion,
    criterion_named,
    known_criteria,
)
from evosearch.pruning.criteria.scores import (
    applicable_criteria,
    channel_order,
    channel_scores,
)
from evosearch.pruning.criteria.view import COUPLINGS, Consumer, Coupling, GroupView

__all__ = [
    "COUPLINGS",
    "CRITERIA",
    "Consumer",
    "Coupling",
    "Criterion",
    "GroupView",
    "Samples",
    "applicable_criteria",
    "channel_order",
    "channel_scores",
    "criterion_named",
    "known_criteria",
]
