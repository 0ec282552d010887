"""Kernels: loops over elements. They know memory patterns, not batch normalization."""
