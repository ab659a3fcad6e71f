"""Weight scope alignment around every strategy that is registered, and around Flower's privacy wrappers."""

import re
from collections.abc import Callable
from pathlib import Path

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
import torch
from federations import Seen, grid_of, holdout, initial_model, lines, one_round, run, spying, tiny
from safetensors.torch import load_file
from torch import Tensor

from fedwsa.arrays import pack
from fedwsa.config import Config
from fedwsa.seeding import torch_seed
from strategies import STRATEGIES, FedAvg, Holdout, build
from strategies.aggregation import weight_of

PAGE = (Path(__file__).parent.parent / "docs" / "strategies.md").read_text(encoding="utf-8")
LAYERS = ("layers.0.weight", "layers.1.weight", "layers.2.weight")


# ---- Flower's privacy wrappers


class FixedClipping(flower.DifferentialPrivacyServerSideFixedClipping):
    """Noise that depends on the round alone, and the state that our rounds ask for: there is none."""

    def aggregate_train(self, server_round, replies):
        np.random.seed(server_round)  # Flower draws from the global generator
        return super().aggregate_train(server_round, replies)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass


class AdaptiveClipping(flower.DifferentialPrivacyServerSideAdaptiveClipping):
    """The same, whose norm is to be kept."""

    def aggregate_train(self, server_round, replies):
        np.random.seed(server_round)
        return super().aggregate_train(server_round, replies)

    def state(self) -> dict[str, Tensor]:
        return {"norm": torch.tensor(self.clipping_norm, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.clipping_norm = state["norm"].item()


def fixed_clipping(config: Config, samples: Holdout) -> FixedClipping:
    inner = FedAvg.from_config(config, samples)
    return FixedClipping(inner, noise_multiplier=0.01, clipping_norm=1.0, num_sampled_clients=config.cohort)


def adaptive_clipping(config: Config, samples: Holdout) -> AdaptiveClipping:
    inner = FedAvg.from_config(config, samples)
    return AdaptiveClipping(inner, noise_multiplier=0.01, num_sampled_clients=config.cohort, initial_clipping_norm=1.0)


PAIRS = [*STRATEGIES, "test_pairs:fixed_clipping", "test_pairs:adaptive_clipping"]
everyone = pytest.mark.parametrize("name", PAIRS)


# ---- two rounds of each pair


@pytest.fixture(scope="module")
def seen_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[Seen]]]:
    """The tiny run of a pair, done once: its folder, and what its clients got and gave."""
    done: dict[str, tuple[Path, list[Seen]]] = {}

    def get(name: str) -> tuple[Path, list[Seen]]:
        if name not in done:
            folder, seen = tmp_path_factory.mktemp("pair"), []
            run(tiny(strategies=(f"{name}-wsa",), wsa={"strength": 0.5}), folder, spying(seen))
            done[name] = folder / f"{name}-wsa", seen
        return done[name]

    return get


def trained(seen: list[Seen], server_round: int) -> list[Seen]:
    return [message for message in seen if (message.kind, message.server_round) == ("train", server_round)]


def fused_by_hand(name: str, replies: list[Seen]) -> tuple[np.ndarray, np.ndarray]:
    """Means over the clients of their layers' means and variances, with the weights of the strategy's own mean."""
    weigh = getattr(build(name, tiny(), holdout(10)), "weigh", weight_of)
    weights = np.array([weigh(reply.metrics) for reply in replies], dtype=np.float64)
    if name == "local-only":  # whose clients keep their models and send their scopes
        scopes = np.array([[reply.metrics[key] for key in ("scope-means", "scope-variances")] for reply in replies])
    else:
        layers = [[reply.model[layer].astype(np.float64) for layer in LAYERS] for reply in replies]
        scopes = np.array([[[w.mean() for w in own], [w.var() for w in own]] for own in layers])
    mean, variance = np.average(scopes, axis=0, weights=weights)
    return mean, variance


