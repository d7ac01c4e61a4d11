"""The model: token ids in, loss out."""
