"""A ModelProto as it is: where it is from, its bodies, its names, and what shape inference knows of its values."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from fastbn import checks

DEFAULT = ("", "ai.onnx")  # the names of ONNX's own domain
LARGE = 2_000_000_000  # bytes: protobuf writes messages below 2 GiB, and there is more in a model than tensors
_ELSEWHERE = "fastbn.deprecated"  # a domain whose operators onnx.checker does not know
Key = tuple[object, ...]  # of a body: the indices of the nodes and subgraphs it lies in; of a function, behind its `function_key`
Body = GraphProto | FunctionProto


class Type(NamedTuple):
    """What shape inference knows of a value: its element type, and its shape, None where the rank is unknown."""

    kind: int
    shape: tuple[int | str | None, ...] | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type as NumPy's."""
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.kind))


def function_key(function: FunctionProto) -> Key:
    """What tells a function from the others: several may have one name, as overloads."""
    return (function.domain, function.name, function.overload)


def bodies(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    """The subgraphs of a node, with the names of their attributes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from ((f"{attribute.name}.{i}", graph) for i, graph in enumerate(attribute.graphs))


def walk(body: Body, key: Key) -> Iterator[tuple[Key, Body]]:
    """A body and those in it, with the keys of their scopes."""
    yield key, body
    for index, node in enumerate(body.node):
        for i, (_, inner) in enumerate(bodies(node)):
            yield from walk(inner, (*key, index, i))


def everything(proto: ModelProto) -> Iterator[tuple[Key, Body]]:
    """The main graph, all that lies in it, and the functions, with the keys of their scopes."""
    yield from walk(proto.graph, ())
    for function in proto.functions:
        yield from walk(function, function_key(function))


def names_read(proto: ModelProto) -> set[str]:
    """Every value that a node reads or a graph returns."""
    found = {name for _, body in everything(proto) for node in body.node for name in node.input}
    for _, body in everything(proto):
        found.update((value.name for value in body.output) if isinstance(body, GraphProto) else body.output)
    return found


def names(proto: ModelProto) -> set[str]:
    """Every name of a value."""
    found = names_read(proto)
    for _, body in everything(proto):
        found.update(name for node in body.node for name in node.output)
        if isinstance(body, GraphProto):
            found.update(value.name for values in (body.input, body.initializer, body.value_info) for value in values)
            found.update(tensor.values.name for tensor in body.sparse_initializer)
        else:
            found.update(body.input)
    return found


def opset(imports: Any) -> int:
    """Version of ONNX's own operators."""
    return max((int(one.version) for one in imports if one.domain in DEFAULT), default=0)


def types(proto: ModelProto) -> dict[tuple[Key, str], Type]:
    """What shape inference finds, by scope and name."""
    try:
        inferred = onnx.shape_inference.infer_shapes(proto)
    except Exception:  # it refuses what the checker lets pass; then nothing is known but what the model says
        inferred = proto
    found: dict[tuple[Key, str], Type] = {}
    for key, body in everything(inferred):
        if isinstance(body, GraphProto):
            found.update({(key, t.name): Type(t.data_type, tuple(t.dims)) for t in body.initializer})
            infos = [*body.value_info, *body.output, *body.input]
        else:
            infos = list(body.value_info)
        for info in infos:
            tensor = info.type.tensor_type
            if info.type.WhichOneof("value") == "tensor_type":
                shape = tuple(_dim(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
                found[key, info.name] = Type(tensor.elem_type, shape)
    return found


def _dim(dim: Any) -> int | str | None:
    if dim.WhichOneof("value") == "dim_value":
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    # Shape inference makes up names for what it does not know.
    return dim.dim_param if dim.dim_param and not dim.dim_param.startswith("unk__") else None


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    for _, body in everything(proto):
        if isinstance(body, GraphProto):
            yield from body.initializer
        for node in body.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)


def said(error: Exception) -> str:
    """What an error says, in one line; the name of a file may stand at its end."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def load(model: object) -> tuple[ModelProto, str]:
    """The ModelProto that a user means, checked, and the folder of its external data.

    Raises
    ------
    TypeError, ValueError
        As `check`.
    """
    folder = ""
    given: Any = model
    if isinstance(model, (str, os.PathLike)):
        path = Path(os.fspath(model)) if isinstance(os.fspath(model), str) else None
        if path is None:
            raise TypeError(f"model must be a ModelProto or a path, got {type(model).__name__}")
        if not _is_file(path):
            raise ValueError(f"model must be the path of a file, but there is none at {checks.short(os.fspath(model))}")
        try:
            proto = onnx.load(str(path), load_external_data=False)
        except Exception as error:  # a file that cannot be read: permissions, an end that is missing, another kind of file
            raise ValueError(f"model: {checks.short(str(path))} cannot be read as an ONNX model: {said(error)}") from error
        folder = str(path.parent)
        given = str(path) if any(map(onnx.external_data_helper.uses_external_data, _tensors(proto))) else proto
    elif isinstance(model, ModelProto):
        proto = model
    else:
        raise TypeError(f"model must be an onnx.ModelProto or a path, got {type(model).__name__}")
    try:
        _check(given, proto)
    except Exception as error:  # of several classes, that of the checker itself among them
        raise ValueError(f"model must be one that onnx.checker lets pass: {said(error)}") from error
    return proto, folder


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or in a folder that may not be read
        return False


def _check(given: ModelProto | str, proto: ModelProto) -> None:
    """Let onnx.checker look, but not at operators that are deprecated in their opset: runtimes run them all the same."""
    try:
        onnx.checker.check_model(given)
        return
    except onnx.checker.ValidationError as error:
        if "is deprecated in domain_version" not in str(error):
            raise
    twin = ModelProto()
    twin.CopyFrom(proto)
    for holder, root in ((twin, twin.graph), *((function, function) for function in twin.functions)):
        version = opset(holder.opset_import)
        for _, body in walk(root, ()):
            for node in body.node:
                if node.domain in DEFAULT and _is_deprecated(node.op_type, version):
                    node.domain = _ELSEWHERE
        holder.opset_import.append(onnx.helper.make_opsetid(_ELSEWHERE, 1))
    for tensor in _tensors(twin):
        if onnx.external_data_helper.uses_external_data(tensor):  # the copy lies in no folder; whoever reads the file says what is wrong
            tensor.CopyFrom(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]))
    onnx.checker.check_model(twin)


def _is_deprecated(op: str, version: int) -> bool:
    try:
        return bool(onnx.defs.get_schema(op, version, "").deprecated)
    except onnx.defs.SchemaError:  # there is no such operator, and the checker says so
        return False


def external_files(path: Path) -> list[Path]:
    """The files that a model's tensors lie in; none where it cannot be read, which `load` says."""
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except Exception:
        return []
    outside = filter(onnx.external_data_helper.uses_external_data, _tensors(proto))
    return [path.parent / name for name in {onnx.external_data_helper.ExternalDataInfo(tensor).location for tensor in outside}]


def load_external(proto: ModelProto, folder: str) -> ModelProto:
    """The same, with its external data in it where it came from a folder."""
    if folder:
        try:
            onnx.external_data_helper.load_external_data_for_model(proto, folder)
        except Exception as error:  # a file that is shorter than the model says
            raise ValueError(f"model: its external data cannot be read: {said(error)}") from error
    return proto


def write(proto: ModelProto, path: Path) -> None:
    """Write a model; where it is too large for one file, its tensors into another beside it, of the same name and ".data"."""
    if sum(tensor.ByteSize() for tensor in _tensors(proto)) < LARGE:
        onnx.save(proto, str(path))  # in the format of the suffix, by which it will be read
        return
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)  # onnx.save would write behind what is there
    onnx.save(proto, str(path), save_as_external_data=True, location=beside.name)
