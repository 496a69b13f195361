"""Checkpoints of logical tensors: written by any layout, read by any other, published by their manifest alone."""
