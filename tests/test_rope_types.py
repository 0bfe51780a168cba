"""Frequencies and amplitudes of transformers' RoPE types by length: against transformers', and exact."""

import math

import mpmath
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
from transformers_models import exact_rope

from clex_kernels.integrations.rope_types import ROPE_TYPES, RopeFrequencies
from clex_kernels.tables import RotaryTableStack

TRAINED, LONGEST, HEAD_DIM = 64, 512, 32
PAIRS = HEAD_DIM // 2
SHORT = [1.0 + i / 40 for i in range(PAIRS)]
LONG = [1.5 + i for i in range(PAIRS)]
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": TRAINED}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": TRAINED,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": TRAINED,
    "short_factor": SHORT,
    "long_factor": LONG,
}
# at 3/4 of 24 channels R = 9.
PARTIAL = {"partial_rotary_factor": 0.75}
CASES = {
    "default": {"rope_type": "default"},
    "default, base": {"rope_type": "default", "rope_theta": 5e5},
    "default, partial": {"rope_type": "default", **PARTIAL},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear, factor below 1": {"rope_type": "linear", "factor": 0.75},
    "linear, partial": {"rope_type": "linear", "factor": 3, **PARTIAL},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "dynamic, factor 1": {"rope_type": "dynamic", "factor": 1.0},
    "dynamic, base, partial": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 500.0, **PARTIAL},
    "yarn": YARN,
    "yarn, partial": YARN | PARTIAL,
    "yarn, factor from lengths": YARN | {"factor": None},
    "yarn, factor below 1": YARN | {"factor": 0.5},
    "yarn, betas": YARN | {"beta_fast": 4.0, "beta_slow": 0.1},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, one-sided ramp": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "yarn, attention_factor": YARN | {"attention_factor": 0.7},
    "yarn, mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 0.3},
    "yarn, mscale without the other": YARN | {"mscale": 0.707},
    "yarn, mscale 0": YARN | {"mscale": 1.0, "mscale_all_dim": 0},
    "llama3": LLAMA3,
    "llama3, partial": LLAMA3 | PARTIAL,
    "llama3, base": LLAMA3 | {"rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 0.2},
    "longrope": LONGROPE | {"factor": 8.0},
    "longrope, factor from lengths": LONGROPE,
    "longrope, factor 1": LONGROPE | {"factor": 1.0},
    "longrope, attention_factor": LONGROPE | {"attention_factor": 1.3},
    "longrope, partial": LONGROPE | {"short_factor": SHORT[:9], "long_factor": LONG[:9], **PARTIAL},
}
# before, at and past both lengths, and far past.
LENGTHS = [1, TRAINED, TRAINED + 1, LONGEST, LONGEST + 1, 700, 4000]


def make_config(parameters: dict[str, object], **sizes: object) -> LlamaConfig:
    head_dim = 24 if "partial_rotary_factor" in parameters else HEAD_DIM
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "max_position_embeddings": LONGEST, **sizes}
    return LlamaConfig(head_dim=head_dim, rope_parameters={"rope_theta": 10000.0, **parameters}, **sizes)


def rows_of(stack: RotaryTableStack, batch: int) -> tuple[Tensor, list[float]]:
    """Frequencies [B, R] and amplitudes of the sequences that a stack serves."""
    index = stack.index
    if index is None:
        index = torch.arange(batch) if len(stack.freq) > 1 else torch.zeros(batch, dtype=torch.int64)
    amplitude = torch.as_tensor(stack.amplitude, dtype=torch.float64).expand(len(stack.freq))
    return stack.freq[index], amplitude[index].tolist()


def theirs(config: LlamaConfig, length: int) -> tuple[Tensor, float]:
    """Frequencies [R] and amplitude by transformers, in fp32."""
    kind = config.rope_parameters["rope_type"]
    compute = PhiRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    return compute(config, "cpu", seq_len=length)


@pytest.mark.parametrize("parameters", CASES.values(), ids=CASES)
def test_every_length_gets_the_frequencies_of_transformers(parameters: dict[str, object]):
    config = make_config(parameters)
    rope = RopeFrequencies(config, torch.float64)
    together = rows_of(rope.at(torch.tensor(LENGTHS), max(LENGTHS)), len(LENGTHS))
    for length, freq, amplitude in zip(LENGTHS, *together, strict=True):
        stock, stock_amplitude = theirs(config, length)
        torch.testing.assert_close(freq.float(), stock, rtol=2e-6, atol=0.0)
        assert amplitude == pytest.approx(stock_amplitude, rel=1e-12)
        exact, exact_amplitude = exact_rope(config, length)
        torch.testing.assert_close(freq, exact, rtol=1e-13, atol=0.0)
        assert amplitude == pytest.approx(exact_amplitude, rel=1e-14)
        # alone as in company.
        alone, amplitudes = rows_of(rope.at(torch.tensor([length]), length), 1)
        assert torch.equal(alone[0], freq)
        assert amplitudes == [amplitude]


