"""A config comes through TOML and Flower's run config unchanged, and what is wrong in one is said in a line each."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedwsa import config
from fedwsa.config import Config, ConfigError
from fedwsa.sections import NPMergeConfig, WSAConfig

POSITIVE = st.floats(0, allow_nan=False, allow_infinity=False, exclude_min=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SEVERAL_ALPHAS = st.lists(POSITIVE, min_size=1, max_size=4, unique_by=lambda alpha: f"{alpha:g}").map(tuple)
CONFIGS = st.builds(
    Config,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", fullmatch=True),
    strategies=st.lists(
        st.sampled_from(["fedavg", "fedavg-wsa", "np-merge", "my.module:Own"]), min_size=1, unique=True
    ).map(tuple),
    data_dir=TEXT,
    alpha=SEVERAL_ALPHAS,
    seed=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4, unique=True).map(tuple),
    num_clients=st.integers(10, 1_000_000),
    rounds=st.integers(1, 10**9),
    momentum=st.floats(0, 1, exclude_max=True),
    learning_rate=POSITIVE,
    wsa=st.builds(WSAConfig, strength=st.one_of(st.just(0.0), POSITIVE), mode=st.sampled_from(["loss", "proximal"])),
    np_merge=st.builds(NPMergeConfig, align=st.booleans(), steps=st.integers(0, 10**6)),
    out_dir=TEXT,
)


def problems(**values: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse({key.replace("_", "-"): value for key, value in values.items()})
    return str(caught.value).splitlines()


def test_defaults_are_the_main_job() -> None:
    defaults = config.parse({})
    assert defaults == Config()
    assert defaults.strategies == ("fedavg", "fedavg-wsa", "np-merge")
    assert (defaults.data, defaults.alpha, defaults.seed) == ("digits", (0.1,), (0,))
    assert (defaults.num_clients, defaults.cohort, defaults.rounds, defaults.engine) == (20, 10, 30, "ray")
    assert (defaults.wsa.mode, defaults.wsa.strength, defaults.wsa.target) == ("loss", 1.0, "fused")


def test_defaults_for_flower_are_the_same() -> None:
    """`flwr run -c` takes no key that pyproject.toml lacks."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    assert config.parse(project["tool"]["flwr"]["app"]["config"]) == Config()
    assert project["tool"]["flwr"]["app"]["config"].keys() == tomllib.loads(Config().to_toml()).keys()
    for section in ("wsa", "np-merge"):
        own = project["tool"]["flwr"]["app"]["config"][section]
        assert own.keys() == tomllib.loads(Config().to_toml())[section].keys()


@settings(max_examples=200)
@given(CONFIGS)
def test_toml_holds_everything(one: Config) -> None:
    assert config.parse(tomllib.loads(one.to_toml())) == one


@settings(max_examples=200)
@given(CONFIGS)
def test_flowers_run_config_holds_everything_in_scalars(one: Config) -> None:
    flat = one.to_run_config()
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
    assert config.from_run_config(flat) == one


@given(SEVERAL_ALPHAS, st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True).map(tuple))
def test_federations_are_every_alpha_with_every_seed(alphas: tuple[float, ...], seeds: tuple[int, ...]) -> None:
    whole = Config(alpha=alphas, seed=seeds, rounds=7)
    parts = whole.federations()
    assert [(part.alpha, part.seed) for part in parts] == [((a,), (s,)) for a in alphas for s in seeds]
    assert all(part.model_copy(update={"alpha": alphas, "seed": seeds}) == whole for part in parts)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0.1,1", (0.1, 1.0)),
        (" 0.1 , 1 ", (0.1, 1.0)),
        ([0.1, 1], (0.1, 1.0)),
        (0.5, (0.5,)),
        (2, (2.0,)),
        ("1e-3", (0.001,)),
    ],
)
def test_one_value_or_text_where_a_list_is_meant(given: Any, expected: tuple[float, ...]) -> None:
    assert config.parse({"alpha": given}).alpha == expected


def test_single_strategy_stays_a_list() -> None:
    assert tomllib.loads(config.parse({"strategies": "fedavg"}).to_toml())["strategies"] == ["fedavg"]


