"""What a client minimises besides the task's loss, as the server asks. An objective is one file here and one line."""

from collections.abc import Callable

from flwr.app import ConfigRecord

from clients.objectives.feddyn import FedDyn
from clients.objectives.fednova import FedNova
from clients.objectives.fedprox import FedProx
from clients.objectives.moon import Moon
from clients.objectives.objective import Objective, Task
from clients.objectives.scaffold import Scaffold
from fedwsa import messages
from fedwsa.registry import lookup

__all__ = ["OBJECTIVES", "Objective", "Task", "asked_for"]

Build = Callable[[Task], Objective]

OBJECTIVES: dict[str, Build] = {
    "feddyn": FedDyn,
    "fednova": FedNova,
    "fedprox": FedProx,
    "moon": Moon,
    "scaffold": Scaffold,
}


def asked_for(settings: ConfigRecord) -> Build | None:
    """The objective that a message's settings name, by import path too; None: the task's loss alone.

    Flower's FedProx names none but sends its μ.
    """
    default = "fedprox" if messages.PROXIMAL_MU in settings else ""
    name = str(settings.get(messages.OBJECTIVE, default))
    return lookup(OBJECTIVES, name, "objective") if name else None
