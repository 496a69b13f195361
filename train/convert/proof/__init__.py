"""The proof of a conversion: transformers, reading a folder, computes what our decoder computes with a checkpoint's weights.

Our side is built from the checkpoint, not from the folder, so that a fault of the key map shows even where its inverse would
undo it. Everything is compared in fp32 on the CPU. Neither model is ever whole in memory: both are run layer by layer, and a
layer's weights are read when it runs.
"""
