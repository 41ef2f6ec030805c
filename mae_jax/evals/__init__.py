"""Evaluators: each turns a training state into scalars and pictures."""
