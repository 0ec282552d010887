"""fastbn for ONNX models: list the batch norms and their cost, fold them, or run them with fastbn.

``print(fastbn.onnx.check("model.onnx"))`` lists the normalization nodes, ``fastbn.onnx.fold(model)`` folds batch norms into
their neighbors, and ``ReferenceEvaluator(model, new_ops=fastbn.onnx.ops)`` runs them with fastbn. See docs/onnx.md.
"""

try:
    import onnx as _onnx
except ImportError as error:
    raise ImportError(f"fastbn.onnx needs onnx (pip install onnx): {error}") from error

from fastbn.onnx.folding import fold
from fastbn.onnx.operators import ops
from fastbn.onnx.report import Norm, Report, check, extract
from fastbn.onnx.sessions import session

__all__ = ["Norm", "Report", "check", "extract", "fold", "ops", "session"]

del _onnx
