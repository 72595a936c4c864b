"""`puna eval`: accuracy on tasks, bits per byte of a text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli.output import Json, print_json
from puna.errors import DataError, UsageError


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model or run folder, a .gguf file, or smollm2-135m.")
    ],
    tasks: Annotated[str, typer.Option(help="reasoning-gym tasks, such as chain_sum,spell_backward.")] = "",
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file: bits per byte and perplexity.")] = None,
    limit: Annotated[int, typer.Option(help="Problems of each task.", min=1)] = 100,
    shots: Annotated[int, typer.Option(help="Solved problems before each question.", min=0)] = 0,
    lenient: Annotated[bool, typer.Option("--lenient", help="The answer may stand inside a sentence.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most ids in an answer.", min=1)] = 48,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.", min=1)] = 16,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp64.")] = "auto",
    as_json: bool = Json,
) -> None:
    """Measure a model: puna eval runs/sft --tasks chain_sum --limit 200"""
    names = [name for name in tasks.split(",") if name]
    if not names and text is None:
        raise UsageError("nothing to measure", fix="--tasks chain_sum, or --text FILE")
    from puna.infer.llama import load

    llama = load(model, dtype=dtype)
    from puna.eval.tasks import TaskConfig, evaluate_tasks, majority

    results: list[dict[str, Any]] = [_text(llama, text)] if text else []
    config = TaskConfig(tasks=names, limit=limit, shots=shots, max_tokens=max_tokens, batch_size=batch_size)  # type: ignore[arg-type]
    for score in evaluate_tasks(llama, config, lenient):
        low, value, high = score.interval
        guess = majority(score.task, limit).accuracy
        results.append({"task": score.task, "accuracy": value, "low": low, "high": high, "n": limit, "majority": guess})
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
