"""decode_attention on the CPU: the operator against the reference, and steps as they follow one another in a model."""

from dataclasses import replace

import decode_cases
import pytest
import torch
from decode_cases import CASES, EMPTY, Case, Inputs, arguments, assert_close, assert_exact, expected, make_inputs
from tolerance import assert_within_rule
from torch import Tensor

from clex_kernels import ClexConfig, ClexRotaryEmbedding, attention, decode_attention, reference
from clex_kernels.tables import RotaryTable, RotaryTableStack

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def run(case: Case, inputs: Inputs, dtype: torch.dtype, ints: torch.dtype = torch.int64) -> list[Tensor]:
    step = decode_cases.make_step(case, inputs, dtype, ints)
    out, lse = torch.ops.clex.decode(*arguments(case, step))
    assert [out.dtype, lse.dtype] == [dtype, torch.promote_types(dtype, torch.float32)]
    assert out.is_contiguous()
    assert lse.is_contiguous()
    return [out, lse]


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_references_in_fp64(name: str, isa: str) -> None:
    inputs = make_inputs(CASES[name])
    actual = run(CASES[name], inputs, torch.float64, torch.int32)
    assert_exact(actual, expected(CASES[name], inputs, torch.float64))


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_values_keep_the_tolerance_rule(name: str, dtype: torch.dtype, isa: str) -> None:
    inputs = make_inputs(CASES[name], dtype)
    assert_close(run(CASES[name], inputs, dtype), CASES[name], inputs, dtype)


