"""Residual networks for small images."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fedwsa.models.vgg import scaled

WIDTHS = (16, 32, 64)
GROUPS = 8  # of GroupNorm


class Block(nn.Module):
    """Two 3×3 convolutions, each normalised, around which the input passes; ReLU between them and after the sum.

    The input passes without parameters, as option A of He et al. has it: every stride-th pixel, zeros for the
    channels that are new.
    """

    def __init__(self, channels: int, out: int, stride: int, norm: str) -> None:
        super().__init__()
        self.stride, self.new = stride, out - channels
        self.conv1 = nn.Conv2d(channels, out, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = normalisation(norm, out)
        self.conv2 = nn.Conv2d(out, out, kernel_size=3, padding=1, bias=False)
        self.norm2 = normalisation(norm, out)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [n, out, ⌈H/stride⌉, ⌈W/stride⌉] of maps [n, channels, H, W]."""
        passed = pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))
        residue: Tensor = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(maps)))))
        return torch.relu(passed + residue)


class ResNet(nn.Module):
    """A 3×3 convolution, three stages of `blocks` blocks (16, 32, 64 channels; 1, 1/2, 1/4 of the size), mean, linear.

    The CIFAR network of He et al., arXiv 1512.03385, section 4.2, with 6·blocks + 2 layers; logits out.
    width: > 0, a factor for all channels, rounded; one above 1 makes it wide, as Zagoruyko & Komodakis, arXiv
    1605.07146, do with blocks of another order.
    norm: "batch", or "group" for GroupNorm (Wu & He, arXiv 1803.08494), which has no statistics to average; 8 groups,
    or as many of them as divide the channels (gcd), are ours. Any other is a ValueError.
    Initialisation is that of torch.nn.Conv2d and Linear, uniform in ±1/√fan_in, from the global generator (`build`
    seeds it); He et al.'s is `init = "kaiming-normal"`.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, blocks: int, width: float = 1.0, norm: str = "batch"
    ) -> None:
        super().__init__()
        channels = scaled(WIDTHS[0], width)
        self.conv = nn.Conv2d(input_shape[0], channels, kernel_size=3, padding=1, bias=False)
        self.norm = normalisation(norm, channels)
        self.blocks = nn.Sequential()
        for stage, size in enumerate(WIDTHS):
            for number in range(blocks):
                stride = 2 if stage > 0 and number == 0 else 1
                self.blocks.append(Block(channels, scaled(size, width), stride, norm))
                channels = scaled(size, width)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, num_classes] of images [n, C, H, W]."""
        maps = self.blocks(torch.relu(self.norm(self.conv(images))))
        logits: Tensor = self.fc(maps.mean((2, 3)))
        return logits


def normalisation(norm: str, channels: int) -> nn.Module:
    """The layer after a convolution with so many channels."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(GROUPS, channels), channels)
    raise ValueError(f'norm must be "batch" or "group", got {norm!r}')


def resnet8(input_shape: tuple[int, int, int], num_classes: int, width: float = 1.0, norm: str = "batch") -> ResNet:
    """One block a stage."""
    return ResNet(input_shape, num_classes, 1, width, norm)


def resnet20(input_shape: tuple[int, int, int], num_classes: int, width: float = 1.0, norm: str = "batch") -> ResNet:
    """Three blocks a stage; 269,722 parameters on colour images of ten classes."""
    return ResNet(input_shape, num_classes, 3, width, norm)
