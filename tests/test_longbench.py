"""The harness over patched models: scores and answers against stock transformers, in batches and from the shell."""

import json
import random
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch
from lm_eval import evaluator, simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers_models import TRAIN_LENGTH, VOCABULARY, clex_model, stock_model, true_logits

from examples import longbench
from examples.longbench import ClexLM, settings_over

SPECIAL = ["<pad>", "<eos>", "Question:", "Answer:"]
WORDS = [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]
EOS = SPECIAL.index("<eos>")
MAX_LENGTH = 4 * TRAIN_LENGTH
NEW_TOKENS = 4
# tokens of the prompts: below, at and above the edges of t, some crossing one while they generate, two too long.
LENGTHS = [5, 6, 7, 8, 9, 13, 15, 16, 17, 21, 28, 33, 40]

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: /data/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
PERPLEXITY = """
task: tiny_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: /data/questions.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
TASKS = ["my_questions", "tiny_choice", "tiny_perplexity"]

pytestmark = pytest.mark.filterwarnings("ignore:.*max_factor.*", "ignore:lengths past.*")


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No hub, a cache of its own, and nothing slow: the harness's own tasks (20 s), pip's list of packages (2 s)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        patch.setattr(longbench, "TaskManager", partial(TaskManager, include_defaults=False))
        yield


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    draw = random.Random(0)
    found = []
    for number, length in enumerate(LENGTHS):
        text = " ".join(draw.choices(WORDS, k=length - 3))
        choices = [" ".join(draw.choices(WORDS, k=k)) for k in (1, 1, 3, 6)]
        sample = {"text": text, "question": draw.choice(WORDS), "answer": "w1 w2 w3 w4"}
        found.append(sample | {"choices": choices, "right": number % len(choices)})
    return found


@pytest.fixture(scope="module")
def tasks(samples, tmp_path_factory) -> Path:
    """A directory with the task in longbench's docstring, one of choices and one of perplexity."""
    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, samples)))
    questions = longbench.__doc__.split("--include-path DIR:\n\n")[1].split("\n\n")[0]
    questions = textwrap.dedent(questions).replace("max_gen_toks: 32", f"max_gen_toks: {NEW_TOKENS}")
    for name, task in zip(TASKS, (questions, CHOICE, PERPLEXITY), strict=True):
        (directory / f"{name}.yaml").write_text(task.replace("/data/questions.jsonl", str(data)))
    return directory


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word."""
    words = models.WordLevel({word: number for number, word in enumerate(SPECIAL + WORDS)}, unk_token="<pad>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def run(model: PreTrainedModel, tasks: Path, batch_size: int, wrapper: type[HFLM] = ClexLM) -> dict[str, Any]:
    lm = wrapper(pretrained=model, tokenizer=make_tokenizer(), max_length=MAX_LENGTH, batch_size=batch_size)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(lm, tasks=TASKS, task_manager=manager, bootstrap_iters=0)


def answers(results: dict[str, Any]) -> list[str]:
    """What was generated, sample by sample."""
    return [sample["resps"][0][0] for sample in results["samples"]["my_questions"]]


def scores(results: dict[str, Any]) -> torch.Tensor:
    """[samples, 4 choices], nats."""
    return torch.tensor([[r[0][0] for r in sample["resps"]] for sample in results["samples"]["tiny_choice"]]).double()


def surprises(results: dict[str, Any]) -> torch.Tensor:
    """Logarithm of the perplexity of all texts, nats."""
    return torch.tensor(results["results"]["tiny_perplexity"]["word_perplexity,none"]).double().log()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Of one layer: with more, hidden states of past tokens are those of the t at which they were computed."""
    return clex_model("llama", layers=1, extras={"eos_token_id": EOS})


@pytest.fixture(scope="module")
def alone(model, tasks) -> dict[str, Any]:
    return run(model, tasks, batch_size=1)


def encode(text: str) -> list[int]:
    return make_tokenizer().encode(text)


