import copy
import io
import math
import pickle
import threading
import warnings

import pytest
import torch
from ropes import CONFIG, CONTINUOUS, make_rope, seeded, solved
from torch import Tensor, nn

from clex_kernels import reference
from clex_kernels.config import ClexConfig
from clex_kernels.modules import ClexRotaryEmbedding
from clex_kernels.tables import RotaryTable, RotaryTableStack


def cosines(table: RotaryTable) -> Tensor:
    """What the factored table holds, position by position [C F, R]."""
    (cos, sin), (fine_cos, fine_sin) = (rows.double().unbind(1) for rows in (table.coarse, table.fine))
    return (cos[:, None] * fine_cos - sin[:, None] * fine_sin).flatten(0, 1)


def test_state_dict_has_the_authors_names_and_their_initialisation():
    rope = ClexRotaryEmbedding(ClexConfig(head_dim=16, train_length=32, hidden_factor=2))
    shapes = {name: tuple(value.shape) for name, value in rope.state_dict().items()}
    assert shapes == {"proj_func.ode_up_proj": (8, 32), "proj_func.ode_down_proj": (32, 8)}
    up, down = rope.parameters()
    assert up.abs().max() > 0
    assert not down.any()


def test_a_new_module_is_ntk_aware_scaling():
    freq = ClexRotaryEmbedding(CONFIG)(CONFIG.train_length * 4).freq
    base = CONFIG.rope_base * 7.0 ** (8 / 7)
    torch.testing.assert_close(freq, base ** -(torch.arange(8.0, dtype=torch.float64) / 8), rtol=1e-12, atol=0)


def test_the_authors_checkpoint_loads_with_its_inv_freq_checked():
    rope, source = ClexRotaryEmbedding(CONFIG), make_rope()
    inv_freq = 1.0 / CONFIG.rope_base ** (torch.arange(0, 16, 2).float() / 16)
    model, checkpoint = nn.ModuleDict({"clex_layer": rope}), {"clex_layer.inv_freq": inv_freq}
    checkpoint |= {f"clex_layer.{name}": value for name, value in source.state_dict().items()}
    model.load_state_dict(checkpoint)
    assert torch.equal(rope.proj_func.ode_down_proj, source.proj_func.ode_down_proj)
    with pytest.raises(RuntimeError, match="inv_freq: expected the 8 plain frequencies of rope_base = 10000"):
        model.load_state_dict({**checkpoint, "clex_layer.inv_freq": inv_freq * 1.1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_stay_fp32_when_the_model_goes_to_half_precision(dtype):
    rope = make_rope()
    before = copy.deepcopy(rope.state_dict())
    model = nn.Sequential(nn.Linear(2, 2), rope).to(dtype)
    assert model[0].weight.dtype == dtype
    for name, weight in rope.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name])


def test_a_half_precision_checkpoint_is_widened_even_when_assigned():
    rope = make_rope()
    rope.load_state_dict({name: value.bfloat16() for name, value in rope.state_dict().items()}, assign=True)
    assert {weight.dtype for weight in rope.parameters()} == {torch.float32}
    rope(40)


def test_double_gives_fp64_tables():
    table = make_rope().double()(40)
    assert table.coarse.dtype == table.fine.dtype == torch.float64


def test_autocast_changes_nothing():
    rope = make_rope()
    plain = rope(200)
    rope.invalidate()
    with torch.autocast("cpu", torch.bfloat16):
        table, sampled = rope(200), rope.sample(64, generator=seeded(0))
    assert torch.equal(table.freq, plain.freq)
    assert torch.equal(table.coarse, plain.coarse)
    assert torch.equal(sampled.coarse, rope.sample(64, generator=seeded(0)).coarse)


@pytest.mark.parametrize(("length", "t"), [(0, 1), (1, 1), (32, 1), (33, 2), (256, 8)])
def test_the_table_is_that_of_its_length_factor(length, t):
    rope = make_rope()
    table = rope(length)
    assert table.t == t
    assert table.positions is None
    assert table.length >= max(length, t * CONFIG.train_length)
    assert not table.freq.requires_grad
    torch.testing.assert_close(table.freq, solved(rope, t)[0], rtol=1e-10, atol=0)
    exact = torch.cos(torch.arange(table.length).double()[:, None] * table.freq)
    torch.testing.assert_close(cosines(table), exact, rtol=0, atol=3e-7)


