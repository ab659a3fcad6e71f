"""The client: who holds what, local training, evaluation, and where its randomness comes from."""

import random
from itertools import chain
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import (
    DIGITS,
    DropoutNet,
    NoisyNet,
    NormNet,
    TiedNet,
    alignment_towards,
    ask,
    digest,
    initial_model,
    tiny,
)
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import nn

from clients import client_app
from clients.federation import federation
from clients.objectives import Objective
from clients.training import train
from fedwsa import messages, models
from fedwsa.arrays import pack
from fedwsa.data import DataError, digits
from fedwsa.evaluation import evaluate
from fedwsa.regularizer import WeightScopeRegularizer
from fedwsa.scope import measure
from fedwsa.seeding import torch_generator
from fedwsa.simulation.engine import identify


def bits(state) -> str:
    return digest({name: tensor.numpy() for name, tensor in state.items()})


def samples(count: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


@pytest.mark.parametrize(("count", "sizes"), [(17, [8, 9]), (18, [8, 8, 2]), (16, [8, 8]), (1, [1]), (9, [9])])
@pytest.mark.parametrize("norm", [True, False])
def test_a_last_single_sample_joins_the_others_where_there_is_batch_norm(count, sizes, norm):
    seen = []

    class Watched(nn.Sequential):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    layers = [nn.Flatten(), *([nn.BatchNorm1d(64)] if norm else []), nn.Linear(64, 10)]
    model, (images, labels) = Watched(*layers), samples(count)
    if norm and count == 1:
        with pytest.raises(ValueError, match="Expected more than 1 value"):
            train(model, images, labels, tiny(batch_size=8, local_epochs=1), torch.Generator())
    else:
        train(model, images, labels, tiny(batch_size=8, local_epochs=1), torch.Generator())
    plain = [8] * (count // 8) + [count % 8] * (count % 8 > 0)
    assert seen == (sizes if norm else plain)


# ---- randomness


@pytest.mark.parametrize("model", ["mlp", "federations:DropoutNet"])
def test_training_depends_on_seed_round_and_client_alone(model):
    start = models.build(model, *DIGITS, seed=0).state_dict()
    config = tiny(model=model, partitioner="iid", batch_size=8)

    def trained(client=2, server_round=3, **changes):
        state, metrics = ask(config.model_copy(update=changes), client, server_round, start=start)
        return bits(state), metrics

    expected = trained()
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        random.seed(global_seed)
        trained(client=global_seed)  # whoever trains in between
        assert trained() == expected
    others = [trained(client=3), trained(server_round=4), trained(seed=(1,))]
    assert len({expected[0], *(model for model, _ in others)}) == 4


def test_order_of_the_samples_depends_on_round_and_client():
    """On equal samples: what differs is the permutation."""
    images, labels = samples()
    models_after = set()
    for server_round, client in ((1, 0), (1, 1), (2, 0), (1, 0)):
        model = models.build("mlp", *DIGITS, seed=0)
        train(model, images, labels, tiny(), torch_generator(0, "client", server_round, client))
        models_after.add(bits(model.state_dict()))
    assert len(models_after) == 3


def test_what_a_module_draws_depends_on_seed_round_and_client():
    config, start = tiny(model="federations:NoisyNet"), NoisyNet(*DIGITS).state_dict()
    drawn = []
    for client, server_round, seed in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (0, 1, 0)):
        NoisyNet.draws.clear()
        ask(config.model_copy(update={"seed": (seed,)}), client, server_round, start=start)
        drawn.append(NoisyNet.draws[0])
    assert drawn[0] == drawn[4]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_global_random_states_are_left_alone(kind):
    config = tiny(model="federations:DropoutNet")
    start = models.build(config.model, *DIGITS, seed=0).state_dict()
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    ask(config, kind=kind, start=start)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


class InOrder(nn.Linear):
    """Writes down whether cuDNN is told to add up in one order, where it cannot show."""

    seen: ClassVar[list[bool]] = []

    def __init__(self, input_shape, num_classes):
        super().__init__(64, num_classes)

    def forward(self, images):
        self.seen.append(torch.backends.cudnn.deterministic)
        return super().forward(images.flatten(1))


def test_cudnn_adds_up_in_one_order_while_a_client_trains():
    config = tiny(model="test_clients:InOrder")
    start = models.build(config.model, *DIGITS, seed=0).state_dict()
    InOrder.seen.clear()
    ask(config, start=start)
    assert set(InOrder.seen) == {True}
    assert not torch.backends.cudnn.deterministic


def test_message_and_client_share_no_memory():
    start = initial_model()
    before = bits(start)
    first, _ = ask(tiny(), start=start)
    after = bits(first)
    ask(tiny(), 1, start=start)
    assert bits(start) == before
    assert bits(first) == after != before


# ---- what comes back


def test_reply_to_a_training():
    config = tiny()
    state, metrics = ask(config, 4)
    assert list(state) == list(initial_model())
    assert metrics.keys() == {"num-examples", "loss", "scope-means", "scope-variances"}
    assert metrics["num-examples"] == len(federation(config).training[4])
    scope = measure(state)  # of what is sent, not of what came
    assert (metrics["scope-means"], metrics["scope-variances"]) == (scope.means.tolist(), scope.variances.tolist())


@pytest.mark.parametrize("seed", [0, 5])
def test_reply_is_the_training_of_the_message_s_model(seed):
    config = tiny(momentum=0.9, seed=seed)
    alignment = alignment_towards(0.5, initial_model(7), strength=2.0)
    state, metrics = ask(config, 3, 5, start=initial_model(7), settings=messages.pack_alignment(alignment))
    model = models.placed(models.build("mlp", *DIGITS, seed=7), torch.device("cpu"))
    holdings = federation(config)
    images, labels = holdings.dataset.train_tensors(holdings.training[3])
    loss = train(model, images, labels, config, torch_generator(seed, "client", 5, 3), alignment).loss
    assert bits(state) == bits(model.state_dict())
    assert metrics["loss"] == loss
    assert bits(state) != bits(ask(config, 3, 5, start=initial_model(7))[0])


def test_reply_to_an_evaluation():
    config = tiny()
    state, metrics = ask(config, 4, kind="evaluate")
    holdings = federation(config)
    images, labels = holdings.dataset.train_tensors(holdings.validation[4])
    assert state == {}
    assert metrics.keys() == {"num-examples", "loss", "accuracy"}
    assert metrics["num-examples"] == len(labels) > 0
    assert (metrics["loss"], metrics["accuracy"]) == evaluate(models.build("mlp", *DIGITS, 0), images, labels)


def test_dropout_is_off_in_an_evaluation_and_on_in_the_next_training():
    config = tiny(model="federations:DropoutNet")
    start = models.build(config.model, *DIGITS, seed=0).state_dict()
    first, evaluated = ask(config, start=start), ask(config, kind="evaluate", start=start)
    assert ask(config, kind="evaluate", start=start) == evaluated
    assert bits(ask(config, start=start)[0]) == bits(first[0])


def test_a_client_of_one_sample_trains_on_it():
    """A validation fraction of 0.6 would be a whole sample."""
    sizes = {"num_clients": 719, "cohort": 1, "evaluation_cohort": 0, "partitioner": "iid", "min_size": 1}
    holdings = federation(tiny(**sizes, server_samples=719, validation_fraction=0.6))
    assert {(len(a), len(b)) for a, b in zip(holdings.training, holdings.validation, strict=True)} == {(1, 0)}


class Failing(Objective):
    """Fails when all else is done, BatchNorm kept included."""

    def finish(self, reply: RecordDict, steps: int) -> None:
        raise RuntimeError("too late")


def test_a_training_that_fails_leaves_what_the_client_keeps_as_it_was():
    """Flower's SuperNode stores the context of a failed training too."""
    identify()
    config = tiny(model="federations:NormNet", batch_norm="local-statistics")
    arrays, kept = pack(NormNet(*DIGITS).state_dict()), RecordDict({"mine": ConfigRecord({"count": 1})})
    context = Context(1, 1, {"partition-id": 0, "num-partitions": 6}, kept, config.to_run_config())

    def train_with(objective):
        entries = {messages.SERVER_ROUND: 1, messages.VERSION: messages.SCHEMA_VERSION, messages.OBJECTIVE: objective}
        content = RecordDict({"arrays": arrays, "config": ConfigRecord(entries)})
        client_app.app(Message(content, dst_node_id=1, message_type="train"), context)

    with pytest.raises(RuntimeError, match="too late"):
        train_with("test_clients:Failing")
    assert dict(context.state) == {"mine": ConfigRecord({"count": 1})}
    train_with("fednova")
    assert set(context.state) == {"mine", "batch-norm"}


class ThreadNet(nn.Linear):
    """Writes down how many threads it has."""

    threads: ClassVar[list[int]] = []

    def __init__(self, input_shape, num_classes) -> None:
        super().__init__(64, num_classes)

    def forward(self, images):
        self.threads.append(torch.get_num_threads())
        return super().forward(images.flatten(1))


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_client_computes_with_as_many_threads_as_the_config_says(kind):
    """On which its sums depend, whoever runs it."""
    config, start = tiny(model="test_clients:ThreadNet", threads_per_client=2), ThreadNet(*DIGITS).state_dict()
    ThreadNet.threads.clear()
    ask(config, kind=kind, start=start)
    assert set(ThreadNet.threads) == {2}


# ---- the loop against PyTorch's optimiser


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("mode", [None, "loss", "proximal"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_training_is_sgd_of_pytorch(momentum, weight_decay, mode, clip_norm):
    """The alignment's gradient comes after clipping, as it is added in the optimiser's step."""
    images, labels = samples()
    changes = {"momentum": momentum, "weight_decay": weight_decay, "clip_norm": clip_norm}
    config = tiny(local_epochs=3, batch_size=16, learning_rate=0.1, **changes)
    ours, theirs = (models.build("mlp", *DIGITS, seed=0) for _ in range(2))
    alignment = alignment_towards(0.7, ours.state_dict(), strength=3.0, mode=mode) if mode else None
    training = train(ours, images, labels, config, torch_generator(4, "client"), alignment)

    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    if alignment:
        WeightScopeRegularizer(theirs.named_parameters(), alignment.target, strength=3.0, mode=mode).attach(optimizer)
    generator, losses, norms = torch_generator(4, "client"), [], []
    for _ in range(3):
        order = torch.randperm(50, generator=generator)
        for start in range(0, 50, 16):
            batch = order[start : start + 16]
            optimizer.zero_grad()
            task_loss = F.cross_entropy(theirs(images[batch]), labels[batch])
            task_loss.backward()
            if clip_norm:
                norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm).item())
            optimizer.step()
            losses.append(task_loss.item())
    assert len(losses) == training.steps == 12
    assert not clip_norm or max(norms) > clip_norm  # it bites
    assert training.loss == pytest.approx(np.mean(losses), rel=1e-6)  # the task's alone
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=1e-7, msg=name)


