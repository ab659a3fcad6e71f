"""Merging of models that were trained apart: state dicts in, one state dict out."""

from fedwsa.merging.align import UnitEntry, UnitGroup, align, chain_permutations
from fedwsa.merging.average import average
from fedwsa.merging.np_merge import Loss, Merged, np_merge, successive_np_merge

__all__ = [
    "Loss",
    "Merged",
    "UnitEntry",
    "UnitGroup",
    "align",
    "average",
    "chain_permutations",
    "np_merge",
    "successive_np_merge",
]
