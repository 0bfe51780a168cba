"""The option and fixtures that bring ODE weights to the benchmarks."""

from pathlib import Path

import pytest

from benchmarks.weights import Weights, learned_weights, synthetic_weights


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--weights", type=Path, help="ODE weights left by a training run; synthetic ones without it")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "weights" in metafunc.fixturenames:
        kinds = ["learned", "synthetic"] if metafunc.config.getoption("weights") else ["synthetic"]
        metafunc.parametrize("weights", kinds, indirect=True, scope="session")


def make_weights(kind: str, config: pytest.Config) -> Weights:
    return learned_weights(config.getoption("weights")) if kind == "learned" else synthetic_weights()


@pytest.fixture(scope="session")
def weights(request: pytest.FixtureRequest) -> Weights:
    """Every kind of weights there is, one case each."""
    return make_weights(request.param, request.config)


@pytest.fixture(scope="session")
def best_weights(request: pytest.FixtureRequest) -> Weights:
    """Learned weights where there are some, else synthetic ones."""
    return make_weights("learned" if request.config.getoption("weights") else "synthetic", request.config)
