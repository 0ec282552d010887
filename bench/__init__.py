"""The main job: fastbn on the layers of real networks, beside a copy of the same memory, NumPy and PyTorch.

Commands, each with ``--help``: ``python -m bench``, and ``python -m`` `bench.situ` (between convolutions), `bench.growth` (time
per byte), `bench.busy` (beside other processes), `bench.roofline` (drawings), `bench.instructions` (counts that need no quiet
machine) and `bench.same` (the gate between two builds).
"""
