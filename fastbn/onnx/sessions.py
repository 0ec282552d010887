"""Sessions of ONNX Runtime in which fastbn computes the batch norms, as a custom operator.

onnxruntime-extensions lets a Python function be an operator, and carries what it returns over as a list of Python floats.
That takes far longer than batch norm itself: it is a way to compare results in a whole model, not to save time. An exception
in such a function would end the process; so it is kept, and raised when the run is over.
"""

from __future__ import annotations

import os
from functools import cache, partial, wraps
from threading import get_ident
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from fastbn.functional import batch_norm
from fastbn.layout import Array
from fastbn.onnx.frozen import EPSILON
from fastbn.onnx.graph import Model, Node, Stays
from fastbn.onnx.protos import load, load_external

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

DOMAIN = "ai.onnx.contrib"  # the only one in which onnxruntime-extensions finds functions of Python
OPERATORS = {TensorProto.FLOAT: "FastbnBatchNormalization", TensorProto.DOUBLE: "FastbnBatchNormalizationDouble"}


# By thread: nodes run one after another in the one that called, or, of `run_async`, in one of ONNX Runtime's, where nothing that is
# local to a thread of Python's outlives a call.
_raised: dict[int, BaseException] = {}


def _batch_norm(x: Array, scale: Array, bias: Array, mean: Array, var: Array, epsilon: float) -> Array:
    try:
        return batch_norm(x[:, None] if x.ndim == 1 else x, mean, var, scale, bias, eps=epsilon).reshape(x.shape)
    except BaseException as error:
        _raised[get_ident()] = error
        return np.full_like(x, np.nan)


@cache  # an operator is registered once in a process
def _library() -> str:
    from onnxruntime_extensions import PyCustomOpDef, get_library_path, onnx_op

    types = {TensorProto.FLOAT: PyCustomOpDef.dt_float, TensorProto.DOUBLE: PyCustomOpDef.dt_double}
    for kind, name in OPERATORS.items():
        declare = onnx_op(op_type=name, inputs=[types[kind]] * 5, outputs=[types[kind]], attrs={"epsilon": PyCustomOpDef.dt_float})
        declare(_batch_norm)
    return str(get_library_path())


def _kept() -> BaseException | None:
    """What fastbn raised in this thread since it was last asked for."""
    return _raised.pop(get_ident(), None)


def _raising(run: Any) -> Any:
    """A method that runs a session, raising what fastbn raised."""

    @wraps(run)
    def raising(*arguments: Any, **named: Any) -> Any:
        try:
            return run(*arguments, **named)
        finally:
            if (error := _kept()) is not None:
                raise error from None

    return raising


@cache
def _session_class() -> Any:
    from onnxruntime import InferenceSession

    class Session(InferenceSession):  # type: ignore[misc]  # typed in part only
        """An InferenceSession that raises what fastbn raised."""

        def __repr__(self) -> str:
            inputs, outputs = ([f"{a.name}: {a.type}{a.shape}" for a in ends] for ends in (self.get_inputs(), self.get_outputs()))
            return f"<fastbn.onnx session of {', '.join(inputs)} to {', '.join(outputs)}>"

        run = _raising(InferenceSession.run)
        run_with_ort_values = _raising(InferenceSession.run_with_ort_values)
        run_with_ortvaluevector = _raising(InferenceSession.run_with_ortvaluevector)
        run_with_iobinding = _raising(InferenceSession.run_with_iobinding)

        def run_async(self, output_names: Any, input_feed: Any, callback: Any, user_data: Any, run_options: Any = None) -> Any:
            """As InferenceSession; what fastbn raises is the text that the callback gets."""

            def told(results: Any, data: Any, text: str) -> None:  # in the thread that ran the nodes
                if (error := _kept()) is not None:
                    results, text = [], f"{type(error).__name__}: {error}"
                callback(results, data, text)

            return super().run_async(output_names, input_feed, told, user_data, run_options)

    return Session


