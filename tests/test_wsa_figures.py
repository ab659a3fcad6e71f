"""The pictures of weight scopes: the clients are those of the run, and what is drawn is what they sent."""

import json
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from federations import Seen, lines, run, spying, tiny
from matplotlib.figure import Figure
from safetensors.torch import load_file
from test_report import Page

from experiments import figures as report_figures
from experiments.results import read_run
from experiments.wsa import figures

NAMES = ("fedavg", "fedavg-wsa")
QUICK = {"num-clients": 6, "cohort": 3, "rounds": 2, "local-epochs": 1, "alpha": 1.0, "data": "digits"}


@pytest.mark.parametrize("changes", [{}, {"model": "federations:NormNet", "batch_norm": "local"}], ids=["mlp", "fedbn"])
@pytest.mark.parametrize("name", NAMES)
def test_the_clients_are_those_of_the_run_and_their_average_its_next_model(name, changes, tmp_path):
    seen: list[Seen] = []
    config = tiny(strategies=NAMES, rounds=3, **changes)
    run(config, tmp_path, spying(seen))
    config = tiny(strategies=(name,), rounds=3, **changes)
    found = figures.clients_of(tmp_path, config, name, 3)
    sent = [s for s in seen if (s.kind, s.server_round, s.config["strategy"]) == ("train", 3, name)]
    assert len(found) == len(sent) == 3
    for client, reply in zip(found, sent, strict=True):
        assert list(client) == list(reply.model)
        assert all(client[key].numpy().tobytes() == reply.model[key].tobytes() for key in client)
    final = load_file(tmp_path / name / "final.safetensors")
    weights = [reply.metrics["num-examples"] for reply in sent]
    for key, tensor in final.items():
        if tensor.is_floating_point():
            mean = np.average([client[key].double().numpy() for client in found], axis=0, weights=weights)
            np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-6, atol=1e-8)


def test_histograms_are_densities_and_gaussians_have_the_scopes_moments():
    rng = np.random.default_rng(0)
    clients = [rng.normal(0.1 * k, 1 + k, 500) for k in range(3)]
    edges = np.linspace(min(map(np.min, clients)), max(map(np.max, clients)), 31)
    axes = Figure().subplots()
    figures.draw_weights(axes, clients, edges)
    assert len(axes.patches) == len(axes.lines) == 3
    for weights, steps, line in zip(clients, axes.patches, axes.lines, strict=True):
        values, at, _ = steps.get_data()
        assert np.dot(values, np.diff(at)) == pytest.approx(1, rel=1e-12)
        counts = values * np.diff(at) * 500
        assert counts == pytest.approx(np.histogram(weights, edges)[0])
        x, y = line.get_xydata().T
        np.testing.assert_allclose(y, scipy.stats.norm.pdf(x, weights.mean(), weights.std()), rtol=1e-9)


def test_the_picture_has_a_panel_for_each_layer_and_strategy():
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.randn(4, 5, generator=generator), "b": torch.randn(4, generator=generator)}
    svg = figures.weights_figure({"fedavg": [state, state], "other": [state]})
    texts = Page(svg).of("text")
    assert [text for text in texts if ":" in text] == ["fedavg: a", "other: a"]  # b has one dimension
    sigma = state["a"].double().std(correction=0).item()
    assert f"σ {sigma:.4f} to {sigma:.4f}" in texts


def test_main_makes_the_runs_once_and_draws_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "VALUES", figures.VALUES | QUICK)
    monkeypatch.setattr(figures, "_data", lambda: "digits")
    monkeypatch.setattr(sys, "argv", ["figures", "--out", str(tmp_path)])
    drawn: list[Figure] = []
    svg = report_figures.svg
    monkeypatch.setattr(report_figures, "svg", lambda figure: drawn.append(figure) or svg(figure))
    figures.main()
    assert capsys.readouterr().out.split() == [str(tmp_path / "weights.svg"), str(tmp_path / "drift.svg")]
    config = json.dumps(read_run(tmp_path / "run").config)
    assert all(json.dumps(value) in config for value in ("digits", "kaiming-normal", list(NAMES)))

    drift = drawn[-1]
    layers = ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
    assert [axes.get_title(loc="left") for axes in drift.axes] == layers
    for name, of_panel in zip(NAMES, zip(*(axes.lines for axes in drift.axes), strict=True), strict=True):
        trained = [e for e in lines(tmp_path / "run" / name / "metrics.jsonl") if e["phase"] == "train"]
        for i, line in enumerate(of_panel):
            expected = [[e["round"], np.sqrt(e["scope_variances"][i])] for e in trained]
            np.testing.assert_allclose(line.get_xydata(), expected, rtol=1e-12)

    pictures = {path: path.read_bytes() for path in tmp_path.glob("*.svg")}
    final = tmp_path / "run" / "fedavg" / "final.safetensors"
    before = final.stat().st_mtime_ns
    figures.main()
    assert final.stat().st_mtime_ns == before
    assert {path: path.read_bytes() for path in tmp_path.glob("*.svg")} == pictures
