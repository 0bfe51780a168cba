"""What the static model assumes of the GPUs: one product per target, from its vendor's data sheets and CUDA's manuals.

Rates are per clock and multiprocessor, clocks those at which the data sheets' rates of tensor cores hold. Nothing here
is measured.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Hardware:
    """A GPU: speeds of the whole, rates of a multiprocessor, and what limits the blocks that it holds."""

    product: str
    multiprocessors: int
    clock_ghz: float
    memory_gb_per_s: float
    # multiply-adds of bf16 on tensor cores, with fp32 sums; results of the other pipes.
    tensor_macs: int
    fp32: int
    fp64: int
    integer: int
    max_warps: int
    max_blocks: int
    shared_bytes: int
    tensor_columns: int = 0
    mufu: int = 16
    conversion: int = 64
    instructions: int = 4
    shared_bytes_per_clock: int = 128
    l2_bytes_per_clock: int = 64
    registers: int = 65536

    @property
    def memory_bytes_per_clock(self) -> float:
        """A multiprocessor's share of the memory's speed."""
        return self.memory_gb_per_s / (self.multiprocessors * self.clock_ghz)

    @property
    def tensor_tflops(self) -> float:
        return 2 * self.tensor_macs * self.multiprocessors * self.clock_ghz / 1e3

    def assumptions(self) -> dict[str, str]:
        """Every figure by its name, for the report."""
        return {field.name.replace("_", " "): f"{getattr(self, field.name):,}" for field in fields(self)[1:]} | {
            "product": self.product
        }


HARDWARE = {
    "sm_80": Hardware("A100 SXM 80 GB", 108, 1.41, 2039, 1024, 64, 32, 64, 64, 32, 164 << 10),
    "sm_90": Hardware("H100 SXM", 132, 1.83, 3350, 2048, 128, 64, 64, 64, 32, 228 << 10),
    "sm_100": Hardware("B200", 148, 1.85, 8000, 4096, 128, 64, 64, 64, 32, 228 << 10, tensor_columns=512),
    "sm_120": Hardware("RTX PRO 6000 Blackwell", 188, 2.6, 1792, 512, 128, 2, 64, 48, 24, 100 << 10),
}
