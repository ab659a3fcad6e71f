"""Multi-layer perceptron."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers with ReLU between them; logits out.

    hidden: widths of the hidden layers. The default on 28×28 images is the "2NN" of McMahan et al., arXiv 1602.05629,
    with 199,210 parameters; () is multinomial logistic regression.
    Initialisation is that of torch.nn.Linear: weights and biases uniform in ±1/√fan_in, from the global generator
    (`build` seeds it).
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, hidden: Sequence[int] = (200, 200)) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden widths must be >= 1, got {tuple(hidden)}")
        widths = [math.prod(input_shape), *hidden, num_classes]
        self.layers = nn.ModuleList(nn.Linear(fan_in, out) for fan_in, out in pairwise(widths))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, num_classes] of images [n, C, H, W]."""
        *hidden, last = self.layers
        units = images.flatten(1)
        for layer in hidden:
            units = torch.relu(layer(units))
        logits: Tensor = last(units)
        return logits
