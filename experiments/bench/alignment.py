"""What weight scope alignment adds to a client's training: with and without it in turn, in one process on one thread.

On a card a lap ends when the card has done all of it.

A lap is a client's local epoch with the term; the median of those without is said at the end: `limit 0.123`, seconds.
The third argument is `loss`, `proximal`, `channel` or `model` (granularities, in loss mode), or `autograd`: the term as
one would write it without closed forms.
"""

import statistics
import time

import torch
from flwr.app import Context, Message, RecordDict
from torch import Tensor, nn

from clients.objectives import Objective, Task
from clients.training import train
from experiments.bench.ours import make_config
from experiments.bench.workloads import WORKLOADS, Stopwatch, arguments, tensors
from fedwsa.config import Config
from fedwsa.messages import Alignment
from fedwsa.models import placed
from fedwsa.scope import WeightScope, is_layer, measure
from fedwsa.simulation.engine import identify

STRENGTH = 1.0


class ByAutograd(Objective):
    """λ Σ KL(layer ‖ target), differentiated by PyTorch at every step."""

    def __init__(self, model: nn.Module, target: WeightScope, config: Config) -> None:
        identify()
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        context = Context(1, 1, {}, RecordDict(), {})
        super().__init__(Task(model, parameters, Message(RecordDict(), 1, "train"), context, config))
        self.layers = [parameters[name] for name in target.names]
        self.goals = list(zip(target.means.tolist(), target.variances.tolist(), strict=True))

    def penalty(self, images: Tensor) -> Tensor:
        """The term itself."""
        terms = [_divergence(weights, *goal) for weights, goal in zip(self.layers, self.goals, strict=True)]
        return STRENGTH * torch.stack(terms).sum()


def _divergence(weights: Tensor, mean: float, variance: float) -> Tensor:
    own = weights.var(correction=0)
    return 0.5 * (variance / own).log() + (own + (weights.mean() - mean) ** 2) / (2 * variance) - 0.5


def main() -> None:
    """Both begin from the same weights each time."""
    name, rounds, kind = arguments()
    granularity = kind if kind in ("channel", "model") else "layer"
    torch.set_num_threads(1)
    workload = WORKLOADS[name]
    config = make_config(workload, 1)
    images, labels = (each[: workload.samples].clone().to(workload.device) for each in tensors())
    model = placed(workload.build(), torch.device(workload.device))
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    layers = {key: tensor for key, tensor in model.named_parameters() if is_layer(key, tensor)}
    target = measure(layers, granularity=granularity)
    mode = "proximal" if kind == "proximal" else "loss"
    term = Alignment(target, STRENGTH, mode, "sum", granularity=granularity, layers=tuple(layers))

    def wait() -> None:
        if workload.device == "cuda":
            torch.cuda.synchronize()

    def seconds(aligned: bool) -> float:
        model.load_state_dict(start)
        alignment = term if aligned and kind != "autograd" else None
        objective = ByAutograd(model, target, config) if aligned and kind == "autograd" else None
        wait()
        begin = time.perf_counter()
        train(model, images, labels, config, torch.Generator().manual_seed(0), alignment, objective)
        wait()
        return time.perf_counter() - begin

    plain = [seconds(aligned=False)]
    watch = Stopwatch()
    for number in range(rounds):
        # Who comes first changes, so that neither always has the other's memory to displace.
        pair = [seconds(aligned) for aligned in ((True, False) if number % 2 else (False, True))]
        with_term, without = pair if number % 2 else reversed(pair)
        watch.say(with_term)
        plain.append(without)
    print(f"limit {statistics.median(plain[1:]):.6f}", flush=True)


if __name__ == "__main__":
    main()