def session(model: ModelProto | str | os.PathLike[str], options: SessionOptions | None = None) -> InferenceSession:
    """Make a session of ONNX Runtime in which fastbn computes the batch norms of inference.

    It is slower than ONNX Runtime's own, by two orders of magnitude for large arrays: onnxruntime-extensions, which carries the
    arrays to Python and back, turns each element into a Python object. Use it to compare results.

    Parameters
    ----------
    model : ModelProto or path
        Its float32 and float64 batch norms of inference become a custom operator, except those in local functions.
    options : onnxruntime.SessionOptions, optional
        The custom operator is registered in it, unless onnxruntime-extensions already is. Nodes must run one after another,
        which is the default.

    Returns
    -------
    onnxruntime.InferenceSession

    Raises
    ------
    ImportError
        If onnxruntime or onnxruntime-extensions is not installed.
    TypeError, ValueError
        As `check`; or if options has the wrong type, or runs nodes at the same time. Running the session also raises the
        exceptions of fastbn.

    Examples
    --------
    >>> import onnxruntime_extensions, onnx.parser, fastbn.onnx
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["": 17]>
    ... net (float[N, 2] x) => (float[N, 2] y)
    ...     <float[2] s = {1, 1}, float[2] b = {0, 0}, float[2] m = {5, 6}, float[2] v = {4, 9}>
    ...     { y = BatchNormalization <epsilon = 0.0> (x, s, b, m, v) }''')
    >>> fastbn.onnx.session(model).run(None, {"x": np.array([[7, 9]], np.float32)})
    [array([[1., 1.]], dtype=float32)]
    """
    try:
        import onnxruntime

        library = _library()
    except ImportError as error:
        raise ImportError(f"fastbn.onnx.session needs onnxruntime and onnxruntime-extensions: {error}") from error
    if options is not None and not isinstance(options, onnxruntime.SessionOptions):
        raise TypeError(f"options must be an onnxruntime.SessionOptions, got {type(options).__name__}")
    if options is not None and options.execution_mode != onnxruntime.ExecutionMode.ORT_SEQUENTIAL:
        raise ValueError(f"options must have the execution_mode ORT_SEQUENTIAL, got {options.execution_mode.name}")
    proto, folder = load(model)
    opened = Model(proto, folder)
    for node in opened.norms:
        if (name := _operator(node)) is not None:
            epsilon = node.attribute("epsilon", np.float32(EPSILON))
            proto = helper.make_node(name, list(node.proto.input), [node.proto.output[0]], node.proto.name, domain=DOMAIN, epsilon=epsilon)
            node.scope.remove(node)
            node.scope.add(node, proto)
    proto = load_external(opened.close(), folder)
    if DOMAIN not in {one.domain for one in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return _opened(proto.SerializeToString(), onnxruntime.SessionOptions() if options is None else options, library)


def _opened(model: bytes, options: SessionOptions, library: str) -> InferenceSession:
    """A session of a model; the library is registered where the options lack it, as ONNX Runtime refuses one that is there twice."""
    make = partial(_session_class(), model, options, providers=["CPUExecutionProvider"])
    try:
        found: InferenceSession = make()
    except Exception as error:  # of no class of its own
        if f"{DOMAIN}:" not in str(error):  # an operator that is not registered
            raise
        options.register_custom_ops_library(library)
        found = make()
    return found


def _operator(node: Node) -> str | None:
    """The custom operator that does what a node does, if there is one."""
    if node.op != "BatchNormalization" or node.scope.in_function or node.scope.opset < 7:
        return None
    try:
        trains = node.attribute("training_mode", 0) or any(list(node.proto.output)[1:]) or not node.attribute("spatial", 1)
    except Stays:
        return None
    kinds: set[Any] = {None if (known := node.scope.type_of(name)) is None else known.kind for name in node.proto.input}
    return None if trains or len(kinds) != 1 else OPERATORS.get(kinds.pop())