class Watched(nn.Module):
    """Writes down which samples it is given; an image's first pixel is its number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.batches: list[list[int]] = []
        self.modes: list[bool] = []

    def forward(self, images):
        self.batches.append(images[:, 0, 0, 0].int().tolist())
        self.modes.append(self.training)
        return self.layer(images.flatten(1) / 100)


def test_every_epoch_passes_every_sample_once_in_batches():
    images, labels = samples(10)
    images[:, 0, 0, 0] = torch.arange(10)
    model = Watched().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, images, labels, tiny(local_epochs=3, batch_size=4, weight_decay=0.1), torch_generator(0, "client"))
    assert [len(batch) for batch in model.batches] == [4, 4, 2] * 3
    epochs = [list(chain(*model.batches[start : start + 3])) for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(model.modes)
    after = model.state_dict()
    assert not torch.equal(after["layer.weight"], before["layer.weight"])
    for name in ("unused.weight", "frozen"):  # without a gradient nothing moves, whatever the decay
        assert torch.equal(after[name], before[name])


def test_momentum_starts_anew():
    images, labels = samples()
    first, second = (models.build("mlp", *DIGITS, seed=0) for _ in range(2))
    config = tiny(momentum=0.9)
    train(first, images, labels, config, torch_generator(0, "client"))
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second.load_state_dict(state)
    for model in (first, second):
        train(model, images, labels, config, torch_generator(1, "client"))
    assert bits(first.state_dict()) == bits(second.state_dict())


def test_strength_zero_changes_no_bit():
    images, labels = samples()
    states = []
    for alignment in (None, alignment_towards(0.5, initial_model(), strength=0.0)):
        model = models.build("mlp", *DIGITS, seed=0)
        train(model, images, labels, tiny(), torch_generator(0, "client"), alignment)
        states.append(bits(model.state_dict()))
    assert states[0] == states[1]


def test_alignment_reaches_parameters_and_no_buffer():
    images, labels = samples()
    model = TiedNet(*DIGITS)
    alignment = alignment_towards(0.5, model.state_dict())
    assert {"table", "body.weight", "again.weight"} < set(alignment.target.names)
    train(model, images, labels, tiny(), torch_generator(0, "client"), alignment)
    assert torch.equal(model.table, torch.linspace(-1, 1, 64).reshape(1, 64))
    assert model.body.weight is model.again.weight


class FrozenNorm(NormNet):
    """As in fine-tuning: BatchNorm's statistics are left as they are."""

    def train(self, mode=True):
        super().train(mode)
        self[2].eval()
        return self


