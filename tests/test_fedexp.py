"""FedExP's step by hand, and where it leads on quadratic losses."""

import numpy as np
import pytest
import torch
from federations import (
    DIGITS,
    canned,
    digest,
    grid_of,
    holdout,
    initial_model,
    lines,
    numbers,
    one_round,
    record,
    run,
    spying,
    tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays
from quadratics import clients_of, play, point
from safetensors.torch import load_file

from fedwsa import models
from fedwsa.config import ConfigError, parse
from fedwsa.data import load
from fedwsa.evaluation import evaluate
from fedwsa.run_folder import FINAL, read_checkpoint
from strategies import FedAvg, WeightScopeAlignment
from strategies.aggregation import equal
from strategies.fedexp import FedExP


class PlainMean(FedAvg):
    weigh = staticmethod(equal)


def after_updates(updates, *, start=None, dtype=np.float64, examples=None, **options):
    """x and η_g after clients moved by these from x."""
    x = np.zeros(len(updates[0])) if start is None else np.array(start)
    sizes = examples or [1] * len(updates)
    replies = [
        ({"w": (x + np.array(update)).astype(dtype)}, {"num-examples": size})
        for update, size in zip(updates, sizes, strict=True)
    ]
    strategy = FedExP(len(updates), seed=0, **options)
    arrays, metrics = one_round(strategy, grid_of(canned(*replies), len(updates)), record({"w": x.astype(dtype)}))
    return arrays["w"].numpy(), metrics["server-step"]


# ---- the step


def test_orthogonal_updates_by_hand():
    """Six of norm 2: Σ‖Δ‖² = 24, ‖Δ̄‖² = 4/6, so that η_g = 24/(12 (2/3 + 1/3)) = 2; x moves by 2 · 2/6."""
    w, step = after_updates(2 * np.eye(6), epsilon=1 / 3)
    assert step == pytest.approx(2, rel=1e-12)
    np.testing.assert_allclose(w, np.full(6, 2 / 3), rtol=1e-12)


def test_two_orthogonal_updates_are_averaged():
    """a²/(a² + 2ε) is less than 1."""
    w, step = after_updates([[3.0, 0.0], [0.0, 3.0]])
    assert (w.tolist(), step) == ([1.5, 1.5], 1.0)


def test_updates_that_partly_cancel_by_hand():
    """(1, 3) and (1, −3): Σ = 20, Δ̄ = (1, 0), η_g = 20/(4 · 1.25) = 4, whatever the clients' sizes."""
    w, step = after_updates([[1.0, 3.0], [1.0, -3.0]], start=[7.0, 7.0], examples=[1, 1000], epsilon=0.25)
    assert (w.tolist(), step) == ([11.0, 7.0], 4.0)


def test_all_arrays_have_one_step():
    replies = [({"a": np.array([1.0]), "b": np.array([3.0])}, {"num-examples": 1})]
    replies += [({"a": np.array([1.0]), "b": np.array([-3.0])}, {"num-examples": 1})]
    start = record({"a": np.array([0.0]), "b": np.array([0.0])})
    arrays, metrics = one_round(FedExP(2, seed=0, epsilon=0.25), grid_of(canned(*replies), 2), start)
    assert numbers(arrays) == {"a": [4.0], "b": [0.0]}
    assert metrics["server-step"] == 4


@given(
    numpy_arrays(np.float32, st.tuples(st.integers(1, 20), st.just(5)), elements=st.floats(-10, 10, width=32)),
    st.sampled_from([1e-4, 1e-2, 1.0]),
)
@settings(max_examples=40)
def test_against_all_updates_at_once(models, epsilon):
    """In float64, x at the first model."""
    updates = models.astype(np.float64) - models[0]
    mean = updates.mean(0)
    step = max(1.0, (updates**2).sum() / (2 * len(models) * ((mean**2).sum() + epsilon)))
    w, found = after_updates(updates, start=models[0].astype(np.float64), epsilon=epsilon)
    assert found == pytest.approx(step, rel=1e-9)
    np.testing.assert_allclose(w, models[0] + step * mean, rtol=1e-9, atol=1e-9 * step)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_updates_are_fedavg_bit_for_bit(dtype):
    app = clients_of((3.0,) * 3, ([1 / 3, 0.7],) * 3, steps=5)
    plain, ours = (play(s, app, 3, 4, point(5.0, 5.0)) for s in (PlainMean(3, seed=0), FedExP(3, seed=0)))
    assert plain.tobytes() == ours.tobytes()
    w, step = after_updates([[0.1, 0.2]] * 3, start=[1 / 3, 0.7], dtype=dtype)
    assert step == 1.0
    assert w.tobytes() == np.array([1 / 3 + 0.1, 0.7 + 0.2], dtype).tobytes()


def test_what_is_no_parameter_is_averaged_and_does_not_count():
    replies = [
        ({"w": np.array(w), "norm.running": np.array([v]), "norm.count": np.asarray(n)}, {"num-examples": n})
        for w, v, n in (([1.0, 3.0], 2.0, 1), ([1.0, -3.0], 4.0, 4))
    ]
    start = record({"w": np.zeros(2), "norm.running": np.array([1000.0]), "norm.count": np.asarray(0)})
    strategy = FedExP(2, seed=0, epsilon=0.25, parameters={"w"})
    arrays, metrics = one_round(strategy, grid_of(canned(*replies), 2), start)
    assert {name: values.tolist() for name, values in numbers(arrays).items()} == {
        "w": [4.0, 0.0],
        "norm.running": [3.0],
        "norm.count": 2,  # 2.5
    }
    assert metrics["server-step"] == 4


# ---- where it leads


def test_faster_than_fedavg_where_no_client_knows_all():
    """Client k sees coordinate k alone, and solves it: FedAvg goes 1/M of the way in a round, FedExP half of it."""
    clients, rounds = 8, 6
    app = clients_of([*torch.eye(clients, dtype=torch.float64)], [[1.0] * clients] * clients)
    plain, ours = (
        play(s, app, clients, rounds, point(*[0.0] * clients))
        for s in (PlainMean(clients, seed=0), FedExP(clients, seed=0, epsilon=1e-12))
    )
    np.testing.assert_allclose(1 - plain, np.full(clients, (1 - 1 / clients) ** rounds), rtol=1e-6)
    np.testing.assert_allclose(1 - ours, np.full(clients, 0.5**rounds), rtol=1e-6)


def test_fixed_point_is_that_of_the_plain_mean_which_small_epsilon_does_not_reach():
    """One step each: the gradients add up to 0 at Σ h c/Σ h, whatever the clients' sizes.

    There ‖Δ_k‖² = 0.0656 for both, so that η_g is 2 with this ε; 0.25 η_g, 0.25 the mean of ηh, has to be below 2.
    """
    app = clients_of((1.0, 4.0), ([1.0, -2.0], [3.0, 0.5]), steps=1, examples=(1, 1000))
    found = play(FedExP(2, seed=0, epsilon=0.0164), app, 2, 60, point(5.0, 5.0))
    np.testing.assert_allclose(found, [13 / 5, 0.0], rtol=1e-9, atol=1e-9)
    swinging = [play(FedExP(2, seed=0, epsilon=0.001), app, 2, rounds, point(5.0, 5.0)) for rounds in range(60, 70)]
    assert np.linalg.norm(np.array(swinging) - [13 / 5, 0.0], axis=1).max() > 0.1


# ---- in a run


def test_the_step_is_recorded(tmp_path):
    for name in ("fedexp", "fedexp-wsa"):
        events = []
        run(tiny(strategies=(name,), local_epochs=5), tmp_path, events=events)
        steps = [event["metrics"]["server-step"] for _, event in events if event["phase"] == "train"]
        assert len(steps) == 2
        assert min(steps) >= 1


def test_the_config_reaches_the_strategy():
    strategy = FedExP.from_config(tiny(fedexp={"epsilon": 0.5}), holdout())
    assert strategy.epsilon == 0.5
    assert strategy.parameters == {f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert WeightScopeAlignment(strategy).weigh is equal
    with pytest.raises(ConfigError, match=r"fedexp\.epsilon = 0: allowed is a finite number > 0"):
        parse({"fedexp": {"epsilon": 0}})


# ---- what is evaluated and kept


def test_the_result_is_the_mean_of_the_last_two_models_and_the_last_of_what_is_no_parameter():
    replies = [({"w": np.array([3.0], np.float32), "norm.count": np.asarray(7)}, {"num-examples": 1})]
    start = record({"w": np.array([1.0], np.float32), "norm.count": np.asarray(1)})
    strategy = FedExP(1, seed=0)
    assert numbers(strategy.result(start)) == {"w": [1.0], "norm.count": 1}
    arrays, _ = one_round(strategy, grid_of(canned(*replies), 1), start)
    result = numbers(strategy.result(arrays))
    assert result == {"w": [2.0], "norm.count": 7}
    assert result["w"].dtype == np.float32
    assert numbers(arrays)["w"] == [3.0]


@pytest.mark.parametrize("name", ["fedexp", "fedexp-wsa"])
@pytest.mark.parametrize("clients", [0, 2])
def test_a_run_evaluates_and_keeps_the_mean_of_the_last_two_models(tmp_path, name, clients):
    """Also where it ended between its last checkpoint and its final model; clients go on from the last model."""
    config, folder, seen = tiny(strategies=(name,), checkpoint_every=1, evaluation_cohort=clients), tmp_path / name, []
    run(config, tmp_path, spying(seen))
    before, last = (
        {key: tensor.numpy() for key, tensor in read_checkpoint(path).model.items()}
        for path in sorted((folder / "checkpoints").iterdir())
    )
    final = load_file(folder / FINAL)
    assert len(final) == len(last) == 6
    for key, tensor in final.items():
        np.testing.assert_allclose(tensor, (before[key] + last[key]) / 2, rtol=1e-6, atol=1e-9)
        assert not np.array_equal(tensor, last[key])
    assert {each.sent for each in seen if each.kind == "train" and each.server_round == 2} == {
        digest({key: before[key] for key in initial_model()})
    }
    expected = digest({key: final[key].numpy() for key in initial_model()})
    asked = [each.sent for each in seen if each.kind == "evaluate" and each.server_round == 2]
    assert asked == [expected] * clients
    model = models.build("mlp", *DIGITS, 0)
    model.load_state_dict(final)
    loss, accuracy = evaluate(model, *load("digits").test_tensors())
    found = [event["metrics"] for event in lines(folder / "metrics.jsonl") if event["phase"] == "evaluate-server"][-1]
    assert (found["loss"], found["accuracy"]) == pytest.approx((loss, accuracy), rel=1e-5)

    kept = (folder / FINAL).read_bytes()
    (folder / FINAL).unlink()
    run(config, tmp_path)
    assert (folder / FINAL).read_bytes() == kept
