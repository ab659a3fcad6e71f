"""NumpyArray against Flower's own Array; records to tensors and back."""

import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from hypothesis.strategies import dictionaries, just, one_of, sampled_from, text
from ray import cloudpickle

from fedwsa.arrays import NumpyArray, from_bytes, load, num_bytes, pack, unpack, view

dtypes = sampled_from([np.float32, np.float64, np.int64])
shapes = one_of(just(()), array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4))
ndarrays = arrays(dtypes, shapes)
states = dictionaries(text(max_size=5), ndarrays, max_size=4)


def saved(array):
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def records(state):
    """The same numbers twice: in arrays of ours, and in Flower's."""
    ours, flowers = ArrayRecord(), ArrayRecord()
    for name, array in state.items():
        ours[name], flowers[name] = NumpyArray(array), Array(array)
    return ours, flowers


def assert_same(array, expected):
    """Numbers, dtype and shape; NaN equals NaN."""
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(array, expected)


# ---- as Flower sees it


@given(ndarrays)
def test_looks_like_flowers_array(array):
    ours, flowers = NumpyArray(array), Array(array)
    assert isinstance(ours, Array)
    assert (ours.dtype, ours.shape, ours.stype) == (flowers.dtype, flowers.shape, flowers.stype)
    assert ours.data == flowers.data == saved(array)


def test_bytes_of_an_array_in_fortran_order_are_numpys():
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert NumpyArray(array).data == saved(array) != saved(np.ascontiguousarray(array))


@given(ndarrays)
def test_numpy_is_a_copy_that_may_be_written_to(array):
    ours, before = NumpyArray(array), array.copy()
    copy = ours.numpy()
    assert isinstance(copy, np.ndarray)
    assert_same(copy, array)
    copy[...] = 7
    assert_same(array, before)
    assert ours.data == saved(before)


def test_view_is_the_array_itself():
    array = np.arange(3.0)
    assert view(NumpyArray(array)) is array
    assert_same(view(Array(array)), array)


def test_a_numpy_scalar_becomes_an_array():
    record = ArrayRecord()
    record["count"] = NumpyArray(np.ones(()) * 2)  # this product is no array
    assert isinstance(record["count"].view(), np.ndarray)
    assert_same(record.to_torch_state_dict()["count"].numpy(), np.array(2.0))


def test_object_arrays_do_not_travel():
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        _ = NumpyArray(np.array([{}], dtype=object)).data


def test_equal_arrays_are_equal():
    assert NumpyArray(np.arange(3)) == NumpyArray(np.arange(3))
    assert NumpyArray(np.arange(3)) != NumpyArray(np.arange(1, 4))


@given(states)
def test_wire_format_is_that_of_flowers_arrays(state):
    ours, flowers = records(state)
    assert ours.object_id == flowers.object_id
    wire = {key: part.deflate() for key, part in get_all_nested_objects(ours).items()}
    assert wire == {key: part.deflate() for key, part in get_all_nested_objects(flowers).items()}
    inflated = inflate_object_from_contents(ours.object_id, wire)
    assert list(inflated) == list(state)
    for name, array in state.items():
        assert type(inflated[name]) is Array
        assert_same(inflated[name].numpy(), array)


def test_wire_format_in_chunks(monkeypatch):
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 64)
    ours, flowers = records({"weight": np.zeros((8, 9))})  # with chunks that are equal
    wire = {key: part.deflate() for key, part in get_all_nested_objects(ours).items()}
    assert wire == {key: part.deflate() for key, part in get_all_nested_objects(flowers).items()}
    assert_same(inflate_object_from_contents(ours.object_id, wire)["weight"].numpy(), np.zeros((8, 9)))


def test_new_bytes_are_new_numbers_and_a_new_object_id():
    ours, flowers = NumpyArray(np.arange(3.0)), Array(np.arange(3.0))
    assert ours.object_id == flowers.object_id
    assert list(ours.children) == list(flowers.children)
    ours.data = flowers.data = saved(np.arange(1.0, 4.0))
    assert_same(ours.numpy(), np.arange(1.0, 4.0))
    assert ours.object_id == flowers.object_id
    assert list(ours.children) == list(flowers.children)


@given(states)
def test_flowers_conversions_work(state):
    ours, flowers = records(state)
    assert ours.count_bytes() == flowers.count_bytes()
    tensors = ours.to_torch_state_dict()
    assert list(tensors) == list(state)
    for name, array in state.items():
        assert_same(tensors[name].numpy(), array)
    for numbers, array in zip(ours.to_numpy_ndarrays(), state.values(), strict=True):
        assert_same(numbers, array)


