"""The benchmarks of the projection to rotated q and k on small shapes: truths and ways, and the report's section."""

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

from test_report import make_info

from benchmarks import exact, formulations, qkv_case, report, summary
from benchmarks.measure import Way
from benchmarks.shapes import PROJECTIONS, ProjectionShape

WHOLE = ProjectionShape("whole", C=24, H=4, G=2, D=8, R=4)
PARTIAL = ProjectionShape("partial", C=24, H=4, G=4, D=10, R=2, has_bias=True)


@pytest.fixture
def eager(monkeypatch):
    """Nothing is compiled, and no uncompiled formulation is left behind as a compiled one."""
    caches = formulations.compiled_whole, formulations.for_q_and_k, formulations.with_frequencies
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    yield
    for cache in caches:
        cache.cache_clear()


def errors_of(case: qkv_case.Case, ways: list[Way]) -> dict[str, dict[str, float]]:
    """By name, of both input sets together."""
    errors: dict[str, dict[str, float]] = {}
    for way in ways:
        for turn in range(qkv_case.SETS):
            way.prepare(turn)
            for quantity, error in way.errors(turn, way.run()).items():
                known = errors.setdefault(way.name, {})
                known[quantity] = max(error, known.get(quantity, 0.0))
    return errors


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("shape", [WHOLE, PARTIAL], ids=lambda shape: shape.name)
@pytest.mark.parametrize("tokens", [1, 100])
def test_every_way_of_a_projection_is_right_on_both_input_sets(shape, tokens):
    case = qkv_case.Case(qkv_case.Projection(shape, "fp32"), tokens)
    ways = [case.ours(qkv_case.OURS), case.ours(qkv_case.PLAIN, "plain"), case.linear(), case.three_linears(1)]
    errors = errors_of(case, ways + case.rivals(1, count=4 if shape is WHOLE else 3))
    assert len(errors) == (8 if shape is WHOLE else 7)
    for name, found in errors.items():
        assert set(found) == {"q", "k", "v"}
        assert max(found.values()) < 1e-5, name


@pytest.mark.usefixtures("eager")
def test_every_way_of_training_gives_the_gradients():
    case = qkv_case.Case(qkv_case.Projection(WHOLE, "fp32"), tokens=100, trains=True)
    ours, frozen = case.ours(qkv_case.OURS, learns=True), case.ours(qkv_case.FROZEN)
    errors = errors_of(case, [ours, frozen, case.linear(), *case.training_rivals(1)])
    for name, found in errors.items():
        learns = name not in (qkv_case.FROZEN, qkv_case.FLOOR)
        assert set(found) == {"q", "k", "v", "dx", "dweight", *(["dfreq"] if learns else [])}
        assert max(found.values()) < 1e-4, name


def test_a_truth_is_rotated_by_its_positions_and_only_in_the_first_channels():
    case = qkv_case.Case(qkv_case.Projection(PARTIAL, "fp32"), tokens=3)
    drawn, freq = case.sets[1], case.projection.freqs["clex"]
    truth, raw = drawn.truth("clex", case.positions), drawn.raw.detach()
    cos, sin = exact.cos_sin(torch.arange(qkv_case.LENGTH - 3, qkv_case.LENGTH), freq)
    expected = torch.cat((exact.rotate(raw[:, :, :4, :4], cos, sin), raw[:, :, :4, 4:]), dim=-1)
    torch.testing.assert_close(truth["q"], expected)
    torch.testing.assert_close(truth["v"], raw[:, :, 8:])
    torch.testing.assert_close(drawn.truth("none", case.positions)["q"], raw[:, :, :4])


def test_a_wrong_rotation_and_a_wrong_gradient_are_noticed():
    case = qkv_case.Case(qkv_case.Projection(WHOLE, "fp32"), tokens=100, trains=True)
    way = case.ours(qkv_case.FROZEN)
    way.prepare(0)
    q, k, v, dx, dweight = way.run()
    right = way.errors(0, (q, k, v, dx, dweight))
    dx = dx.clone()
    # no gradient was put in here, so that there is none to come out.
    dx[:, next(row for row in range(100) if row not in case.sets[0].rows)] += 0.1
    wrong = way.errors(0, (q.flip(-1), k, v, dx, dweight))
    assert {name for name in wrong if wrong[name] > 2 * right[name]} == {"q", "dx"}


def test_operations_and_weights_are_counted():
    case = qkv_case.Case(qkv_case.Projection(WHOLE, "bf16"), tokens=5)
    assert (case.operations, case.weight_bytes) == (2 * 5 * 24 * 64, 24 * 64 * 2)
    assert all(shape.D >= 2 * shape.R and shape.H % shape.G == 0 for shape in PROJECTIONS)


def make_qkv_info(**changes):
    curves = {"tokens": 1, "operations": 5e9, "bytes": 50_000_000, "three": "plain"}
    return make_info(section="qkv", case="Phi-2, bf16, 1 token", curves=curves) | changes


def test_projections_have_a_table_with_or_without_figures():
    gpu = make_qkv_info(curves={})
    rows = summary.qkv_table([make_info(), make_qkv_info(), gpu]).splitlines()[2:]
    assert rows == [
        "| Phi-2, bf16, 1 token | 2 ms | 4 ms | 1.6 ms | 10 ms | 0.500x | 1.250x | 5.00x | 2.5e+03 | 25 |",
    ]
    assert report.qkv_parts([make_qkv_info()])[-1].splitlines()[2:] == rows
    assert report.qkv_parts([make_info(), gpu])[-1] == "Not measured in this run."
    assert "qkv" in report.SECTIONS
