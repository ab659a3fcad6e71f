"""Clients whose loss is a quadratic, h/2 ‖w − c‖², in float64: where they are led has a closed form."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from federations import grid_of, record, tiny
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy
from torch import nn

from clients.objectives import Objective, Task, asked_for
from clients.optimizers import step_of
from fedwsa import messages
from fedwsa.arrays import fill, pack
from fedwsa.simulation.grid import SimulationGrid
from strategies.gate import Gate

EXACT = 250  # steps of 0.1 after which gradient descent has arrived where the curvature is 1 or more


class Point(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))


def clients_of(
    curvatures: Sequence[float],
    centres: Sequence[Sequence[float]],
    *,
    steps: int | Sequence[int] = EXACT,
    learning_rate: float = 0.1,
    examples: Sequence[int] | None = None,
    slopes: bool = False,
    **options: object,
) -> ClientApp:
    """Client k makes `steps` (or steps[k]) gradient steps with the objective that it is asked for, as our client does.

    examples: what it gives as its number of examples; 1 each. slopes: its loss is the linear ⟨c, w⟩ instead.
    options: of the config (momentum, …).
    """
    app = ClientApp()
    config = tiny(learning_rate=learning_rate, **options)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"])
        centre = torch.tensor(centres[k], dtype=torch.float64)
        model = Point(len(centre))
        fill(model, messages.arrays_of(message))

        def gradient() -> torch.Tensor:
            return centre.clone() if slopes else curvatures[k] * (model.w.detach() - centre)

        task = Task(model, {"w": model.w}, message, context, config, lambda: {"w": gradient()})
        objective = (asked_for(messages.config_of(message)) or Objective)(task)
        step = step_of([model.w], config)
        number = steps if isinstance(steps, int) else steps[k]
        for _ in range(number):
            model.w.grad = gradient()
            objective.add_gradient()
            step()
        metrics = MetricRecord({"num-examples": examples[k] if examples else 1, "loss": 0.0})
        reply = RecordDict({"arrays": pack({"w": model.w.detach().clone()}), "metrics": metrics})
        objective.finish(reply, number)
        return Message(reply, reply_to=message)

    return app


def point(*values: float) -> ArrayRecord:
    return record({"w": np.array(values, np.float64)})


def play(strategy: Strategy, app: ClientApp, num_clients: int, rounds: int, start: ArrayRecord) -> np.ndarray:
    """The global w after so many rounds with all the gate's checks; whoever the strategy draws takes part."""
    for w, _ in watch(strategy, app, num_clients, rounds, start):
        last = w
    return last


def watch(
    strategy: Strategy, app: ClientApp, num_clients: int, rounds: int, start: ArrayRecord
) -> Iterator[tuple[np.ndarray, SimulationGrid]]:
    """The global w after each round, and the grid, whose states are what the clients keep (`kept`)."""
    grid: SimulationGrid = grid_of(app, num_clients)
    arrays, gate = start, Gate(strategy)
    for server_round in range(1, rounds + 1):
        outgoing = gate.configure_train(server_round, arrays, ConfigRecord({"strategy": "own"}), grid)
        arrays, _ = gate.aggregate_train(server_round, grid.send_and_receive(outgoing))
        yield arrays["w"].numpy(), grid


def kept(grid: SimulationGrid, what: str, size: int) -> np.ndarray:
    """What each client keeps under a name, [clients, size]; zeros of those that keep nothing."""
    rows = np.zeros((grid.num_clients, size))
    for client, state in grid.states.items():
        rows[client] = state[f"{what} own"]["w"].numpy()
    return rows
