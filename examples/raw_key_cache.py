"""Reads text over a live cache across the length where a model's RoPE changes, and compares with one pass over all.

    python -m examples.raw_key_cache                  # under 3 minutes on 2 idle cores, output in build/raw_key_cache
    python -m examples.raw_key_cache --output docs    # what the README shows

One small byte-level Llama is trained with plain RoPE at L0 = 128 bytes. Its weights then serve a Llama with dynamic NTK
and, fused, a Phi-3 with LongRoPE; both are read up to 4 L0 on test documents, token by token:

- transformers: plain forward calls over its dynamic cache, where keys stay rotated by the frequencies of their time;
- transformers, generate(): the same for Llama; Phi-3's drops its cache at the switch, so that one step reads all anew;
- raw keys: apply_raw_key_cache with recompute=False, which keeps cached values, and with recompute=True.

The truth for n tokens is one pass of the stock model over all n, without a cache and with a fresh rotary embedding. It
is in fp32, angles included, which are fp64 in this package: by that alone raw keys differ from it by a few 1e-6 to 1e-5
of the largest logit.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from examples.extrapolation.corpus import cut_segments, load_corpus
from examples.live_cache.decoding import Way, read_uncached, relative_errors, score, ways_of
from examples.live_cache.models import Family, Setting, families, train
from examples.live_cache.results import header, plot_errors, row

SETTING = Setting()
TRUTH = "one pass over all"


def run(setting: Setting, folder: Path) -> dict[str, Any]:
    """Trains, reads in every way, prints the tables, and writes logit_error.png and logit_error.json into `folder`."""
    text = cut_segments(load_corpus().test, setting.texts, setting.length)
    found = {}
    for title, family in families(setting, train(setting)).items():
        print(header(title, setting), flush=True)
        found[title] = compare(family, ways_of(title), text, setting)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "logit_error.json").write_text(json.dumps({"setting": asdict(setting), "models": found}) + "\n")
    plot_errors(found, setting, folder / "logit_error.png")
    return found


def compare(family: Family, ways: dict[str, Way], text: Tensor, setting: Setting) -> dict[str, Any]:
    """Scores and errors of the truth and of every way, printed as they come; text [B, length + 1]."""
    truth = read_uncached(family.fresh(), text, setting.prompt)
    found = {}
    for name, way in {TRUTH: None, **ways}.items():
        reading = way(family.fresh(), text, setting.prompt) if way else truth
        scores = score(reading, truth, text, setting)._asdict()
        # three digits are more than a figure shows.
        errors = [float(f"{error:.3g}") for error in relative_errors(reading, truth)]
        found[name] = {"scores": scores, "errors": errors}
        print(row(name, scores), flush=True)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Runs, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=SETTING.steps, help="of training")
    parser.add_argument("--output", type=Path, default=Path("build/raw_key_cache"), help="folder of figure and json")
    arguments = parser.parse_args(words)
    if arguments.steps < 1:
        parser.error(f"--steps: expected at least 1, got {arguments.steps}")
    run(replace(SETTING, steps=arguments.steps), arguments.output)
    print(f"\nlogit_error.png and logit_error.json in {arguments.output}")


if __name__ == "__main__":
    main()
