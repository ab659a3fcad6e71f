"""The ClientApp: trains or evaluates the model that a message brings, on this client's own samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from clients.batch_norm import keep, local_names, put_back
from clients.federation import FederatedData, federation
from clients.objectives import Task, asked_for
from clients.training import mean_gradient, train
from fedwsa import messages, models
from fedwsa.arrays import fill, pack
from fedwsa.config import Config, from_run_config
from fedwsa.data.augmentation import AUGMENTATIONS, Augmented
from fedwsa.evaluation import evaluate
from fedwsa.registry import lookup
from fedwsa.scope import measure
from fedwsa.seeding import torch_generator, torch_seed
from fedwsa.warmup import trained

app = ClientApp()

RunConfig = dict[str, bool | int | float | str]


@app.train()
def train_message(message: Message, context: Context) -> Message:
    """Train on this client's training samples; everything random comes from (seed, round, partition id)."""
    with _kept_if_it_fails(context):
        return _train_and_reply(message, context)


def _train_and_reply(message: Message, context: Context) -> Message:
    config, client = _identity(message, context)
    torch.set_num_threads(config.threads_per_client)  # sums depend on it
    holdings = federation(config)
    settings = messages.config_of(message)
    images, labels = (_moved(each, config) for each in _training_tensors(holdings, client, settings))
    model, state = _model_with(message, config, holdings)
    local = _local(model, settings, config)
    sent = {name: state[name].clone() for name in local}
    put_back(state, local, context, settings)
    server_round = int(settings[messages.SERVER_ROUND])  # type: ignore[arg-type]
    own_seed = torch_seed(config.seed[0], "client", server_round, client)
    with _reproducible(_device(config), torch_seed(config.seed[0], "client-module", server_round, client)):
        order = torch.Generator().manual_seed(own_seed)
        seen = _augmented(images, config, server_round, client)
        alignment = messages.unpack_alignment(settings)
        objective = None
        if make := asked_for(settings):
            gradient = partial(mean_gradient, model, images, labels, config, own_seed)
            objective = make(Task(model, _shared(model, local), message, context, config, gradient))
        training = train(model, seen, labels, config, order, alignment, objective)
    trained(sum(tensor.numel() for tensor in state.values()))
    keep(state, local, context, settings)
    state = {name: tensor.cpu() for name, tensor in state.items()}  # from a card once
    reply = {**state, **sent}  # in the order of the state
    # The scope is that of what it trained, also where the server gets none of it.
    own_scope = messages.pack_scope(measure(state))
    metrics = MetricRecord({messages.NUM_EXAMPLES: len(labels), messages.LOSS: training.loss, **own_scope})
    if alignment and alignment.share > 0:
        metrics[messages.SCOPE_STRENGTH] = training.strength
    if alignment and alignment.granularity != "layer":
        pooled = {name: tensor for name, tensor in state.items() if not alignment.layers or name in alignment.layers}
        scope = measure(pooled, granularity=alignment.granularity)
        metrics.update(messages.pack_scope(scope, alignment.granularity))
    content = RecordDict({messages.ARRAYS: pack(reply), messages.METRICS: metrics})
    if objective:
        objective.finish(content, training.steps)
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate_message(message: Message, context: Context) -> Message:
    """Evaluate on this client's validation samples, with its own BatchNorm where `batch-norm` leaves it that.

    On the whole test split besides, where the message asks for it.
    """
    config, client = _identity(message, context)
    torch.set_num_threads(config.threads_per_client)  # sums depend on it
    holdings = federation(config)
    images, labels = holdings.validation_tensors(client)
    if not len(labels):
        raise ValueError(f"client {client} holds no validation samples; raise validation-fraction or min-size")
    model, state = _model_with(message, config, holdings)
    settings = messages.config_of(message)
    put_back(state, _local(model, settings, config), context, settings)
    loss, accuracy = evaluate(model, images, labels)
    metrics = MetricRecord({messages.NUM_EXAMPLES: len(labels), messages.LOSS: loss, messages.ACCURACY: accuracy})
    if settings.get(messages.TEST_TOO):
        images, labels = holdings.dataset.test_tensors()
        loss, accuracy = evaluate(model, images, labels)
        metrics.update(
            {messages.TEST_EXAMPLES: len(labels), messages.TEST_LOSS: loss, messages.TEST_ACCURACY: accuracy}
        )
    return Message(RecordDict({messages.METRICS: metrics}), reply_to=message)


@app.evaluate(messages.TEST_SPLIT.removeprefix("evaluate."))
def evaluate_test_split(message: Message, context: Context) -> Message:
    """Evaluate on a part of the central test split, for a simulation whose server has workers beside it."""
    config, _ = _identity(message, context)
    torch.set_num_threads(config.threads_per_client)  # sums depend on it
    holdings = federation(config)
    settings = messages.config_of(message)
    part = slice(int(settings[messages.FIRST_SAMPLE]), int(settings[messages.LAST_SAMPLE]))  # type: ignore[arg-type]
    images, labels = holdings.dataset.test_tensors(part)
    model, _ = _model_with(message, config, holdings)
    loss, accuracy = evaluate(model, images, labels)
    metrics = MetricRecord({messages.NUM_EXAMPLES: len(labels), messages.LOSS: loss, messages.ACCURACY: accuracy})
    return Message(RecordDict({messages.METRICS: metrics}), reply_to=message)