# ranges of keys, which are merged, end at multiples of 256 to 2048 slots.
RANGES = {
    "new tokens on both sides of a boundary": Case(kv_end=(259, 515), queries=5, slots=520),
    "a window over boundaries": Case(kv_end=(800, 700), queries=3, slots=800, rule={"window": 300}),
    "a window that ends at a boundary": Case(kv_end=(768, 513), queries=2, slots=800, rule={"window": 256}),
    "padding up to a boundary": Case(kv_end=(900, 530), kv_start=(256, 511), slots=900, rule={"softcap": 2.0}),
    "long": Case(kv_end=(20_000, 4097), slots=20_000, h=2, g=1, tables=4, train_length=5000),
    "pages": Case(kv_end=(600, 1), queries=2, page=48, h=8, head_major=True),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges_merge_to_the_reference(name: str, isa: str) -> None:
    case, inputs = RANGES[name], make_inputs(RANGES[name])
    assert_exact(run(case, inputs, torch.float64), expected(case, inputs, torch.float64))
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(case, dtype)
        assert_close(run(case, inputs, dtype), case, inputs, dtype)


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_nothing_gives_nothing(case: Case) -> None:
    out, lse = run(case, make_inputs(case), torch.float32)
    assert out.shape == (len(case.kv_end), case.queries, case.h, case.d)
    assert lse.shape == (len(case.kv_end), case.h, case.queries)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_lse_is_not_made_unless_asked_for() -> None:
    case = CASES["one token"]
    step = decode_cases.make_step(case, make_inputs(case), torch.float32)
    assert torch.ops.clex.decode(*arguments(case, step, with_lse=False))[1].shape == (0,)


MIXED = {
    "contiguous": Case(kv_end=(2500, 1, 37, 1024, 2047, 0, 300), slots=2500, d=64, r=32),
    "head-major, several tokens": Case(kv_end=(1500, 4, 1027), slots=1500, queries=5, head_major=True, d=128, r=64),
    "pages": Case(kv_end=(1300, 64, 17), page=32),
    "window": Case(kv_end=(1300, 64, 1025), slots=1300, rule={"window": 700}),
    "tables by length": Case(kv_end=(1300, 64, 1025), slots=1300, tables=4, train_length=400),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_a_sequence_is_bit_for_bit_the_same_alone_and_in_a_batch(name: str, dtype: torch.dtype) -> None:
    case = MIXED[name]
    step = decode_cases.make_step(case, make_inputs(case), dtype)
    together = torch.ops.clex.decode(*arguments(case, step))
    for b, end in enumerate(case.kv_end):
        rows = slice(b, b + 1)
        caches, block_table = (step.k_cache, step.v_cache), step.block_table
        if case.page is None:
            # and in a cache with no room left.
            caches = tuple(x[rows, :end].clone() for x in caches)
        else:
            block_table = block_table[rows, : -(-end // case.page)]
        alone = step._replace(
            q=step.q[rows], k_cache=caches[0], v_cache=caches[1], kv_end=step.kv_end[rows], block_table=block_table
        )
        out, lse = torch.ops.clex.decode(*arguments(case, alone))
        assert torch.equal(out, together[0][rows])
        assert torch.equal(lse, together[1][rows])


@pytest.mark.parametrize("name", MIXED)
def test_threads_change_no_bit(name: str) -> None:
    case = MIXED[name]
    step = decode_cases.make_step(case, make_inputs(case), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.clex.decode(*arguments(case, step)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_bounds_that_lie_are_cut_to_the_cache() -> None:
    case = Case(kv_end=(50, 50), kv_start=(0, 0), slots=50, tables=4, train_length=20, rule={"log_base": 2.0})
    inputs = make_inputs(case)
    step = decode_cases.make_step(case, inputs, torch.float64)
    truth = torch.ops.clex.decode(*arguments(case, step))
    lying = step._replace(kv_end=torch.tensor([99, 2**63 - 1]), kv_start=torch.tensor([-3, -(2**63)]))
    for x, y in zip(torch.ops.clex.decode(*arguments(case, lying)), truth, strict=True):
        assert torch.equal(x, y)


def test_rows_that_see_nothing_give_zero_even_where_there_is_no_table() -> None:
    case = Case(kv_end=(70, 40), kv_start=(69, 39), queries=3)
    step = decode_cases.make_step(case, make_inputs(case), torch.float32)
    out, lse = torch.ops.clex.decode(*arguments(case, step._replace(coarse=step.coarse[:, :1])))
    assert out[0, 2].isnan().all()
    assert (out[0, :2] == 0).all()
    assert (lse[0, :, :2] == -torch.inf).all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("what", ["page past the pool", "negative page", "index past the stack", "rows past the table"])
def test_what_does_not_exist_gives_nan_for_that_sequence_alone(what: str) -> None:
    case = Case(kv_end=(130, 130), page=64, tables=2, index=(1, 0))
    step = decode_cases.make_step(case, make_inputs(case), torch.float32)
    truth = torch.ops.clex.decode(*arguments(case, step))
    block_table, index = step.block_table.clone(), step.index.clone()
    if what == "rows past the table":
        step = step._replace(coarse=step.coarse[:, :2], kv_end=torch.tensor([130, 128]))
        truth = torch.ops.clex.decode(*arguments(case, step._replace(kv_end=torch.tensor([128, 128]))))
    elif what == "index past the stack":
        index[0] = 2
    else:
        block_table[0, 1] = -1 if what == "negative page" else len(step.k_cache)
    out, lse = torch.ops.clex.decode(*arguments(case, step._replace(block_table=block_table, index=index)))
    assert out[0].isnan().all()
    assert torch.equal(out[1], truth[0][1])
    assert torch.equal(lse[1], truth[1][1])


def test_a_step_allocates_its_output_alone() -> None:
    case = Case(kv_end=(3000, 20), slots=3000)
    step = decode_cases.make_step(case, make_inputs(case), torch.bfloat16)
    stack = RotaryTableStack.from_frequencies(
        make_inputs(case._replace(tables=3)).freq,
        torch.arange(1.0, 4, dtype=torch.float64),
        length=3000,
        train_length=1000,
    )
    decode_attention(step.q, step.k_cache, step.v_cache, stack, step.kv_end)
    with torch.profiler.profile(profile_memory=True) as profile:
        out = decode_attention(step.q, step.k_cache, step.v_cache, stack, step.kv_end)
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    # a few numbers of the checks, which look at kv_end, are freed before the operator runs.
    assert [size for size in sizes if size > 64] == [out.numel() * out.element_size()]


def small_rope(policy: str = "integer") -> ClexRotaryEmbedding:
    config = ClexConfig(head_dim=16, train_length=16, max_factor=4, hidden_factor=2, scale_policy=policy)
    rope = ClexRotaryEmbedding(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in rope.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return rope


def draw(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("pick", ["forward", "stack", "at"])
def test_a_sequence_that_grows_across_t_is_right_at_every_token(pick: str) -> None:
    rope = small_rope("continuous" if pick == "at" else "integer")
    length, train = 58, rope.config.train_length
    q, k, v = draw(1, length, 4, 16), draw(1, length, 2, 16, seed=1), draw(1, length, 2, 16, seed=2)
    # weights are fp32, so are the tables: fp32 tensors, judged by a reference in fp64.
    caches = [torch.full((1, 64, 2, 16), torch.nan) for _ in range(2)]
    factors = set()
    for end in range(1, length + 1):
        for cache, x in zip(caches, (k, v), strict=True):
            cache[:, end - 1] = x[:, end - 1]
        lengths = torch.tensor([end])
        table = rope(end) if pick == "forward" else rope.stack() if pick == "stack" else rope.at(lengths)
        out = decode_attention(q[:, end - 1 : end].float(), *caches, table, lengths)
        t = max(1.0, end / train) if pick == "at" else float(-(-end // train))
        factors.add(t)
        freq = reference_frequencies(rope, t)
        cos, sin = reference.tables(freq, torch.arange(end, dtype=torch.float64))
        one = slice(end - 1, end)
        truth, low = (
            reference.attention(
                reference.rotary(q[:, one].to(dtype), cos[one], sin[one]),
                reference.rotary(k[:, :end].to(dtype), cos, sin),
                v[:, :end].to(dtype),
            )[0]
            for dtype in (torch.float64, torch.float32)
        )
        assert_within_rule(out, low, truth)
    assert len(factors) == (43 if pick == "at" else 4)


def reference_frequencies(rope: ClexRotaryEmbedding, t: float) -> Tensor:
    up, down = (weight.detach().double() for weight in rope.parameters())
    return reference.frequencies(up, down, torch.tensor([t], dtype=torch.float64), rope.config)[0]


PREFILLS = {
    "plain": {},
    "window": {"window": 30},
    "window of one": {"window": 1},
    "window of a page and a token": {"window": 17},
    "softcap": {"softcap": 2.0},
    "left padding": {"kv_start": torch.tensor([4, 60])},
    "sequences by length": {"lengths": torch.tensor([20, 60])},
}


@pytest.mark.parametrize("page", [None, 16, 48, 256])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", PREFILLS)
def test_decode_is_the_last_rows_of_prefill(name: str, dtype: torch.dtype, page: int | None) -> None:
    rope, ends = small_rope(), torch.tensor([63, 61])
    rope = rope.double() if dtype == torch.float64 else rope
    case = Case(kv_end=(63, 61), slots=64, page=page)
    inputs = make_inputs(case)
    step = decode_cases.make_step(case, inputs, dtype)
    new = 3
    q = draw(2, 64, 4, 16, dtype=dtype, seed=3)
    options = PREFILLS[name]
    prefill = [
        attention(
            q[b : b + 1, : ends[b]],
            *(x[b : b + 1, : ends[b]].to(dtype) for x in inputs[1:3]),
            rope.stack(),
            is_causal=True,
            return_lse=True,
            **{key: x[b : b + 1] if isinstance(x, Tensor) else x for key, x in options.items()},
        )
        for b in range(2)
    ]
    last = torch.stack([q[b, ends[b] - new : ends[b]] for b in range(2)])
    out, lse = decode_attention(
        *(last, step.k_cache, step.v_cache, rope.stack(), ends),
        block_table=step.block_table,
        return_lse=True,
        **options,
    )
    eps = torch.finfo(dtype).eps
    for b in range(2):
        truth, truth_lse = prefill[b][0][:, -new:], prefill[b][1][:, :, -new:]
        torch.testing.assert_close(out[b : b + 1], truth, rtol=0.0, atol=8 * eps * truth.abs().max().item())
        torch.testing.assert_close(lse[b : b + 1], truth_lse, rtol=0.0, atol=8 * eps * truth_lse.abs().max().item())


def test_rotated_says_what_is_rotated_already() -> None:
    case = Case(kv_end=(64, 64), slots=64)
    inputs = make_inputs(case)
    q, k, v = (x.float() for x in inputs[:3])
    table = RotaryTable.from_frequencies(inputs.freq[0], length=64, amplitude=1.2)
    cos, sin = reference.tables(inputs.freq[0], torch.arange(64.0, dtype=torch.float64), 1.2)
    rotated_q, rotated_k = reference.rotary(q, cos[63:], sin[63:]), reference.rotary(k, cos, sin)
    ends = torch.tensor([64, 64])
    truth = decode_attention(q, k, v, table, ends)
    for name, operands in {"q": (rotated_q, k), "k": (q, rotated_k), "qk": (rotated_q, rotated_k)}.items():
        out = decode_attention(*operands, v, table, ends, rotated=name)
        torch.testing.assert_close(out, truth, rtol=0.0, atol=1e-5)


def test_prefill_in_chunks_is_one_prefill() -> None:
    rope = small_rope()
    q, k, v = (draw(2, 60, heads, 16, dtype=torch.float32, seed=heads) for heads in (4, 2, 3))
    v = v[:, :, :2]
    lengths = torch.tensor([60, 60])
    whole = attention(q, k, v, rope.stack(), is_causal=True)
    caches = [torch.full((2, 80, 2, 16), torch.nan) for _ in range(2)]
    for first, end in ((0, 25), (25, 26), (26, 60)):
        for cache, x in zip(caches, (k, v), strict=True):
            cache[:, first:end] = x[:, first:end]
        out = attention(
            q[:, first:end], *caches, rope.stack(), is_causal=True, kv_end=torch.full((2,), end), lengths=lengths
        )
        torch.testing.assert_close(out, whole[:, first:end], rtol=0.0, atol=2e-6)


def test_frequencies_of_a_sequence_do_not_depend_on_its_batch_mates() -> None:
    rope = small_rope("continuous")
    case = Case(kv_end=(20, 33, 64), slots=64)
    step = decode_cases.make_step(case, make_inputs(case), torch.float32)
    ends = step.kv_end
    together = decode_attention(step.q, step.k_cache, step.v_cache, rope.at(ends), ends)
    for b in range(3):
        rows = slice(b, b + 1)
        alone = decode_attention(
            step.q[rows], step.k_cache[rows], step.v_cache[rows], rope.at(ends[rows], max_length=64), ends[rows]
        )
        assert torch.equal(alone, together[rows])


def test_the_operator_passes_opcheck_and_compiles() -> None:
    case = CASES["pages of 64, head-major"]
    step = decode_cases.make_step(case, make_inputs(case), torch.float32)
    torch.library.opcheck(torch.ops.clex.decode.default, arguments(case, step))
    stack = replace(decode_cases.make_stack(case, make_inputs(case).freq, torch.float32), train_length=32)

    def decode(q: Tensor, ends: Tensor) -> Tensor:
        return decode_attention(q * 1, step.k_cache, step.v_cache, stack, ends, block_table=step.block_table) + 1

    compiled = torch.compile(decode, fullgraph=True)
    torch.testing.assert_close(compiled(step.q, step.kv_end), decode(step.q, step.kv_end), rtol=0.0, atol=0.0)


def test_backward_says_that_there_is_none() -> None:
    case = CASES["one token"]
    step = decode_cases.make_step(case, make_inputs(case), torch.float32)
    table = RotaryTable.from_frequencies(make_inputs(case).freq[0], length=200)
    out = decode_attention(step.q.requires_grad_(), step.k_cache, step.v_cache, table, step.kv_end)
    with pytest.raises(RuntimeError, match=r"attention\(\)"):
        out.sum().backward()
