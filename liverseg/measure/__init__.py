"""Measurements on NumPy arrays: no torch, no network, no pictures, no files."""
