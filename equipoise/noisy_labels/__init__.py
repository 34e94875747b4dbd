"""Noisy labels: part of the training labels is wrong."""
