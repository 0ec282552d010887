"""The main job: fastbn on the layers of real networks, beside a copy of the same memory, NumPy and PyTorch."""