def test_every_type_of_the_package_is_tested():
    assert {case["rope_type"] for case in CASES.values()} == set(ROPE_TYPES)


def test_frequencies_are_right_to_the_last_digits():
    """Pair by pair in 40 digits, for the types whose formula is short."""
    length, factor, rounded = 4000, 4, {}
    with mpmath.workdps(40):
        plain = [mpmath.mpf(10000) ** (mpmath.mpf(-i) / PAIRS) for i in range(PAIRS)]
        alpha = mpmath.mpf(factor) * length / LONGEST - (factor - 1)
        rounded["dynamic"] = [f * alpha ** (mpmath.mpf(-i) / (PAIRS - 1)) for i, f in enumerate(plain)]
        rounded["linear"] = [f / factor for f in plain]
        rounded["longrope"] = [f / mpmath.mpf(by) for f, by in zip(plain, LONG, strict=True)]
        amplitude = mpmath.sqrt(1 + mpmath.log(8) / mpmath.log(TRAINED))
    for kind, expected in rounded.items():
        freq, amplitudes = rows_of(RopeFrequencies(make_config(CASES[kind])).at(torch.tensor([length]), length), 1)
        expected = torch.tensor([float(f) for f in expected], dtype=torch.float64)
        torch.testing.assert_close(freq[0], expected, rtol=4e-15, atol=0.0)
        assert amplitudes == [pytest.approx(float(amplitude) if kind == "longrope" else 1.0, rel=1e-15)]


def cosines(stack: RotaryTableStack, row: int, position: int) -> Tensor:
    """[2, R] of one sequence at a position, from its table."""
    table = row if stack.index is None else int(stack.index[row])
    c0, s0 = stack.coarse[table, position // stack.tile].double()
    c1, s1 = stack.fine[table, position % stack.tile].double()
    return torch.stack((c0 * c1 - s0 * s1, s0 * c1 + c0 * s1))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 4e-7), (torch.float64, 1e-13)], ids=["fp32", "fp64"])
def test_tables_of_mixed_lengths_have_each_sequences_frequencies_and_amplitude(kind, dtype, bound):
    config, lengths = make_config(CASES[kind]), [600, 3, 64, 65, 512, 513]
    stack = RopeFrequencies(config, dtype).at(torch.tensor(lengths), 600)
    assert stack.dtype == dtype
    assert stack.length >= 600
    for row, length in enumerate(lengths):
        freq, amplitude = exact_rope(config, length)
        for position in (0, 1, length - 1, 599):
            expected = amplitude * torch.stack(((position * freq).cos(), (position * freq).sin()))
            assert (cosines(stack, row, position) - expected).abs().max() < bound


def test_each_set_of_phimoe_has_an_amplitude_of_its_own():
    config = make_config(LONGROPE | {"short_mscale": 1.25, "long_mscale": 1.5, "attention_factor": 1.1})
    assert rows_of(RopeFrequencies(config).at(torch.tensor([65, 64]), 65), 2)[1] == [1.1, 1.1]
    config.model_type = "phimoe"
    assert rows_of(RopeFrequencies(config).at(torch.tensor([65, 64]), 65), 2)[1] == [1.5, 1.25]
    del config.rope_parameters["long_mscale"]
    with pytest.raises(ValueError, match=r"rope_parameters\['long_mscale'\]: expected a finite number > 0, got None"):
        RopeFrequencies(config)
    config.rope_parameters["rope_type"] = "linear"
    with pytest.raises(ValueError, match="expected rope_type default or longrope for PhiMoE, got 'linear'"):
        RopeFrequencies(config)


STATES = {
    "dynamic": (True, [512, 512, 512, 512, 513, 700, 4000]),
    "longrope": (True, [0, 0, 1, 1, 1, 1, 1]),
    "yarn": (False, [0] * 7),
    "default": (False, [0] * 7),
}


@pytest.mark.parametrize(("kind", "moves", "states"), [(kind, *rest) for kind, rest in STATES.items()], ids=STATES)
def test_states_are_equal_where_frequencies_are(kind, moves, states):
    rope = RopeFrequencies(make_config(CASES[kind]), torch.float64)
    assert rope.moves is moves
    state = rope.state(torch.tensor(LENGTHS, dtype=torch.int32))
    assert state.dtype == torch.int64
    assert state.tolist() == states
    freq, amplitudes = rows_of(rope.at(torch.tensor(LENGTHS), 1), len(LENGTHS))
    for first in range(len(LENGTHS)):
        for second in range(first):
            same = torch.equal(freq[first], freq[second]) and amplitudes[first] == amplitudes[second]
            assert same == (states[first] == states[second])


