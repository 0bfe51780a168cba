from collections import Counter

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks.compiled.cases import CASES  # noqa: E402
from benchmarks.compiled.compiling import TARGETS, compiling, find_nvdisasm, read_sass  # noqa: E402
from benchmarks.compiled.counts import TRITON, Counts, gate, problems  # noqa: E402
from benchmarks.compiled.launches import launch_decode, launch_qkv_rotary, meta  # noqa: E402
from benchmarks.compiled.sass import accesses, innermost_loops  # noqa: E402
from clex_kernels.attention_terms import Rule, Tables, Tokens  # noqa: E402
from clex_kernels.kernels import append, attention_bwd, attention_fwd, decode_combine, rotary  # noqa: E402
from clex_kernels.kernels.launch_tables import ROTARY  # noqa: E402


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles_within_the_targets_limits(target: str) -> None:
    if triton.__version__ != TRITON:
        pytest.skip(f"counts are for triton {TRITON}, this is {triton.__version__}")
    found = gate(target)
    assert [counts.name for counts in found] == list(CASES)
    assert not [problem for counts in found for problem in problems(CASES[counts.name], counts, target)]
    if TARGETS[target].gpu.backend == "cuda" and find_nvdisasm() is None:
        pytest.skip("compiled, but no nvdisasm found to look for spills in loops and wide accesses")


def test_no_more_than_sixty_configurations_a_target() -> None:
    roles = Counter(case.role for case in CASES.values())
    assert roles["configuration"] <= 60
    # cases without rotary stand beside some of them, features are compiled only.
    assert roles["plain"] <= 15
    assert roles["variant"] <= 20


