"""Estimation: preference MLE, ridge regression on sufficient statistics, Gaussian posteriors, ellipsoids."""

from .gram import Gram, RidgeRegression, TrackedNorms
from .preferences import PreferenceFit, SeparableDataError, fit_preferences, merge_repeated

__all__ = [
    "Gram",
    "PreferenceFit",
    "RidgeRegression",
    "SeparableDataError",
    "TrackedNorms",
    "fit_preferences",
    "merge_repeated",
]
