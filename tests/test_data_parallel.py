"""Data parallelism: DDP and FSDP2 train as one process does, and go on from checkpoints of other numbers of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import run_processes
from ropes import make_rope
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers_models import clex_model, random_tokens

from clex_kernels import clip_gradients, modules, param_groups
from clex_kernels.distributed import StepGenerator, shard_rotary
from clex_kernels.integrations import raw_keys

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*", "ignore:torch.distributed is disabled")

STEPS, SAVED, ROWS, LENGTH = 6, 3, 4, 8
SEED = 5
PARALLEL = ["ddp", "fsdp"]


class Run:
    """A Llama in training, in one process or as one of several."""

    def __init__(self, parallel: str | None = None, streams: tuple[int, ...] = (0,)):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        self.draws = [StepGenerator(SEED, stream) for stream in streams]
        self.model = clex_model("llama").train()
        if parallel == "fsdp":
            shard(self.model)
        self.forward = DistributedDataParallel(self.model) if parallel == "ddp" else self.model
        self.optimizer = torch.optim.AdamW(param_groups(self.model, lr=0.02, ode_lr=1e-3, weight_decay=0.1))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.times: list[float] = []
        self.generator: torch.Generator | None = None
        rope = self.model.base_model.clex_layer
        sample = rope.sample

        def sample_and_record(length: int, **options: Any) -> Any:
            table = sample(length, **(options | {"generator": self.generator, "plain_share": 0.0}))
            self.times.append(table.t)
            return table

        rope.sample = sample_and_record

    def step(self) -> tuple[float, list[float]]:
        """Over the rows of this process, a part of them by the draws of each stream; the loss, and both norms."""
        tokens = random_tokens(ROWS, LENGTH, seed=self.draws[0].step).chunk(self.world)[self.rank]
        total = torch.zeros((), dtype=torch.float64)
        for draws, part in zip(self.draws, tokens.chunk(len(self.draws)), strict=True):
            draws.advance()
            self.generator = draws.generator
            loss = loss_of(self.forward, part) / len(self.draws)
            loss.backward()
            total += loss.detach()
        norms = clip_gradients(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        if self.world > 1:
            dist.all_reduce(total)
        return float(total) / self.world, [float(norm) for norm in norms]

    def steps(self, count: int) -> dict[str, Any]:
        """What `count` steps gave, and the weights after them."""
        losses, norms = zip(*(self.step() for _ in range(count)), strict=True)
        weights = {name: whole(weight.detach()) for name, weight in self.model.named_parameters()}
        return {"losses": losses, "norms": norms, "times": list(self.times), "weights": weights}

    def save(self, path: Path) -> "Run":
        dcp.save(self._state(), checkpoint_id=path, no_dist=self.world == 1)
        return self

    def load(self, path: Path) -> "Run":
        dcp.load(state := self._state(), checkpoint_id=path, no_dist=self.world == 1)
        kinds = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **kinds)
        return self

    def _state(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": moments, "schedule": self.schedule, "draws": self.draws[0]}


def shard(model: PreTrainedModel, policy: MixedPrecisionPolicy | None = None) -> None:
    options = {"mp_policy": policy or MixedPrecisionPolicy()}
    shard_rotary(model.base_model.clex_layer)
    for layer in model.base_model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


def loss_of(forward: nn.Module, tokens: Tensor) -> Tensor:
    # transformers' own loss is in fp32.
    logits = forward(input_ids=tokens, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train_in_two(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What two processes do."""
    results: dict[str, Any] = {}
    for parallel in PARALLEL:
        run = Run(parallel)
        first = run.steps(SAVED)
        rest = run.save(folder / parallel).steps(STEPS - SAVED)
        results[parallel] = {name: first[name] + rest[name] for name in ("losses", "norms")} | {
            "weights": rest["weights"],
            "times": rest["times"],
        }
        results[f"{parallel}, a stream for each rank"] = Run(parallel, (rank,)).steps(STEPS)
    results["evaluation"] = evaluate_after_training()
    results["bf16"] = tables_under_bf16()
    results["clipped"] = [clip_mixed(dtensors) for dtensors in ("all", "some")]
    return results


