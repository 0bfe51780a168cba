"""The reference against the authors' own numbers, and against an independent fp64 solution."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.nn import functional

from clex_kernels import reference
from clex_kernels.config import ClexConfig

GOLDEN = Path(__file__).parent / "golden"
FREQUENCIES = ["frequencies_tanh_d128", "frequencies_silu_d64", "frequencies_mixtral_base"]
TRAINING = ["training_tanh_d64", "training_silu_d128"]
LENGTHS = [8, 16, 17, 40, 64]


def load(name: str) -> tuple[SimpleNamespace, dict[str, Tensor]]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "spec"}
        return SimpleNamespace(**json.loads(str(file["spec"]))), arrays


def config_of(spec: SimpleNamespace) -> ClexConfig:
    return ClexConfig(
        head_dim=spec.head_dim,
        train_length=spec.train_length,
        max_factor=spec.max_factor,
        rope_base=spec.rope_base,
        ntk_base=spec.ntk_base,
        hidden_factor=spec.param_factor,
        activation=spec.act,
        step_size=spec.time_dt,
    )


def llama_step(spec, weights: dict[str, Tensor], ids: Tensor, config: ClexConfig, cache: list) -> Tensor:
    """Logits [B, L, vocabulary] of new tokens over an unrotated cache; one length factor, that of all tokens so far."""
    heads, groups = spec.num_attention_heads, spec.num_key_value_heads
    past = cache[0][0].shape[1] if cache else 0
    length = past + ids.shape[1]
    up, down = (weights[f"model.clex_layer.proj_func.ode_{side}_proj"] for side in ("up", "down"))
    freq = reference.frequencies(up, down, torch.tensor([config.length_factor(length)]), config)[0]
    cos, sin = reference.tables(freq, torch.arange(length))
    mask = reference.visible(ids.shape[1], length, is_causal=True)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.rms_norm_eps) * weights[f"{name}.weight"]

    def project(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}_proj.weight"])

    x = weights["model.embed_tokens.weight"][ids]
    for n in range(spec.num_hidden_layers):
        layer = f"model.layers.{n}"
        hidden = norm(x, f"{layer}.input_layernorm")
        q = project(hidden, f"{layer}.self_attn.q").unflatten(-1, (heads, -1))
        k, v = (project(hidden, f"{layer}.self_attn.{name}").unflatten(-1, (groups, -1)) for name in ("k", "v"))
        if len(cache) == n:
            cache.append((k, v))
        else:
            cache[n] = k, v = tuple(torch.cat(pair, dim=1) for pair in zip(cache[n], (k, v), strict=True))
        q, k = reference.rotary(q, cos[past:], sin[past:]), reference.rotary(k, cos, sin)
        out, _ = reference.attention(q, k, v, mask)
        x = x + project(out.flatten(2), f"{layer}.self_attn.o")
        hidden = norm(x, f"{layer}.post_attention_layernorm")
        gate, up_stream = (project(hidden, f"{layer}.mlp.{name}") for name in ("gate", "up"))
        x = x + project(functional.silu(gate) * up_stream, f"{layer}.mlp.down")
    return functional.linear(norm(x, "model.norm"), weights["lm_head.weight"])


def llama(dtype: torch.dtype = torch.float32) -> tuple:
    spec, arrays = load("llama_gqa")
    weights = {name[2:]: value.to(dtype) for name, value in arrays.items() if name.startswith("w:")}
    config = ClexConfig.from_transformers({**vars(spec), "max_position_embeddings": spec.train_length})
    return spec, weights, arrays, config


def exact_frequencies(up: Tensor, down: Tensor, times: Tensor, config: ClexConfig) -> Tensor:
    """fp64 frequencies [T, R] by scipy at 1e-13, written independently of the package."""
    up, down, i, pairs = up.double().numpy(), down.double().numpy(), np.arange(config.pairs), config.pairs
    activation = np.tanh if config.activation == "tanh" else lambda x: x / (1 + np.exp(-x))

    def slope(t: float, z: np.ndarray) -> np.ndarray:
        alpha = 2 * t - 1
        ntk = -i / pairs * np.log(config.ntk_base) - i / (pairs - 1) * np.log(alpha)
        return activation((z + ntk) @ up) @ down - 2 * i / (pairs - 1) / alpha

    start = -i / pairs * np.log(config.rope_base)
    solved = solve_ivp(slope, (1, times.max()), start, method="DOP853", rtol=1e-13, atol=1e-13, t_eval=times.numpy())
    return torch.from_numpy(np.exp(solved.y.T))


def largest(x: Tensor) -> float:
    return x.double().abs().max().item()


@pytest.mark.parametrize("name", FREQUENCIES)
def test_frequencies_are_the_authors(name):
    spec, golden = load(name)
    config = config_of(spec)
    up, down, times = golden["ode_up_proj"], golden["ode_down_proj"], torch.arange(1.0, config.max_factor + 1)
    truth = exact_frequencies(up, down, times.double(), config)
    # the authors' own fp32 error: two fp32 runs that order their sums differently may be this far apart.
    theirs = largest(golden["frequencies"] / truth - 1)
    in_fp32 = reference.frequencies(up, down, times, config)
    assert largest(in_fp32 / golden["frequencies"] - 1) <= theirs < 5e-5
    # what is left in fp64 is the truncation error of rk4, of fourth order in step_size.
    in_fp64 = reference.frequencies(up.double(), down.double(), times, config)
    assert largest(in_fp64 / truth - 1) <= 2e-10 * (config.step_size / 0.01) ** 4 < theirs / 10


@pytest.mark.parametrize("name", TRAINING)
def test_training_tables_loss_and_gradients_are_the_authors(name):
    spec, golden = load(name)
    results = {}
    for dtype in (torch.float32, torch.float64):
        up, down = (golden[f"ode_{side}_proj"].clone().to(dtype).requires_grad_() for side in ("up", "down"))
        freq = reference.frequencies(up, down, torch.tensor([spec.t]), config_of(spec))[0]
        cos, sin = reference.tables(freq, golden["positions"])
        loss = (cos * golden["loss_weight_cos"]).double().sum() + (sin * golden["loss_weight_sin"]).double().sum()
        loss.backward()
        results[dtype] = (cos, sin, loss, up.grad, down.grad)
    names = ("cos", "sin", "loss", "grad_ode_up_proj", "grad_ode_down_proj")
    for key, in_fp32, in_fp64 in zip(names, results[torch.float32], results[torch.float64], strict=True):
        theirs, size = golden[key], largest(golden[key])
        # their distance from fp64: fp32 angles at hundreds of positions, and fp32 frequencies. The loss is one number,
        # whose rounding may happen to cancel, so it gets 1e-5 of slack.
        rounding = largest(theirs - in_fp64) + (1e-5 * size if key == "loss" else 0.0)
        assert largest(theirs - in_fp32) <= rounding <= 5e-4 * max(size, 1.0), key


@pytest.mark.parametrize("name", TRAINING)
def test_sampled_positions_follow_the_authors_law(name):
    spec, golden = load(name)
    ours = reference.sample_positions(spec.seq_len, spec.t, spec.train_length, torch.Generator().manual_seed(0))
    for positions in (golden["positions"].double(), ours):
        assert positions.shape == (spec.seq_len,)
        assert positions[0] == 0
        assert positions[-1] == spec.seq_len * spec.t - 1
        assert torch.equal(positions, positions.round())
        assert positions.diff().min() >= 1


def test_sampled_positions_of_long_sequences_are_divided_by_whole_train_lengths():
    positions = reference.sample_positions(25, 2.0, train_length=10)
    assert positions[-1] == (25 * 2 - 1) / 2
    assert torch.equal(positions * 2, (positions * 2).round())
    assert reference.sample_positions(1, 4.0, 10).tolist() == [0.0]


# fp32 logits of a two-layer model, of size 2.5: a hundred roundings of 2^-24 at most.
LOGITS_TOLERANCE = 1e-5


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_logits_are_the_authors(length):
    spec, weights, golden, config = llama()
    logits = llama_step(spec, weights, golden["input_ids"][:, :length], config, [])
    assert largest(logits - golden[f"logits_prefill_{length}"]) <= LOGITS_TOLERANCE


def test_decode_logits_over_an_unrotated_cache_are_the_authors():
    spec, weights, golden, config = llama()
    cache = []
    steps = [llama_step(spec, weights, ids, config, cache) for ids in golden["input_ids"].split(1, dim=1)]
    assert largest(torch.cat(steps, dim=1) - golden["logits_decode"]) <= LOGITS_TOLERANCE


def test_times_in_any_order_solve_as_they_do_alone():
    config = ClexConfig(head_dim=16, train_length=64, activation="silu")
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(8, 16, generator=generator, dtype=torch.float64) / 4
    down = torch.randn(16, 8, generator=generator, dtype=torch.float64) / 40
    times = torch.tensor([3.137, 1.0, 7.5, 3.137, 1.0041], dtype=torch.float64)
    freq = reference.frequencies(up, down, times, config)
    order = times.unique()
    truth = exact_frequencies(up, down, order, config)[torch.searchsorted(order, times)]
    assert largest(freq / truth - 1) < 1e-8
    assert torch.equal(freq[0], freq[3])
    assert torch.equal(freq[1], torch.exp(reference.plain_log_frequencies(config, torch.float64)))


def test_without_the_ode_it_is_ntk_aware_scaling():
    config = ClexConfig(head_dim=16, train_length=64, rope_base=5e5)
    up, down = torch.randn(8, 16, dtype=torch.float64), torch.zeros(16, 8, dtype=torch.float64)
    freq = reference.frequencies(up, down, torch.tensor([4.0], dtype=torch.float64), config)[0]
    base = config.rope_base * 7.0 ** (8 / 7)
    assert largest(freq * base ** (torch.arange(8.0, dtype=torch.float64) / 8) - 1) < 1e-8


def test_rotation_depends_on_distance_alone_and_leaves_the_other_channels():
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 1, 1, 1, 10, generator=generator, dtype=torch.float64)
    freq = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)

    def product(p: int, r: int) -> Tensor:
        cos, sin = reference.tables(freq, torch.tensor([p, r]))
        a, b = reference.rotary(x, cos[:1], sin[:1]), reference.rotary(y, cos[1:], sin[1:])
        assert torch.equal(a[..., 6:], x[..., 6:])
        return (a * b).sum()

    torch.testing.assert_close(product(12, 5), product(1007, 1000), rtol=1e-12, atol=1e-12)
    assert abs(product(12, 5) - product(12, 6)) > 1e-3
    doubled = reference.tables(freq, torch.arange(3), amplitude=2.0)[0]
    assert torch.equal(doubled, 2 * reference.tables(freq, torch.arange(3))[0])


def test_attention_is_scaled_dot_product_attention():
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 5, 6, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 7, 3, 8, generator=generator, dtype=torch.float64)
    mask = reference.visible(5, 7, is_causal=True, window=3)
    out, lse = reference.attention(q, k, v, mask, scale=0.3)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    theirs = functional.scaled_dot_product_attention(*heads_first, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, theirs.transpose(1, 2))
    assert lse.shape == (2, 6, 5)


def test_attention_agrees_with_a_loop_over_visible_keys():
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 9, 1, 4, generator=generator, dtype=torch.float64)
    start, end, window, cap = torch.tensor([2, 0]), torch.tensor([7, 9]), 2, 1.5
    config = ClexConfig(head_dim=4, train_length=3, log_scale=True)
    factor = reference.log_factor(end - start, config)
    # slots outside [start, end) hold what a cache leaves there.
    v[0, 7:], v[0, :2], k[0, 7:] = math.nan, math.nan, math.nan
    mask = reference.visible(3, 9, is_causal=True, window=window, kv_start=start, kv_end=end)
    out, lse = reference.attention(q, k, v, mask, softcap=cap, query_factor=factor)
    for b in range(2):
        for i in range(3):
            at = int(end[b]) - 3 + i
            keys = range(max(at - window + 1, int(start[b])), at + 1)
            scores = torch.stack([q[b, i] @ k[b, j, 0] * math.log(end[b] - start[b]) / math.log(3) / 2 for j in keys])
            scores = cap * torch.tanh(scores / cap)
            weights = scores.softmax(dim=0)
            wanted = sum(weights[n, :, None] * v[b, j, 0] for n, j in enumerate(keys))
            torch.testing.assert_close(out[b, i], wanted)
            torch.testing.assert_close(lse[b, :, i], scores.logsumexp(dim=0))


def test_a_query_without_keys_gives_zeros_and_minus_infinity():
    q, k = torch.ones(1, 3, 1, 4), torch.ones(1, 2, 1, 4)
    out, lse = reference.attention(q, k, k, reference.visible(3, 2, is_causal=True))
    assert out[0, 0].abs().max() == 0
    assert lse[0, 0, 0] == -math.inf
    assert (out[0, 1:] == 1).all()


def test_blocks_of_keys_merge_by_their_offsets_and_lse():
    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(3, 1, 6, 2, 4, generator=generator, dtype=torch.float64)
    whole, _ = reference.attention(q, k, v, reference.visible(6, 6, is_causal=True))
    masks = (reference.visible(6, 3, is_causal=True, q_offset=0, k_offset=offset) for offset in (0, 3))
    parts = [
        reference.attention(q, k[:, at], v[:, at], mask)
        for at, mask in zip((slice(0, 3), slice(3, 6)), masks, strict=True)
    ]
    share = torch.stack([lse for _, lse in parts]).softmax(dim=0).transpose(2, 3).unsqueeze(-1)
    torch.testing.assert_close(sum(s * out for s, (out, _) in zip(share, parts, strict=True)), whole)


def test_the_log_factor_is_one_by_default_and_at_least_one_when_clamped():
    config = ClexConfig(head_dim=4, train_length=16)
    lengths = torch.tensor([4, 16, 256])
    assert reference.log_factor(lengths, config).tolist() == [1, 1, 1]
    assert reference.log_factor(lengths, replace(config, log_scale=True)).tolist() == pytest.approx([0.5, 1, 2])
    assert reference.log_factor(lengths, replace(config, log_scale="clamped")).tolist() == pytest.approx([1, 1, 2])
