"""Worlds that are known exactly, their Gymnasium environments, and who answers preference queries."""

if __name__ != "preflab.envs":
    raise ImportError("import preflab.envs: a bare import would make a second copy of every class")

from .features import FeatureMap
from .kernels import CSRKernel, DenseKernel, Kernel, TreeKernel
from .mdp import FiniteMDP
from .trajectories import Trajectories

__all__ = ["CSRKernel", "DenseKernel", "FeatureMap", "FiniteMDP", "Kernel", "Trajectories", "TreeKernel"]
