"""MOON. Li, He, Song, arXiv 2103.16257, algorithm 1."""

from typing import Any, Self

from fedwsa import messages
from fedwsa.config import Config
from strategies.fedavg import FedAvg, cohorts
from strategies.holdout import Holdout


class Moon(FedAvg):
    """FedAvg whose clients minimise their loss and μ ℓ_con, a contrast of representations (`clients.objectives`).

    mu: μ ≥ 0; 0 is FedAvg. The paper takes the best of 0.1, 1, 5 and 10 for each data set: 5 on CIFAR-10, 1 on
    CIFAR-100 and Tiny-ImageNet; 1 is the default, as in the authors' code.
    temperature: τ > 0; 0.5 in the paper.
    Weighted as FedAvg is: Σ p_k (f_k + μ ℓ_con), p_k the clients' shares of the examples. ℓ_con moves with what the
    server sends and the clients keep, so that this is no fixed objective.
    """

    def __init__(self, cohort: int, *, mu: float = 1.0, temperature: float = 0.5, **options: Any) -> None:
        super().__init__(cohort, **options)
        self.mu = mu
        self.temperature = temperature

    @classmethod
    def from_config(cls, config: Config, holdout: Holdout) -> Self:
        """As a run's config says; the server's held-out samples are not used."""
        return cls(**cohorts(config), mu=config.moon.mu, temperature=config.moon.temperature)

    def asked(self) -> dict[str, bool | float | str]:
        """The objective, with μ and τ."""
        return {
            messages.OBJECTIVE: "moon",
            messages.CONTRASTIVE_MU: self.mu,
            messages.TEMPERATURE: self.temperature,
        }
