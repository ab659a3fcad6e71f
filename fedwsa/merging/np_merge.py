"""NP-Merge, arXiv 2412.15467: one learned interpolation coefficient per parameter.

W = s ⊙ W_A + (1 − s) ⊙ W_B′ with s = sigmoid(s_pre), B′ = B aligned to A. The method is the paper's; where its
summary is silent the choice is ours: Adam, its learning rate and number of steps, a start at the models' weight share.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam  # the function: constructing an Optimizer imports torch._dynamo, about a second

from fedwsa.merging.align import UnitGroup
from fedwsa.merging.align import align as align_to
from fedwsa.merging.average import average, check_alike

Loss = Callable[[dict[str, Tensor], int], Tensor]
"""loss(state, step): the merged model's scalar loss at optimisation step 0, 1, …; the caller brings model and data."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model and how it came about.

    state: all tensors of the models, in their types. coefficients: s per trainable tensor, the share of A, in [0, 1].
    losses: the loss before each step; fewer than the steps asked for, or a last one that is not finite, if learning
    had to end early.
    """

    state: dict[str, Tensor]
    coefficients: dict[str, Tensor]
    losses: list[float]


def np_merge(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    loss: Loss,
    *,
    share: float = 0.5,
    steps: int = 20,
    learning_rate: float = 0.1,
    align: bool = True,
    groups: Sequence[UnitGroup] | None = None,
    trainable: Collection[str] | None = None,
) -> Merged:
    """Merge two models with one coefficient per parameter, learned by Adam on `loss`.

    All s start at `share`, so zero steps give the weighted average of A and B′. The state after the last step is
    returned; its own loss is not evaluated. A loss or gradient that is not finite ends the learning at the last state
    whose loss was finite (the average, if there was none).

    loss: gets every tensor of the merged model: the trainable ones with gradient, the others as fresh copies (so that a
        BatchNorm in training mode may write to its own).
    share: A's part of the accumulated weight, in (0, 1). The paper starts at ½.
    steps: ≥ 0. learning_rate: Adam's, > 0, in units of s_pre (logits). The defaults, learning on 100 samples, had a
        lower test loss than the average in all of 31 merges of MLPs trained apart on the digits; a rate of 3 had not.
    align: permute B's units towards A first; groups: the permutation spec, None for a plain chain (see align()).
    trainable: the tensors that get coefficients, None for all floating ones. The others are averaged by `share`, as
        average() does; name the parameters here if the model has floating buffers, such as BatchNorm's statistics.
    Raises ValueError for options out of range, unlike models and non-finite trainable weights.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share!r}")
    if not steps >= 0:
        raise ValueError(f"steps must be >= 0, got {steps!r}")
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate must be > 0 and finite, got {learning_rate!r}")
    check_alike([a, b])
    names = _trainable_names(a, b, trainable)
    if align:
        b = align_to(b, a, groups)
    others = [{name: tensor for name, tensor in state.items() if name not in names} for state in (a, b)]
    rest = average(others, [share, 1 - share])

    def evaluate(merged: Sequence[Tensor], step: int) -> tuple[float, tuple[Tensor, ...]]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in zip(names, merged, strict=True)}
        with torch.enable_grad():
            value = loss({n: leaves[n].to(a[n].dtype) if n in leaves else rest[n].clone() for n in a}, step)
            if not value.requires_grad:
                raise ValueError(
                    "the loss does not depend on the merged tensors; compute it from the state it is given"
                )
            return value.item(), torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)

    ends = [[_wide(state[name]) for name in names] for state in (a, b)]
    coefficients, merged, losses = _learn(ends[0], ends[1], evaluate, share, steps if names else 0, learning_rate)
    learned = {name: tensor.to(a[name].dtype) for name, tensor in zip(names, merged, strict=True)}
    state = {name: learned[name] if name in learned else rest[name] for name in a}
    return Merged(state, dict(zip(names, coefficients, strict=True)), losses)


