"""What clients keep from round to round (`Context.state`), as tensors for a checkpoint and back."""

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Wire  # pylint: disable=no-name-in-module
from torch import Tensor


def pack_states(states: Mapping[int, RecordDict]) -> dict[str, Tensor]:
    """By partition id as text: the bytes of Flower's wire format, uint8 [n], which holds no code."""
    packed = {}
    for partition_id, state in states.items():
        wire = recorddict_to_proto(state).SerializeToString(deterministic=True)
        packed[str(partition_id)] = torch.from_numpy(np.frombuffer(wire, np.uint8).copy())
    return packed


def unpack_states(packed: Mapping[str, Tensor]) -> dict[int, RecordDict]:
    """The inverse."""
    return {
        int(partition_id): recorddict_from_proto(Wire.FromString(wire.numpy().tobytes()))
        for partition_id, wire in packed.items()
    }
