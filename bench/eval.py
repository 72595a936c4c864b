"""5-shot ARC-Easy in lm-eval: our engine beside its own `hf` backend, on the same exported model, scores equal.

pip install lm-eval
puna convert smollm2-135m /tmp/model --to hf --dtype fp32
python bench/eval.py /tmp/model arc_easy_validation.parquet --limit 40
"""

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from side_by_side import Work, compare

TASK = {
    "task": "arc", "dataset_path": "parquet", "output_type": "multiple_choice", "validation_split": "validation",
    "fewshot_split": "validation", "num_fewshot": 5, "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_target": "{{choices.label.index(answerKey)}}", "doc_to_choice": "{{choices.text}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip


def ours(model: str) -> Any:
    import puna
    from puna.eval.harness import as_lm

    return as_lm(puna.load(model, dtype="fp32"))


def hf(model: str, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=batch)


def evaluation(make: Any, folder: str, limit: int) -> Work:
    """A step is the whole evaluation; its loss is 100 acc + acc_norm, which has to be the same."""
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=folder, include_defaults=False)
    model = make()

    def step() -> float:
        if hasattr(model, "reader"):
            model.reader.engine.forget()  # nothing of the last turn
        found: Any = lm_eval.simple_evaluate(
            model=model, tasks=["arc"], task_manager=tasks, limit=limit, bootstrap_iters=0
        )
        return 100 * found["results"]["arc"]["acc,none"] + found["results"]["arc"]["acc_norm,none"]

    return Work(step)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    task = {**TASK, "dataset_kwargs": {"data_files": {"validation": str(Path(asked.data).resolve())}}}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "arc.yaml").write_text(json.dumps(task))
        sides = {
            "puna": partial(evaluation, partial(ours, asked.model), folder, asked.limit),
            **{
                f"lm-eval hf, batch {batch}": partial(evaluation, partial(hf, asked.model, batch), folder, asked.limit)
                for batch in (1, 8)
            },
        }
        compare(sides, units=asked.limit, rounds=asked.rounds, unit="questions", loss_within=1e-9)
