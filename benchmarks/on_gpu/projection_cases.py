"""From hidden states to rotated q and k, and v, beside one linear followed by others' rotary."""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from benchmarks import formulations, qkv_case
from benchmarks.measure import Way
from benchmarks.on_gpu import angles, rivals
from benchmarks.on_gpu.case import NOISE, Aim, Bench, Case
from benchmarks.on_gpu.device import Gpu
from benchmarks.on_gpu.floors import Cost
from benchmarks.on_gpu.sizes import Sizes
from benchmarks.on_gpu.timing import Rival, ready
from benchmarks.qkv_case import FLOOR, OURS, Projection
from benchmarks.shapes import ProjectionShape

Run = Callable[[Tensor], Sequence[Tensor]]


class OnGpu(qkv_case.Case):
    """The same case for a clock on the device, which doesn't wait within a call."""

    def wait(self) -> None:
        pass

    @property
    def cost(self) -> Cost:
        moved = self.weight.numel() + self.x.numel() + self.tokens * self.weight.shape[0]
        return Cost(moved * self.weight.element_size(), self.operations)

    def linear_then(self, name: str, needs: tuple[str, ...], make: Callable[[], Callable[..., None]]) -> Rival:
        """One linear, then a rotary in place on q and k together, [1, M, H + G, 2R] of the packed result."""
        full = f"linear + {name}"
        heads, rotated = self.shape.heads, 2 * self.shape.R

        def build() -> Way:
            rotate = make()

            def run(x: Tensor) -> Sequence[Tensor]:
                qkv = F.linear(x, self.weight, self.bias).unflatten(-1, (sum(heads), -1))
                rotate(qkv[:, :, : heads[0] + heads[1], :rotated])
                return qkv.split(heads, dim=-2)

            return self.way(full, "clex", run)

        return Rival(full, build, needs)

    def all_rivals(self) -> list[Rival]:
        positions = self.positions.to(self.device)
        freq = self.projection.freqs["clex"]
        single = angles.half_tables(freq, positions)
        operands = self.weight, self.bias, self.shape.heads

        def compiled() -> Callable[[Tensor], None]:
            rotate = formulations.compiled_whole(formulations.split_halves_in_place)
            return lambda qk: rotate(qk, *single)

        def flash() -> Callable[[Tensor], None]:
            rotate = rivals.flash_rotary(inplace=True)
            heads = (self.shape.H, self.shape.G)
            return lambda qk: rotate(*qk.split(heads, dim=2), *single)

        def together() -> Way:
            apply = formulations.compiled_whole(formulations.project_split_halves)
            return self.way(whole, "clex", lambda x: apply(x, *operands, *single))

        def eager() -> Way:
            tables = angles.doubled_tables(freq, positions, self.x.dtype)
            return self.way(plainly, "clex", lambda x: formulations.project_rotate_half(x, *operands, *tables))

        whole = "torch.compile of linear and split halves together"
        plainly = "linear + eager rotate-half (transformers)"
        return [
            self.linear_then("torch.compile split halves, in place", (), compiled),
            Rival(whole, together),
            self.linear_then("flash-attn rotary, in place", ("flash_attn",), flash),
            Rival(plainly, eager),
        ]


def make_projection(shape: ProjectionShape, tokens: int, gpu: Gpu) -> Bench:
    case = OnGpu(Projection(shape, "bf16"), tokens, device=gpu.device)
    backends = [ready(case.ours(f"{OURS}, backend={backend}", backend=backend)) for backend in gpu.projection_backends]
    return Bench(
        ours=ready(case.ours(OURS)),
        rivals=case.all_rivals(),
        own=backends,
        besides=[ready(case.linear()), ready(case.three_linears(every=1))],
        without=FLOOR,
        cost=case.cost,
        aims=[
            *([Aim(FLOOR, 1.03, "time over the bare linear")] if tokens >= 512 else []),
            *(Aim(backend.name, NOISE, f"auto over {backend.name}") for backend in backends),
        ],
        notes=[str(shape), "backend=auto", f"checked at up to {qkv_case.ROWS} tokens per input set"],
    )


def projection_cases(sizes: Sizes) -> list[Case]:
    return [
        Case(
            "qkv",
            "projection and rotary",
            f"{shape.name}, bf16, {tokens:,} token{'s' * (tokens > 1)}",
            partial(make_projection, shape, tokens),
        )
        for shape, counts in sizes.projections.items()
        for tokens in counts
    ]
