"""transformers models with heads or sequences split over processes: all that one process computes, and no less."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from split_models import (
    GENERATING,
    LLAMA,
    QWEN3,
    SAVED,
    SPLIT_HEADS,
    SPLIT_TOKENS,
    Whole,
    batch,
    bf16_step,
    generate,
    make_model,
    observe,
    plain_logits,
    raw_key_logits,
    work,
)
from tolerance import assert_within_rule
from transformers import AutoModelForCausalLM
from transformers_models import scaled_model, widen_norms

from clex_kernels.integrations.transformers import apply_clex, apply_raw_key_cache

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*", "ignore:.*max_factor.*", "ignore:lengths past.*")

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
AS_FP32 = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What each of four processes saw, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("parallel")
    return run_processes(work, 4, folder, folder, time_limit=300.0), folder


@cache
def one_process(family: str, extras: tuple[tuple[str, Any], ...], case: str) -> dict[str, Any]:
    """What one process sees, with the model after it."""
    model = make_model(family, dict(extras))
    return observe(model, Whole(model), case) | {"model": model}


def truth(family: str, extras: dict[str, Any], case: str) -> dict[str, Any]:
    kind = next((kind for kind in ("padded", "checkpointed", "accumulated") if kind in case), "")
    return one_process(family, tuple(extras.items()), kind)


def assert_same(found: dict[str, Any], expected: dict[str, Any], close: dict[str, float] = CLOSE) -> None:
    """Everything that was found."""
    for name, value in found.items():
        if isinstance(value, dict):
            assert value.keys() == expected[name].keys()
        torch.testing.assert_close(value, expected[name], **close, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", SPLIT_HEADS)
def test_split_heads_see_what_one_process_sees(seen, case):
    family, extras, *_ = SPLIT_HEADS[case]
    expected = truth(family, extras, case)
    for found in seen[0]:
        names = ("logits", "padded", "losses", "gradients", "weights", "logits after")
        # experts are chosen, and weighed, in fp32.
        close = AS_FP32 if family == "mixtral" else CLOSE
        assert_same({name: found[case][name] for name in names}, expected, close)


@pytest.mark.parametrize("case", SPLIT_TOKENS)
def test_split_sequences_see_what_one_process_sees(seen, case):
    family, extras, _ = SPLIT_TOKENS[case]
    for found in seen[0]:
        assert_same(found[f"tokens {case}"], truth(family, extras, case))


@pytest.mark.parametrize("case", [*SPLIT_HEADS, *(f"tokens {case}" for case in SPLIT_TOKENS)])
def test_ranks_agree_bit_for_bit_on_the_ode(seen, case):
    first, *others = ({name: x for name, x in found[case]["weights"].items() if "clex" in name} for found in seen[0])
    assert len(first) == 2
    for weights in others:
        assert all(torch.equal(weights[name], first[name]) for name in first)


def test_heads_and_sequences_split_at_once_see_what_one_process_sees(seen):
    expected = truth(*LLAMA[1], "")
    for found in seen[0]:
        assert_same(found["both"], {**expected, "losses": expected["losses"][:1]})


def test_sequences_and_weights_shared_by_the_same_ranks_see_what_one_process_sees(seen):
    expected = truth(*LLAMA[2], "")
    for found in seen[0]:
        assert_same(found["sharded"], {**expected, "losses": expected["losses"][:1]})


@pytest.mark.parametrize("case", GENERATING)
def test_generation_over_split_heads_is_that_of_one_process(seen, case):
    family, extras, *_ = SPLIT_HEADS[case]
    expected = generate(copy.deepcopy(truth(family, extras, case)["model"]))
    kept = {"plan-R4-G2": 1, "after-R2-G2": 1, "before-R2-G3-uneven": 3}[case]
    for found in seen[0]:
        # transformers hands out logits in fp32.
        assert_same(found[case]["generated"], {**expected, "heads": kept}, AS_FP32)


@pytest.mark.parametrize("case", SAVED)
def test_split_model_saved_is_whole_in_one_process(seen, case):
    family, extras, *_ = SPLIT_HEADS[case]
    model = AutoModelForCausalLM.from_pretrained(seen[1] / f"{case} again", dtype=torch.float64)
    apply_clex(widen_norms(model))
    with torch.no_grad():
        logits = model(batch()).logits
    torch.testing.assert_close(logits, truth(family, extras, case)["logits after"], **CLOSE)


@pytest.mark.parametrize("case", SPLIT_HEADS)
def test_split_heads_without_clex_are_those_of_the_plain_model(seen, case):
    family, extras, *_ = SPLIT_HEADS[case]
    expected = plain_logits(copy.deepcopy(truth(family, extras, case)["model"]))
    for found in seen[0]:
        # transformers' own cosines are in fp32.
        torch.testing.assert_close(found[case]["plain logits"], expected, **AS_FP32)


@pytest.mark.parametrize(("case", "model"), {"copy": LLAMA[2], "frozen": QWEN3}.items(), ids=["copy", "frozen"])
def test_a_copy_and_a_model_frozen_while_it_is_split_see_what_one_process_sees(seen, case, model):
    for found in seen[0]:
        assert_same(found[case], truth(*model, ""))


def test_raw_keys_of_split_heads_decode_as_in_one_process(seen):
    model = scaled_model("llama", "dynamic", num_key_value_heads=1)
    apply_raw_key_cache(model, recompute=True)
    expected = raw_key_logits(model)
    with torch.no_grad():
        shards = model(batch()).logits
    for found in seen[0]:
        assert_same(found["raw keys"], {"decoded": expected, "shards": shards})


def test_mean_of_the_ranks_own_losses_is_that_of_one_process(seen):
    expected = make_model(*LLAMA[2])(batch(), labels=batch()).loss
    for found in seen[0]:
        torch.testing.assert_close(found["loss"], expected.detach(), **AS_FP32)


@pytest.mark.parametrize("split", ["heads", "tokens"])
def test_bf16_autocast_errs_no_more_than_in_one_process(seen, split):
    models = {dtype: make_model(*LLAMA[1]).to(dtype) for dtype in (torch.float64, torch.float32)}
    exact = models[torch.float64]
    loss, _ = Whole(exact.train()).loss(batch())
    loss.backward()
    with torch.no_grad():
        logits = exact.eval()(batch()).logits
    expected = {"logits": logits, "ode": exact.base_model.clex_layer.proj_func.ode_down_proj.grad}
    single = bf16_step(models[torch.float32], Whole(models[torch.float32]))
    for found in seen[0]:
        for name, value in found["bf16"][split].items():
            assert_within_rule(value, single[name], expected[name])


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "heads": "mesh: expected a size that divides the model's H = 6 heads, got 4",
        "family": "model: expected a family whose tensor parallel plan splits attention, got PhimoeForCausalLM",
        "mesh": "mesh: expected a DeviceMesh, got ProcessGroup",
        "split already": "model: expected one that every rank has whole",
        "split by hand": "heads: expected 4 of them over 1 ranks, got 1 here",
        "not patched": "model: expected one patched by apply_clex or apply_raw_key_cache",
        "twice": "model: expected one that takes whole sequences",
        "heads draw apart": "generator: expected one in the same state on all ranks",
        "tokens draw apart": "generator: expected one in the same state on all ranks",
        "cache": "cache: expected none where sequences are split over ranks",
        "use_cache": "cache: expected none where sequences are split over ranks (shard_context), got use_cache=True",
        "generate": "cache: expected none where sequences are split over ranks",
        "labels": "shift_labels: expected what comes next for every token",
        "copy": "model: expected whole heads to copy it",
        "uncut positions": "position_ids: expected consecutive ones",
        "holes": "attention_mask: expected one block of ones in every row",
    }.items(),
    ids=lambda value: value if len(value) < 20 else "",
)
def test_refuses_by_name(seen, call, message):
    for found in seen[0]:
        assert found["refused"][call].startswith(message)
