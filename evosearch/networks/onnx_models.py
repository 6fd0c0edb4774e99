"""Networks in ONNX, as ONNX Runtime runs them. The only module that imports either.

Both are extras: `pip install 'evosearch[onnx]'`.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evosearch.errors import ConfigError, NetworkError, first_line

__all__ = [
    "INPUT",
    "OUTPUT",
    "exported_program",
    "onnx_model",
    "onnx_runner",
    "optimized",
    "serialized",
    "with_weights_of",
]

INPUT, OUTPUT = "images", "logits"
# What torch.export says of a dimension that is no variable after all.
_FIXED = "Constraints violated"


@contextlib.contextmanager
def _extra() -> Iterator[None]:
    """Imports of what only the extra brings.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        yield
    except ImportError as exc:
        raise ConfigError(f"{exc.name} is missing; pip install 'evosearch[onnx]'") from exc


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Exporters warn of their own insides, which nobody here can do anything about."""
    talkers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [talker.level for talker in talkers]
    for talker in talkers:
        talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)


def exported_program(
    module: nn.Module, images: Tensor, *, fixed: bool = False
) -> torch.export.ExportedProgram:
    """The graph of a network.

    Args:
        module: In evaluation mode.
        images: `(n, c, h, w)`; two or more unless `fixed`: a single one is taken for a constant.
        fixed: Whether the graph is for so many images alone.

    Raises:
        NetworkError: torch.export cannot follow the network.
    """
    shapes = None if fixed else ({0: torch.export.Dim("batch")},)
    try:
        with _quietly(), torch.no_grad():
            return torch.export.export(module, (images,), dynamic_shapes=shapes)
    except Exception as exc:
        if _FIXED in str(exc):
            raise NetworkError(
                "torch.export finds the number of images fixed in the network's forward: len(x) "
                "fixes it, x.shape[0] and flatten(1) do not"
            ) from exc
        raise NetworkError(f"torch.export cannot follow the network: {first_line(exc)}") from exc


def onnx_model(
    program: torch.export.ExportedProgram, facts: Mapping[str, str], *, folded: bool = True
) -> Any:
    """An `onnx.ModelProto` whose input is `images` and whose output is `logits`.

    Args:
        program: Of a network.
        facts: Become the metadata of the model.
        folded: Whether batch norm is folded away; else tensors have the network's names and values.

    Raises:
        ConfigError: The extra is missing.
        NetworkError: The network has something that ONNX has not.
    """
    with _extra():
        import onnx
        import onnxscript  # noqa: F401 -- torch imports it, and says less of it
    taken = sorted({INPUT, OUTPUT} & {*program.state_dict, *program.constants})
    if taken:
        raise NetworkError(
            f"the network has a tensor {taken[0]!r}, which is how its input or output is called in "
            "ONNX; give it another name"
        )
    try:
        with _quietly():
            found: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                optimize=folded,
                input_names=[INPUT],
                output_names=[OUTPUT],
            )
        model = found.model_proto
    except Exception as exc:  # what an exporter of hundreds of operations may raise
        raise NetworkError(f"ONNX has no form of the network: {first_line(exc)}") from exc
    onnx.helper.set_model_props(model, dict(facts))
    return model


def with_weights_of(model: Any, module: nn.Module) -> Any:
    """A copy of a model that was not folded, with the tensors of a network of other widths.

    Groups of convolutions follow, and maps are flattened to whatever they are. What else may hang
    on widths, such as how many channels are padded, stays: whoever calls this compares what the
    copy computes with what the network does.
    """
    with _extra():
        import onnx
    state = module.state_dict()
    narrowed = onnx.ModelProto()
    narrowed.CopyFrom(model)
    del narrowed.graph.value_info[:]
    for tensor in narrowed.graph.initializer:
        if tensor.name in state:
            value = state[tensor.name].detach().numpy()
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    groups = {
        f"{name}.weight": layer.groups
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.conv._ConvNd)
    }
    made_by = {name: node for node in narrowed.graph.node for name in node.output}
    for node in narrowed.graph.node:
        if node.op_type == "Conv":
            for attribute in node.attribute:
                if attribute.name == "group":
                    attribute.i = groups.get(node.input[1], attribute.i)
        elif node.op_type == "Reshape" and _flattens(made_by, node.input[1]):
            node.op_type = "Flatten"
            del node.input[1], node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("axis", 1))
    return narrowed


def _flattens(made_by: Mapping[str, Any], shape: str) -> bool:
    """Whether a shape is that of two numbers: of images, however many, and what each becomes."""
    joined = made_by.get(shape)
    if joined is None or joined.op_type != "Concat" or len(joined.input) != 2:
        return False
    images, each = (made_by.get(name) for name in joined.input)
    if images is None or each is None:
        return False
    return bool(images.op_type != "Constant" and each.op_type == "Constant")


def optimized(model: Any) -> Any:
    """A model that was not folded, as it would have been exported.

    Nothing that is constant is computed when it runs, so that a runtime sees what it can fuse.
    """
    with _extra():
        from onnxscript import optimizer
    with _quietly():
        return optimizer.optimize(model)


def serialized(model: Any) -> bytes:
    """The bytes of a model.

    Raises:
        NetworkError: It is larger than ONNX allows.
    """
    try:
        found: bytes = model.SerializeToString()
    except Exception as exc:
        raise NetworkError(
            "ONNX allows 2 GB in a file, and the network has more; write it as .pt2"
        ) from exc
    return found


def onnx_runner(model: bytes, threads: int = 1) -> Callable[[Tensor], NDArray[np.float32]]:
    """What runs a model on the CPU: from `(n, c, h, w)` float32 images to its outputs.

    Raises:
        ConfigError: The extra is missing.
        NetworkError: ONNX Runtime refuses the model.
    """
    with _extra():
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Errors are raised; the rest is talk.
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # its errors have no common class
        raise NetworkError(f"ONNX Runtime refuses the network: {first_line(exc)}") from exc

    def run(images: Tensor) -> NDArray[np.float32]:
        (found,) = session.run([OUTPUT], {INPUT: images.numpy()})
        return np.asarray(found)

    return run
