"""Small convolutional network."""

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d


class CNN(nn.Module):
    """Two 5×5 convolutions (32 and 64 channels, each with ReLU and 2×2 max-pooling), 512 hidden units; logits out.

    The CNN of McMahan et al., arXiv 1602.05629: 1,663,370 parameters on 28×28 images. Padding keeps the size, so that
    each pooling halves it, rounded down; images smaller than 4×4 are a ValueError.
    Initialisation is that of torch.nn.Conv2d and Linear: weights and biases uniform in ±1/√fan_in, from the global
    generator (`build` seeds it).
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        if height < 4 or width < 4:
            raise ValueError(f"the CNN needs images of 4×4 or larger, got {height}×{width}; use the mlp")
        self.conv1 = nn.Conv2d(channels, 32, kernel_size=5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=5, padding=2)
        self.fc1 = nn.Linear(64 * (height // 4) * (width // 4), 512)
        self.fc2 = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, num_classes] of images [n, C, H, W]."""
        maps = max_pool2d(torch.relu(self.conv1(images)), 2)
        maps = max_pool2d(torch.relu(self.conv2(maps)), 2)
        logits: Tensor = self.fc2(torch.relu(self.fc1(maps.flatten(1))))
        return logits
