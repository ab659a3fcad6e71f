"""What of BatchNorm a client keeps to itself, from round to round, as `batch-norm` in the config says.

`aggregate`: nothing; the server averages affine parameters and statistics with all else.
`local`: affine parameters and statistics (FedBN, Li et al., arXiv 2102.07623).
`local-statistics`: running mean, running variance and their counter; affine parameters are averaged (SiloBN, Andreux
et al. 2020).

`model`, which no config says but a strategy's message may: all arrays there are.

What is kept lies in Flower's `Context.state`. In its place a client sends what the server sent, so that a reply holds
every array and the average of these stays what it is, the initial model's, for good.
"""

from collections.abc import Mapping

from flwr.app import ConfigRecord, Context
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clients.memory import recall, remember
from fedwsa.arrays import load

KEPT = "batch-norm"


def local_names(model: nn.Module, policy: str) -> list[str]:
    """Names of the arrays that stay with the client, in the order of the state dict."""
    if policy == "aggregate":
        return []
    if policy == "model":
        return list(model.state_dict())
    local = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            own = dict(module.named_buffers(recurse=False))
            names = own.keys() if policy == "local-statistics" else own.keys() | module._parameters.keys()
            local |= {f"{path}.{name}" if path else name for name in names}
    return [name for name in model.state_dict() if name in local]


def put_back(state: Mapping[str, Tensor], names: list[str], context: Context, settings: ConfigRecord) -> None:
    """Write what the client kept of this strategy into its model; before its first training that is nothing.

    state: of the model, as the server sent it. Raises ValueError naming what differs, where it is of another model.
    """
    kept = recall(context, settings, KEPT)
    if names and kept is not None:
        load({name: state[name] for name in names}, kept)


def keep(state: Mapping[str, Tensor], names: list[str], context: Context, settings: ConfigRecord) -> None:
    """Remember the client's own arrays; their memory is handed over."""
    if names:
        remember(context, settings, KEPT, {name: state[name] for name in names})
