"""Linear layers by oneDNN, on processors where that is faster than what PyTorch takes.

PyTorch multiplies float32 matrices by MKL, which on AMD's processors leaves AVX-512 unused; oneDNN, which comes with
PyTorch and does its convolutions, uses it: 50 × 784 by 784 × 200 takes 98 µs instead of 172 there. The numbers are
those of `nn.Linear` up to float32's rounding, and the same for any number of workers.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_WEIGHTS = 1 << 15
"""Of a layer; with fewer it gains nothing."""

LEAST_PRODUCTS = 1 << 20
"""Rows times weights; with fewer, a product gains nothing.

Each number of rows has code of its own, made at its first use in half a millisecond.
"""


def hasten(model: nn.Module) -> None:
    """In place: large `nn.Linear`s, not those of a subclass, become `Linear` where this processor gains by it."""
    if not _gains():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LEAST_WEIGHTS:
            module.__class__ = Linear


class Linear(nn.Linear):
    """`nn.Linear`, of which float32 products of many rows on the CPU are left to oneDNN."""

    def forward(self, rows: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if not self.suits(rows):
            return super().forward(rows)
        product: Tensor = _Product.apply(rows, self.weight, self.bias)
        return product

    def suits(self, rows: Tensor) -> bool:
        """Whether these are rows that oneDNN multiplies."""
        weight = self.weight
        many = rows.ndim == 2 and len(rows) * weight.numel() >= LEAST_PRODUCTS
        single = rows.dtype == weight.dtype == torch.float32 and rows.device == weight.device == _CPU
        dense = rows.is_contiguous() and weight.is_contiguous()
        return many and single and dense and not torch.is_autocast_enabled("cpu")


_CPU = torch.device("cpu")

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def multiplying(layer: nn.Linear, rows: Tensor) -> Multiply:
    """How the products of a layer are made for these rows, forwards and backwards: a · bᵀ + bias."""
    return _multiply if isinstance(layer, Linear) and layer.suits(rows) else F.linear


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _multiply(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # With create_graph=True these must be differentiable themselves.
        multiply = F.linear if torch.is_grad_enabled() else _multiply
        return (
            multiply(gradient, weight.t()) if wanted[0] else None,
            multiply(gradient.t(), rows.t()) if wanted[1] else None,
            gradient.sum(0) if wanted[2] else None,
        )


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows · weightᵀ + bias."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
    return product


@cache
def _gains() -> bool:
    """Whether this is a processor of AMD's with AVX-512, and PyTorch has the operator."""
    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return vendor and torch.backends.cpu.get_cpu_capability() == "AVX512" and _has_operator()


def _has_operator() -> bool:
    """It is not part of PyTorch's public interface."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