def _trainable_names(a: Mapping[str, Tensor], b: Mapping[str, Tensor], trainable: Collection[str] | None) -> list[str]:
    floating = [name for name, tensor in a.items() if tensor.is_floating_point()]
    if trainable is None:
        trainable = floating
    if odd := set(trainable) - set(floating):
        raise ValueError(f"trainable must name floating tensors of the model, got {sorted(odd)}")
    names = [name for name in floating if name in trainable]
    if broken := [name for name in names if not (a[name].isfinite().all() and b[name].isfinite().all())]:
        raise ValueError(
            f"trainable tensors must be finite, these are not: {broken}; leave them out or reject the model"
        )
    return names


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: Adam's ε is zero in float16, and a coefficient needs more than bfloat16's eight bits."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _mix(logits: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """s and s ⊙ W_A + (1 − s) ⊙ W_B; exact where s is 0 or 1 and where W_A = W_B."""
    coefficients = [logit.sigmoid() for logit in logits]
    return coefficients, [torch.lerp(y, x, s) for x, y, s in zip(a, b, coefficients, strict=True)]


def logit_gradients(
    gradients: Iterable[Tensor], a: Iterable[Tensor], b: Iterable[Tensor], coefficients: Iterable[Tensor]
) -> list[Tensor]:
    """∂L/∂s_pre = ∂L/∂W ⊙ (W_A − W_B) ⊙ s(1 − s), so that autograd need only reach W."""
    return [g * (x - y) * s * (1 - s) for g, x, y, s in zip(gradients, a, b, coefficients, strict=True)]


def _learn(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    evaluate: Callable[[Sequence[Tensor], int], tuple[float, tuple[Tensor, ...]]],
    share: float,
    steps: int,
    learning_rate: float,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Coefficients, merged tensors and losses after `steps` of Adam on s_pre."""
    logits = [torch.full_like(tensor, math.log(share) - math.log1p(-share)) for tensor in a]
    means, squares = ([torch.zeros_like(tensor) for tensor in a] for _ in range(2))
    counts = [torch.tensor(0.0) for _ in a]
    losses: list[float] = []
    finite = current = _mix(logits, a, b)
    for step in range(steps):
        value, gradients = evaluate(current[1], step)
        losses.append(value)
        if not math.isfinite(value):
            return *finite, losses
        finite = current
        logit_grads = logit_gradients(gradients, a, b, current[0])
        if not all(gradient.isfinite().all() for gradient in logit_grads):
            break
        adam(
            logits,
            logit_grads,
            means,
            squares,
            [],
            counts,
            foreach=True,
            amsgrad=False,
            maximize=False,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            lr=learning_rate,
        )
        current = _mix(logits, a, b)
    return *current, losses


def successive_np_merge(
    pairs: Iterable[tuple[Mapping[str, Tensor], float]], loss: Loss, *, share: float | None = None, **options: Any
) -> dict[str, Tensor]:
    """Merge models one after another: each is aligned to the running merge and merged into it by np_merge().

    With `share` None every merge starts at the accumulated weight share, so that zero steps give the weighted average
    of the aligned models; share=0.5 is the paper's start, under which the first of ten models weighs 0.002.

    pairs: (state, weight > 0) in any iterable; a model is dropped before the next is asked for, so that a generator
        need never hold more than one beside the running merge. One model comes back as it is, copied.
    options: steps, learning_rate, align, groups and trainable of np_merge(). `loss` starts at step 0 for every model.
    Raises ValueError for no models, a weight that is not positive and finite, and whatever np_merge() refuses.
    """
    merged: dict[str, Tensor] | None = None
    total = 0.0
    for state, weight in pairs:
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weights must be > 0 and finite, got {weight!r}")
        if merged is None:
            merged = {name: tensor.detach().clone() for name, tensor in state.items()}
        else:
            start = total / (total + weight) if share is None else share
            merged = np_merge(merged, state, loss, share=start, **options).state
        total += weight
        del state
    if merged is None:
        raise ValueError("successive_np_merge needs at least one model, got none")
    return merged
