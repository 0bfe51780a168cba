"""Work that is split over ranks, or over blocks of keys, and put together again."""

from .mutant import Mutant

MERGING = ("test_merging.py",)
CONTEXT = ("test_context_parallel.py",)
SPLIT_DECODE = ("test_split_decode.py",)
SHARDING = ("test_sharding.py",)
TENSOR = ("test_tensor_parallel.py",)
DATA = ("test_data_parallel.py",)
DRAWS = ("test_step_generator.py",)
TRANSFORMERS = ("test_transformers_parallel.py",)

SPLITS = [
    Mutant(
        "parts merged by equal weights",
        "clex_kernels/merging.py",
        "(largest + total.log()).masked_fill(is_empty, -math.inf), shares / total",
        "(largest + total.log()).masked_fill(is_empty, -math.inf), 0 * shares + 1 / len(lses)",
        MERGING,
    ),
    Mutant(
        "chunks in order, no zigzag",
        "clex_kernels/distributed/zigzag.py",
        "torch.cat([first + a * chunk for a in (ranks.rank, 2 * ranks.size - 1 - ranks.rank)])",
        "torch.cat([first + a * chunk for a in (2 * ranks.rank, 2 * ranks.rank + 1)])",
        CONTEXT,
    ),
    Mutant(
        "keys taken for those of the next rank",
        "clex_kernels/distributed/context.py",
        "source = (self.ranks.rank - step) % self.ranks.size",
        "source = (self.ranks.rank + step) % self.ranks.size",
        CONTEXT,
    ),
    Mutant(
        "dfreq of one rank's tokens alone",
        "clex_kernels/distributed/context.py",
        "            dist.all_reduce(dfreq, group=ctx.terms.ranks.group)\n",
        "            pass\n",
        CONTEXT,
    ),
    Mutant(
        "padding counted from every chunk",
        "clex_kernels/distributed/context.py",
        "(kv_start - pair.k_offset).clamp(0, terms.chunk)",
        "kv_start.clamp(0, terms.chunk)",
        CONTEXT,
    ),
    Mutant(
        "split cache: queries not moved to this rank's slots",
        "clex_kernels/distributed/split_decode.py",
        "position_ids=(at - here.first).clamp(min=0)",
        "position_ids=at.clamp(min=0)",
        SPLIT_DECODE,
    ),
    Mutant(
        "split cache: new tokens on every rank",
        "clex_kernels/distributed/split_decode.py",
        "k_cache, v_cache, here.kv_end - here.first, None)",
        "k_cache, v_cache, here.kv_end % k_cache.shape[1] + k.shape[1], None)",
        SPLIT_DECODE,
    ),
    Mutant(
        "DTensors: the first key head for all ranks",
        "clex_kernels/sharding.py",
        "return x.narrow(dim, self.rank(HEADS) * groups // ranks * each,",
        "return x.narrow(dim, 0 * groups // ranks * each,",
        SHARDING,
    ),
    Mutant(
        "DTensors: dfreq of one rank's heads alone",
        "clex_kernels/sharding.py",
        "freq.to_local(grad_placements=self.placed(None, None, Partial()))",
        "freq.to_local()",
        SHARDING,
    ),
    Mutant(
        "DTensors: the first rank's sequences for all",
        "clex_kernels/sharding.py",
        "x = parts[rank] if rank < len(parts) else x[:0]",
        "x = parts[0]",
        SHARDING,
    ),
    Mutant(
        "output bias added by every rank",
        "clex_kernels/distributed/tensor.py",
        "return out if self.bias is None else out + self.bias.to_local().to(out.dtype)",
        "return out if self.bias is None else out + mesh.size() * self.bias.to_local().to(out.dtype)",
        TENSOR,
    ),
    Mutant(
        "draws alike in all streams",
        "clex_kernels/distributed/data.py",
        "_mix(self._seed, self._step, self._stream)",
        "_mix(self._seed, self._step)",
        DRAWS,
    ),
    Mutant(
        "tables kept over a gather of new weights",
        "clex_kernels/distributed/data.py",
        "    if isinstance(rope.proj_func.ode_up_proj, DTensor):\n        rope.invalidate()",
        "    pass",
        DATA,
    ),
    Mutant(
        "norm of one rank's part of the gradients",
        "clex_kernels/training.py",
        "square if way is None else DTensor.from_local(square, *way, run_check=False).full_tensor()",
        "square",
        DATA,
    ),
    Mutant(
        "transformers: dfreq of one rank's heads alone",
        "clex_kernels/integrations/split.py",
        "            freq = sum_gradients(freq, self.heads.group)\n",
        "            pass\n",
        TRANSFORMERS,
    ),
    Mutant(
        "transformers: dfreq as often as ranks share a sequence",
        "clex_kernels/integrations/split.py",
        "lambda dfreq: dfreq / self.token_ranks",
        "lambda dfreq: dfreq",
        TRANSFORMERS,
    ),
]