def test_scores_are_stock_transformers_at_the_t_of_each_sequence(model, samples, alone):
    expected = []
    for sample in samples:
        for choice in sample["choices"]:
            context, continuation = encode(sample["text"]), encode(choice)
            tokens = (context + continuation)[-MAX_LENGTH - 1 :]
            logits = true_logits(model, torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
            places = range(len(tokens) - 1 - len(continuation), len(tokens) - 1)
            expected.append(sum(logits[place, token] for place, token in zip(places, continuation, strict=True)))
    torch.testing.assert_close(scores(alone).flatten(), torch.stack(expected), rtol=0, atol=1e-5)


def test_answers_are_stock_transformers_at_the_t_of_every_step(model, samples, alone):
    for sample, answer in zip(samples, answers(alone), strict=True):
        prompt = encode(f"{sample['text']}\n\nQuestion: {sample['question']}\nAnswer:")[NEW_TOKENS - MAX_LENGTH :]
        new: list[int] = []
        while len(new) < NEW_TOKENS and EOS not in new:
            new.append(int(true_logits(model, torch.tensor([prompt + new]))[0, -1].argmax()))
        assert answer == make_tokenizer().decode(new, skip_special_tokens=True)


@pytest.mark.parametrize(
    "changes",
    [{}, {"scale_policy": "continuous"}, {"log_scale": True}],
    ids=["integer", "continuous", "log_scale"],
)
def test_results_do_not_depend_on_the_batch(tasks, changes):
    model = clex_model("llama", extras={"eos_token_id": EOS}, **changes)
    alone, together = (run(model, tasks, batch_size) for batch_size in (1, 4))
    assert answers(together) == answers(alone)
    torch.testing.assert_close(scores(together), scores(alone), rtol=0, atol=1e-5)
    torch.testing.assert_close(surprises(together), surprises(alone), rtol=0, atol=1e-9)


def test_the_harness_by_itself_would_score_by_the_longest_of_a_batch(model, tasks, alone):
    together = run(model, tasks, 4, wrapper=HFLM)
    assert (scores(together) - scores(alone)).abs().max() > 0.1


def save(model: PreTrainedModel, directory: Path) -> str:
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


def test_the_command_evaluates_a_checkpoint_beside_its_plain_rope(model, tasks, alone, tmp_path, capsys):
    source, output = save(model, tmp_path / "model"), tmp_path / "results.json"
    words = [source, "--tasks", ",".join(TASKS), "--include-path", str(tasks), "--device", "cpu", "--batch-size", "3"]
    longbench.main([*words, "--baseline", "--log-samples", "--output", str(output)])
    results = json.loads(output.read_text())
    assert answers(results["clex"]) == answers(alone)
    torch.testing.assert_close(scores(results["clex"]), scores(alone), rtol=0, atol=1e-5)
    plain = stock_model("llama", layers=1, eos_token_id=EOS)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "clex_layer" not in name})
    expected = run(plain, tasks, 1, wrapper=HFLM)
    assert answers(results["baseline"]) == answers(expected) != answers(alone)
    torch.testing.assert_close(scores(results["baseline"]), scores(expected), rtol=0, atol=1e-5)
    printed = capsys.readouterr().out
    assert printed.count("|tiny_choice") == 2
    assert printed.index("baseline: ") < printed.index("clex: ")


def test_the_command_gives_a_plain_model_fresh_settings(tasks, tmp_path):
    source, output = (
        save(stock_model("llama", layers=1, eos_token_id=EOS), tmp_path / "model"),
        tmp_path / "results.json",
    )
    words = [source, "--tasks", str(tasks / "tiny_choice.yaml"), "--device", "cpu", "--limit", "5"]
    longbench.main([*words, "--max-factor", "4", "--output", str(output)])
    result = json.loads(output.read_text())["clex"]
    assert result["n-samples"]["tiny_choice"]["effective"] == 5
    assert "samples" not in result


def test_settings_over_a_model_are_its_own_sizes_and_frequencies():
    rope = {"rope_type": "default", "rope_theta": 5e5}
    model = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=rope)
    config = settings_over(model, 8)
    assert (config.head_dim, config.rope_base, config.train_length, config.max_factor) == (64, 5e5, 2048, 8)
    assert settings_over(model, 8, 512).train_length == 512


def test_bad_input_is_refused(model, tasks):
    with pytest.raises(ValueError, match="expected for a plain model only"):
        settings_over(model.config, 8)
    with pytest.raises(SystemExit, match="--tasks: expected names that the harness knows, or files, got nonsense"):
        longbench.main(["anywhere", "--tasks", "tiny_choice,nonsense", "--include-path", str(tasks)])
    with pytest.raises(SystemExit):
        longbench.main(["anywhere", "--tasks", "tiny_choice", "--train-length", "8"])
