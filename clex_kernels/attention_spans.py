"""The work of a call of attention on the CPU, cut into spans.

A span is the queries and keys of one sequence, or of all sequences if they are alike, without the queries that see no
key and the keys that no query sees. So a dead slot is never read, a position outside the table is never looked up, and
every softmax has something to sum. With the span's first key at 0 and its first query at `shift`, query l sees key j

    causal:  j <= shift + l          window:  shift + l - window < j

A span is plain if the rule hides nothing in it, or if it is the lower triangle of a square.

Shapes: q [B, L, H, D], k and v [B, S, G, D], lse [B, H, L].
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from clex_kernels.attention_terms import Rule, Tables, Tokens


class Span(NamedTuple):
    """Tokens that attend to each other; positions are rows of the table, `table` is which of T tables it uses."""

    sequences: slice
    queries: slice
    keys: slice
    q_position: int
    k_position: int
    table: slice
    scale: float
    is_causal: bool
    window: int | None
    softcap: float | None

    @property
    def shift(self) -> int:
        """Position of the first query less that of the first key."""
        return self.q_position - self.k_position

    @property
    def size(self) -> tuple[int, int]:
        """How many queries and keys."""
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start

    @property
    def is_square(self) -> bool:
        """Whether queries and keys are as many and stand at the same positions."""
        return self.shift == 0 and self.size[0] == self.size[1]

    @property
    def is_plain(self) -> bool:
        """See the module docstring."""
        # a log-n factor of 0, that of one token, would multiply hidden logits of -inf there.
        fits = self.scale > 0 and (not self.is_causal or self.is_square)
        return fits and self.softcap is None and self.window is None

    def of_queries(self, x: Tensor) -> Tensor:
        """The span's part of a tensor like q."""
        return x[self.sequences, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        """The span's part of a tensor like k."""
        return x[self.sequences, self.keys]

    def of_lse(self, x: Tensor) -> Tensor:
        """The span's part of a tensor like lse."""
        return x[self.sequences, :, self.queries]

    def of_tables(self, tables: Tables) -> Tables:
        """The tables that the span uses."""
        if self.table == slice(None):
            return tables
        coarse, fine, positions, _ = tables
        if positions is not None and positions.shape[0] > 1:
            positions = positions[self.table]
        return Tables(coarse[self.table], fine[self.table], positions, None)


def _per_sequence(values: Tensor | None, default: int | None, count: int) -> list[int] | list[None]:
    return [default] * count if values is None else values.tolist()


def _bounds(edges: Tensor | None, size: int, count: int) -> list[tuple[int, int]]:
    """First token and number of tokens of each sequence, within [0, size]."""
    if edges is None:
        return [(0, size)] * count
    return [(first, max(end - first, 0)) for first, end in pairwise(edges.clamp(0, size).tolist())]


def _scale(length: int, rule: Rule) -> float:
    factor = 1.0 if rule.log_base is None else math.log(length) / rule.log_base
    return rule.scale * (max(factor, 1.0) if rule.log_clamped else factor)


def _seen(queries: int, start: int, end: int, shift: int, rule: Rule) -> tuple[int, int, int, int]:
    """The queries that see some key and the keys that some query sees; query l stands at key slot shift + l."""
    first, last = max(0, start - shift) if rule.is_causal else 0, queries
    if rule.window is not None:
        last = min(last, end - 1 + rule.window - shift)
        start = max(start, shift + first - rule.window + 1)
    return first, last, start, min(end, shift + last) if rule.is_causal else end


def _sequence_spans(q: Tensor, k: Tensor, tables: Tables, tokens: Tokens, rule: Rule, count: int) -> Iterator[Span]:
    stacked = range(count) if tables.coarse.shape[0] > 1 else [0] * count
    numbers = zip(
        _bounds(tokens.cu_seqlens_q, q.shape[1], count),
        _bounds(tokens.cu_seqlens_k, k.shape[1], count),
        _per_sequence(tokens.kv_start, 0, count),
        _per_sequence(tokens.kv_end, k.shape[1], count),
        _per_sequence(tokens.lengths, None, count),
        _per_sequence(tokens.q_offsets, tokens.q_offset, count),
        _per_sequence(tokens.k_offsets, tokens.k_offset, count),
        stacked if tables.index is None else tables.index.tolist(),
        strict=False,
    )
    for b, ((q_base, queries), (k_base, slots), start, end, length, q_offset, k_offset, table) in enumerate(numbers):
        start, end = (min(max(slot, 0), slots) for slot in (start, end))
        length = max(end - start, 1) if length is None else max(length, 1)
        shift = end - queries if q_offset is None else q_offset - k_offset
        first, last, start, end = _seen(queries, start, end, shift, rule)
        if first >= last or start >= end:
            continue
        yield Span(
            sequences=slice(b, b + 1) if tokens.cu_seqlens_q is None else slice(0, 1),
            queries=slice(q_base + first, q_base + last),
            keys=slice(k_base + start, k_base + end),
            q_position=k_offset + shift + first,
            k_position=k_offset + start,
            table=slice(table, table + 1),
            scale=_scale(length, rule),
            is_causal=rule.is_causal and shift + first < end - 1,
            window=rule.window if rule.window is not None and shift + last - 1 - rule.window >= start else None,
            softcap=rule.softcap,
        )


def cut_into_spans(
    q: Tensor, k: Tensor, tables: Tables, tokens: Tokens, rule: Rule, in_blocks: bool = False
) -> list[Span]:
    """The spans of a call, one for the whole batch if its sequences are alike and need no blocks."""
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return []
    rule = rule._replace(is_causal=rule.is_causal or rule.window is not None)
    if rule.log_base is None:
        tokens = tokens._replace(lengths=None)
    if not any(isinstance(values, Tensor) for values in tokens):
        spans = list(_sequence_spans(q, k, tables, tokens, rule, 1))
        if not spans or (spans[0].is_plain and not in_blocks):
            return [span._replace(sequences=slice(0, q.shape[0]), table=slice(None)) for span in spans]
    count = q.shape[0] if tokens.cu_seqlens_q is None else tokens.cu_seqlens_q.shape[0] - 1
    return list(_sequence_spans(q, k, tables, tokens, rule, count))


def is_everything(spans: list[Span], q: Tensor, k: Tensor) -> bool:
    """Whether one span holds all queries and all keys."""
    return [span[:3] for span in spans] == [(slice(0, q.shape[0]), slice(0, q.shape[1]), slice(0, k.shape[1]))]
