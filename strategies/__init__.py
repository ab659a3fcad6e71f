"""What a round is on the server. A strategy is one file here and one line below; `-wsa` behind its name aligns it."""

from collections.abc import Callable

from flwr.serverapp.strategy import Strategy

from fedwsa.config import ALIGNED, Config
from fedwsa.registry import check_call, lookup
from strategies import flowers
from strategies.central import Central
from strategies.fedavg import FedAvg
from strategies.feddyn import FedDyn
from strategies.fedexp import FedExP
from strategies.fedlws import FedLWS
from strategies.fednova import FedNova
from strategies.fedprox import FedProx
from strategies.holdout import Holdout
from strategies.local_only import LocalOnly
from strategies.moon import Moon
from strategies.np_merge import NPMerge
from strategies.scaffold import Scaffold
from strategies.wsa import FedAvgWSA, WeightScopeAlignment

__all__ = [
    "STRATEGIES",
    "Central",
    "FedAvg",
    "FedAvgWSA",
    "FedDyn",
    "FedExP",
    "FedLWS",
    "FedNova",
    "FedProx",
    "Holdout",
    "LocalOnly",
    "Moon",
    "NPMerge",
    "Scaffold",
    "WeightScopeAlignment",
    "build",
    "find",
]

Build = Callable[[Config, Holdout], Strategy]

STRATEGIES: dict[str, Build] = {
    "fedavg": FedAvg.from_config,
    "fedprox": FedProx.from_config,
    "scaffold": Scaffold.from_config,
    "feddyn": FedDyn.from_config,
    "moon": Moon.from_config,
    "fednova": FedNova.from_config,
    "fedexp": FedExP.from_config,
    "fedlws": FedLWS.from_config,
    "fedavgm": flowers.fedavgm,
    "fedadam": flowers.fedadam,
    "fedyogi": flowers.fedyogi,
    "fedadagrad": flowers.fedadagrad,
    "fedmedian": flowers.fedmedian,
    "fedtrimmedavg": flowers.fedtrimmedavg,
    "krum": flowers.krum,
    "np-merge": NPMerge.from_config,
    "local-only": LocalOnly.from_config,
    "central": Central.from_config,
}


def find(name: str) -> tuple[Build, bool]:
    """A strategy by its name or import path, and whether aligned.

    An import path is that of a function of (Config, Holdout), or of a class with such a `from_config`.
    Raises ValueError, in one line, for a name that is neither.
    """
    found = lookup(STRATEGIES, name, "strategy", ALIGNED)
    make = getattr(found, "from_config", found)
    check_call(make, f"strategy {name!r}", "(config, holdout), by from_config if it is a class", None, None)
    return make, name.endswith(ALIGNED)


def build(name: str, config: Config, holdout: Holdout) -> Strategy:
    """The strategy of a name, see `find`, as a run's config says.

    Raises ValueError, in one line, also where that is no Flower strategy, or one without `state` and `load_state`.
    """
    make, aligned = find(name)
    strategy: object = make(config, holdout)
    if not isinstance(strategy, Strategy):
        raise ValueError(f"strategy {name!r} must be a flwr.serverapp.strategy.Strategy, got {type(strategy).__name__}")
    if missing := [part for part in ("state", "load_state") if not hasattr(strategy, part)]:
        raise ValueError(f"strategy {name!r} has no {' and no '.join(missing)}; checkpoints need both")
    return WeightScopeAlignment.around(strategy, config, holdout.model) if aligned else strategy
