"""Weights by the names that other programs know them by."""