@everyone
def test_target_in_round_two_is_the_fusion_of_the_scopes_of_round_one(name, seen_of):
    _, seen = seen_of(name)
    mean, variance = fused_by_hand(name, trained(seen, 1))
    assert len(trained(seen, 2)) == (1 if name == "central" else 3)
    for message in trained(seen, 2):
        target = message.alignment.target
        assert (target.names, message.alignment.strength) == (LAYERS, 0.5)
        np.testing.assert_allclose(target.means, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(target.variances, variance, rtol=1e-9)


@everyone
def test_nobody_is_left_out_and_what_is_recorded_is_that_fusion(name, seen_of):
    folder, seen = seen_of(name)
    events = [event for event in lines(folder / "metrics.jsonl") if event["phase"] == "train"]
    assert [event["num_failed"] for event in events] == [0, 0]
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "final.safetensors").values())
    for event in events:
        mean, variance = fused_by_hand(name, trained(seen, event["round"]))
        np.testing.assert_allclose(event["scope_means"], mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(event["scope_variances"], variance, rtol=1e-9)


@everyone
def test_strength_zero_is_the_strategy_by_itself_bit_for_bit_and_another_is_not(name, seen_of, tmp_path):
    run(tiny(strategies=(name, f"{name}-wsa"), wsa={"strength": 0.0}), tmp_path)
    plain, off = ((tmp_path / each / "final.safetensors").read_bytes() for each in (name, f"{name}-wsa"))
    assert plain == off
    events = [lines(tmp_path / each / "metrics.jsonl") for each in (name, f"{name}-wsa")]
    losses = [[event["metrics"] for event in each] for each in events]
    assert losses[0] == losses[1]
    folder, _ = seen_of(name)
    aligned = [event["metrics"] for event in lines(folder / "metrics.jsonl")]
    assert aligned[1]["loss"] != losses[0][1]["loss"]  # already in the first round's training


# ---- privacy


@pytest.mark.parametrize("name", ["fixed_clipping", "adaptive_clipping"])
def test_aligned_and_clipped_the_model_moves_by_the_norm_at_most(name, tmp_path):
    """Noise of 0.01 · 1/3 in each of 55,210 numbers has a norm of 0.78; unclipped, the model moves by more."""
    folder, limit = tmp_path / "run", 1.0 + 0.01 / 3 * np.sqrt(55_210) * 1.02
    run(tiny(strategies=(f"test_pairs:{name}-wsa", "fedavg-wsa"), rounds=1, local_epochs=20), folder)
    start = initial_model(torch_seed(0, "model"))
    private, open_ = (
        load_file(path / "final.safetensors") for path in (folder / f"test_pairs:{name}-wsa", folder / "fedavg-wsa")
    )
    moved = [sum((model[key] - start[key]).square().sum().item() for key in start) ** 0.5 for model in (private, open_)]
    assert 0.75 < moved[0] < limit < moved[1]


def test_adaptive_norm_goes_on_from_a_checkpoint(tmp_path):
    name = "test_pairs:adaptive_clipping-wsa"
    run(tiny(strategies=(name,), rounds=3), tmp_path / "whole")
    run(tiny(strategies=(name,), rounds=2), tmp_path / "parts")
    (tmp_path / "parts" / name / "final.safetensors").unlink()
    run(tiny(strategies=(name,), rounds=3), tmp_path / "parts")
    whole, parts = (tmp_path / part / name / "final.safetensors" for part in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


# ---- the page


def test_the_private_strategy_of_the_page_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "private.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    run(tiny(strategies=("private:fedavg", "private:fedavg-wsa"), rounds=1), tmp_path / "run")
    assert (tmp_path / "run" / "private:fedavg-wsa" / "final.safetensors").exists()


def test_the_private_strategy_of_the_page_keeps_the_state_of_the_one_inside(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    found = {}
    exec(code, found)
    inner = STRATEGIES["feddyn"](tiny(), holdout())
    private = found["Private"](inner, noise_multiplier=1.0, clipping_norm=0.5, num_sampled_clients=3)
    one_round(private, grid_of(spying([]), 6, tiny().to_run_config()), pack(initial_model()))
    assert private.state().keys() == inner.state().keys()
    fresh = STRATEGIES["feddyn"](tiny(), holdout())
    found["Private"](fresh, noise_multiplier=1.0, clipping_norm=0.5, num_sampled_clients=3).load_state(private.state())
    for name, tensor in inner.state().items():
        assert tensor.any()
        assert torch.equal(fresh.state()[name], tensor)


def test_every_strategy_is_in_the_table():
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`([^`]+)`", " ".join(rows))) == sorted(STRATEGIES)
