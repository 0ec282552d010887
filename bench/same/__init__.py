"""The gate for a rebuild of the kernels: two builds side by side. ``python -m bench.same BUILD_A BUILD_B``."""
