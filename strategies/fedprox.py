"""FedProx. Li et al., arXiv 1812.06127, algorithm 2."""

from typing import Any, Self

from fedwsa import messages
from fedwsa.config import Config
from strategies.fedavg import FedAvg, cohorts
from strategies.holdout import Holdout


class FedProx(FedAvg):
    """FedAvg whose clients minimise their loss and μ/2 ‖w − x‖², x the weights that they were sent.

    mu: μ ≥ 0; 0 is FedAvg. The paper takes the best of 0.001, 0.01, 0.1 and 1 for each data set; 0.01 is our default.
    Weighted as FedAvg is (the paper draws clients by their sizes and takes a plain mean, the same in expectation). With
    exact local solutions its fixed point minimises Σ p_k × the Moreau envelope of client k's loss, not Σ p_k f_k.
    """

    def __init__(self, cohort: int, *, mu: float = 0.01, **options: Any) -> None:
        super().__init__(cohort, **options)
        self.mu = mu

    @classmethod
    def from_config(cls, config: Config, holdout: Holdout) -> Self:
        """As a run's config says; the server's held-out samples are not used."""
        return cls(**cohorts(config), mu=config.fedprox.mu)

    def asked(self) -> dict[str, bool | float | str]:
        """The objective, with μ."""
        return {messages.OBJECTIVE: "fedprox", messages.PROXIMAL_MU: self.mu}
