"""Training policies by the package's losses: one loop for all methods, judges, files of comparisons, run folders."""

from .loop import TrainingStopped, TrainResult, train
from .methods import METHODS, Method, find_method
from .settings import TrainSettings

__all__ = ["METHODS", "Method", "TrainResult", "TrainSettings", "TrainingStopped", "find_method", "train"]
