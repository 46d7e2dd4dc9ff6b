"""Estimation: preference MLE, ridge regression on sufficient statistics, Gaussian posteriors, ellipsoids."""

from .bradley_terry import BradleyTerryFit, fit_bradley_terry
from .gram import Gram, RidgeRegression, TrackedNorms
from .online_preferences import OnlinePreferenceMLE
from .posterior import GaussianPosterior, confidence_radius, disagreement
from .preferences import PreferenceFit, SeparableDataError, fit_preferences, merge_repeated

__all__ = [
    "BradleyTerryFit",
    "GaussianPosterior",
    "Gram",
    "OnlinePreferenceMLE",
    "PreferenceFit",
    "RidgeRegression",
    "SeparableDataError",
    "TrackedNorms",
    "confidence_radius",
    "disagreement",
    "fit_bradley_terry",
    "fit_preferences",
    "merge_repeated",
]
