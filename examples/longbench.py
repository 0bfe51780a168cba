r"""Runs lm-evaluation-harness on a CLEX model: LongBench, any other of its tasks, or tasks over your own data.

    pip install ".[examples]"
    python -m examples.longbench MODEL --tasks longbench_tasks_e --limit 20 --baseline --output results.json

MODEL is a directory or a name on the hub. If its RoPE is of type "clex", settings and weights of the ODE are the
checkpoint's; a plain model gets them by --max-factor (and --train-length), and then evaluates NTK-aware scaling, with
which CLEX starts. --baseline evaluates the same weights without CLEX as well: on plain RoPE, or on a plain model's own
scaling, which may depend on the longest sequence of a batch; then give --batch-size 1.

In version 0.4.13 of the harness LongBench is the groups longbench (21 tasks) and longbench_e (9 of the 13 whose lengths
are spread evenly; the tag longbench_tasks_e has all), their parts longbench_single, _multi, _summarization, _fewshot,
_synthetic and _code, each with an _e twin, and longbench2. The data comes from the hub, the metrics need jieba,
fuzzywuzzy and rouge, which lm_eval[longbench] brings, and prompts beyond --max-length lose their beginning, where
LongBench's authors cut the middle. RULER takes its lengths by --metadata '{"max_seq_lengths": [4096, 32768]}'.

Tasks of your own are .yaml files. --tasks takes their paths, or their names with --include-path DIR:

    task: my_questions
    dataset_path: json
    dataset_kwargs: {data_files: {test: /data/questions.jsonl}}  # lines {"text": "", "question": "", "answer": ""}
    test_split: test
    output_type: generate_until
    doc_to_text: "{{text}}\n\nQuestion: {{question}}\nAnswer:"
    doc_to_target: answer
    generation_kwargs: {until: ["\n"], max_gen_toks: 32}
    metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]

With `include: .../lm_eval/tasks/longbench/qasper_e.yaml`, `dataset_name: null`, a `task` and a `tag` of its own, and
`dataset_path` and `dataset_kwargs` as above, it is a task of LongBench, prompt and metric included, over your files.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Grouper
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from clex_kernels import ClexConfig
from clex_kernels.integrations.transformers import apply_clex

# a request to score: its two texts (or None), tokens of the context, tokens of the continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class ClexLM(HFLM):
    """The harness's model around one patched by apply_clex; every sequence gets what it would get alone.

    Prompts to generate from come padded on the left with a mask, which says the lengths. Sequences to score come padded
    on the right without one, which causality makes harmless but for t: so a batch has only those of the same t.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        score = super()._loglikelihood_tokens
        by_factor = Grouper(requests, self._factor)
        answers = {factor: score(group, disable_tqdm, override_bs) for factor, group in by_factor.get_grouped().items()}
        return by_factor.get_original(answers)

    def _factor(self, request: Request) -> float:
        """What about a request's length matters to its logits."""
        config = ClexConfig.from_transformers(self.config)
        _, context, continuation = request
        # the last token is only predicted, and what is too long is cut on the left.
        length = min(len(context) + len(continuation) - 1, self.max_length)
        return length if config.log_scale else config.length_factor(length)


def settings_over(model: PreTrainedConfig, max_factor: int, train_length: int | None = None) -> ClexConfig:
    """CLEX over a plain model's own heads and frequencies.

    Args:
        model: its configuration.
        max_factor: largest length factor t.
        train_length: tokens it was trained with; None: its max_position_embeddings.

    Raises:
        ValueError: the model has CLEX settings of its own, or one here is out of range.
    """
    rope = model.rope_parameters or {}
    if rope.get("rope_type") == "clex":
        raise ValueError('max_factor, train_length: expected for a plain model only, got one of RoPE type "clex"')
    train_length = model.max_position_embeddings if train_length is None else train_length
    clex = {"rope_type": "clex", "max_factor": max_factor, "original_max_position_embeddings": train_length}
    return ClexConfig.from_transformers({**model.to_dict(), "rope_parameters": {**rope, **clex}})


def evaluate(arguments: argparse.Namespace, manager: TaskManager) -> dict[str, dict[str, Any]]:
    """The harness's results under "clex", and with --baseline under "baseline"."""
    given = AutoConfig.from_pretrained(arguments.model)
    has_own = arguments.max_factor is None
    config = (
        ClexConfig.from_transformers(given)
        if has_own
        else settings_over(given, arguments.max_factor, arguments.train_length)
    )
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).to(arguments.device)
    wrapper = {
        "pretrained": model,
        "tokenizer": AutoTokenizer.from_pretrained(arguments.model),
        "max_length": arguments.max_length or config.train_length * config.max_factor,
        "batch_size": arguments.batch_size,
    }
    options = {
        "tasks": arguments.tasks,
        "task_manager": manager,
        "limit": arguments.limit,
        "apply_chat_template": arguments.apply_chat_template,
        "log_samples": arguments.log_samples,
    }
    results = {}
    if arguments.baseline:
        results["baseline"] = simple_evaluate(HFLM(**wrapper), **options)
    # given settings would start the weights anew.
    apply_clex(model, None if has_own else config)
    results["clex"] = simple_evaluate(ClexLM(**wrapper), **options)
    return results


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="directory or name on the hub, with its tokenizer")
    parser.add_argument("--tasks", required=True, type=lambda names: names.split(","), help="names or .yaml files: A,B")
    parser.add_argument("--include-path", metavar="DIR", help="directory of more tasks")
    parser.add_argument("--metadata", type=json.loads, default={}, metavar="JSON", help="settings that tasks take")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N samples of a task")
    parser.add_argument("--batch-size", type=int, default=1, metavar="B")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens; default: train_length * max_factor")
    parser.add_argument("--max-factor", type=int, help="of a plain model: the largest length factor")
    parser.add_argument("--train-length", type=int, help="of a plain model; default: its max_position_embeddings")
    parser.add_argument("--baseline", action="store_true", help="evaluate without CLEX as well")
    parser.add_argument("--apply-chat-template", action="store_true", help="the tokenizer's, around every prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="auto: the checkpoint's")
    parser.add_argument("--output", type=Path, metavar="JSON", help="file for results")
    parser.add_argument("--log-samples", action="store_true", help="every prompt and answer in it, too")
    arguments = parser.parse_args(words)
    if arguments.train_length is not None and arguments.max_factor is None:
        parser.error("--train-length: expected together with --max-factor")
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Evaluates and prints the harness's tables."""
    arguments = read_arguments(words)
    # RULER cuts its samples by this tokenizer.
    metadata = {"pretrained": arguments.model, **arguments.metadata}
    manager = TaskManager(include_path=arguments.include_path, metadata=metadata)
    unknown = [name for name in arguments.tasks if name not in manager.task_index and not Path(name).is_file()]
    if unknown:
        raise SystemExit(f"--tasks: expected names that the harness knows, or files, got {', '.join(unknown)}")
    results = evaluate(arguments, manager)
    for name, result in results.items():
        print(f"{name}: {arguments.model}")
        print(make_table(result))
        if "groups" in result:
            print(make_table(result, "groups"))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2, default=handle_non_serializable), encoding="utf-8")


if __name__ == "__main__":
    main()
