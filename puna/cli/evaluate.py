"""`puna eval`: scores on tasks, bits per byte of a text."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli.models import Model
from puna.cli.output import Json, print_json
from puna.errors import DataError, UsageError

_TASKS = (
    'Names of `puna ls tasks`, olmes:TASK/FORM, requests.jsonl; reasoning-gym: a,b or "{chain_sum: {max_terms: 2}}".'
)
_RUN_CODE = "Run the code the model writes; humaneval needs it. Confined: your files can be read, nothing leaves."


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: Model,
    tasks: Annotated[str, typer.Option(help=_TASKS)] = "",
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file: bits per byte and perplexity.")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder of evaluation sets: .parquet, .jsonl, .arrow.")] = None,
    limit: Annotated[int, typer.Option(help="Most questions of each task.", min=1)] = 200,
    shots: Annotated[int, typer.Option(help="Solved problems before each question.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Chooses the solved problems, and samples.")] = 1234,
    samples: Annotated[int, typer.Option(help="Answers to each question, for pass@k.", min=1)] = 1,
    temperature: Annotated[float, typer.Option(help="Of written answers; 0: the likeliest.", min=0)] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Most ids in an answer. Default: the task's.", min=1)] = None,
    run_code: Annotated[bool, typer.Option("--run-code", help=_RUN_CODE)] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="reasoning-gym: the reply has to be the answer; else it may hold it.")
    ] = False,
    against: Annotated[str | None, typer.Option(help="Another model: the gain over it, paired.")] = None,
    shards: Annotated[Path | None, typer.Option(help="Token shards: what of the questions was trained on.")] = None,
    ngram: Annotated[int, typer.Option(help="Tokens in a row that count as trained on.", min=2)] = 8,
    output: Annotated[Path | None, typer.Option(help="A folder for every question and answer.")] = None,
    batch_size: Annotated[int, typer.Option(help="Answers written at a time.", min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp64.")] = "auto",
    as_json: bool = Json,
) -> None:
    """Measure a model: puna eval my-model --tasks arc_easy,hellaswag --limit 200"""
    if not tasks and text is None:
        raise UsageError("nothing to measure", fix="--tasks arc_easy, or --text FILE")
    from puna.config import load_config, nearest_path, parse_words
    from puna.eval.exam import prepare
    from puna.eval.table import TASKS
    from puna.eval.tasks import TaskConfig, check_tasks
    from puna.infer.llama import load
    from puna.infer.sampling import Sampling

    listed = tasks if tasks.startswith(("{", "[")) else f"[{tasks}]"
    given = {**parse_words([f"tasks={listed}"]), "limit": limit, "shots": shots, "lenient": not strict}
    config = load_config(TaskConfig, given={**given, "max_tokens": max_tokens or 24, "batch_size": batch_size})
    sets = [name for name in config.tasks if name in TASKS or _is_requests(name)]
    config = config.model_copy(update={"tasks": {k: v for k, v in config.tasks.items() if k not in sets}})
    _check(sets, list(config.tasks), run_code)
    check_tasks(config.tasks)
    if text is not None and not text.is_file():
        raise DataError("no such file" + nearest_path(text), where=text)
    if samples > 1 and not temperature:
        raise UsageError(f"{samples} samples at temperature 0 are all the same", fix="--temperature 0.8")
    exams = [prepare(name, data, limit, shots, seed, max_tokens) for name in sets]
    sampling = Sampling(n=samples, temperature=temperature, seed=seed)
    llamas = [load(name, dtype=dtype, packed="auto") for name in (model, against) if name]
    texts = [_text(llamas[0], text)] if text else []
    measured = _exams(llamas, exams, sampling, batch_size, shards, ngram, output)
    results = []
    for row in chain(texts, _procedural(llamas, config), measured):
        results.append(row)
        if not as_json:
            _print(row)
    if as_json:
        print_json(results)


def _is_requests(name: str) -> bool:
    return name.startswith("olmes:") or name.endswith((".jsonl", ".jsonl.gz"))


def _check(sets: list[str], others: list[str], run_code: bool) -> None:
    """What can be told before anything is loaded."""
    from puna.config import nearest
    from puna.eval.table import TASKS

    for name in others:
        if near := nearest(name, list(TASKS)):
            raise UsageError(f"no task `{name}`{near}", fix="puna ls tasks")
    code = [name for name in sets if name in TASKS and TASKS[name].kind == "code"]
    if code and not run_code:
        raise UsageError(f"{code[0]} runs what the model writes", cause="code of a model may do anything",
                         fix="--run-code, best on a machine with nothing to lose")  # fmt: skip


def _procedural(llamas: list[Any], config: Any) -> Iterator[dict[str, Any]]:
    """Rows of the tasks that reasoning-gym makes."""
    from puna.eval.tasks import evaluate_tasks, gain, majority

    for scores in zip(*(evaluate_tasks(llama, config) for llama in llamas), strict=True):
        score, settings = scores[0], config.tasks[scores[0].task]
        low, value, high = score.interval
        row: dict[str, Any] = {"task": score.task, "accuracy": value, "low": low, "high": high, "n": score.n}
        row["majority"] = majority(score.task, config.limit, settings).accuracy
        if len(scores) > 1:
            row["gain"] = dict(zip(("low", "value", "high"), gain(scores[1], score), strict=True))
        yield {**row, "shots": config.shots, "lenient": config.lenient, "settings": settings}


def _exams(
    llamas: list[Any], exams: list[Any], sampling: Any, batch: int, shards: Path | None, ngram: int, output: Path | None
) -> Iterator[dict[str, Any]]:
    """Rows of the tasks with data of their own."""
    from puna.eval.exam import sit
    from puna.eval.reader import Reader
    from puna.eval.scorecard import contamination, gain_over, scorecard, write_answers

    readers = [Reader(llama, batch=batch) for llama in llamas] if exams else []
    for exam in exams:
        marks = [sit(exam, reader, sampling) for reader in readers]
        row = scorecard(marks[0])
        if len(marks) > 1:
            row["gain"] = gain_over(*marks)
        if shards:
            row["contamination"] = contamination(marks[0], shards, llamas[0].tokenizer, ngram)
        if output:
            row["answers"] = str(write_answers(output, marks[0]))
        yield row


def _print(row: dict[str, Any]) -> None:
    """A row for people: metrics under each other, the rest behind one another."""
    rest = {k: v for k, v in row.items() if k not in ("metrics", "contamination", "gain")}
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items()))
    for name, found in row.get("metrics", {}).items():
        print(f"  {name:18} {_interval(found)}  {found['definition']}")
    if "gain" in row:
        print(f"  {'gain':18} {_interval(row['gain'])}  {row['gain'].get('metric', '')}, over the other model, paired")
    if found := row.get("contamination"):
        print(f"  {found['tokens']:.1%} of the tokens, {found['touched']:.1%} of the questions are in the shards")
        for name, part in found["subsets"].items():
            scores = "  ".join(f"{k} {_interval(v)}" for k, v in part.items() if k != "n")
            print(f"  {name:18} n {part['n']}  {scores}")


def _interval(found: dict[str, float | None]) -> str:
    value, low, high = ("?" if found[name] is None else f"{found[name]:.4f}" for name in ("value", "low", "high"))
    return f"{value:>8}  ({low} .. {high})"


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
