"""Names and layouts of the PyTorch families."""
