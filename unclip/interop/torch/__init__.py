"""PyTorch's files, read without unpickling."""