def test_a_users_own_train_does_not_depend_on_what_the_process_did_before():
    config = tiny(model=f"{__name__}:FrozenNorm")
    start = models.build(config.model, *DIGITS, 0).state_dict()
    client_app._model.cache_clear()
    first = ask(config, start=start)[0]
    ask(config, start=start, kind="evaluate")
    assert bits(ask(config, start=start)[0]) == bits(first)
    assert torch.equal(first["2.running_mean"], start["2.running_mean"])


def test_target_for_another_model_is_refused():
    images, labels = samples()
    alignment = alignment_towards(0.5, {"elsewhere": torch.randn(3, 3)})
    with pytest.raises(ValueError, match="elsewhere"):
        train(models.build("mlp", *DIGITS, 0), images, labels, tiny(), torch_generator(0, "client"), alignment)


# ---- evaluation


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2500])
def test_evaluation_by_hand(count):
    images, labels = samples(count)
    model = models.build("mlp", *DIGITS, seed=1)
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    units = images.flatten(1).double().numpy()
    for layer in range(3):
        units = units @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
        units = np.maximum(units, 0) if layer < 2 else units
    log_likelihood = units - np.log(np.exp(units).sum(1, keepdims=True))
    loss, accuracy = evaluate(model, images, labels)
    assert loss == pytest.approx(-log_likelihood[np.arange(count), labels].mean(), rel=1e-6)
    assert accuracy == (units.argmax(1) == labels.numpy()).mean()


