"""Runs beside each other: a table of their numbers and settings, a picture of their curves."""