WHOLE = "allowed is a whole number"
MANY = ", or a list of such, not empty"


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("rounds", 0, f"rounds = 0: {WHOLE} ≥ 1"),
        ("rounds", 1.5, f"rounds = 1.5: {WHOLE} ≥ 1"),
        ("rounds", "many", f'rounds = "many": {WHOLE} ≥ 1'),
        ("rounds", True, f"rounds = true: {WHOLE} ≥ 1"),
        ("num-clients", 1_000_001, f"num-clients = 1000001: {WHOLE} ≥ 1 and ≤ 1000000"),
        ("alpha", 0.0, f"alpha = 0.0: allowed is a finite number > 0{MANY}"),
        ("alpha", -1, f"alpha = -1: allowed is a finite number > 0{MANY}"),
        ("alpha", float("nan"), f"alpha = NaN: allowed is a finite number > 0{MANY}"),
        ("alpha", "0.1,inf", f"alpha = Infinity: allowed is a finite number > 0{MANY}"),
        ("alpha", "low", f'alpha = "low": allowed is a finite number > 0{MANY}'),
        ("alpha", True, f"alpha = true: allowed is a finite number > 0{MANY}"),
        ("alpha", [], f"alpha = []: allowed is a finite number > 0{MANY}"),
        ("alpha", "", f'alpha = "": allowed is a finite number > 0{MANY}'),
        ("seed", [0, -1], f"seed = -1: {WHOLE} ≥ 0 and < 4294967296{MANY}"),
        ("seed", 2**32, f"seed = 4294967296: {WHOLE} ≥ 0 and < 4294967296{MANY}"),
        ("seed", 0.5, f"seed = 0.5: {WHOLE} ≥ 0 and < 4294967296{MANY}"),
        ("strategies", [], f"strategies = []: allowed is text in quotes{MANY}"),
        ("strategies", [1], f"strategies = 1: allowed is text in quotes{MANY}"),
        ("data", 3, "data = 3: allowed is text in quotes"),
        ("momentum", 1, "momentum = 1: allowed is a finite number ≥ 0 and < 1"),
        ("momentum", float("nan"), "momentum = NaN: allowed is a finite number ≥ 0 and < 1"),
        ("validation-fraction", float("nan"), "validation-fraction = NaN: allowed is a finite number ≥ 0 and < 1"),
        ("target-accuracy", 80, "target-accuracy = 80: allowed is a finite number > 0 and ≤ 1"),
        ("target-accuracy", float("nan"), "target-accuracy = NaN: allowed is a finite number > 0 and ≤ 1"),
        ("learning-rate", float("inf"), "learning-rate = Infinity: allowed is a finite number > 0"),
        ("weight-decay", float("nan"), "weight-decay = NaN: allowed is a finite number ≥ 0"),
        ("timeout", 0, "timeout = 0: allowed is a finite number > 0"),
        ("width", 0, "width = 0: allowed is a finite number > 0"),
        ("norm", "layer", 'norm = "layer": allowed is "batch" or "group"'),
        (
            "init",
            "he",
            'init = "he": allowed is "default", "kaiming-normal", "kaiming-uniform", "xavier-normal", "xavier-uniform" '
            'or "orthogonal"',
        ),
        ("initial-model-sha256", "abc", 'initial-model-sha256 = "abc": allowed is 64 hexadecimal digits, or empty'),
        ("batch-norm", "fedbn", 'batch-norm = "fedbn": allowed is "aggregate", "local" or "local-statistics"'),
        ("engine", "spark", 'engine = "spark": allowed is "ray" or "inprocess"'),
        ("wsa", 3, "wsa = 3: allowed is a section with keys of its own"),
        ("wsa", {"strength": -1}, "wsa.strength = -1: allowed is a finite number ≥ 0"),
        (
            "wsa",
            {"variance": "sum"},
            'wsa.variance = "sum": allowed is "mean", "mixture", "independent" or "merged"',
        ),
        ("np-merge", {"align": 1}, "np-merge.align = 1: allowed is true or false"),
        (
            "name",
            "a/b",
            'name = "a/b": allowed is up to 80 letters, digits, dots, hyphens and underscores, '
            "the first a letter or digit",
        ),
        ("name", ".hidden", None),
        ("name", "a" * 81, None),
    ],
)
def test_wrong_value(key: str, value: Any, line: str | None) -> None:
    said = problems(**{key: value})
    assert len(said) == 1
    if line is not None:
        assert said == [line]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"cohort": 21}, "cohort = 21: allowed is at most num-clients = 20"),
        ({"evaluation-cohort": 21}, "evaluation-cohort = 21: allowed is at most num-clients = 20"),
        (
            {"server-samples": 0},
            "server-samples = 0: np-merge learns on the server's split; allowed with it is a whole number ≥ 1",
        ),
        (
            {"validation-fraction": 0},
            "validation-fraction = 0: clients evaluate on it; allowed is > 0, or evaluation-cohort = 0",
        ),
        (
            {"min-size": 1},
            "min-size = 1: a client trains on one sample and evaluates on another; "
            "allowed is a whole number ≥ 2, or evaluation-cohort = 0",
        ),
        (
            {"initial-model": "a.safetensors", "init": "orthogonal"},
            'init = "orthogonal": with an initial-model it means nothing; allowed is "default"',
        ),
        (
            {"initial-model-sha256": "0" * 64},
            "initial-model-sha256: without an initial-model it means nothing; allowed is empty",
        ),
        ({"min-replies": 11}, "min-replies = 11: allowed is at most cohort = 10"),
        (
            {"engine": "inprocess", "gpus-per-client": 0.5},
            'gpus-per-client: with engine = "inprocess" it means nothing; allowed is engine = "ray"',
        ),
        (
            {"engine": "inprocess", "ray-address": "auto"},
            'ray-address: with engine = "inprocess" it means nothing; allowed is engine = "ray"',
        ),
        (
            {"partition-sha256": "0" * 64},
            "partition-sha256: without a partition-file it means nothing; allowed is empty",
        ),
        (
            {"shift-strength": 0.5},
            "shift-strength = 0.5: without a feature-shift it means nothing; allowed is 0.1",
        ),
        (
            {"wsa": {"mode": "proximal", "divergence": "reverse-kl"}},
            'wsa.divergence = "reverse-kl": has no proximal map; allowed is wsa.mode = "loss", or another one',
        ),
        (
            {"wsa": {"schedule": "first-k-rounds"}},
            'wsa.schedule-rounds = 0: allowed with wsa.schedule = "first-k-rounds" is > 0',
        ),
        ({"wsa": {"schedule-rounds": 3}}, 'wsa.schedule-rounds = 3: allowed with wsa.schedule = "constant" is 0'),
        ({"wsa": {"schedule": "relative"}}, 'wsa.share = 0: allowed with wsa.schedule = "relative" is > 0'),
        ({"wsa": {"share": 0.1}}, 'wsa.share = 0.1: allowed with wsa.schedule = "constant" is 0'),
        ({"wsa": {"target": "gaussian"}}, 'wsa.target-std = 0: allowed with wsa.target = "gaussian" is > 0'),
        ({"wsa": {"target-std": 0.1}}, 'wsa.target-std = 0.1: allowed with wsa.target = "fused" is 0'),
        ({"wsa": {"target-mean": 0.1}}, 'wsa.target-mean = 0.1: allowed with wsa.target = "fused" is 0'),
        (
            {"wsa": {"target-momentum": 0.5, "target": "initial"}},
            'wsa.target-momentum = 0.5: allowed with wsa.target = "initial" is 0',
        ),
        ({"seed": [1, 1]}, "seed = [1, 1]: allowed are values that differ from each other"),
        (
            {"strategies": ["fedavg", "fedavg"]},
            'strategies = ["fedavg", "fedavg"]: allowed are values that differ from each other',
        ),
        (
            {"alpha": [0.1, 0.10000001]},
            "alpha = [0.1, 0.10000001]: allowed are values that differ from each other in their first six digits",
        ),
    ],
)
def test_impossible_together(values: dict[str, Any], line: str) -> None:
    assert problems(**values) == [line]


