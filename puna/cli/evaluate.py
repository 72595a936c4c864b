"""`puna eval`: accuracy on tasks, bits per byte of a text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli.models import Model
from puna.cli.output import Json, print_json
from puna.errors import DataError, UsageError


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: Model,
    tasks: Annotated[
        str, typer.Option(help='reasoning-gym tasks: a,b or with settings "{chain_sum: {max_terms: 2}}".')
    ] = "",
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file: bits per byte and perplexity.")] = None,
    limit: Annotated[int, typer.Option(help="Problems of each task.", min=1)] = 200,
    shots: Annotated[int, typer.Option(help="Solved problems before each question.", min=0)] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="The reply has to be the answer; else it may hold it.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Most ids in an answer.", min=1)] = 24,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.", min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp64.")] = "auto",
    as_json: bool = Json,
) -> None:
    """Measure a model: puna eval runs/sft --tasks chain_sum --limit 200"""
    if not tasks and text is None:
        raise UsageError("nothing to measure", fix="--tasks chain_sum, or --text FILE")
    from puna.config import load_config, nearest_path, parse_words
    from puna.eval.tasks import TaskConfig, check_tasks, evaluate_tasks, majority
    from puna.infer.llama import load

    listed = tasks if tasks.startswith(("{", "[")) else f"[{tasks}]"
    given = {**parse_words([f"tasks={listed}"]), "limit": limit, "shots": shots, "lenient": not strict}
    config = load_config(TaskConfig, given={**given, "max_tokens": max_tokens, "batch_size": batch_size})
    check_tasks(config.tasks)
    if text is not None and not text.is_file():
        raise DataError("no such file" + nearest_path(text), where=text)
    llama = load(model, dtype=dtype, packed="auto")
    results: list[dict[str, Any]] = [_text(llama, text)] if text else []
    for score in evaluate_tasks(llama, config):
        low, value, high = score.interval
        settings = config.tasks[score.task]
        row: dict[str, Any] = {"task": score.task, "accuracy": value, "low": low, "high": high, "n": score.n}
        row["majority"] = majority(score.task, limit, settings).accuracy
        results.append({**row, "shots": shots, "lenient": config.lenient, "settings": settings})
    if as_json:
        print_json(results)
        return
    for row in results:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def _text(llama: Any, path: Path) -> dict[str, Any]:
    from puna.eval.perplexity import text_bits_per_byte

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as UTF-8 text: {error}", where=path) from None
    if not text:
        raise DataError("is empty", where=path)
    bits, perplexity, tokens = text_bits_per_byte(llama.model, llama.tokenizer, text)
    return {"text": str(path), "bits_per_byte": bits, "perplexity": perplexity, "tokens": tokens}
