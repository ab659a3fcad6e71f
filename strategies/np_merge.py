"""NP-Merge as a server strategy: one learnt interpolation coefficient per parameter. arXiv 2412.15467."""

from collections.abc import Callable, Iterable, Iterator
from typing import Self

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor, nn

from fedwsa import messages
from fedwsa.arrays import pack, unpack
from fedwsa.config import Config
from fedwsa.merging import chain_permutations, successive_np_merge
from fedwsa.sections import NPMergeConfig
from fedwsa.seeding import torch_generator, torch_seed
from strategies.aggregation import MeanMetrics, ScopeStatistics, weight_of
from strategies.fedavg import FedAvg
from strategies.holdout import Holdout
from strategies.sampling import each


class NPMerge(FedAvg):
    """Client models merged one after another, in the order of the cohort, on samples that the server holds out.

    The paper merges finished models; merging a cohort every round, and beginning each pair at the accumulated weight
    share so that zero steps give FedAvg (of aligned models), are ours.

    holdout: at least one sample, else ValueError.
    options: learning of the coefficients, for each pair. ValueError for `align` with a model that is no chain of
        layers, or with a weight under two names, which no permutation of one layer leaves as it is; without, it is
        merged once.
    """

    def __init__(
        self,
        cohort: int,
        holdout: Holdout,
        options: NPMergeConfig,
        *,
        seed: int,
        evaluation_cohort: int = 0,
        timeout: float = 600.0,
    ) -> None:
        if not len(holdout.labels):
            raise ValueError("NP-Merge learns on samples of the server; server-samples must be at least 1")
        if options.align:
            _check_alignable(holdout)
        super().__init__(cohort, seed=seed, evaluation_cohort=evaluation_cohort, timeout=timeout)
        self.holdout = holdout
        self.options = options

    @classmethod
    def from_config(cls, config: Config, holdout: Holdout) -> Self:
        """As a run's config says."""
        return cls(
            config.cohort,
            holdout,
            config.np_merge,
            seed=config.seed[0],
            evaluation_cohort=config.evaluation_cohort,
            timeout=config.timeout,
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The merge of all replies, two models in memory at a time; metrics as FedAvg gives them."""
        metrics, scopes = MeanMetrics(), ScopeStatistics()
        first_names: dict[str, str] = {}  # of all tensors, in their order
        tied = self.holdout.second_names

        def models() -> Iterator[tuple[dict[str, Tensor], float]]:
            for reply in each(replies):
                arrays, own = messages.arrays_of(reply), messages.metrics_of(reply)
                scopes.take(arrays, own)
                metrics.add(own, weight_of(own))
                first_names.update((name, tied.get(name, name)) for name in arrays)
                once = {name: tensor for name, tensor in unpack(arrays).items() if name not in tied}
                yield once, weight_of(own)

        with torch.random.fork_rng(devices=[]):  # what a module draws by itself, dropout for one
            torch.default_generator.manual_seed(torch_seed(self.seed, "np-merge-module", server_round))
            merged = successive_np_merge(
                models(),
                batch_loss(self.holdout, self.options.batch_size, torch_generator(self.seed, "np-merge", server_round)),
                steps=self.options.steps,
                learning_rate=self.options.learning_rate,
                align=self.options.align,
                trainable={name for name, _ in self.holdout.model.named_parameters()},
            )
        state = {name: merged[first] for name, first in first_names.items()}
        return pack(state), MetricRecord({**metrics.record(), **scopes.metrics(scopes.fused())})


def _check_alignable(holdout: Holdout) -> None:
    allowed = "allowed with this model is false"
    if tied := holdout.second_names:
        raise ValueError(f"np-merge.align = true: {', '.join(tied)} has another name too; {allowed}")
    try:
        chain_permutations(holdout.model.state_dict())
    except ValueError as error:
        raise ValueError(f"np-merge.align = true: {error}; {allowed}") from error


def batch_loss(
    holdout: Holdout, batch_size: int, generator: torch.Generator
) -> Callable[[dict[str, Tensor], int], Tensor]:
    """Cross-entropy (nats a sample) of merged parameters on a batch drawn anew at each call."""
    model: nn.Module = holdout.model
    samples = len(holdout.labels)

    def loss(parameters: dict[str, Tensor], step: int) -> Tensor:
        model.train()
        batch = torch.randperm(samples, generator=generator)[:batch_size]
        logits = torch.func.functional_call(model, parameters, holdout.images[batch])
        return F.cross_entropy(logits, holdout.labels[batch])

    return loss
