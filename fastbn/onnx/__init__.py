"""fastbn for ONNX models: what their batch norms cost, models without them, and fastbn where they stay.

``print(fastbn.onnx.check("model.onnx"))`` lists the normalization nodes, ``fastbn.onnx.fold(model)`` folds batch norms into
what stands beside them, ``ReferenceEvaluator(model, new_ops=fastbn.onnx.ops)`` runs them by fastbn. See docs/onnx.md.
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
