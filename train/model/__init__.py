"""The model: one definition of a decoder, made of layers that pass one tuple of tensors."""
