"""What a round is on the server. A strategy is one file here and one line below."""

from collections.abc import Callable

from flwr.serverapp.strategy import Strategy

from fedwsa.config import Config
from fedwsa.registry import lookup
from strategies.fedavg import FedAvg
from strategies.holdout import Holdout
from strategies.np_merge import NPMerge
from strategies.wsa import FedAvgWSA, WeightScopeAlignment

__all__ = ["STRATEGIES", "FedAvg", "FedAvgWSA", "Holdout", "NPMerge", "WeightScopeAlignment", "build"]

Build = Callable[[Config, Holdout], Strategy]

STRATEGIES: dict[str, Build] = {
    "fedavg": FedAvg.from_config,
    "fedavg-wsa": FedAvgWSA.from_config,
    "np-merge": NPMerge.from_config,
}


def build(name: str, config: Config, holdout: Holdout) -> Strategy:
    """Strategy by its registered name, or by the import path of a function of (Config, Holdout)."""
    return lookup(STRATEGIES, name, "strategy")(config, holdout)
