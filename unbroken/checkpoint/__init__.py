"""Checkpoints: trees of sliced tensors and plain values, to a file and back. README.md says where to begin."""
