"""A Flower `Array` that keeps its numbers, and makes the bytes of `np.save` only when somebody asks for them."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor

_STYPE = "numpy.ndarray"  # Flower's name for np.save bytes


class NumpyArray(Array):
    """Looks like any Flower `Array`; inside one machine no message copies a model into bytes and back.

    The array given is kept, not copied: whoever makes one hands it over and writes to it no more.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        array = np.asarray(array)  # arithmetic on arrays without dimensions gives scalars, not arrays
        self.__dict__.update(dtype=str(array.dtype), shape=tuple(array.shape), stype=_STYPE, _array=array)

    @property
    def data(self) -> bytes:
        """The bytes of `np.save`, made anew at each access."""
        buffer = BytesIO()
        np.save(buffer, self.__dict__["_array"], allow_pickle=False)
        return buffer.getvalue()

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["_array"] = np.load(BytesIO(value), allow_pickle=False)

    def numpy(self) -> NDArray[Any]:
        """A copy, as Flower's own `numpy` gives: the caller may write to it."""
        return cast(NDArray[Any], self.__dict__["_array"].copy())

    def view(self) -> NDArray[Any]:
        """The numbers themselves, not to be written to."""
        return cast(NDArray[Any], self.__dict__["_array"])

    def __getstate__(self) -> dict[str, Any]:
        """Without the chunks that Flower keeps once it has cut the bytes: they cannot be pickled."""
        return {key: value for key, value in self.__dict__.items() if key != "_chunks"}

    def deflate(self) -> bytes:
        """Flower's wire format, which names the class: so by a plain `Array`."""
        return Array(dtype=self.dtype, shape=self.shape, stype=self.stype, data=self.data).deflate()


def pack(state: Mapping[str, Tensor]) -> ArrayRecord:
    """State dict to record; the tensors' memory is shared where they lie on the CPU, so hand over what is yours."""
    record = ArrayRecord()
    for name, tensor in state.items():
        record[name] = NumpyArray(tensor.detach().cpu().contiguous().numpy())
    return record


def view(array: Array) -> NDArray[Any]:
    """Numbers of any Flower `Array`, not to be written to; without a copy where the array keeps them."""
    return array.view() if isinstance(array, NumpyArray) else array.numpy()


def as_type(values: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
    """Values in another type; for integers they are rounded to the nearest."""
    return np.asarray(values if kind.kind == "f" or values.dtype.kind != "f" else np.rint(values), dtype=kind)


def unpack(record: Mapping[str, Array]) -> dict[str, Tensor]:
    """Record to a state dict of its own memory."""
    return {name: torch.from_numpy(np.array(view(array))) for name, array in record.items()}


def num_bytes(record: Mapping[str, Array]) -> int:
    """Bytes of the numbers, without headers."""
    return sum(int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize for array in record.values())


def load(state: Mapping[str, Tensor], record: Mapping[str, Array]) -> None:
    """Write a record into tensors that exist already (a module's `state_dict()`).

    Numbers take the tensors' own types; integers (counters) are rounded to the nearest, since some strategies
    average them as floats. Raises ValueError naming what differs, where names or shapes do.
    """
    if unlike := state.keys() ^ record.keys():
        raise ValueError(f"array names differ from the model's: {sorted(unlike)}")
    for name, tensor in state.items():
        if tuple(tensor.shape) != record[name].shape:
            raise ValueError(f"{name}: shape {record[name].shape}, the model has {tuple(tensor.shape)}")
        own = tensor.numpy()
        np.copyto(own, as_type(view(record[name]), own.dtype))