def test_the_table_agrees_with_the_reference():
    rope = make_rope().double()
    table = rope(200)
    times = torch.tensor([7.0], dtype=torch.float64)
    freq = reference.frequencies(*(weight.detach() for weight in rope.parameters()), times, CONFIG)[0]
    cos, _ = reference.tables(freq, torch.arange(200))
    # at 200 tokens the reference's rk4 error of 1e-9 in frequency is 2e-7 in angle.
    torch.testing.assert_close(cosines(table)[:200], cos[:, :8], rtol=0, atol=1e-6)


def test_t_1_is_plain_rope_exactly():
    plain = torch.exp(-math.log(CONFIG.rope_base) * torch.arange(8, dtype=torch.float64) / 8)
    torch.testing.assert_close(make_rope()(32).freq, plain, rtol=1e-15, atol=0)


def test_with_max_factor_1_everything_is_plain_rope():
    rope = make_rope(ClexConfig(head_dim=16, train_length=32, max_factor=1))
    plain = solved(rope, 1.0)[0]
    for freq in (rope(20).freq, rope.stack().freq[0], rope.at(torch.tensor([20])).freq[0], rope.sample(20).freq):
        torch.testing.assert_close(freq.detach(), plain, rtol=1e-15, atol=0)


@pytest.mark.parametrize("max_factor", [2, 3, 5, 7, 16, 31, 64])
def test_the_last_length_factor_is_in_reach(max_factor):
    rope = make_rope(ClexConfig(head_dim=16, train_length=4, max_factor=max_factor))
    assert rope.stack().freq.isfinite().all()
    torch.testing.assert_close(rope(4 * max_factor).freq, solved(rope, max_factor)[0], rtol=1e-10, atol=0)


@pytest.mark.filterwarnings("ignore:.*past train_length")
def test_the_continuous_policy_moves_t_with_every_token():
    rope = make_rope(CONTINUOUS)
    assert [rope(length).t for length in (20, 32, 33, 48, 300)] == [1.0, 1.0, 33 / 32, 1.5, 8.0]
    assert rope(48).length >= 48
    torch.testing.assert_close(rope(48).freq, solved(rope, 1.5)[0], rtol=1e-10, atol=0)


def test_a_growing_sequence_builds_once_per_length_factor():
    rope = make_rope()
    for length in range(1, 257):
        rope(length)
    stats = rope.cache_stats()
    # 8 tables and the trajectory they are all read off, which misses once and is then found 7 times.
    assert stats.misses == 9
    assert stats.hits == 256 - 8 + 7
    assert stats.entries == 9


@pytest.mark.filterwarnings("ignore:.*past train_length")
def test_past_max_factor_the_table_doubles():
    rope = make_rope()
    rope(256)
    misses = rope.cache_stats().misses
    lengths = [rope(length).length for length in range(257, 1025)]
    assert sorted(set(lengths)) == [512, 1024]
    assert rope.cache_stats().misses == misses + 2
    assert rope(1024).t == 8
    assert rope.stack(300).length == 512


def test_past_max_factor_it_warns_once():
    rope = make_rope()
    with pytest.warns(UserWarning, match="257 tokens are past train_length \\* max_factor = 256"):
        rope(257)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rope(300)
        rope.stack(300)


def test_the_stack_holds_every_integer_factor():
    rope = make_rope()
    stack = rope.stack()
    assert isinstance(stack, RotaryTableStack)
    assert stack.t.tolist() == list(range(1, 9))
    assert stack.index is None
    assert stack.train_length == CONFIG.train_length
    assert stack.length >= 256
    for t in range(1, 9):
        table = rope(t * CONFIG.train_length)
        rows = len(table.coarse)
        assert torch.equal(stack.freq[t - 1], table.freq)
        assert torch.equal(stack.coarse[t - 1, :rows], table.coarse)
        assert torch.equal(stack.fine[t - 1], table.fine)
    assert stack.select(torch.tensor([1, 32, 33, 256])).index.tolist() == [0, 0, 1, 7]
    misses = rope.cache_stats().misses
    assert rope.stack(100).coarse.data_ptr() == stack.coarse.data_ptr()
    assert rope.cache_stats().misses == misses