def _identity(message: Message, context: Context) -> tuple[Config, int]:
    """The config, with the digest of the partition file that the server has, and which client this is."""
    settings = messages.config_of(message)
    messages.check_version(settings)
    config = _config(context.run_config)
    if (digest := settings.get(messages.PARTITION, config.partition_sha256)) != config.partition_sha256:
        config = config.model_copy(update={"partition_sha256": digest})
    try:
        client, clients = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    except KeyError as error:
        raise ValueError(f'node config: {error} is missing; --node-config "partition-id=0 num-partitions=2"') from None
    if not 0 <= client < clients:
        raise ValueError(f"partition-id = {client}: allowed is 0 to num-partitions − 1 = {clients - 1}")
    if clients != config.num_clients:  # of which the server knows nothing; its strategies count on num-clients
        raise ValueError(f"num-partitions = {clients}: allowed is the run's num-clients = {config.num_clients}")
    return config, client


_CONFIGS: list[tuple[RunConfig, Config]] = []  # of runs seen lately


def _config(run_config: RunConfig) -> Config:
    """Parsed once a process and run. To compare is quicker than to hash, and a client may take a millisecond."""
    for known, config in _CONFIGS:
        if known == run_config:
            return config
    config = from_run_config(run_config)
    _CONFIGS[:] = [(dict(run_config), config), *_CONFIGS[:7]]
    return config


@lru_cache(maxsize=2)
def _model(config: Config, input_shape: tuple[int, int, int], num_classes: int, device: torch.device) -> nn.Module:
    """One module a process and run, filled anew for each message."""
    model = models.placed(models.of_config(config, input_shape, num_classes, seed=0), device)
    return model.train()  # what a user's own train() does must not wait for the first evaluation


def _model_with(message: Message, config: Config, holdings: FederatedData) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module with the numbers that the message brings, and its state dict, whose memory is nobody else's."""
    model = _model(config, holdings.dataset.input_shape, holdings.dataset.num_classes, _device(config))
    return model, fill(model, messages.arrays_of(message))


def _training_tensors(holdings: FederatedData, client: int, settings: ConfigRecord) -> tuple[Tensor, Tensor]:
    """This client's training samples; everybody's, one client's after the other's, where the message asks for them."""
    if not settings.get(messages.POOLED):
        return holdings.training_tensors(client)
    images, labels = zip(*map(holdings.training_tensors, range(len(holdings.training))), strict=True)
    return torch.cat(images), torch.cat(labels)


def _local(model: nn.Module, settings: ConfigRecord, config: Config) -> list[str]:
    """Names of the arrays that stay with the client, as the message says, or else the config."""
    return local_names(model, str(settings.get(messages.LOCAL, config.batch_norm)))


def _shared(model: nn.Module, local: list[str]) -> dict[str, Tensor]:
    """The parameters that train, but for those that stay with the client."""
    own = set(local)
    return {name: each for name, each in model.named_parameters() if each.requires_grad and name not in own}


def _augmented(images: Tensor, config: Config, server_round: int, client: int) -> Tensor | Augmented:
    if not config.augmentation:
        return images
    augment = lookup(AUGMENTATIONS, config.augmentation, "augmentation")
    return Augmented(images, augment, torch_generator(config.seed[0], "augmentation", server_round, client))


def _device(config: Config) -> torch.device:
    """Where this client computes; Ray shows a worker only the card that it may use."""
    if not config.gpus_per_client:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"gpus-per-client = {config.gpus_per_client:g}: no CUDA device here; allowed is 0")
    return torch.device("cuda", 0)


@contextmanager
def _reproducible(device: torch.device, seed: int) -> Iterator[None]:
    """What a module draws by itself, for dropout or the like, is by this seed, and cuDNN adds up in one order.

    That is one among its deterministic algorithms, and not the one that a benchmark finds the quickest today.

    Afterwards generators and settings are as they were.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])
    kept, cudnn = [each.get_state() for each in generators], torch.backends.cudnn
    settings = cudnn.deterministic, cudnn.benchmark
    try:
        for each in generators:
            each.manual_seed(seed)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = settings
        for each, before in zip(generators, kept, strict=True):
            each.set_state(before)


@contextmanager
def _kept_if_it_fails(context: Context) -> Iterator[None]:
    """What the client keeps is as it was where its training fails: Flower's SuperNode would store it as it is then."""
    before = dict(context.state)
    try:
        yield
    except BaseException:
        context.state.clear()
        context.state.update(before)
        raise


def _moved(tensor: Tensor, config: Config) -> Tensor:
    device = _device(config)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
