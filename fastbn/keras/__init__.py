"""fastbn in Keras 3, on its torch, tensorflow, jax and numpy backends.

`BatchNormalization` is Keras' layer, computed by fastbn's kernels; `convert` replaces Keras' layers in a copy of a model by
it. See docs/keras.md.
"""

try:
    import keras as _keras
except ImportError as error:
    raise ImportError(
        f"fastbn.keras needs Keras 3 (pip install keras) and the backend that KERAS_BACKEND names, or else tensorflow: {error}"
    ) from error
if int(_keras.__version__.split(".")[0]) < 3:
    raise ImportError(f"fastbn.keras needs Keras 3, this is {_keras.__version__}: pip install -U keras")

from fastbn.keras.conversion import convert
from fastbn.keras.layer import BatchNormalization
from fastbn.keras.overview import Summary, summary

__all__ = ["BatchNormalization", "Summary", "convert", "summary"]

del _keras
