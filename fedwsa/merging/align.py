"""Weight matching: permute the hidden units of one network so that its weights lie nearest to another's.

Coordinate descent over linear assignment problems, after Ainsworth, Hayase & Srinivasa, "Git Re-Basin", arXiv
2209.04836, algorithm 1; there the groups are visited in random order, here in a fixed one, so that the result is a
function of the weights alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fedwsa.merging.average import check_alike


class UnitEntry(NamedTuple):
    """Where a group's units lie in one tensor: unit i is positions i·block … (i+1)·block − 1 along `axis`.

    A block > 1 is a convolution's channel behind a flatten: its spatial positions are neighbouring columns.
    """

    name: str
    axis: int
    block: int = 1


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """`size` hidden units that may be permuted together in all `entries` without changing the network's function."""

    size: int
    entries: tuple[UnitEntry, ...]


def chain_permutations(state: Mapping[str, Tensor]) -> list[UnitGroup]:
    """The unit groups of a plain feed-forward chain of Linear and Conv2d layers, in state-dict order.

    A layer is 'X.weight' (out, in) or (out, in, kh, kw) with an optional 'X.bias' (out); one group stands between each
    layer and the next. A convolution may feed a linear layer through a flatten: in = channels · positions.

    Shapes cannot show skip connections, nor a forward order that is not the state dict's: pass align() groups of your
    own for such networks. Raises ValueError where the tensors form no chain, or two of them are one in memory.
    """
    weights = [name for name, tensor in state.items() if _leaf(name) == "weight" and tensor.ndim in (2, 4)]
    biases = {name.removesuffix("weight") + "bias": name for name in weights}
    for name, tensor in state.items():
        is_bias = name in biases and tensor.shape == state[biases[name]].shape[:1]
        if name not in weights and not is_bias:
            raise _no_chain(f"{name} {tuple(tensor.shape)} is no Linear or Conv2d weight or bias")
    there: dict[int, str] = {}
    for name in weights:
        if (first := there.setdefault(state[name].data_ptr() or id(state[name]), name)) != name:
            raise _no_chain(f"{name} and {first} are one weight")
    groups = []
    for name, following in pairwise(weights):
        size, block = state[name].shape[0], _block(name, following, state)
        bias = name.removesuffix("weight") + "bias"
        entries = [UnitEntry(name, 0), *([UnitEntry(bias, 0)] if bias in state else []), UnitEntry(following, 1, block)]
        groups.append(UnitGroup(size, tuple(entries)))
    return groups


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _no_chain(reason: str) -> ValueError:
    return ValueError(f"no plain chain of layers: {reason}; pass `groups` (a permutation spec) or do not align")


def _block(name: str, following: str, state: Mapping[str, Tensor]) -> int:
    """How many consecutive inputs of `following` belong to one output unit of `name`."""
    before, after = state[name], state[following]
    outputs, inputs = before.shape[0], after.shape[1]
    flattened = before.ndim == 4 and after.ndim == 2
    if before.ndim < after.ndim or not outputs or (inputs % outputs if flattened else inputs != outputs):
        raise _no_chain(f"{following} {tuple(after.shape)} does not take the {outputs} outputs of {name}")
    return inputs // outputs


def align(
    b: Mapping[str, Tensor],
    a: Mapping[str, Tensor],
    groups: Sequence[UnitGroup] | None = None,
    *,
    max_sweeps: int = 50,
) -> dict[str, Tensor]:
    """Permute the units of `b` so that its weights lie nearest to `a`; b's function stays the same.

    Each group in turn gets the permutation that maximises Σ_i ⟨a's unit i, b's unit π(i)⟩ given the others, in
    float64, until none improves or after `max_sweeps` rounds. ‖a − b‖ never grows; ties keep b's order, so equal
    networks stay as they are. The result is a local optimum and shares no memory with `b`.

    groups: None derives them with chain_permutations().
    Raises ValueError for unlike networks, weights of the groups that are not finite, no chain, or groups that do not
    fit the tensors.
    """
    check_alike([a, b])
    groups = chain_permutations(a) if groups is None else groups
    _check_groups(groups, a)
    aligned = {name: tensor.detach().clone() for name, tensor in b.items()}
    for group, permutation in zip(groups, _match(b, a, groups, max_sweeps), strict=True):
        for entry in group.entries:
            aligned[entry.name] = _permuted(aligned[entry.name], entry, permutation)
    return aligned


