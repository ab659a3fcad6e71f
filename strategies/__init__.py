"""What a round is on the server. A strategy is one file here and one line below; `-wsa` behind its name aligns it."""

from collections.abc import Callable

from flwr.serverapp.strategy import Strategy

from fedwsa.config import ALIGNED, Config
from fedwsa.registry import lookup
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx
from strategies.holdout import Holdout
from strategies.np_merge import NPMerge
from strategies.wsa import FedAvgWSA, WeightScopeAlignment

__all__ = [
    "STRATEGIES",
    "FedAvg",
    "FedAvgWSA",
    "FedProx",
    "Holdout",
    "NPMerge",
    "WeightScopeAlignment",
    "build",
    "find",
]

Build = Callable[[Config, Holdout], Strategy]

STRATEGIES: dict[str, Build] = {
    "fedavg": FedAvg.from_config,
    "fedprox": FedProx.from_config,
    "np-merge": NPMerge.from_config,
}


def find(name: str) -> tuple[Build, bool]:
    """A strategy by its registered name or the import path of a function of (Config, Holdout), and whether aligned.

    Raises ValueError for a name that is neither.
    """
    plain = name.removesuffix(ALIGNED)
    return lookup(STRATEGIES, plain, "strategy"), plain != name


def build(name: str, config: Config, holdout: Holdout) -> Strategy:
    """The strategy of a name, see `find`, as a run's config says."""
    make, aligned = find(name)
    strategy = make(config, holdout)
    return WeightScopeAlignment.around(strategy, config, holdout.model) if aligned else strategy
