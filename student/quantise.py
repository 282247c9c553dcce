"""int8 whose result for a pair depends on that pair alone.

Weights are int8 with a scale for each output channel, embeddings with one for each row. Activations are quantised as they
come, every token by its own largest value. onnxruntime's dynamic quantisation takes the largest value of the whole batch
instead, so a pair's probability would move with whatever shares its batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from student.onnx_files import INLINE_BYTES, data_file, files_of, remove

Array = np.ndarray
# 7-bit weights: with 8 bits the sums of two products overflow 16 bits on CPUs without VNNI, and the machine that serves is
# not known.
WEIGHT_LIMIT = 63
TOKEN_LIMIT = 127
_ZERO = 128  # what 0 is as uint8: onnxruntime multiplies uint8 activations by int8 weights fastest
_MIN_ROWS = 64  # embeddings of fewer rows stay as they are


def write_int8(fp32: Path, int8: Path, inline_bytes: int = INLINE_BYTES) -> None:
    """Write a copy of the ONNX model `fp32` whose linear layers compute in int8 and whose embeddings are int8.

    Weights of more than `inline_bytes` go into a file of their own, see `student.onnx_files`.
    """
    model = onnx.load(str(fp32))
    graph = model.graph
    weights = {each.name: each for each in graph.initializer}
    constants: dict[str, Any] = {"one": np.float32(1), "zero": np.uint8(_ZERO), "limit": np.float32(TOKEN_LIMIT)}
    constants |= {"tiny": np.float32(1e-12), "last_axis": np.array([-1])}
    new = {f"int8.{name}": np.array(value) for name, value in constants.items()}
    quantised: set[str] = set()
    nodes: list[Any] = []
    for node in graph.node:
        made = None
        if node.op_type in ("MatMul", "Gemm") and _is_linear(node, weights):
            made = list(_linear(node, numpy_helper.to_array(weights[node.input[1]]), new, quantised))
        elif node.op_type == "Gather" and node.input[0] in weights and _axis(node) == 0:
            table = weights[node.input[0]]
            if len(table.dims) == 2 and table.dims[0] >= _MIN_ROWS and table.data_type == onnx.TensorProto.FLOAT:
                made = list(_embedding(node, numpy_helper.to_array(table), new))
        nodes += [node] if made is None else made
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    graph.initializer.extend(each for name, each in weights.items() if name in used)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in new.items() if name in used)
    if not any(each.domain == "com.microsoft" for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    beside = sum(len(each.raw_data) for each in graph.initializer) > inline_bytes
    remove([int8])  # an older file of weights would be added to
    onnx.save(model, str(int8), save_as_external_data=beside, location=data_file(int8).name)
    for file in files_of(int8):
        file.chmod(fp32.stat().st_mode)  # onnx makes the second file readable to its owner alone


def by_channel(weight: Array, limit: int, axis: int) -> tuple[Array, Array]:
    """int8 values of a matrix, and the scale (float32) of each row (axis 1) or column (axis 0): value times scale is it."""
    scale = np.abs(weight).max(axis=axis, keepdims=True) / limit
    scale[scale == 0] = 1
    return np.rint(weight / scale).astype(np.int8), scale.squeeze(axis).astype(np.float32)


def _is_linear(node: Any, weights: dict[str, Any]) -> bool:
    """Whether a node multiplies activations by a matrix of weights; a Gemm may add a bias, and scale nothing."""
    weight = weights.get(node.input[1])
    if weight is None or len(weight.dims) != 2 or node.input[0] in weights:
        return False
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return values.get("alpha", 1.0) == 1.0 and values.get("beta", 1.0) == 1.0 and not values.get("transA", 0)


def _axis(node: Any) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def _linear(node: Any, weight: Array, new: dict[str, Array], quantised: set[str]) -> Iterator[Any]:
    """A MatMul or Gemm in int8; what several layers read is quantised once."""
    source, out, name = node.input[0], node.output[0], f"int8.{node.input[1]}"
    if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
        weight = weight.T
    new[name], new[f"{name}.scale"] = by_channel(weight, WEIGHT_LIMIT, 0)
    token = f"int8.{source}"
    if source not in quantised:
        quantised.add(source)
        yield helper.make_node("Abs", [source], [f"{token}.abs"])
        yield helper.make_node("ReduceMax", [f"{token}.abs", "int8.last_axis"], [f"{token}.max"], keepdims=1)
        yield helper.make_node("Max", [f"{token}.max", "int8.tiny"], [f"{token}.largest"])
        yield helper.make_node("Div", [f"{token}.largest", "int8.limit"], [f"{token}.scale"])
        yield helper.make_node("Div", [source, f"{token}.scale"], [f"{token}.scaled"])
        yield helper.make_node("QuantizeLinear", [f"{token}.scaled", "int8.one", "int8.zero"], [f"{token}.uint8"])
    # Fused by hand: onnxruntime itself would fuse only a scale of the whole tensor.
    inputs = [f"{token}.uint8", name, "int8.one", f"{name}.scale", "int8.zero"]
    yield helper.make_node("MatMulIntegerToFloat", inputs, [f"{out}.unscaled"], domain="com.microsoft")
    bias = node.input[2] if len(node.input) > 2 else ""
    yield helper.make_node("Mul", [f"{out}.unscaled", f"{token}.scale"], [f"{out}.scaled" if bias else out])
    if bias:
        yield helper.make_node("Add", [f"{out}.scaled", bias], [out])


def _embedding(node: Any, table: Array, new: dict[str, Array]) -> Iterator[Any]:
    """A Gather of rows from an int8 table."""
    (table_name, index), out = node.input[:2], node.output[0]
    name = f"int8.rows.{table_name}"
    new[name], scale = by_channel(table, 127, 1)
    new[f"{name}.scale"] = scale[:, None]
    yield helper.make_node("Gather", [name, index], [f"{out}.int8"])
    yield helper.make_node("Cast", [f"{out}.int8"], [f"{out}.float"], to=onnx.TensorProto.FLOAT)
    yield helper.make_node("Gather", [f"{name}.scale", index], [f"{out}.scale"])
    yield helper.make_node("Mul", [f"{out}.float", f"{out}.scale"], [out])