def test_evaluation_is_without_dropout_and_gradients():
    model = DropoutNet(*DIGITS).train()
    images, labels = samples()
    assert evaluate(model, images, labels) == evaluate(model, images, labels)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- who holds what


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"partitioner": "iid", "num_clients": 20, "cohort": 10},
        {"alpha": 0.1, "num_clients": 20, "seed": 3},
        {
            "server_samples": 0,
            "validation_fraction": 0.0,
            "evaluation_cohort": 0,
            "np_merge": {},
            "strategies": ("fedavg",),
        },
        {"validation_fraction": 0.9, "min_size": 2},
    ],
)
def test_every_training_sample_is_held_once(changes):
    config = tiny(**changes)
    holdings = federation(config)
    size = len(digits.load().train_labels)
    held = np.concatenate([holdings.server, *holdings.training, *holdings.validation])
    assert np.array_equal(np.sort(held), np.arange(size))
    assert len(holdings.server) == config.server_samples
    assert len(holdings.training) == len(holdings.validation) == config.num_clients
    labels = holdings.dataset.train_labels
    for client, (training, validation) in enumerate(zip(holdings.training, holdings.validation, strict=True)):
        total = len(training) + len(validation)
        assert total >= config.min_size
        expected = (
            min(max(round(config.validation_fraction * total), 1), total - 1) if config.validation_fraction else 0
        )
        assert len(validation) == expected
        own = np.concatenate([training, validation])
        assert np.array_equal(holdings.label_counts()[client], np.bincount(labels[own], minlength=10))


def test_split_follows_the_seed_and_nothing_random():
    config = tiny()
    one = federation(config)
    federation.cache_clear()
    np.random.seed(3)
    again, other = federation(config), federation(tiny(seed=1))
    for name in ("server", "training", "validation"):
        for a, b in zip(getattr(one, name), getattr(again, name), strict=True):
            assert np.array_equal(a, b)
    assert not np.array_equal(one.server, other.server)
    assert not all(np.array_equal(a, b) for a, b in zip(one.training, other.training, strict=True))


def test_seed_decides_who_holds_what_where_the_server_holds_nothing():
    counts = [federation(tiny(server_samples=0, strategies=("fedavg",), seed=seed)).label_counts() for seed in (0, 1)]
    assert not np.array_equal(*counts)


