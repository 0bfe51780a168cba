import math
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest
from transformers import LlamaConfig

from clex_kernels.config import ClexConfig

AUTHORS = {"type": "clex", "max_factor": 16, "param_factor": 2, "act": "tanh", "time_dt": 0.05, "factor": 1}
MODEL = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096, "rope_scaling": AUTHORS}


def test_defaults_are_the_authors():
    config = ClexConfig(head_dim=128, train_length=4096)
    assert asdict(config) == {
        "head_dim": 128,
        "train_length": 4096,
        "max_factor": 16,
        "rotary_dim": 128,
        "rope_base": 10000.0,
        "ntk_base": 10000.0,
        "hidden_factor": 1,
        "activation": "tanh",
        "step_size": 0.01,
        "scale_policy": "integer",
        "log_scale": False,
    }
    assert (config.pairs, config.hidden_size) == (64, 128)


def test_sizes_follow_the_rotary_dim():
    config = ClexConfig(head_dim=80, train_length=2048, rotary_dim=32, hidden_factor=3)
    assert (config.pairs, config.hidden_size) == (16, 96)


def test_numbers_of_any_kind_are_stored_as_plain_ones():
    config = ClexConfig(head_dim=np.int64(8), train_length=16, rope_base=500000)
    assert config == ClexConfig(head_dim=8, train_length=16, rope_base=5e5)
    assert type(config.head_dim) is int
    assert type(config.rope_base) is float
    assert hash(config) == hash(replace(config))


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        ClexConfig(head_dim=8, train_length=16).head_dim = 4


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("head_dim", 0, ValueError),
        ("head_dim", 128.0, TypeError),
        ("head_dim", True, TypeError),
        ("train_length", -1, ValueError),
        ("train_length", None, TypeError),
        ("max_factor", 0, ValueError),
        ("max_factor", "16", TypeError),
        ("hidden_factor", 0, ValueError),
        ("hidden_factor", 1.5, TypeError),
        ("rotary_dim", 2, ValueError),
        ("rotary_dim", 7, ValueError),
        ("rotary_dim", 18, ValueError),
        ("rotary_dim", 8.0, TypeError),
        ("rope_base", 1.0, ValueError),
        ("rope_base", math.nan, ValueError),
        ("rope_base", math.inf, ValueError),
        ("rope_base", True, TypeError),
        ("rope_base", "10000", TypeError),
        ("ntk_base", -1e4, ValueError),
        ("ntk_base", None, TypeError),
        ("activation", "gelu", ValueError),
        ("activation", None, ValueError),
        ("step_size", 0.0, ValueError),
        ("step_size", math.nan, ValueError),
        ("rope_base", 10**400, ValueError),
        ("max_factor", 2**63, ValueError),
        ("scale_policy", "ceil", ValueError),
        ("log_scale", 1, ValueError),
        ("log_scale", "yes", ValueError),
        ("log_scale", None, ValueError),
    ],
)
def test_bad_fields_are_named(field, value, error):
    with pytest.raises(error, match=f"^{field}: expected .*, got "):
        ClexConfig(**{"head_dim": 16, "train_length": 16, field: value})


def test_an_odd_head_needs_a_rotary_dim():
    with pytest.raises(ValueError, match="rotary_dim: expected an even number from 4 to head_dim = 15, got 15"):
        ClexConfig(head_dim=15, train_length=16)


def test_log_scale_needs_a_logarithm_to_divide_by():
    with pytest.raises(ValueError, match="log_scale"):
        ClexConfig(head_dim=8, train_length=1, log_scale=True)


@pytest.mark.parametrize(
    ("policy", "factors"),
    [
        ("integer", {0: 1.0, 1: 1.0, 10: 1.0, 11: 2.0, 20: 2.0, 21: 3.0, 40: 4.0, 41: 4.0, 10**400: 4.0}),
        ("continuous", {0: 1.0, 1: 1.0, 10: 1.0, 11: 1.1, 25: 2.5, 40: 4.0, 41: 4.0, 10**400: 4.0}),
    ],
)
def test_length_factor_grows_by_policy_and_stays_at_its_ends(policy, factors):
    config = ClexConfig(head_dim=8, train_length=10, max_factor=4, scale_policy=policy)
    assert {length: config.length_factor(length) for length in factors} == factors


