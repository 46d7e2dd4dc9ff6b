"""Losses on exact tables: what a policy-optimisation method needs to be run to its optimum and measured there.

A *loss* is a pure function of log-probabilities, labels and weights (`losses`). It is run on a policy whose parameters
give the log-probabilities of all responses (`SoftmaxTable`, `PrefixTree`), on a batch of comparisons that is either the
whole population with its exact probabilities or a sample (`Pairs`), by an optimiser whose answer carries its gradient:
`minimise` for any function, `fit` for losses of whole responses, `fit_pairs` for losses of comparisons. torch is
imported when a loss is evaluated, not with the package.
"""

from .minimise import Minimum, fit, fit_pairs, minimise
from .pairs import Pairs, gather
from .tables import PrefixTree, SoftmaxTable, Table

__all__ = [
    "Minimum",
    "Pairs",
    "PrefixTree",
    "SoftmaxTable",
    "Table",
    "fit",
    "fit_pairs",
    "gather",
    "minimise",
]
