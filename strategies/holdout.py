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

    @property
    def second_names(self) -> dict[str, str]:
        """Of parameters under several names, the first one by each of the others."""
        first: dict[int, str] = {}
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: one for name, each in named if (one := first.setdefault(id(each), name)) != name}

    @property
    def trainable(self) -> frozenset[str]:
        """Names of the parameters that train; of a weight under two names both."""
        named = self.model.named_parameters(remove_duplicate=False)
        return frozenset(name for name, parameter in named if parameter.requires_grad)
