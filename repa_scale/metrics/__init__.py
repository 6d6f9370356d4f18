"""Measures of sets of images, as pure functions of their features; the features come from extractors.py."""

CONFIDENCE = 0.95  # of intervals, two-sided
NORMAL = 1.959964  # standard errors of the normal distribution on either side that hold it
