"""The serving example's command."""

import re

import pytest
from transformers_models import clex_model

from examples import serve


def test_the_command_streams_and_sums_up(capsys):
    options = "--requests 5 --rate 100 --prompt 4 60 --new 2 12 --pages 8 --chunk 32"
    serve.main(options.split())
    first, *lines, rate, steps, pages, wait, gap = capsys.readouterr().out.splitlines()
    assert "random model" in first
    assert all(re.fullmatch(r" *\d+\.\d\d s( \d+:\d+\.?)+", line) for line in lines)
    words = [word for line in lines for word in line.split()[2:]]
    assert sorted(word[0] for word in words if word.endswith(".")) == list("01234")
    assert re.fullmatch(r"5 requests in .* s: \d+ new tokens/s, \d+ with those of prompts", rate)
    assert re.fullmatch(r"\d+ steps of \d sequences at most, \d+ evictions", steps)
    assert re.fullmatch(r"pages in use: \d+% on average, \d of 8 at most, 0 now", pages)
    assert re.fullmatch(r"time to the first token: median \d+ ms, worst \d+ ms", wait)
    assert re.fullmatch(r"time from token to token: median \d+ ms, worst \d+ ms", gap)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--requests 0", "--requests: expected at least 1, got 0"),
        ("--rate 0", "--rate: expected a finite number > 0, got 0"),
        ("--prompt 9 3", "--prompt: expected 1 <= LEAST <= MOST, got 9 3"),
        ("--pages 4", "--pages: expected room for a longest request of 495 tokens, got 64"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(words, message, capsys):
    with pytest.raises(SystemExit):
        serve.main(words.split())
    assert message in capsys.readouterr().err


def test_the_command_serves_a_model_from_a_directory(tmp_path, capsys):
    clex_model("llama").save_pretrained(tmp_path)
    options = "--requests 2 --rate 100 --prompt 4 9 --new 2 3 --device cpu --dtype float32"
    serve.main(["--model", str(tmp_path), *options.split()])
    assert "2 requests in" in capsys.readouterr().out
    for words, message in {
        "--page-size 20": "page_size: expected a multiple of 16, got 20",
        "--temperature -1": r"temperature: expected a finite number >= 0, got -1\.0",
    }.items():
        with pytest.raises(SystemExit, match=message):
            serve.main(["--model", str(tmp_path), *options.split(), *words.split()])