def train_in_four(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What four processes do with the checkpoints of two."""
    results = {f"{kind} to fsdp": Run("fsdp").load(folder / kind).steps(STEPS - SAVED) for kind in PARALLEL}
    results["fsdp to ddp"] = Run("ddp").load(folder / "fsdp").steps(STEPS - SAVED)
    results["meshes"] = clip_over_meshes()
    return results


def evaluate_after_training() -> dict[str, Any]:
    """Logits and generated tokens between and after steps, of the sharded model and of its weights in one piece."""
    # as on a GPU at worst, where neither addresses nor version counters tell one gather from another.
    before, modules.weights_fingerprint = modules.weights_fingerprint, lambda *weights: 0
    run, found = Run("fsdp"), []
    tokens = random_tokens(2, 2 * LENGTH)
    stats = run.model.base_model.clex_layer.cache_stats
    for _ in range(2):
        # in training mode, so that no switch of modes drops the tables.
        with torch.no_grad():
            logits = run.model(tokens, use_cache=False).logits
            hits = stats().hits
            run.model(tokens, use_cache=False)
        kept = stats().hits > hits
        found.append((logits, logits_in_one_piece(run, tokens)))
        run.steps(1)
    run.model.eval()
    made = run.model.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    piece = one_piece(run)
    modules.weights_fingerprint = before
    expected = piece.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    again = run.steps(1)["losses"]
    return {"logits": found, "generated": (made, expected), "kept": kept, "loss after": again}


def one_piece(run: Run) -> PreTrainedModel:
    model = clex_model("llama").eval()
    weights = {name: whole(weight) for name, weight in run.model.state_dict().items()}
    model.load_state_dict(weights)
    return model


def logits_in_one_piece(run: Run, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return one_piece(run)(tokens, use_cache=False).logits


def tables_under_bf16() -> dict[str, Any]:
    """Tables that attention meets in training and in evaluation while FSDP computes in bf16, and those of fp32."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    model, plain = clex_model("llama").float().train(), clex_model("llama").float().train()
    shard(model, policy)
    met, attend = [], raw_keys.attention

    def attend_and_record(q: Tensor, k: Tensor, v: Tensor, table: Any, *args: Any, **options: Any) -> Tensor:
        met.append({"dtype": str(q.dtype), "freq": table.freq.detach(), "coarse": table.coarse, "fine": table.fine})
        return attend(q, k, v, table, *args, **options)

    raw_keys.attention = attend_and_record
    tokens = random_tokens(2, 3 * LENGTH)
    for one in (plain, model):
        torch.manual_seed(SEED)
        one(tokens[:, :LENGTH], use_cache=False).logits.float().square().mean().backward()
        gradients = [whole(weight.grad) for weight in one.base_model.clex_layer.parameters()]
        with torch.no_grad():
            one(tokens, use_cache=False)
    raw_keys.attention = attend
    return {"met": met, "gradients": gradients}


def mixed_optimizer(place: Any) -> torch.optim.Optimizer:
    """Two groups of weights with gradients, of which `place` splits what it likes."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for max_norm in (0.5, 100.0):
        gradients = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(4)]
        weights = [nn.Parameter(place(n, torch.zeros_like(gradient))) for n, gradient in enumerate(gradients)]
        for n, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            weight.grad = place(n, gradient)
        groups.append({"params": weights, "max_norm": max_norm})
    return torch.optim.SGD(groups, lr=0.1)


def clipped(optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """Norms and gradients after a clip."""
    norms = clip_gradients(optimizer)
    return norms, [whole(weight.grad) for group in optimizer.param_groups for weight in group["params"]]


def clip_mixed(dtensors: str) -> tuple[list[Tensor], list[Tensor]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return clipped(
        mixed_optimizer(lambda n, x: x if dtensors == "some" and n % 2 else distribute_tensor(x, mesh, [Shard(n % 2)]))
    )


def clip_over_meshes() -> tuple[list[Tensor], list[Tensor]]:
    """Split over one dimension of a mesh and repeated over the other, split over both, by another mesh, and plain."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))

    def place(n: int, x: Tensor) -> Tensor:
        ways = [
            lambda: distribute_tensor(x, mesh, [Replicate(), Shard(0)]),
            lambda: distribute_tensor(x, mesh, [Shard(0), Shard(1)]),
            lambda: distribute_tensor(x, mesh["heads"], [Shard(1)]),
            lambda: x,
        ]
        return ways[n]()

    return clipped(mixed_optimizer(place))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints go."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def in_two(folder: Path) -> list[dict[str, Any]]:
    return run_processes(train_in_two, 2, folder, folder)


@pytest.fixture(scope="module")
def in_four(in_two: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    return run_processes(train_in_four, 4, folder, folder)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """One process over the whole batch."""
    return Run().steps(STEPS)


def assert_same_training(found: dict[str, Any], expected: dict[str, Any], since: int = 0) -> None:
    for name in ("losses", "norms"):
        assert_close(found[name], expected[name][since:], rtol=1e-9, atol=1e-9)
    assert_close(found["weights"], expected["weights"], rtol=1e-8, atol=1e-8)


def test_the_ode_learns_at_many_factors(expected):
    assert len(set(expected["times"])) > 2
    start = dict(clex_model("llama").named_parameters())
    for name, weight in expected["weights"].items():
        assert (weight - start[name]).abs().max() > 1e-4


@pytest.mark.parametrize("parallel", PARALLEL)
def test_shared_draws_train_as_one_process_on_the_whole_batch(in_two, expected, parallel):
    for results in in_two:
        assert_same_training(results[parallel], expected)
        assert results[parallel]["times"] == expected["times"]


@pytest.mark.parametrize("parallel", PARALLEL)
def test_own_draws_train_as_one_process_that_draws_for_each_part(in_two, parallel):
    expected = Run(streams=(0, 1)).steps(STEPS)
    found = [results[f"{parallel}, a stream for each rank"] for results in in_two]
    for rank, result in enumerate(found):
        assert_same_training(result, expected)
        assert result["times"] == expected["times"][rank::2]
    assert found[0]["times"] != found[1]["times"]


@pytest.mark.parametrize("kind", ["ddp to fsdp", "fsdp to fsdp", "fsdp to ddp"])
def test_four_processes_go_on_from_two(in_four, expected, kind):
    for results in in_four:
        assert_same_training(results[kind], expected, SAVED)
        assert results[kind]["times"] == expected["times"][SAVED:]


@pytest.mark.usefixtures("in_two")
@pytest.mark.parametrize("kind", PARALLEL)
def test_one_process_goes_on_from_two(folder, expected, kind):
    assert_same_training(Run().load(folder / kind).steps(STEPS - SAVED), expected, SAVED)


def test_sharded_model_evaluates_and_generates_as_in_one_piece(in_two):
    for results in in_two:
        result = results["evaluation"]
        for found, expected in result["logits"]:
            assert_close(found, expected, rtol=1e-10, atol=1e-10)
        before, after = (expected for _, expected in result["logits"])
        assert (before - after).abs().max() > 1e-3
        assert torch.equal(*result["generated"])
        assert result["kept"]


def test_tables_are_those_of_fp32_weights_where_fsdp_computes_in_bf16(in_two):
    for results in in_two:
        met = results["bf16"]["met"]
        expected, found = met[: len(met) // 2], met[len(met) // 2 :]
        assert len(found) == 4
        for exact, table in zip(expected, found, strict=True):
            assert (exact.pop("dtype"), table.pop("dtype")) == ("torch.float32", "torch.bfloat16")
            assert_close(table, exact, rtol=0, atol=0)
        assert all(gradient.dtype == torch.float32 and gradient.norm() > 0 for gradient in results["bf16"]["gradients"])


@pytest.mark.parametrize("kind", ["all", "some"])
def test_clipping_takes_norms_over_all_ranks(in_two, kind):
    expected = clipped(mixed_optimizer(lambda _, x: x))
    assert expected[0][0] > 0.5
    for results in in_two:
        assert_close(results["clipped"][kind == "some"], expected, rtol=1e-12, atol=1e-12)


def test_clipping_takes_gradients_of_several_meshes(in_four):
    expected = clipped(mixed_optimizer(lambda _, x: x))
    for results in in_four:
        assert_close(results["meshes"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"param_dtype": torch.bfloat16}, "expected a param_dtype of None or torch.float32 for the ODE, got torch.bf"),
        ({"reduce_dtype": torch.float16}, "expected a reduce_dtype of None or torch.float32 or torch.float64 for"),
        ({"output_dtype": torch.float32}, "expected a output_dtype of None for the ODE, got torch.float32"),
    ],
)
def test_policies_that_round_the_ode_are_refused(policy, message):
    with pytest.raises(ValueError, match=f"mp_policy: {message}"):
        shard_rotary(make_rope(), mp_policy=MixedPrecisionPolicy(**policy))


def test_only_whole_rotary_embeddings_are_sharded():
    with pytest.raises(TypeError, match="rope: expected a ClexRotaryEmbedding, got Linear"):
        shard_rotary(nn.Linear(2, 2))