def _check_groups(groups: Sequence[UnitGroup], state: Mapping[str, Tensor]) -> None:
    seen = set()
    for group in groups:
        for entry in group.entries:
            if entry.name not in state:
                raise ValueError(f"unit group names a tensor that the model lacks: {entry.name!r}")
            shape = state[entry.name].shape
            if not 0 <= entry.axis < len(shape) or shape[entry.axis] != group.size * entry.block:
                raise ValueError(f"{entry} with {group.size} units does not fit {entry.name} {tuple(shape)}")
            if (entry.name, entry.axis) in seen:
                raise ValueError(f"axis {entry.axis} of {entry.name} is in the unit groups twice; list it once")
            seen.add((entry.name, entry.axis))
        # two axes of one tensor under one permutation are a quadratic assignment, which no sweep solves
        if len({entry.name for entry in group.entries}) < len(group.entries):
            raise ValueError(f"a unit group holds two axes of one tensor: {[tuple(entry) for entry in group.entries]}")


def _match(
    b: Mapping[str, Tensor], a: Mapping[str, Tensor], groups: Sequence[UnitGroup], max_sweeps: int
) -> list[Tensor]:
    """One permutation a group, int64 [size]: unit i of the aligned network is unit permutation[i] of `b`."""
    names = {entry.name for group in groups for entry in group.entries}
    wide_a, wide_b = ({name: state[name].detach().to("cpu", torch.float64) for name in names} for state in (a, b))
    if broken := [
        name for name in sorted(names) if not (wide_a[name].isfinite().all() and wide_b[name].isfinite().all())
    ]:
        raise ValueError(f"weights must be finite to be aligned, these are not: {broken}; reject the model")
    holders = {
        name: [(g, e) for g, group in enumerate(groups) for e in group.entries if e.name == name] for name in names
    }
    permutations = [torch.arange(group.size) for group in groups]

    def similarity(g: int, entry: UnitEntry) -> Tensor:
        other = wide_b[entry.name]
        for h, held in holders[entry.name]:
            if h != g:
                other = _permuted(other, held, permutations[h])
        return _units(wide_a[entry.name], entry, groups[g].size) @ _units(other, entry, groups[g].size).T

    fixed = [  # what no other group can change is computed once
        sum((similarity(g, e) for e in group.entries if len(holders[e.name]) == 1), torch.zeros(group.size, group.size))
        for g, group in enumerate(groups)
    ]
    stale = set(range(len(groups)))
    for _ in range(max_sweeps):
        for g in sorted(stale):
            moving = [entry for entry in groups[g].entries if len(holders[entry.name]) > 1]
            better = _assignment(sum((similarity(g, entry) for entry in moving), fixed[g]), permutations[g])
            stale.discard(g)
            if better is not None:
                permutations[g] = better
                stale |= {h for entry in moving for h, _ in holders[entry.name] if h != g}
        if not stale:
            break
    return permutations


def _units(tensor: Tensor, entry: UnitEntry, size: int) -> Tensor:
    """The tensor as one row a unit, [size, everything else]."""
    return tensor.movedim(entry.axis, 0).reshape(size, -1)


def _permuted(tensor: Tensor, entry: UnitEntry, permutation: Tensor) -> Tensor:
    positions = permutation[:, None] * entry.block + torch.arange(entry.block)
    return tensor.index_select(entry.axis, positions.reshape(-1).to(tensor.device))


def _assignment(similarity: Tensor, current: Tensor) -> Tensor | None:
    """The permutation with the greatest Σ_i similarity[i, π(i)]; None if `current` is as good, to rounding."""
    rows = torch.arange(len(current))
    now, highest = similarity[rows, current], similarity.amax(dim=1)
    if torch.equal(now, highest):
        return None  # each row's maximum: no permutation has a greater sum

    from scipy.optimize import linear_sum_assignment  # 0.2 s to import

    # taking a constant from a row or a column leaves the best permutation the best, and halves the solver's time
    reduced = similarity - highest[:, None]
    reduced -= reduced.amax(dim=0)
    best = torch.from_numpy(linear_sum_assignment(reduced.numpy(), maximize=True)[1])
    gain = similarity[rows, best].sum() - now.sum()
    return best if gain > 1e-12 * similarity.abs().amax(dim=1).sum() else None