def test_at_gives_each_sequence_its_own_continuous_t():
    rope = make_rope()
    lengths = torch.tensor([40, 1, 32, 256, 200, 40])
    stack = rope.at(lengths)
    assert stack.t.tolist() == [1.25, 1.0, 1.0, 8.0, 6.25, 1.25]
    assert stack.index.tolist() == list(range(6))
    assert stack.length >= 256
    expected = solved(rope, 1.0, 1.25, 6.25, 8.0)[[1, 0, 0, 3, 2, 1]]
    torch.testing.assert_close(stack.freq, expected, rtol=1e-10, atol=0)


def test_at_does_not_depend_on_batch_mates():
    rope = make_rope(CONTINUOUS)
    lengths = torch.randint(1, 257, (37,), generator=seeded(1))
    batch = rope.at(lengths, max_length=256)
    for b, length in enumerate(lengths.tolist()):
        alone, table = rope.at(lengths[b : b + 1], max_length=256), rope(length)
        for name in ("freq", "coarse", "fine"):
            assert torch.equal(getattr(batch, name)[b], getattr(alone, name)[0]), name
        assert torch.equal(batch.freq[b], table.freq)
        assert torch.equal(batch.coarse[b, : len(table.coarse)], table.coarse)


def test_at_solves_once_and_stores_no_table():
    rope = make_rope()
    for step in range(4):
        rope.at(torch.tensor([40 + step, 90]))
    stats = rope.cache_stats()
    assert (stats.misses, stats.hits, stats.entries) == (1, 3, 1)


def _step(rope):
    optimizer = torch.optim.SGD(rope.parameters(), lr=1.0)
    for weight in rope.parameters():
        weight.grad = torch.full_like(weight, 0.01)
    optimizer.step()


def _load(rope):
    rope.load_state_dict(make_rope(seed=1).state_dict())


def _assign(rope):
    rope.load_state_dict(make_rope(seed=1).state_dict(), assign=True)


def _write_data(rope):
    rope.proj_func.ode_down_proj.data.mul_(1.5)


def _write_in_inference_mode(rope):
    with torch.inference_mode():
        rope.proj_func.ode_down_proj.mul_(1.5)


def _replace_data(rope):
    rope.proj_func.ode_down_proj.data = rope.proj_func.ode_down_proj * 1.5


@pytest.mark.parametrize(
    "change",
    [_step, _load, _assign, _write_data, _write_in_inference_mode, _replace_data],
    ids=lambda f: f.__name__[1:],
)
@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference_mode"])
def test_changed_weights_give_new_tables(change, inference):
    rope = make_rope()
    with torch.inference_mode(inference):
        before = rope(100)
        again = rope(100)
        assert again.coarse.data_ptr() == before.coarse.data_ptr()
    kept = before.coarse.clone()
    change(rope)
    with torch.inference_mode(inference):
        after = rope(100)
    torch.testing.assert_close(after.freq, solved(rope, 4.0)[0], rtol=1e-10, atol=0)
    assert (after.freq - before.freq).abs().max() > 1e-6
    # whoever still holds the old table is not disturbed.
    assert torch.equal(before.coarse, kept)


@pytest.mark.parametrize(
    "drop",
    [
        lambda rope: rope.invalidate(),
        lambda rope: rope.train(),
        lambda rope: rope.eval(),
        lambda rope: rope.to("cpu"),
        lambda rope: nn.Sequential(rope).to(torch.bfloat16),
        lambda rope: rope.load_state_dict(rope.state_dict()),
    ],
    ids=["invalidate", "train", "eval", "to_device", "to_dtype_in_a_model", "load_state_dict"],
)
def test_what_may_change_weights_unseen_drops_the_tables(drop):
    rope = make_rope()
    rope(100)
    assert rope.cache_stats().entries
    drop(rope)
    assert rope.cache_stats().entries == 0


def test_fp64_and_fp32_tables_are_not_confused():
    rope = make_rope()
    assert rope(100).dtype == torch.float32
    assert rope.double()(100).dtype == torch.float64
    assert rope.float()(100).dtype == torch.float32


