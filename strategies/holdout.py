"""What the server itself holds."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Holdout:
    """A module of the federation's architecture, and labelled samples that no client trains on.

    images: [N, C, H, W] float32, labels: [N] int64; N = `server-samples`, may be 0.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
