"""Objectives: each module builds a Task, the pure functions that the training loop drives."""
