"""Estimation: preference MLE, ridge regression on sufficient statistics, Gaussian posteriors, ellipsoids."""

from .gram import Gram, RidgeRegression, TrackedNorms
from .online_preferences import OnlinePreferenceMLE
from .posterior import GaussianPosterior, confidence_radius, disagreement
from .preferences import PreferenceFit, SeparableDataError, fit_preferences, merge_repeated

__all__ = [
    "GaussianPosterior",
    "Gram",
    "OnlinePreferenceMLE",
    "PreferenceFit",
    "RidgeRegression",
    "SeparableDataError",
    "TrackedNorms",
    "confidence_radius",
    "disagreement",
    "fit_preferences",
    "merge_repeated",
]