@pytest.mark.parametrize(
    "values",
    [
        {"server-samples": 0, "strategies": "fedavg"},
        {"validation-fraction": 0, "evaluation-cohort": 0},
        {"min-size": 1, "evaluation-cohort": 0},
        {"cohort": 20, "evaluation-cohort": 20},
        {"feature-shift": "noise", "shift-strength": 0.5},
        {"wsa": {"schedule": "linear-decay", "schedule-rounds": 3, "divergence": "reverse-kl"}},
        {"wsa": {"schedule": "relative", "share": 0.1, "mode": "proximal", "divergence": "wasserstein"}},
        {"wsa": {"target": "gaussian", "target-std": 0.1, "target-mean": -0.1, "granularity": "channel"}},
        {"wsa": {"target-momentum": 0.5, "granularity": "model"}},
    ],
)
def test_possible_together(values: dict[str, Any]) -> None:
    config.parse(values)


def test_unknown_key_names_the_nearest_and_all() -> None:
    (line,) = problems(cohrt=3)
    assert line.startswith("cohrt: unknown key; did you mean cohort? allowed are name, strategies, data, ")
    assert line.endswith(", runs-dir, out-dir")
    assert set(line.partition("allowed are ")[2].split(", ")) == set(tomllib.loads(Config().to_toml()))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("strength", "wsa.strength"), ("learning_rte", "learning-rate"), ("epochs", "local-epochs")],
)
def test_nearest_key(key: str, nearest: str) -> None:
    (line,) = problems(**{key: 3})
    assert f": unknown key; did you mean {nearest}? allowed are " in line


