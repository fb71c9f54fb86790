"""Stores the weights of an ONNX model as 8-bit integers, with one scale per row.

onnxruntime's own tools store a table twice if it is both looked up and multiplied, and their matrix products round the
activations of a whole batch together, so that one user's answers would depend on the others'. Here,

    table[ids] looks up integers and scales,
    states @ table.T multiplies integers, after rounding the states user by user, and
    every other weight becomes float again when onnxruntime loads the model, which costs no time afterwards.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

# Unsigned, with 128 for zero: products of signed with unsigned bytes overflow on processors without VNNI.
_ZERO = 128
_STEPS = 127


def quantize_weights(model: onnx.ModelProto) -> None:
    """Replace every float32 weight of two or more dimensions by integers and scales, in place.

    Args:
        model: of opset 18 or newer.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if _is_matrix(tensor)}
    added = {"int8/uint8_zero": np.array(_ZERO, np.uint8), "int8/float_zero": np.array(_ZERO, np.float32)}
    for name, tensor in weights.items():
        added[f"{name}.uint8"], added[f"{name}.scales"] = _integers_and_scales(numpy_helper.to_array(tensor))
    nodes, as_float = [], {}
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in weights and _attribute(node, "axis", 0) == 0:
            nodes += _lookup(node)
        elif node.op_type == "Gemm" and node.input[1] in weights and _is_plain_product(node):
            nodes += _product(node, added)
        else:
            nodes.append(node)
            as_float |= dict.fromkeys(name for name in node.input if name in weights)
    kept = [tensor for tensor in graph.initializer if tensor.name not in weights]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend([*kept, *(numpy_helper.from_array(array, name) for name, array in added.items())])
    graph.node.extend([*(node for name in as_float for node in _float_again(name)), *nodes])


def _is_matrix(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == onnx.TensorProto.FLOAT and sum(size > 1 for size in tensor.dims) > 1


def _integers_and_scales(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers of the same shape, and a scale for each index of the first axis that is longer than 1."""
    rows = next(axis for axis, size in enumerate(weight.shape) if size > 1)
    largest = np.abs(weight).max(axis=tuple(range(rows + 1, weight.ndim)), keepdims=True)
    scales = np.where(largest > 0, largest / _STEPS, 1).astype(np.float32)
    return (np.rint(weight / scales) + _ZERO).astype(np.uint8), scales


def _attribute(node: onnx.NodeProto, name: str, default):
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _is_plain_product(node: onnx.NodeProto) -> bool:
    """Whether a Gemm is states @ table.T and nothing else."""
    settings = [_attribute(node, name, default) for name, default in (("alpha", 1.0), ("transA", 0), ("transB", 0))]
    return len(node.input) == 2 and settings == [1.0, 0, 1]


def _lookup(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """table[ids] = (integers[ids] - zero) * scales[ids]."""
    (weight, ids), (out,) = node.input, node.output
    return [
        helper.make_node("Gather", [f"{weight}.uint8", ids], [f"{out}.uint8"], axis=0),
        helper.make_node("Gather", [f"{weight}.scales", ids], [f"{out}.scales"], axis=0),
        *_as_float(f"{out}.uint8", f"{out}.scales", out),
    ]


def _float_again(weight: str) -> list[onnx.NodeProto]:
    """weight = (integers - zero) * scales: constants only, so onnxruntime computes it when it loads the model."""
    return _as_float(f"{weight}.uint8", f"{weight}.scales", weight)


def _as_float(integers: str, scales: str, out: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", [integers], [f"{out}.cast"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Sub", [f"{out}.cast", "int8/float_zero"], [f"{out}.steps"]),
        helper.make_node("Mul", [f"{out}.steps", scales], [out]),
    ]


def _product(node: onnx.NodeProto, added: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    """states @ table.T = (integer states @ integer table.T) * scale of the user * scales of the rows."""
    (states, weight), (out,) = node.input, node.output
    added |= {
        "int8/last_axis": np.array([1], np.int64),
        "int8/steps": np.array(_STEPS, np.float32),
        "int8/smallest": np.array(np.finfo(np.float32).tiny, np.float32),
    }
    steps = [
        ("Abs", [states], "abs"),  # (batch, hidden)
        ("ReduceMax", [f"{out}.abs", "int8/last_axis"], "largest"),  # (batch, 1)
        ("Div", [f"{out}.largest", "int8/steps"], "scale"),
        ("Max", [f"{out}.scale", "int8/smallest"], "user_scale"),
        ("Div", [states, f"{out}.user_scale"], "scaled"),
        ("Round", [f"{out}.scaled"], "rounded"),
        ("Add", [f"{out}.rounded", "int8/float_zero"], "shifted"),
        ("Cast", [f"{out}.shifted"], "states"),
        ("Transpose", [f"{weight}.uint8"], "table"),  # (hidden, items), of a constant
        ("MatMulInteger", [f"{out}.states", f"{out}.table", "int8/uint8_zero", "int8/uint8_zero"], "integers"),
        ("Cast", [f"{out}.integers"], "floats"),
        ("Mul", [f"{out}.floats", f"{out}.user_scale"], "of_user"),
        ("Squeeze", [f"{weight}.scales", "int8/last_axis"], "row_scales"),  # (items,), of a constant
        ("Mul", [f"{out}.of_user", f"{out}.row_scales"], None),
    ]
    attributes = {
        "states": {"to": onnx.TensorProto.UINT8},
        "table": {"perm": [1, 0]},
        "floats": {"to": onnx.TensorProto.FLOAT},
    }
    return [
        helper.make_node(op_type, inputs, [f"{out}.{name}" if name else out], **attributes.get(name, {}))
        for op_type, inputs, name in steps
    ]


__all__ = ["quantize_weights"]
