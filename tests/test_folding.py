"""Sums over replies: the same bits whoever computes which part of them, in a tree and in whole runs."""

import math
import pickle
import random
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
from federations import client_app, lines, tiny
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.client_app import evaluate_message, train_message
from fedwsa import loops
from fedwsa.arrays import record_of, view
from fedwsa.simulation import open_engine, shared_memory, simulate
from fedwsa.simulation.engine import Population, Task, identify, perform, without
from fedwsa.simulation.folding import BLOCK, Tree, fold
from fedwsa.simulation.schedule import Durations
from strategies.aggregation import MeanFold, MeanModel
from strategies.gate import Gate
from strategies.server_app import make_app

HELD = int(math.log2(BLOCK)) + 2  # parts in a tree, with the one that it is given

# ---- replies, and what cuts them


@dataclass(frozen=True)
class Given:
    """What a client replies; arrays of all kinds, whose sums depend on the order of adding in their last bits."""

    seed: int
    failed: bool = False
    shuffled: bool = False  # its arrays stand in another order

    @property
    def weight(self) -> float:
        return float(np.random.default_rng([self.seed, 1]).uniform(0.1, 1000))

    def arrays(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([self.seed, 2])
        arrays = {
            "half": rng.normal(size=3).astype(np.float16),
            "single": rng.normal(size=(2, 3)).astype(np.float32),
            "double": rng.normal(size=11) * 10.0 ** rng.integers(-9, 9, size=11),
            "count": np.asarray(rng.integers(0, 10**6)),
            "bytes": rng.integers(0, 256, size=(2, 2), dtype=np.uint8),
            "nothing": np.empty((0, 2), np.float32),
        }
        return dict(reversed(arrays.items())) if self.shuffled else arrays

    def reply(self) -> Message:
        """Made anew: a fold takes a reply's scope out of it."""
        metrics = MetricRecord({"num-examples": self.weight, "loss": self.weight / 7})
        if self.seed % 3:
            metrics["only-some"] = 1 / self.weight
            metrics.update({"scope-means": [self.weight / 3] * 2, "scope-variances": [0.1, self.weight]})
        return Message(RecordDict({"arrays": record_of(self.arrays()), "metrics": metrics}), 1, "train")


@st.composite
def cohorts(draw: Any, largest: int = 3 * BLOCK + 5) -> list[Given]:
    some = st.builds(Given, st.integers(0, 10**6), st.booleans(), st.booleans())
    fine = st.builds(Given, st.integers(0, 10**6))
    return draw(st.lists(draw(st.sampled_from([some, fine])), max_size=largest))


@st.composite
def cuts(draw: Any, length: int) -> list[int]:
    """Sizes of neighbouring pieces: powers of two up to BLOCK that divide their first position."""
    sizes: list[int] = []
    while (position := sum(sizes)) < length:
        fit = [size for k in range(6) if (size := 2**k) <= min(BLOCK, length - position) and position % size == 0]
        sizes.append(draw(st.sampled_from(fit)))
    return sizes


def part_of(given: Given) -> MeanFold:
    part = MeanFold()
    if not given.failed:
        part.add(given.reply())
    return part


def piece_of(some: list[Given]) -> MeanFold:
    """What a worker makes of them."""
    tree = Tree()
    for each in some:
        tree.push(1, part_of(each))
    return tree.total()


def pickled(part: Any) -> Any:
    return pickle.loads(pickle.dumps(part, protocol=5))


def through_a_socket(part: Any) -> Any:
    """As `shared_memory` sends what no block has room for: the numbers come as bytes, which are read-only."""
    stream, buffers = shared_memory.dumps(part)
    return pickle.loads(stream, buffers=[bytes(buffer) for buffer in buffers])


def piecewise(cohort: list[Given], sizes: list[int], send: Callable[[Any], Any]) -> MeanFold | None:
    tree, position = Tree(), 0
    for size in sizes:
        tree.push(size, send(piece_of(cohort[position : position + size])))
        position += size
    return tree.total()


def one_by_one(cohort: list[Given]) -> MeanFold | None:
    return piecewise(cohort, [1] * len(cohort), lambda part: part)


def bits(folded: MeanFold | None) -> Any:
    """All that a fold holds; equal if and only if the bits are."""
    if folded is None:
        return None
    model = {name: (array.dtype, array.shape, view(array).tobytes()) for name, array in folded.model.record().items()}
    metrics, scopes = folded.metrics, folded.scopes
    numbers = repr((folded.model.weight, metrics.sums, metrics.weights, scopes.numbers, scopes.weights))
    return sorted(model.items()), numbers


# ---- the tree


@given(st.data(), cohorts(), st.sampled_from([2, 4, 8, 16]))
@settings(max_examples=60)
def test_any_cut_gives_the_bits_of_adding_one_by_one(data, cohort, at_once):
    """However many are summed in one pass, and whether by compiled loops or by NumPy."""
    sizes = data.draw(cuts(len(cohort)))
    trips = data.draw(st.lists(st.sampled_from([pickled, lambda part: part]), min_size=1, max_size=7))
    turns = iter(trips * len(cohort))
    with patch("fedwsa.warmup._loops", None):
        expected = bits(one_by_one(cohort))
    with patch("strategies.aggregation.AT_ONCE", at_once), patch("fedwsa.warmup._loops", loops):
        assert bits(piecewise(cohort, sizes, lambda part: next(turns)(part))) == expected


@given(st.data(), cohorts())
@settings(max_examples=40)
def test_the_numbers_are_added_in_pairs_inside_a_block_and_block_after_block(data, cohort):
    """The order itself, written down without a tree."""

    def in_pairs(terms):
        if len(terms) == 1:
            return terms[0]
        half = 1 << (len(terms) - 1).bit_length() - 1
        return plus(in_pairs(terms[:half]), in_pairs(terms[half:]))

    def plus(one, other):
        return other if one is None else one if other is None else one + other

    def total(terms):
        whole = None
        for start in range(0, len(terms), BLOCK):
            whole = plus(whole, in_pairs(terms[start : start + BLOCK]))
        return whole

    folded = piecewise(cohort, data.draw(cuts(len(cohort))), pickled)
    used = [each for each in cohort if not each.failed]
    if not used:
        assert folded is None or not folded.model.weight
        return
    weight = total([None if each.failed else each.weight for each in cohort])
    sums = total([None if each.failed else each.weight * each.arrays()["double"] for each in cohort])
    assert folded.model.weight == weight
    assert view(folded.model.record()["double"]).tobytes() == (sums / weight).tobytes()


@given(st.data(), cohorts())
@settings(max_examples=40)
def test_the_sum_is_the_weighted_mean(data, cohort):
    """To the rounding of float64 sums, and then of the arrays' own types."""
    folded = piecewise(cohort, data.draw(cuts(len(cohort))), pickled)
    used = [each for each in cohort if not each.failed]
    if not used:
        return
    means, own = folded.model.record(), [each.arrays() for each in used]
    weight = math.fsum(each.weight for each in used)
    assert [*means] == [*own[0]]
    for name, array in means.items():
        values = view(array)
        assert (values.dtype, values.shape) == (own[0][name].dtype, own[0][name].shape)
        for place in np.ndindex(values.shape):
            terms = [each.weight * float(arrays[name][place]) for each, arrays in zip(used, own, strict=True)]
            rounding = 4 * len(used) * np.finfo(np.float64).eps * math.fsum(map(abs, terms)) / weight
            is_float = values.dtype.kind == "f"
            type_rounding = float(np.spacing(np.abs(values[place]))) / 2 if is_float else 0.5
            assert abs(float(values[place]) - math.fsum(terms) / weight) <= rounding + type_rounding


@given(st.data(), cohorts())
@settings(max_examples=40)
def test_metrics_are_means_over_those_who_report_them_and_scopes_stay_in_order(data, cohort):
    folded = piecewise(cohort, data.draw(cuts(len(cohort))), pickled)
    replies = [each.reply().content["metrics"] for each in cohort if not each.failed]
    for key in ("loss", "only-some"):
        own = [metrics for metrics in replies if key in metrics]
        if own:
            weight = math.fsum(metrics["num-examples"] for metrics in own)
            mean = math.fsum(metrics["num-examples"] * metrics[key] for metrics in own) / weight
            assert folded.metrics.record()[key] == pytest.approx(mean, rel=1e-13)
    own = [metrics for metrics in replies if "scope-means" in metrics and len(metrics["scope-means"]) == 2]
    if cohort:
        assert folded.scopes.weights == [metrics["num-examples"] for metrics in own]
        assert folded.scopes.numbers == [(metrics["scope-means"], metrics["scope-variances"]) for metrics in own]


@given(cohorts(BLOCK + 3))
@settings(max_examples=20)
def test_replies_that_are_here_give_the_same_bits(cohort):
    fine = [each for each in cohort if not each.failed]
    assert bits(fold(MeanFold, (each.reply() for each in fine))) == bits(one_by_one(fine))


def test_the_order_of_the_replies_decides_the_bits():
    """Else the tests above would hold whatever the tree did."""
    cohort = [Given(seed) for seed in range(2 * BLOCK + 3)]
    assert bits(one_by_one(cohort)) != bits(one_by_one(cohort[::-1]))


@pytest.mark.parametrize("sizes", [[2, 2, 4, 8, 16], [16, 16], [1, 1, 2, 4, 8, 16]], ids=str)
def test_parts_may_come_in_memory_that_cannot_be_written_to(sizes):
    """So come those of small models, and all from another machine."""
    cohort = [Given(seed) for seed in range(sum(sizes))]
    assert bits(piecewise(cohort, sizes, through_a_socket)) == bits(one_by_one(cohort))


def test_of_nothing_there_is_no_total():
    tree = Tree()
    assert tree.total() is None
    assert fold(MeanFold, []) is None
    tree.push(1, part_of(Given(1)))
    assert tree.total() is not None
    assert tree.total() is None  # it was given


class Part:
    """Knows which positions it covers, and how many of its kind there are."""

    alive: ClassVar["weakref.WeakSet[Part]"] = weakref.WeakSet()
    most: ClassVar[int] = 0

    def __init__(self, first: int, size: int) -> None:
        self.covers = list(range(first, first + size))
        self.alive.add(self)
        Part.most = max(Part.most, len(self.alive))

    def merge(self, later: "Part") -> None:
        self.covers += later.covers


@given(st.data(), st.integers(1, 40 * BLOCK))
@settings(max_examples=50)
def test_a_tree_holds_few_parts_however_long_the_cohort(data, length):
    sizes = data.draw(st.sampled_from([[1] * length, data.draw(cuts(min(length, 3 * BLOCK)))]))
    Part.most, tree, position = 0, Tree(), 0
    for size in sizes:
        tree.push(size, Part(position, size))
        position += size
    assert Part.most <= HELD
    assert tree.total().covers == list(range(position))


def test_the_bound_on_the_parts_is_reached():
    Part.most, tree = 0, Tree()
    for position in range(2 * BLOCK):
        tree.push(1, Part(position, 1))
    assert Part.most == HELD


@pytest.mark.parametrize("first", [[1] * BLOCK, [1, 1, 2, 4, 8], [BLOCK]], ids=["singles", "mixed", "block"])
def test_a_sum_of_many_parts_holds_few_models(first):
    """Whatever pieces the first block comes in, and however many blocks follow."""
    size = 20_000
    model = 8 * size  # bytes of float64 sums

    def piece(length: int) -> MeanModel:
        tree = Tree()
        for _ in range(length):
            part = MeanModel()
            part.add(record_of({"w": np.ones(size, np.float32)}), 1.0)
            tree.push(1, part)
        return pickled(tree.total())

    whole = pickle.dumps(piece(BLOCK), protocol=5)
    tree = Tree()
    tracemalloc.start()
    try:
        for length in first:
            tree.push(length, piece(length))
        for _ in range(60):
            tree.push(BLOCK, pickle.loads(whole))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < (HELD + BLOCK) * model
    assert view(tree.total().record()["w"]).tolist() == [1.0] * size


@pytest.mark.parametrize("loaded", [loops, None], ids=["compiled", "numpy"])
def test_summing_a_block_takes_two_models_at_the_most(loaded):
    """Two halves of a block; nothing as large besides, at any moment."""
    size = 1 << 20
    replies = [record_of({"w": np.full(size, k, np.float32)}) for k in range(BLOCK)]
    with patch("fedwsa.warmup._loops", loaded):
        tracemalloc.start()
        try:
            tree = Tree()
            for reply in replies:
                part = MeanModel()
                part.add(reply, 1.0)
                tree.push(1, part)
            folded = tree.total()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 2.3 * 8 * size
    assert (view(folded.record()["w"]) == (BLOCK - 1) / 2).all()


def test_a_sum_has_no_limit_to_its_blocks():
    """Of pieces that begin with single replies, as where one client's time is not known."""
    tree = Tree()
    sizes = [1, 1, 2, 4, 8] + [BLOCK] * 1500
    for size in sizes:
        part = MeanModel()
        for _ in range(size):
            part.add(record_of({"w": np.ones(1)}), 1.0)
        tree.push(size, pickled(part))
    assert view(tree.total().record()["w"]).tolist() == [1.0]


# ---- whole runs

Seconds = Callable[[Durations, int, str], float | None]

SECONDS: dict[str, Seconds | None] = {  # that the clients are said to take: it decides which of them travel together
    "measured": None,
    "unknown": lambda self, client, kind: None,
    "quick": lambda self, client, kind: 1e-4,
    "mixed": lambda self, client, kind: (None, 1e-4, 0.02, 1e-3, 1e-4)[client // 3 % 5],
}
# The first has integers, and is so small that it travels through sockets until the other has been there.
MODELS = ("federations:NormNet", "mlp")


def fails_at_times() -> ClientApp:
    """Our client, which raises in some rounds."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if (context.node_config["partition-id"] + message.content["config"]["server-round"]) % 7 < 2:
            raise RuntimeError("not today")
        return train_message(message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return evaluate_message(message, context)

    return app


CLIENTS = {"fine": lambda: client_app, "fails": fails_at_times}


def run(engine: Any, client: str, model: str) -> dict[str, Any]:
    """Bytes of the final models and the events of a run of our ServerApp; its cohort has three blocks."""
    config = tiny(
        strategies=["fedavg", "fedavg-wsa"], num_clients=40, cohort=37, evaluation_cohort=5, alpha=10.0, model=model
    )
    with TemporaryDirectory() as name:
        folder = Path(name)
        app = make_app(folder, lambda strategy, event: None)
        simulate(app, CLIENTS[client](), 40, engine=engine, run_config=config.to_run_config())
        return {
            strategy: (
                (folder / strategy / "final.safetensors").read_bytes(),
                lines(folder / strategy / "metrics.jsonl"),
            )
            for strategy in config.strategies
        }


@cache
def expected(client: str, model: str) -> dict[str, Any]:
    """One client after another in this process, each reply added by the server."""
    with patch.object(Gate, "folding", lambda self, server_round: None):
        return run("inprocess", client, model)


def said_to_take(seconds: str) -> Any:
    return patch.object(Durations, "seconds", SECONDS[seconds] or Durations.seconds)


class Shuffling:
    """Workers that take turns at random, and whose outcomes are pickled on their way."""

    workers_elsewhere = False

    def __init__(self, workers: int, seed: int) -> None:
        self.workers = workers
        self.random = random.Random(seed)
        self.tasks: list[Task] = []
        self.sizes: set[int] = set()  # of tasks that were folded
        self.positions: list[int] = []  # that were taken, of those that were there

    def wake(self) -> None:
        pass

    def begin(self, population: Population) -> None:
        self.population = population

    def submit(self, task: Task) -> None:
        self.tasks.append(task)
        if task.make:
            self.sizes.add(len(task.jobs))

    def collect(self, timeout: float | None) -> list[Any]:
        self.positions.append(self.random.randrange(len(self.tasks)))
        return [pickled(perform(self.population, self.tasks.pop(self.positions[-1])))]

    def cancel(self, message_ids: set[str]) -> None:
        self.tasks = [left for task in self.tasks if (left := without(task, message_ids)).jobs]

    def close(self) -> None:
        pass


class Guarded(MeanFold):
    """Leaves error replies out."""

    def add(self, reply: Message) -> None:
        if reply.has_content():
            super().add(reply)


def folds(engine: Any) -> list[Any]:
    """What the grid makes of two rounds of float64 replies: a run's float32 models hide most last bits of the sums."""
    server, client, found = ServerApp(), ClientApp(), []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        given = reply_of(int(context.node_config["partition-id"]), int(message.content["config"]["round"]))
        if given.failed:
            raise RuntimeError("not today")
        return Message(given.reply().content, reply_to=message)

    @server.main()
    def main(grid: Any, context: Context) -> None:
        for number in (1, 2):
            content = RecordDict({"config": ConfigRecord({"round": number})})
            messages = [Message(content, node, "train") for node in grid.get_node_ids()]
            found.append(bits(grid.fold(messages, Guarded)))

    simulate(server, client, 37, engine=engine)
    return found


def reply_of(client: int, server_round: int) -> Given:
    return Given(100 * server_round + client, failed=(client + server_round) % 7 == 0, shuffled=client % 5 == 0)


def expected_folds() -> list[Any]:
    return [bits(one_by_one([reply_of(client, number) for client in range(37)])) for number in (1, 2)]


def assert_same(found: dict[str, Any], client: str, model: str) -> None:
    """With a message that is not a dump of the model."""
    for strategy, (final, events) in expected(client, model).items():
        assert found[strategy][1] == events, strategy
        assert found[strategy][0] == final, strategy
    assert found.keys() == expected(client, model).keys()


def test_some_clients_fail_and_are_left_out():
    events = expected("fails", "mlp")["fedavg"][1]
    failed = [event["num_failed"] for event in events if event["phase"] == "train"]
    assert all(5 <= number <= 15 for number in failed)
    assert expected("fails", "mlp")["fedavg"][0] != expected("fine", "mlp")["fedavg"][0]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("model", MODELS)
def test_in_one_process_the_cut_changes_no_bit(seconds, client, model):
    with said_to_take(seconds):
        assert_same(run("inprocess", client, model), client, model)


@pytest.mark.parametrize("seconds", SECONDS)
def test_in_one_process_the_cut_changes_no_bit_of_the_sums(seconds):
    with said_to_take(seconds):
        assert folds("inprocess") == expected_folds()


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("seconds", ["unknown", "quick", "mixed"])
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_neither_the_number_of_workers_nor_their_order_changes_a_bit(workers, seconds, client, model):
    engine = Shuffling(workers, seed=workers)
    with said_to_take(seconds):
        assert_same(run(engine, client, model), client, model)
    assert set(engine.positions) >= {0, 1, 2}
    assert (max(engine.sizes) > 1) == (seconds != "unknown")


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_nor_a_bit_of_the_sums(workers, seconds):
    for seed in range(5):
        with said_to_take(seconds):
            assert folds(Shuffling(workers, seed)) == expected_folds()


@pytest.fixture(scope="module", params=[1, 2, 4])
def ray_engine(request: pytest.FixtureRequest) -> Iterator[Any]:
    """One after the other: Ray is there once a process."""
    with open_engine("ray", workers=request.param) as engine:
        yield engine


@pytest.mark.process
@pytest.mark.timeout(120)
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("seconds", ["unknown", "quick", "measured"])
@pytest.mark.parametrize("model", MODELS)
def test_neither_do_processes(ray_engine, seconds, client, model):
    with said_to_take(seconds):
        assert_same(run(ray_engine, client, model), client, model)


@pytest.mark.process
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seconds", SECONDS)
def test_neither_do_processes_in_the_sums(ray_engine, seconds):
    with said_to_take(seconds):
        assert folds(ray_engine) == expected_folds()


identify()
