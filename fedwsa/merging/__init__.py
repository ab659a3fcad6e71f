"""Merging of models that were trained apart: state dicts in, one state dict out."""

from fedwsa.merging.align import UnitEntry, UnitGroup, align, chain_permutations
from fedwsa.merging.align_scopes import Rescaled, align_scopes
from fedwsa.merging.average import average
from fedwsa.merging.barrier import Barrier, Baseline, accuracy_drop, barrier, interpolate
from fedwsa.merging.np_merge import Loss, Merged, np_merge, successive_np_merge
from fedwsa.merging.recalibrate import recalibrate
from fedwsa.merging.stages import PairMerge, merge_in_stages

__all__ = [
    "Barrier",
    "Baseline",
    "Loss",
    "Merged",
    "PairMerge",
    "Rescaled",
    "UnitEntry",
    "UnitGroup",
    "accuracy_drop",
    "align",
    "align_scopes",
    "average",
    "barrier",
    "chain_permutations",
    "interpolate",
    "merge_in_stages",
    "np_merge",
    "recalibrate",
    "successive_np_merge",
]