def executed(counts: Counts, length: int, is_causal: bool) -> int:
    """Instructions that the warps of one head of attention's forward pass execute over `length` queries and keys."""
    masked, whole = sorted((loop.instructions for loop in counts.loops if loop.products), reverse=True)
    rows, columns = counts.constants["BLOCK_L"], counts.constants["BLOCK_S"]
    total = 0
    for first in range(0, length, rows):
        trips = (first + 1) // columns if is_causal else length // columns
        all_trips = -(-(first + rows) // columns) if is_causal else length // columns
        outside = counts.instructions - masked - whole
        total += outside + trips * whole + (all_trips - trips) * masked
    return total * counts.warps


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.gpu.backend == "cuda"])
def test_rotary_adds_no_instruction_to_the_loop_over_keys_and_little_to_the_call(target: str) -> None:
    if triton.__version__ != TRITON or find_nvdisasm() is None:
        pytest.skip("counts need the pinned triton and nvdisasm")
    found = {counts.name: counts for counts in gate(target)}
    keys = found["attention_fwd_keys"]
    length, heads, key_heads = 4096, 32, 8
    trip = max(loop.instructions for loop in keys.loops)
    trips = -(-key_heads // keys.constants["BLOCK_H"])
    pass_over_keys = (keys.instructions + (trips - 1) * trip) * keys.warps * length // keys.constants["BLOCK_L"]
    # 1.03 is the goal, and met but on sm_90; under causality the average query meets half the keys only, and its own
    # rotation weighs twice as much.
    for name, bound in (("D128-R64-full", 1.035 if target == "sm_90" else 1.03), ("D128-R64", 1.065)):
        case = CASES[f"attention_fwd-bfloat16-{name}"]
        fused, plain = found[case.name], found[case.plain]
        assert fused.main_loop.instructions <= plain.main_loop.instructions
        with_rotary, without = (heads * executed(counts, length, "full" not in name) for counts in (fused, plain))
        assert with_rotary + pass_over_keys <= bound * without


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.gpu.backend == "cuda"])
def test_decoding_reads_keys_and_values_once_and_a_coarse_row_and_computes_no_sine(target: str) -> None:
    if triton.__version__ != TRITON or find_nvdisasm() is None:
        pytest.skip("counts need the pinned triton and nvdisasm")
    loops = []
    for rotates in ((True, True), (False, False)):
        with compiling(target, "decode_kernel") as compiled:
            launch_decode(rotates=rotates)
        kernel, constants = compiled[0]
        sass = read_sass(kernel.asm["cubin"], find_nvdisasm())
        loops += innermost_loops(sass)[1]
    fused, plain = loops
    # D 128 in bf16; a coarse row is loaded by as many threads as it has columns, one number each.
    keys_and_values, coarse_row, slots = 2 * 2 * 128, 2 * 64 * 4, constants["BLOCK_S"]
    for loop, others in ((fused, {"32": 2}), (plain, {})):
        reads = accesses(loop, "LDGSTS")
        wide = reads.pop("128") * 16 * kernel.metadata.num_warps * 32
        assert (wide, dict(reads), accesses(loop, "LDG")) == (slots * keys_and_values, others, {})
    moved = keys_and_values + coarse_row / slots
    # what the ranges give is written and read again.
    length, groups, rows = 32768, 8, 4
    partials = 2 * decode_combine.most_splits(groups, rows) * rows * (128 + 1) * 4
    assert moved + partials / length <= 1.02 * keys_and_values
    assert not any(text.startswith(("MUFU.SIN", "MUFU.COS")) for text in fused)
    assert len(fused) <= 2.2 * len(plain)


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.gpu.backend == "cuda"])
def test_rotary_adds_no_instruction_to_the_loop_of_the_projections(target: str) -> None:
    if triton.__version__ != TRITON or find_nvdisasm() is None:
        pytest.skip("counts need the pinned triton and nvdisasm")
    found = {counts.name: counts for counts in gate(target) if counts.kernel == "qkv_rotary_kernel"}
    assert not {name: counts.spill_bytes for name, counts in found.items() if counts.spill_bytes}
    fused, plain = (found[f"qkv_rotary-bfloat16-{name}"] for name in ("D128-R64-rows8192", "D128-rows8192-plain"))
    loop, same = ([loop.instructions for loop in counts.loops if loop.products] for counts in (fused, plain))
    assert loop == same
    # the epilogue runs once, the loop goes over 4096 columns of x.
    tile = fused.constants
    assert fused.instructions - plain.instructions <= 0.25 * loop[0] * 4096 // tile["BLOCK_C"]
    with compiling(target, "qkv_rotary_kernel") as compiled:
        launch_qkv_rotary()
    _, loops = innermost_loops(read_sass(compiled[0][0].asm["cubin"], find_nvdisasm()))
    copies = (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_C"] * 2 // (16 * 32 * fused.warps)
    assert sum((accesses(loop, "LDGSTS") for loop in loops), Counter()) == {"128": copies}


def test_another_length_offset_or_window_of_attention_compiles_nothing_new() -> None:
    q, k = (meta(2, 512, heads, 128, dtype=torch.bfloat16) for heads in (32, 8))
    fine = meta(1, 64, 2, 64, dtype=torch.float32)
    with compiling("sm_90") as compiled:
        for length, keys, q_offset, k_offset, window in ((512, 512, 0, 0, 16), (16, 511, 48, 16, 1), (1, 7, 1, 1, 99)):
            x, y = q[:, :length], k[:, :keys]
            tables = Tables(meta(1, keys, 2, 64, dtype=torch.float32), fine)
            lse = meta(2, 32, length, dtype=torch.float32)
            tokens, rule = Tokens(q_offset=q_offset, k_offset=k_offset), Rule(0.1, window=window)
            attention_fwd.launch_attention_fwd_keys(y, y, tables, tokens, length)
            attention_fwd.launch_attention_fwd(x, y, y, tables, tokens, rule, True, x, lse, x)
            saved = (x, None, x, y, y, x, lse)
            attention_bwd.launch_attention_bwd(*saved, tables, tokens, rule, (True, True), True, x, y, y)
    hashes = {(kernel.metadata.name, kernel.hash) for kernel, _ in compiled}
    # the sums of dfreq are of two kinds of tiles.
    assert len(hashes) == len({name for name, _ in hashes}) + 1


def test_another_length_capacity_or_window_of_decoding_compiles_nothing_new() -> None:
    for page in (None, 64):
        with compiling("sm_90") as compiled:
            for length, capacity, window in ((1, 4096, 16), (2, 64 * 77, 1), (4, 65536, 99), (3, 64, 2**40)):
                launch_decode(length=length, capacity=capacity, rule=Rule(0.1, window=window), page=page)
        assert len({kernel.hash for kernel, _ in compiled}) == 2


def test_another_length_offset_or_batch_of_the_projections_compiles_nothing_new() -> None:
    for variant in ("", "all"):
        with compiling("sm_90") as compiled:
            for rows, sequences, offset in ((513, 1, 0), (1024, 2, 16), (3 * 333, 3, 1), (4096, 4096, 2**20)):
                launch_qkv_rotary(rows, sequences=sequences, offset=offset, variant=variant)
        assert len({kernel.hash for kernel, _ in compiled}) == 1


def test_another_length_or_page_table_of_appending_compiles_nothing_new() -> None:
    k = meta(2, 64, 8, 128, dtype=torch.bfloat16)
    with compiling("sm_90") as compiled:
        for length, pages, columns in ((1, 64, 8), (3, 77, 5), (16, 4096, 1), (7, 128, 64)):
            pool = meta(pages, 16, 8, 128, dtype=torch.bfloat16)
            block_table, kv_end = meta(2, columns, dtype=torch.int32), meta(2, dtype=torch.int64)
            append.launch_append(k[:, :length], k[:, :length], pool, pool, kv_end, block_table)
    assert len({kernel.hash for kernel, _ in compiled}) == 1


def test_another_length_or_offset_compiles_nothing_new() -> None:
    q, k = (torch.empty(2, 512, heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    fine = torch.empty(1, 64, 2, 64, device="meta")
    with compiling("sm_90") as compiled:
        for length in (1, 7, 16, 64, 65, 96, 511):
            coarse = torch.empty(1, length, 2, 64, device="meta")
            x, y = q[:, :length], k[:, :length]
            rotary.launch_rotary(x, y, x, y, coarse, fine, None, None, length - 1, False)
    assert len({kernel.hash for kernel, _ in compiled}) == len(ROTARY["sm_90"]["half"])
