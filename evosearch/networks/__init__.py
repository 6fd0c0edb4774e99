"""Dense networks: built in, torchvision's or a user's own, with weights and normalisation."""

from evosearch.networks.catalogue import BUILT_IN, InputSpec
from evosearch.networks.gpus import check_alive, like_a_cpu, on_cpu, sent
from evosearch.networks.loading import (
    Network,
    NetworkSpec,
    build_module,
    check_repeatable,
    is_own,
    load_network,
    plain,
    trusted_factory,
)
from evosearch.networks.own import import_own, importing
from evosearch.networks.portable import write_portable
from evosearch.networks.weights import (
    load_into,
    put_state,
    read_weights,
    save_weights,
    weights_path,
)

__all__ = [
    "BUILT_IN",
    "InputSpec",
    "Network",
    "NetworkSpec",
    "build_module",
    "check_alive",
    "check_repeatable",
    "import_own",
    "importing",
    "is_own",
    "like_a_cpu",
    "load_into",
    "load_network",
    "on_cpu",
    "plain",
    "put_state",
    "read_weights",
    "save_weights",
    "sent",
    "trusted_factory",
    "weights_path",
    "write_portable",
]
