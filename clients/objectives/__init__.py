"""What a client minimises besides the task's loss, as the server asks. An objective is one file here and one line."""

from collections.abc import Callable

from clients.objectives.fedprox import FedProx
from clients.objectives.objective import Objective, Task
from fedwsa import messages
from fedwsa.registry import lookup

__all__ = ["OBJECTIVES", "Objective", "Task", "asked_for"]

OBJECTIVES: dict[str, Callable[[Task], Objective]] = {
    "fedprox": FedProx,
}


def asked_for(task: Task) -> Objective:
    """The objective that the message names, by import path too; Flower's FedProx names none but sends its μ."""
    settings = messages.config_of(task.message)
    default = "fedprox" if messages.PROXIMAL_MU in settings else ""
    name = str(settings.get(messages.OBJECTIVE, default))
    return lookup(OBJECTIVES, name, "objective")(task) if name else Objective(task)