def test_a_module_made_in_inference_mode_serves_autograd_later():
    with torch.inference_mode():
        rope = ClexRotaryEmbedding(CONFIG)
        table = rope(100)
    assert not any(tensor.is_inference() for tensor in (table.freq, table.coarse, table.fine))
    x = torch.ones(table.coarse.shape, requires_grad=True)
    (x * table.coarse).sum().backward()
    assert torch.equal(x.grad, table.coarse)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda rope: pickle.loads(pickle.dumps(rope))], ids=["deepcopy", "pickle"]
)
def test_copies_have_a_cache_of_their_own(copied):
    rope = make_rope()
    table = rope(100)
    twin = copied(rope)
    assert twin.cache_stats().entries == 0
    assert torch.equal(twin(100).coarse, table.coarse)
    twin.proj_func.ode_down_proj.data.zero_()
    assert not torch.equal(twin(100).freq, table.freq)
    assert rope(100).coarse.data_ptr() == table.coarse.data_ptr()


def test_it_survives_torch_save():
    rope, file = make_rope(), io.BytesIO()
    torch.save(rope, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(100).coarse, rope(100).coarse)


def test_threads_share_it():
    rope, results = make_rope(), {}
    expected = {length: make_rope()(length).coarse for length in range(20, 260, 20)}

    def work(number: int) -> None:
        rounds = [torch.equal(rope(n).coarse, expected[n]) for _ in range(10) for n in expected]
        results[number] = all(rounds)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


def test_the_cache_keeps_to_its_budget():
    rope = ClexRotaryEmbedding(CONFIG, cache_bytes=100_000)
    for length in range(32, 257, 32):
        rope(length)
    stats = rope.cache_stats()
    assert stats.evictions > 0
    assert stats.entries < 9


def test_lookups_stay_outside_compiled_regions():
    rope = make_rope()

    def model(x: Tensor, length: int) -> Tensor:
        return x * rope(length).coarse[0, 0]

    x = torch.ones(8)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(x, 100), model(x, 100))
    # torch.compile would go on with what it has compiled for this function.
    torch.compiler.reset()
    with pytest.raises(Exception, match="build rotary tables outside"):
        torch.compile(model, backend="eager", fullgraph=True)(x, 100)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda rope: rope(-1), ValueError, "length: expected .*, got -1"),
        (lambda rope: rope(10.0), TypeError, "length: expected an integer, got 10.0"),
        (lambda rope: rope(torch.tensor(10)), TypeError, "length: expected an integer"),
        (lambda rope: rope.stack(0.5), TypeError, "max_length: expected an integer"),
        (lambda rope: rope.stack(-3), ValueError, "max_length: expected at least 0, got -3"),
        (lambda rope: rope.at([3, 4]), TypeError, "lengths: expected an int32 or int64 tensor"),
        (lambda rope: rope.at(torch.tensor([3.0])), TypeError, "lengths: expected .*, got torch.float32"),
        (lambda rope: rope.at(torch.tensor(3)), ValueError, r"lengths: expected shape \[B\], .*, got \[\]"),
        (lambda rope: rope.at(torch.tensor([], dtype=torch.int64)), ValueError, r"lengths: expected .*, got \[0\]"),
        (lambda rope: rope.at(torch.tensor([3, -1])), ValueError, "lengths: expected at least 0, got -1"),
        (lambda rope: rope.at(torch.tensor([99]), max_length=64), ValueError, "max_length: expected .* 99, got 64"),
    ],
)
def test_bad_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call(make_rope())


def test_bad_construction_is_named():
    with pytest.raises(TypeError, match="config: expected a ClexConfig, got dict"):
        ClexRotaryEmbedding({"head_dim": 16})
    with pytest.raises(ValueError, match="byte_budget: expected"):
        ClexRotaryEmbedding(CONFIG, cache_bytes=-1)


def test_weights_that_are_not_finite_are_rejected():
    rope = make_rope()
    rope.proj_func.ode_up_proj.data[0, 0] = math.nan
    for use in (lambda: rope(100), lambda: rope.sample(8), lambda: rope.at(torch.tensor([100])), rope.stack):
        with pytest.raises((ValueError, RuntimeError), match="finite"):
            use()