def test_unknown_key_of_a_section() -> None:
    assert problems(np_merge={"learning-rte": 1}) == [
        "np-merge.learning-rte: unknown key; did you mean np-merge.learning-rate? "
        "allowed are np-merge.steps, np-merge.learning-rate, np-merge.batch-size, np-merge.align"
    ]
    assert problems(wsa={"zzzz": 1}) == [
        "wsa.zzzz: unknown key; allowed are wsa.strength, wsa.mode, wsa.reduction, wsa.divergence, wsa.granularity, "
        "wsa.layers, wsa.schedule, wsa.schedule-rounds, wsa.share, wsa.target, wsa.target-mean, wsa.target-std, "
        "wsa.target-momentum, wsa.variance"
    ]


@pytest.mark.parametrize(("key", "said"), [("", '""'), ("wsa.", '"wsa."')])
def test_a_key_without_a_name(key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_run_config({key: 5})
    assert str(caught.value) == f"{said} = 5: the key is missing; allowed is key = value"


def test_all_problems_are_said_at_once() -> None:
    said = problems(rounds=0, alpha=[-1, 2], wsa={"strength": -1, "mode": "x"}, cohort=30, seed=[3, 3], zzzz=1)
    assert [line.partition(":")[0] for line in said] == [
        "alpha = -1",
        "rounds = 0",
        "wsa.strength = -1",
        'wsa.mode = "x"',
        "zzzz",
        "cohort = 30",
        "seed = [3, 3]",
    ]


def test_what_follows_from_a_wrong_value_is_not_said() -> None:
    """Which cohorts are possible is unknown as long as the number of clients is."""
    assert problems(num_clients=0, cohort=30) == ["num-clients = 0: allowed is a whole number ≥ 1 and ≤ 1000000"]


def test_underscores_count_as_hyphens() -> None:
    values = {"num_clients": 30, "np_merge": {"learning_rate": 0.5}}
    assert config.parse(values) == Config(num_clients=30, np_merge=NPMergeConfig(learning_rate=0.5))


def test_both_spellings_of_a_key() -> None:
    line = "given twice, with a hyphen and with an underscore; allowed is one of the two"
    with pytest.raises(ConfigError, match=f"^num-clients: {line}$"):
        config.parse({"num-clients": 3, "num_clients": 3})
    with pytest.raises(ConfigError, match=f"^learning-rate: {line}$"):
        config.parse({"np-merge": {"learning-rate": 1, "learning_rate": 1}})


def test_assign_takes_either_spelling_and_the_last_counts() -> None:
    values: dict[str, Any] = {"num-clients": 3, "np-merge": {"steps": 1}}
    config.assign(values, "num_clients", 4)
    config.assign(values, "np_merge.learning_rate", 0.5)
    assert values == {"num-clients": 4, "np-merge": {"steps": 1, "learning-rate": 0.5}}


def test_assign_into_a_value() -> None:
    with pytest.raises(ConfigError, match=r"^wsa.strength: wsa is given as a single value too; allowed is one of"):
        config.assign({"wsa": 3}, "wsa.strength", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rounds = \nname = 'a'", "not valid TOML: .*line 1"),
        (b"rounds = 1\nname = a\n", "not valid TOML: .*line 2"),
        (b"name = '\xff'", "not a text file in UTF-8: .*position 8"),
    ],
)
def test_unreadable_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        config.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        config.read(tmp_path / "config.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        config.read(tmp_path)


def test_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().rounds = 3
