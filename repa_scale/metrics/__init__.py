"""Measures of sets of images, as pure functions of their features; the features come from extractors.py."""