# ---- between processes


@given(states)
def test_pickling_keeps_the_numbers(state):
    record, _ = records(state)
    copy = pickle.loads(pickle.dumps(record, protocol=5))
    assert list(copy) == list(state)
    for name, array in state.items():
        assert type(copy[name]) is NumpyArray
        assert_same(copy[name].numpy(), array)
        assert copy[name].data == saved(array)


def test_an_array_that_was_cut_into_chunks_can_be_pickled():
    array = NumpyArray(np.arange(3.0))
    chunks = array.children
    assert_same(pickle.loads(pickle.dumps(array, protocol=5)).numpy(), np.arange(3.0))
    assert array.children == chunks


def test_pickling_for_ray_leaves_the_numbers_where_they_are():
    array = np.arange(100_000.0)
    buffers = []
    pickled = cloudpickle.dumps(pack({"weight": torch.from_numpy(array)}), protocol=5, buffer_callback=buffers.append)
    assert len(pickled) < 10_000
    (buffer,) = buffers
    assert np.shares_memory(np.frombuffer(buffer.raw()), array)
    loaded = cloudpickle.loads(pickled, buffers=[buffer.raw().toreadonly()])["weight"]
    assert not loaded.view().flags.writeable
    assert loaded.numpy().flags.writeable
    assert_same(loaded.numpy(), array)


# ---- state dicts


@given(states)
def test_packing_and_unpacking_gives_the_state_back(state):
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    record = pack(tensors)
    back = unpack(record)
    assert list(record) == list(back) == list(state)
    for name, array in state.items():
        assert_same(back[name].numpy(), array)
        assert not np.shares_memory(back[name].numpy(), array)


@given(states)
def test_loading_what_was_packed_gives_the_state_back(state):
    for record in (pack({name: torch.from_numpy(array) for name, array in state.items()}), records(state)[1]):
        tensors = {
            name: torch.full(array.shape, 9, dtype=torch.from_numpy(array).dtype) for name, array in state.items()
        }
        load(tensors, record)
        for name, array in state.items():
            assert_same(tensors[name].numpy(), array)


def test_packing_does_not_copy_what_lies_on_the_cpu():
    tensor = torch.zeros(3)
    assert np.shares_memory(pack({"weight": tensor})["weight"].view(), tensor.numpy())


def test_parameters_and_transposed_tensors_can_be_packed():
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    assert_same(pack({"weight": weight.T})["weight"].numpy(), np.arange(6, dtype=np.float32).reshape(2, 3).T)


def test_loading_a_module_changes_the_module():
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    load(model.state_dict(), pack(other.state_dict()))
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_names_that_differ_are_named():
    with pytest.raises(ValueError, match=r"names differ.*\['a', 'c'\]"):
        load({"a": torch.zeros(1), "b": torch.zeros(1)}, pack({"b": torch.zeros(1), "c": torch.zeros(1)}))


@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 3, 1), ()])  # some of these NumPy would broadcast
def test_shapes_that_differ_are_named(shape):
    with pytest.raises(ValueError, match=r"weight: shape .* the model has \(2, 3\)"):
        load({"weight": torch.zeros(2, 3)}, pack({"weight": torch.zeros(shape)}))


def test_numbers_take_the_models_types():
    """A mean of counters comes as floats from Flower's FedAvg; 0.1 + 0.2 + … falls short of the integer."""
    state = {"weight": torch.zeros(2), "count": torch.zeros((), dtype=torch.int64)}
    load(state, ArrayRecord({"weight": Array(np.array([0.5, 2.0])), "count": Array(np.array(9.999999999))}))
    assert torch.equal(state["weight"], torch.tensor([0.5, 2.0]))
    assert torch.equal(state["count"], torch.tensor(10))


@given(states)
def test_size_is_that_of_the_numbers(state):
    for record in records(state):
        assert num_bytes(record) == sum(array.nbytes for array in state.values())


@pytest.mark.parametrize("shape", ["(2.0,)", "(-1, -2)", "(True, 2)", "2"])
def test_bytes_that_claim_an_impossible_shape_are_left_to_numpy(shape):
    """Which refuses them where the gate looks, and not where a worker's answer is unpickled."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(8)
    assert from_bytes(memoryview(data)) is None
    whole = header.replace(shape, "(2,)").encode()
    fine = b"\x93NUMPY\x01\x00" + len(whole).to_bytes(2, "little") + whole + bytes(8)
    assert from_bytes(memoryview(fine)).shape == (2,)