def test_training_options_move_no_sample():
    """Strategies and options are compared on the same federation."""
    one = federation(tiny())
    other = federation(tiny(rounds=9, learning_rate=1.0, strategies=("fedavg",), local_epochs=4, cohort=2))
    assert all(np.array_equal(a, b) for a, b in zip(one.training, other.training, strict=True))


def test_a_single_sample_is_trained_on():
    config = tiny(
        data="test_clients:small",
        partitioner="iid",
        num_clients=20,
        min_size=1,
        server_samples=0,
        cohort=1,
        evaluation_cohort=0,
        strategies=("fedavg",),
    )
    holdings = federation(config)
    assert sorted(len(part) for part in holdings.training) == [1] * 20
    assert sorted(len(part) for part in holdings.validation) == [0] * 10 + [1] * 10
    alone = next(client for client, part in enumerate(holdings.validation) if not len(part))
    with pytest.raises(RuntimeError, match=f"client {alone} holds no validation samples; raise validation-fraction or"):
        ask(config, alone, kind="evaluate")


def small(data_dir):
    """Thirty of the digits."""
    whole = digits.load()
    return type(whole)(
        "small", whole.train_images[:30], whole.train_labels[:30], whole.test_images, whole.test_labels, 10, 16.0
    )


def test_too_small_a_client_is_refused():
    config = tiny(data="test_clients:small", partitioner="iid", num_clients=10, min_size=3, server_samples=1)
    with pytest.raises(
        ValueError,
        match=r"^partitioner 'iid': client 9 would hold 2 of 29 samples, min-size = 3; allowed are fewer clients "
        r"than 10 or another partitioner, or a smaller min-size$",
    ):
        federation(config)


def all_for_the_first(labels, num_clients, *, rng):
    return [np.arange(len(labels) * (client == 0)) for client in range(num_clients)]


def test_no_min_size_is_small_enough_for_an_empty_client():
    with pytest.raises(
        ValueError,
        match=r"^partitioner 'test_clients:all_for_the_first': client 1 would hold 0 of .* samples, min-size = 2; "
        r"allowed are fewer clients than [0-9]+ or another partitioner$",
    ):
        federation(tiny(partitioner="test_clients:all_for_the_first"))


def test_impossible_dirichlet_split_is_refused():
    with pytest.raises(ValueError, match="min-size=30"):
        federation(tiny(alpha=0.01, num_clients=40, min_size=30))


def test_missing_data_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr("fedwsa.data.fashion_mnist.SYSTEM_DIR", tmp_path)
    with pytest.raises(DataError, match="fashion-mnist: no folder has all"):
        federation(tiny(data="fashion-mnist", data_dir=str(tmp_path)))


# ---- identity


@pytest.mark.parametrize(
    ("node_config", "message"),
    [
        ({"num-partitions": 2}, "node config: 'partition-id' is missing; --node-config"),
        ({"partition-id": 0}, "node config: 'num-partitions' is missing; --node-config"),
        ({"partition-id": 2, "num-partitions": 2}, "partition-id = 2: allowed is 0 to num-partitions − 1 = 1"),
        ({"partition-id": -1, "num-partitions": 2}, "partition-id = -1: allowed is 0 to"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_client_without_a_place_says_so(kind, node_config, message):
    with pytest.raises(ValueError, match=message):
        ask(tiny(), kind=kind, node_config=node_config)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_network_of_another_size_than_the_server_counts_on_is_refused(kind):
    """SCAFFOLD's and FedDyn's server divide by num-clients."""
    with pytest.raises(ValueError, match="num-partitions = 4: allowed is the run's num-clients = 6"):
        ask(tiny(num_clients=6), kind=kind, node_config={"partition-id": 1, "num-partitions": 4})


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_server_of_another_version_is_refused(kind):
    with pytest.raises(RuntimeError, match="ValueError: schema-version = 2: this client speaks 1"):
        ask(tiny(), kind=kind, settings={"schema-version": 2})


def test_model_of_another_shape_is_refused():
    state = initial_model()
    del state["layers.0.bias"]
    with pytest.raises(RuntimeError, match=r"array names differ from the model's: \['layers.0.bias'\]"):
        ask(tiny(), start=state)


def test_evaluation_leaves_the_validation_samples_out_of_training():
    holdings = federation(tiny())
    for training, validation in zip(holdings.training, holdings.validation, strict=True):
        assert not set(training) & set(validation)