def test_fixed_tables_are_kept_and_grow():
    rope = RopeFrequencies(make_config(CASES["longrope"]))
    first = rope.at(torch.tensor([3]), 3)
    assert first.length == LONGEST
    assert rope.at(torch.tensor([400]), LONGEST).coarse is first.coarse
    grown = rope.at(torch.tensor([600]), LONGEST + 1)
    assert grown.length == 1024
    assert torch.equal(grown.coarse[:, : LONGEST // grown.tile], first.coarse)
    assert rope.at(torch.tensor([3]), 3).coarse is grown.coarse


def test_dynamic_tables_follow_every_length():
    rope = RopeFrequencies(make_config(CASES["dynamic"]))
    freq = [rope.at(torch.tensor([length]), length).freq for length in (512, 513, 514, 512)]
    assert not torch.equal(freq[1], freq[2])
    assert torch.equal(freq[3], freq[0])


def changed(kind: str, **changes: object) -> LlamaConfig:
    """A configuration whose parameters were changed, or dropped (by ...), after transformers' own checks."""
    config = make_config(CASES[kind])
    parameters = {**config.rope_parameters, **changes}
    config.rope_parameters = {name: value for name, value in parameters.items() if value is not ...}
    return config


def replaced(parameters: object, **sizes: object) -> LlamaConfig:
    config = make_config(CASES["default"], **sizes)
    config.rope_parameters = parameters
    return config


NESTED = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}
ONE = "rope_parameters: expected one rope_type of default, .* for all layers, got "
BAD = {
    "nested": (replaced(NESTED), ONE + ".*full_attention"),
    "none": (replaced(None), ONE + "{}"),
    "unknown type": (changed("linear", rope_type="proportional"), ONE + "'?proportional"),
    "type clex": (changed("linear", rope_type="clex"), ONE + ".*clex.*; use apply_clex"),
    "no rotary dimension": (
        changed("linear", partial_rotary_factor=0.0),
        r"rope_parameters: expected an even rotary dimension, 2 to D=32, .* got 0",
    ),
    "odd rotary dimension": (changed("linear", partial_rotary_factor=0.22), "an even rotary dimension, .* got 7"),
    "past the head": (changed("linear", partial_rotary_factor=1.25), "an even rotary dimension, .* got 40"),
    "one pair of dynamic": (changed("dynamic", partial_rotary_factor=0.07), "4 to D=32, .*'dynamic', got 2"),
    "high_freq_factor": (changed("llama3", high_freq_factor=1.0), r"\['high_freq_factor'\]: expected more than low_f"),
}
# what each type must have, and of what size.
NUMBERS = {
    "default": {"rope_theta": (..., None, 1.0, -5.0, math.nan)},
    "linear": {"factor": (..., None, 0, -2.0, math.inf, "4", True)},
    "dynamic": {"factor": (..., 0, "4"), "rope_theta": ("1e4",)},
    "yarn": {
        "factor": (0, -1.0, "8"),
        "original_max_position_embeddings": (1, 0, -64),
        "attention_factor": (0.0, -1.0, "1"),
        "beta_fast": (0, -1.0),
        "beta_slow": (math.nan,),
        "rope_theta": (1.0,),
    },
    "yarn, mscale": {"mscale": (-0.5, "1"), "mscale_all_dim": (-1.0,)},
    "llama3": {"factor": (..., 0), "low_freq_factor": (..., 0.0), "high_freq_factor": (..., math.inf)},
    "longrope": {
        "factor": (0, "8"),
        "original_max_position_embeddings": (1,),
        "attention_factor": (0,),
        "short_factor": (..., SHORT[:-1], "1" * PAIRS, [0.0, *SHORT[1:]]),
        "long_factor": (None, 4.0, [*LONG, 1.0], [math.nan, *LONG[1:]], ["1", *LONG[1:]]),
    },
}


@pytest.mark.parametrize(("config", "message"), BAD.values(), ids=BAD)
def test_types_that_do_not_fit_are_named(config: LlamaConfig, message: str):
    with pytest.raises(ValueError, match=message):
        RopeFrequencies(config)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in NUMBERS.items() for name in names])
def test_bad_parameters_are_named(kind: str, name: str):
    for value in NUMBERS[kind][name]:
        config = changed(kind, **{name: value})
        with pytest.raises(ValueError, match=rf"rope_parameters\['{name}'\]: expected .*, got"):
            RopeFrequencies(config)
