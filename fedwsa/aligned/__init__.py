"""The weights that a regulariser pulls, by granularity: they are measured, and get their affine update, in place."""

from fedwsa.aligned.channels import ChannelUnits
from fedwsa.aligned.layers import LayerUnits, ModelUnit
from fedwsa.aligned.units import Held, Units

UNITS: dict[str, type[Units]] = {"layer": LayerUnits, "channel": ChannelUnits, "model": ModelUnit}

__all__ = ["UNITS", "Held", "Units"]
