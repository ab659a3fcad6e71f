"""The server's evaluation on the test split: the same numbers here and on the workers."""

import json

import numpy as np
import pytest
import torch
from federations import DIGITS, client_app, grid_of, run, tiny
from flwr.clientapp import ClientApp

from fedwsa import data, models
from fedwsa.arrays import pack
from fedwsa.evaluation import evaluate
from strategies import evaluation
from strategies.evaluation import CentralEvaluation

BATCH = 100  # of the 359 test images


@pytest.fixture
def model():
    return models.build("mlp", *DIGITS, seed=3)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", BATCH)


def make(app, model, num_clients=3):
    config = tiny(num_clients=num_clients, cohort=2)
    grid = grid_of(app, num_clients, config.to_run_config())
    return CentralEvaluation(models.build("mlp", *DIGITS, seed=0), data.load("digits"), grid, timeout=10), grid


def test_the_workers_give_loss_and_accuracy_of_all_samples(model):
    test, grid = make(client_app, model)
    event = test(pack(model.state_dict()))
    loss, accuracy = evaluate(model, *data.load("digits").test_tensors())
    assert event["metrics"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert event["metrics"]["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert event["num_examples"] == 359
    assert test.grid is grid


def test_whoever_evaluates_it_is_the_same(model):
    """The same batches in the same order, so the same bits for any number of clients."""
    arrays = pack(model.state_dict())
    metrics = [make(client_app, model, num_clients=n)[0](arrays)["metrics"] for n in (2, 3, 5)]
    assert metrics[0] == metrics[1] == metrics[2]


def test_a_client_app_that_cannot_is_done_without(model):
    foreign = ClientApp()
    test, _ = make(foreign, model)
    event = test(pack(model.state_dict()))
    assert event["metrics"]["accuracy"] == evaluate(model, *data.load("digits").test_tensors())[1]
    assert test.grid is None  # it is not asked again


def test_a_small_test_split_stays_here(model, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 359)
    test, _ = make(client_app, model)
    assert test.grid is None


def test_a_loss_that_is_not_finite_is_null_in_the_events(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 359)  # here, not by the workers
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: (float("nan"), 0.1))
    config, heard = tiny(strategies=("fedavg",), rounds=1), []
    run(config, tmp_path, events=heard)
    text = (tmp_path / "fedavg" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    events = [json.loads(line) for line in text.splitlines()]
    assert events == [event for _, event in heard]
    found = [event["metrics"] for event in events if event["phase"] == "evaluate-server"]
    assert found == [{"loss": None, "accuracy": 0.1}] * 2


def test_parts_of_the_test_split_are_its_parts():
    whole, labels = data.load("digits").test_tensors()
    parts = [data.load("digits").test_tensors(slice(first, first + 100)) for first in range(0, 359, 100)]
    assert torch.equal(torch.cat([images for images, _ in parts]), whole)
    assert np.array_equal(torch.cat([own for _, own in parts]), labels)
