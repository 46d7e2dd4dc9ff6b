"""Worlds that are known exactly, their Gymnasium environments, and who answers preference queries."""

if __name__ != "preflab.envs":
    raise ImportError("import preflab.envs: under the bare name 'envs' every class would exist twice")

from .features import FeatureMap
from .kernels import CSRKernel, DenseKernel, Kernel, TreeKernel
from .mdp import FiniteMDP
from .trajectories import Trajectories

__all__ = ["CSRKernel", "DenseKernel", "FeatureMap", "FiniteMDP", "Kernel", "Trajectories", "TreeKernel"]
