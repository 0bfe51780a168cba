"""What decode_attention says to bad input, and what it lets pass."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clex_kernels import RotaryTable, RotaryTableStack, append_kv, attention, decode_attention

B, L, S, H, G, D, R, P = 2, 1, 96, 4, 2, 16, 8, 32


def frequencies(tables: int | None = None) -> Tensor:
    freq = 10 ** torch.linspace(0, -3, R, dtype=torch.float64)
    return freq if tables is None else freq / torch.arange(1, tables + 1)[:, None]


def make_stack(tables: int, **settings: Any) -> RotaryTableStack:
    times = torch.arange(1.0, tables + 1, dtype=torch.float64)
    return RotaryTableStack.from_frequencies(frequencies(tables), times, length=S, **settings)


def good() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "q": torch.randn(B, L, H, D, generator=generator),
        "k_cache": torch.randn(B, S, G, D, generator=generator),
        "v_cache": torch.randn(B, S, G, D, generator=generator),
        "table": RotaryTable.from_frequencies(frequencies(), length=S),
        "kv_end": torch.tensor([S, 40]),
    }


def paged() -> dict[str, Any]:
    pools = {name: good()[name].reshape(B * S // P, P, G, D) for name in ("k_cache", "v_cache")}
    return good() | pools | {"block_table": torch.arange(B * S // P, dtype=torch.int32).reshape(B, -1)}


def strided(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def sampled() -> RotaryTable:
    return RotaryTable.from_frequencies(frequencies(), positions=torch.arange(S))


WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "q of another kind": (TypeError, "q: expected a tensor, got list", {"q": [1.0]}),
    "k_cache of another kind": (TypeError, "k_cache: expected a tensor, got None", {"k_cache": None}),
    "q of three dims": (ValueError, r"q: expected shape \[B, L, H, D\], got \[2, 4, 16\]", {"q": torch.ones(2, 4, 16)}),
    "q of integers": (TypeError, "q: expected float32", {"q": torch.ones(B, L, H, D, dtype=torch.int64)}),
    "mixed dtypes": (ValueError, "v_cache: expected q's dtype", {"v_cache": torch.ones(B, S, G, D).double()}),
    "another batch": (ValueError, r"k_cache: expected shape \[B=2, S, G, D=16\]", {"k_cache": torch.ones(3, S, G, D)}),
    "another D": (ValueError, r"k_cache: expected shape \[B=2, S, G, D=16\]", {"k_cache": torch.ones(B, S, G, 8)}),
    "v unlike k": (
        ValueError,
        r"v_cache: expected shape k_cache's \[2, 96, 2, 16\]",
        {"v_cache": torch.ones(B, 95, G, D)},
    ),
    "strides of q": (ValueError, "q: expected unit stride in D", {"q": strided(torch.ones(B, L, H, D))}),
    "strides of v": (ValueError, "v_cache: expected unit stride in D", {"v_cache": strided(torch.ones(B, S, G, D))}),
    "heads that do not group": (ValueError, "q: expected H to be a multiple of G=2", {"q": torch.ones(B, L, 3, D)}),
    "many tokens": (ValueError, "q: expected L of at most 16 new tokens, got 17", {"q": torch.ones(B, 17, H, D)}),
    "kv_end of another kind": (TypeError, "kv_end: expected an int or a tensor, got NoneType", {"kv_end": None}),
    "kv_end as a bool": (TypeError, "kv_end", {"kv_end": True}),
    "kv_end of floats": (TypeError, "kv_end: expected a torch.int32", {"kv_end": torch.tensor([1.0, 2.0])}),
    "kv_end of another size": (ValueError, r"kv_end: expected shape \[B=2\]", {"kv_end": torch.tensor([1])}),
    "kv_end past the cache": (ValueError, r"kv_end: .*\[0, 96\], got 40 to 97", {"kv_end": torch.tensor([97, 40])}),
    "negative kv_end": (ValueError, r"kv_end: .*\[0, 96\], got -1 to 40", {"kv_end": torch.tensor([-1, 40])}),
    "one kv_end past the cache": (ValueError, r"kv_end: expected within \[0, S\] = \[0, 96\], got 97", {"kv_end": 97}),
    "one negative kv_end": (ValueError, "kv_end: expected within", {"kv_end": -1}),
    "kv_start after kv_end": (ValueError, "kv_start: expected at most kv_end", {"kv_start": torch.tensor([0, 41])}),
    "negative kv_start": (ValueError, "kv_start: .*got -2", {"kv_start": torch.tensor([0, -2])}),
    "negative lengths": (ValueError, "lengths: expected numbers >= 0", {"lengths": torch.tensor([0, -2])}),
    "no table": (TypeError, "table: expected a RotaryTable", {"table": frequencies()}),
    "sampled positions": (ValueError, "table: expected positions 0, 1, 2, .*got sampled", {"table": sampled()}),
    "a short table": (
        ValueError,
        "table: expected positions for all keys up to kv_end = 96, got one of 64",
        {"table": RotaryTable.from_frequencies(frequencies(), length=64)},
    ),
    "a table in fp64": (
        TypeError,
        "table: expected dtype torch.float32",
        {"table": RotaryTable.from_frequencies(frequencies(), length=S, dtype=torch.float64)},
    ),
    "a stack of three without index": (ValueError, "table: a stack of T=3 needs an index", {"table": make_stack(3)}),
    "a wide table": (
        ValueError,
        "table: expected a rotary dimension 2R of at most D=16, got 18",
        {"table": RotaryTable.from_frequencies(torch.ones(9, dtype=torch.float64), length=S)},
    ),
    "no scale": (ValueError, "scale: expected a finite number > 0, got 0", {"scale": 0.0}),
    "no window": (ValueError, "window: expected at least 1 token", {"window": 0}),
    "a scale past fp32": (ValueError, "scale: expected a finite number > 0, got 1e[+]39", {"scale": 1e39}),
    "no cap": (ValueError, "softcap: expected a finite number > 0, got -1", {"softcap": -1.0}),
    "rotated by another name": (ValueError, "rotated: expected one of 'none', 'q', 'k', 'qk'", {"rotated": "v"}),
}
WRONG_PAGES: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "floats": (TypeError, "block_table: expected a torch.int32", {"block_table": torch.ones(2, 3)}),
    "a list": (TypeError, "block_table: expected a torch.int32 or torch.int64 tensor, got list", {"block_table": [1]}),
    "one row": (ValueError, r"block_table: expected shape \[B=2, pages", {"block_table": torch.zeros(1, 3).long()}),
    "a page past the pool": (
        ValueError,
        r"block_table: expected pages in \[0, 6\) up to kv_end, got 6 at \[1, 1\]",
        {"block_table": torch.tensor([[0, 1, 2], [3, 6, 9]])},
    ),
    "a negative page": (ValueError, r"got -1 at \[0, 2\]", {"block_table": torch.tensor([[0, 1, -1], [3, 4, 5]])}),
    "no pages": (
        ValueError,
        r"k_cache: expected pages for block_table \[2, 3\], got none",
        {name: torch.ones(0, P, G, D) for name in ("k_cache", "v_cache")},
    ),
    "small pages": (
        ValueError,
        "k_cache: expected pages of P slots, P a multiple of 16, got P=8",
        {name: torch.ones(24, 8, G, D) for name in ("k_cache", "v_cache")},
    ),
    "kv_end past the pages": (ValueError, r"\[0, 96\], got 40 to 97", {"kv_end": torch.tensor([97, 40])}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name: str) -> None:
    error, message, changes = WRONG[name]
    with pytest.raises(error, match=message):
        decode_attention(**good() | changes)


@pytest.mark.parametrize("name", WRONG_PAGES)
def test_a_wrong_page_is_named(name: str) -> None:
    error, message, changes = WRONG_PAGES[name]
    with pytest.raises(error, match=message):
        decode_attention(**paged() | changes)


def test_pages_hold_what_a_contiguous_cache_does() -> None:
    assert torch.equal(decode_attention(**paged()), decode_attention(**good()))


def test_pages_that_nobody_reads_may_be_anything() -> None:
    table = torch.tensor([[0, 1, 2], [3, 4, -1]])
    assert torch.equal(decode_attention(**paged() | {"block_table": table}), decode_attention(**good()))
    starts = {"kv_start": torch.tensor([0, 33])}
    table = torch.tensor([[0, 1, 2], [99, 4, -1]])
    out = decode_attention(**paged() | starts | {"block_table": table})
    assert torch.equal(out, decode_attention(**good() | starts))


def test_one_kv_end_is_that_of_all() -> None:
    both = {"kv_end": torch.tensor([77, 77], dtype=torch.int32)}
    truth = decode_attention(**good() | both)
    for one in (77, np.int64(77)):
        assert torch.equal(decode_attention(**good() | {"kv_end": one}), truth)


def test_an_empty_sequence_gives_zero() -> None:
    out, lse = decode_attention(**good() | {"kv_end": torch.tensor([0, 40])}, return_lse=True)
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    assert out[1].isfinite().all()


def test_a_stack_is_chosen_from_by_length_as_select_does() -> None:
    stack = make_stack(4, train_length=24)
    chosen = decode_attention(**good() | {"table": stack})
    selected = decode_attention(**good() | {"table": stack.select(good()["kv_end"])})
    assert torch.equal(chosen, selected)
    lengths = torch.tensor([3, 60], dtype=torch.int32)
    chosen = decode_attention(**good() | {"table": stack, "lengths": lengths})
    assert torch.equal(chosen, decode_attention(**good() | {"table": stack.select(lengths)}))


def test_lengths_past_the_last_table_warn() -> None:
    stack = make_stack(2, train_length=24)
    with pytest.warns(UserWarning, match=r"lengths past 2 \* 24 tokens") as record:
        decode_attention(**good() | {"table": stack})
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_attention(**good() | {"table": stack, "lengths": torch.tensor([48, 1])})


def test_log_scale_comes_with_the_table() -> None:
    table = RotaryTable.from_frequencies(frequencies(), length=S, train_length=12, log_scale=True)
    scales = [torch.tensor(float(n)).log().item() / torch.tensor(12.0).log().item() for n in (S, 40)]
    out = decode_attention(**good() | {"table": table})
    for b, factor in enumerate(scales):
        plain = decode_attention(**good(), scale=factor * D**-0.5)
        torch.testing.assert_close(out[b], plain[b], rtol=0.0, atol=1e-6)


def test_rotated_caches_need_no_rows() -> None:
    short = RotaryTable.from_frequencies(frequencies(), length=64)
    out = decode_attention(**good() | {"table": short}, rotated="qk")
    assert torch.equal(out, decode_attention(**good(), rotated="qk"))


def test_strides_change_nothing() -> None:
    given = good()
    heads_first = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("k_cache", "v_cache")}
    packed = torch.stack((given["k_cache"], given["v_cache"]), dim=2)
    views = {"k_cache": packed[:, :, 0], "v_cache": packed[:, :, 1]}
    wide = {"q": torch.cat((given["q"], given["q"]), dim=3)[..., :D]}
    ends = {"kv_end": torch.stack((given["kv_end"], given["kv_end"]), dim=1)[:, 0]}
    for changes in (heads_first, views, wide, ends):
        assert torch.equal(decode_attention(**given | changes), decode_attention(**given))


def test_forward_mode_is_refused() -> None:
    given = good()
    for name in ("q", "k_cache", "v_cache"):
        with pytest.raises(RuntimeError, match="decode_attention: has no forward-mode derivatives"):
            torch.func.jvp(
                lambda x, name=name: decode_attention(**given | {name: x}),
                (given[name],),
                (torch.ones_like(given[name]),),
            )


def test_compiled_code_serves_any_batch() -> None:
    compiled = torch.compile(decode_attention, backend="eager", fullgraph=True, dynamic=True)
    append = torch.compile(append_kv, backend="eager", fullgraph=True, dynamic=True)
    attend = torch.compile(attention, backend="eager", fullgraph=True, dynamic=True)
    table = good()["table"]
    before = torch._dynamo.utils.counters["frames"]["ok"]
    for batch in range(2, 14):
        q, k, v = torch.randn(batch, 1, H, D), torch.randn(batch, S, G, D), torch.randn(batch, S, G, D)
        ends = torch.full((batch,), 50)
        assert torch.equal(compiled(q, k, v, table, ends), decode_attention(q, k, v, table, ends))
        append(k[:, :1].clone(), v[:, :1].clone(), k, v, ends)
        attend(q, k, v, table, is_causal=True)
    # one of each, and perhaps a second when sizes turn out to vary.
    assert torch._dynamo.utils.counters["frames"]["ok"] - before <= 6