@pytest.mark.parametrize(("length", "error"), [(-1, ValueError), (10.0, TypeError), (True, TypeError)])
def test_length_factor_rejects_what_is_no_length(length, error):
    with pytest.raises(error, match="length: expected"):
        ClexConfig(head_dim=8, train_length=10).length_factor(length)


def test_from_transformers_reads_the_authors_dictionary():
    assert ClexConfig.from_transformers(MODEL) == ClexConfig(
        head_dim=16, train_length=4096, max_factor=16, hidden_factor=2, activation="tanh", step_size=0.05
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": 32}, {"head_dim": 32, "rotary_dim": 32}),
        ({"rope_theta": 1e6}, {"rope_base": 1e6, "ntk_base": 10000.0}),
        ({"partial_rotary_factor": 0.5}, {"rotary_dim": 8}),
        ({"head_dim": 96, "rotary_pct": 0.25}, {"rotary_dim": 24}),
        ({"log_scale": True}, {"log_scale": True}),
        ({"original_max_position_embeddings": 1024}, {"train_length": 1024}),
        ({"rope_scaling": {**AUTHORS, "original_max_position_embeddings": 512}}, {"train_length": 512}),
        ({"rope_scaling": {**AUTHORS, "rope_theta": 5e5, "ntk_base": 2e4}}, {"rope_base": 5e5, "ntk_base": 2e4}),
        ({"rope_scaling": {**AUTHORS, "max_factor": 4.0}}, {"max_factor": 4}),
        ({"rope_scaling": None, "rope_parameters": {**AUTHORS, "type": None, "rope_type": "clex"}}, {}),
        ({"rope_scaling": {"type": "clex", "max_factor": 16, "param_factor": 1}}, {"activation": "silu"}),
    ],
    ids=lambda value: ",".join(value) or "-",
)
def test_from_transformers_finds_settings_where_models_keep_them(changes, expected):
    config = asdict(ClexConfig.from_transformers({**MODEL, **changes}))
    assert {name: config[name] for name in expected} == expected


def test_from_transformers_reads_configuration_objects():
    model = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_theta=5e5,
        partial_rotary_factor=0.5,
        rope_scaling=dict(AUTHORS),
    )
    expected = ClexConfig(
        head_dim=16,
        train_length=2048,
        rotary_dim=8,
        rope_base=5e5,
        hidden_factor=2,
        step_size=0.05,
    )
    assert ClexConfig.from_transformers(model) == expected
    assert ClexConfig.from_transformers(model.to_dict()) == expected


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"rope_scaling": None}, ValueError, 'of type "clex", got neither'),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ValueError, 'of type "clex", got .*yarn'),
        ({"rope_scaling": "clex"}, TypeError, "rope_scaling: expected a dictionary, got str"),
        ({"rope_scaling": {"type": "clex"}}, ValueError, "max_factor: expected in the configuration"),
        ({"hidden_size": None}, ValueError, "hidden_size: expected in the configuration"),
        ({"max_position_embeddings": None}, ValueError, "max_position_embeddings: expected in the configuration"),
        ({"partial_rotary_factor": 1.5}, ValueError, "rotary_dim: expected"),
        ({"partial_rotary_factor": "half"}, TypeError, "partial_rotary_factor: expected a number"),
        ({"rope_scaling": {**AUTHORS, "act": "gelu"}}, ValueError, "activation: expected"),
        ({"rope_scaling": {**AUTHORS, "param_factor": 1.5}}, TypeError, "hidden_factor: expected"),
    ],
)
def test_from_transformers_names_what_is_wrong(changes, error, match):
    with pytest.raises(error, match=match):
        ClexConfig.from_transformers({**MODEL, **changes})


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 8), (12, 12), (49, 46), (116, 110), (187, 22)])
def test_settings_survive_the_way_through_a_configuration(head_dim, rotary_dim):
    config = ClexConfig(head_dim, 12, 6, rotary_dim, 500.0, 3000.0, 3, "silu", 0.05, "continuous", "clamped")
    settings = {"head_dim": head_dim, "max_position_embeddings": 72, "rope_parameters": config.to_transformers()}
    assert ClexConfig.from_transformers(settings) == config
