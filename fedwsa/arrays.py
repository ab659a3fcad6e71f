"""A Flower `Array` that keeps its numbers, and makes the bytes of `np.save` only when somebody asks for them."""

import ast
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from io import BytesIO
from math import prod
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import Tensor, nn

_STYPE = "numpy.ndarray"  # Flower's name for np.save bytes


@cache
def _name(dtype: np.dtype[Any]) -> str:
    return str(dtype)


class NumpyArray(Array):
    """Looks like any Flower `Array`; inside one machine no message copies a model into bytes and back.

    The array given is kept, not copied: whoever makes one hands it over and writes to it no more.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        array = np.asarray(array)  # arithmetic on arrays without dimensions gives scalars, not arrays
        self.__dict__.update(dtype=_name(array.dtype), shape=array.shape, stype=_STYPE, _array=array)

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
        return cast("NDArray[Any]", self.__dict__["_array"].copy())

    def view(self) -> NDArray[Any]:
        """The numbers themselves, not to be written to."""
        return cast("NDArray[Any]", self.__dict__["_array"])

    def __copy__(self) -> "NumpyArray":
        """Another with the same numbers; Python's own way to it takes ten times as long."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__getstate__())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Without the chunks that Flower keeps once it has cut the bytes: they cannot be pickled."""
        state = dict(self.__dict__)
        state.pop("_chunks", None)
        return state

    def __eq__(self, other: object) -> bool:
        """Whether another `Array`, of whichever class, holds the same."""
        if not isinstance(other, Array):
            return NotImplemented
        return (self.dtype, self.shape, self.stype) == (other.dtype, other.shape, other.stype) and (
            self.data == other.data
        )

    __hash__ = None  # type: ignore[assignment]  # as Flower's

    def deflate(self) -> bytes:
        """Flower's wire format, which names the class: so by a plain `Array`."""
        return Array(dtype=self.dtype, shape=self.shape, stype=self.stype, data=self.data).deflate()


def from_bytes(data: memoryview) -> NumpyArray | None:
    """An array over the bytes of `np.save`, which are not copied; None where they are not plainly such."""
    size = int.from_bytes(data[8:10], "little") + 10  # version 1.0 of the format has 16 bits for the header's length
    if bytes(data[:8]) != b"\x93NUMPY\x01\x00" or size > len(data):
        return None
    dtype, shape = _header(bytes(data[10:size]))
    if dtype is None or len(data) == size or len(data) - size != prod(shape) * dtype.itemsize:
        return None
    return NumpyArray(np.frombuffer(data[size:], dtype).reshape(shape))


@lru_cache(maxsize=4096)
def _header(text: bytes) -> tuple[np.dtype[Any] | None, tuple[int, ...]]:
    """Type and shape in the header of `np.save`; reading it takes longer than most arrays take to copy."""
    try:
        entries = ast.literal_eval(text.decode("latin1"))
        dtype = np.dtype(entries["descr"])
        shape = tuple(entries["shape"])
        plain = not (entries["fortran_order"] or dtype.hasobject) and all(type(n) is int and n >= 0 for n in shape)
        return (dtype if plain else None), shape
    except (ValueError, SyntaxError, KeyError, TypeError):
        return None, ()


def pack(state: Mapping[str, Tensor]) -> ArrayRecord:
    """State dict to record; the tensors' memory is shared where they lie on the CPU, so hand over what is yours."""
    return record_of({name: tensor.contiguous().numpy(force=True) for name, tensor in state.items()})


def record_of(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """A record of arrays that are handed over."""
    record = ArrayRecord()
    # By the back door: the front one checks types, which takes longer than the rest.
    record.__dict__["_data"].update((name, NumpyArray(array)) for name, array in arrays.items())
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
    """Bytes of the numbers, without headers; of an array that is no `np.save`, all of its bytes."""
    return sum(map(_num_bytes, record.values()))


def _num_bytes(array: Array) -> int:
    if isinstance(array, NumpyArray):
        return array.view().nbytes
    try:
        return prod(array.shape) * np.dtype(array.dtype).itemsize
    except TypeError:  # an app may call its types what it likes, and Flower's older servers call them nothing
        return len(array.data)


def load(state: Mapping[str, Tensor], record: Mapping[str, Array]) -> None:
    """Write a record into tensors that exist already (a module's `state_dict()`).

    Numbers take the tensors' own types; integers (counters) are rounded to the nearest, since some strategies
    average them as floats. Raises ValueError naming what differs, where names or shapes do.
    """
    for tensor, values in _matched(state, record):
        _write(tensor.detach(), values)


def fill(module: nn.Module, record: Mapping[str, Array]) -> dict[str, Tensor]:
    """Give a module the numbers of a record, in memory of its own: what it had before belongs to whoever has it.

    So a client may hand its trained tensors over without a copy. Returns them by name, as `state_dict` does; errors as
    `load`.
    """
    state = module.state_dict(keep_vars=True)
    for tensor, values in _matched(state, record):
        fresh = torch.empty_like(tensor, requires_grad=False)
        _write(fresh, values)
        tensor.data = fresh
    return {name: tensor.detach() for name, tensor in state.items()}


def _write(tensor: Tensor, values: NDArray[Any]) -> None:
    if tensor.device.type == "cpu":
        np.copyto(tensor.numpy(), values, casting="unsafe")  # the values' memory may be read-only
    else:
        tensor.copy_(torch.tensor(values).pin_memory(), non_blocking=True)


def _matched(state: Mapping[str, Tensor], record: Mapping[str, Array]) -> Iterator[tuple[Tensor, NDArray[Any]]]:
    """Each tensor with its numbers, in its type."""
    if unlike := state.keys() ^ record.keys():
        raise ValueError(f"array names differ from the model's: {sorted(unlike)}")
    for name, tensor in state.items():
        values = view(record[name])
        if tensor.shape != values.shape:
            raise ValueError(f"{name}: shape {values.shape}, the model has {tuple(tensor.shape)}")
        if values.dtype.kind == "f" and not tensor.is_floating_point():
            values = np.rint(values)
        yield tensor, values
