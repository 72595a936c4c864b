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
    from puna.eval.reader import room_for
    from puna.eval.scorecard import check_shards
    from puna.eval.table import TASKS
    from puna.eval.tasks import TaskConfig
    from puna.infer.llama import load

    listed = tasks if tasks.startswith(("{", "[")) else f"[{tasks}]"
    given = {**parse_words([f"tasks={listed}"]), "limit": limit, "shots": shots, "lenient": not strict}
    config = load_config(TaskConfig, given={**given, "max_tokens": max_tokens or 24, "batch_size": batch_size})
    sets = [name for name in config.tasks if name in TASKS or _is_requests(name)]
    config = config.model_copy(update={"tasks": {k: v for k, v in config.tasks.items() if k not in sets}})
    _check_code(sets, run_code)
    _check_names(config.tasks)
    if text is not None and not text.is_file():
        raise DataError("no such file" + nearest_path(text), where=text)
    sampling = _sampling(samples, temperature, seed)
    exams = [prepare(name, data, limit, shots, seed, max_tokens) for name in sets]
    _check_options(exams, list(config.tasks), shards, output, samples)
    llamas = [load(name, dtype=dtype, packed="auto") for name in (model, against) if name]
    for length in (llama.model.config.max_seq_len for llama in llamas):
        room_for(max((exam.max_tokens for exam in exams), default=0), length)
    if shards:
        check_shards(shards, llamas[0].tokenizer)
    texts = [_text(llama, text) for llama in llamas] if text else []
    results = []
    measured = _exams(llamas, exams, sampling, batch_size, shards, ngram, output)
    for row in chain(texts, _procedural(llamas, config), measured):
        results.append(row)
        if not as_json:
            _print(row)
    if as_json:
        print_json(results)


def _sampling(samples: int, temperature: float, seed: int) -> Any:
    from puna.infer.sampling import Sampling

    if samples > 1 and not temperature:
        raise UsageError(f"{samples} samples at temperature 0 are all the same", fix="--temperature 0.8")
    return Sampling(n=samples, temperature=temperature, seed=seed)


def _is_requests(name: str) -> bool:
    return name.startswith("olmes:") or name.endswith((".jsonl", ".jsonl.gz"))


def _check_code(sets: list[str], run_code: bool) -> None:
    from puna.eval.table import TASKS

    code = [name for name in sets if name in TASKS and TASKS[name].kind == "code"]
    if code and not run_code:
        raise UsageError(f"{code[0]} runs what the model writes", cause="code of a model may do anything",
                         fix="--run-code, best on a machine with nothing to lose")  # fmt: skip


def _check_names(tasks: Any) -> None:
    """reasoning-gym's own names come before slips in ours."""
    from puna.config import nearest
    from puna.eval.table import TASKS
    from puna.eval.tasks import check_tasks

    for name, settings in tasks.items():
        try:
            check_tasks({name: settings})
        except (DataError, UsageError) as error:
            known = isinstance(error, UsageError) and not error.what.startswith("no reasoning-gym task")
            if known or not (near := nearest(name, list(TASKS))):
                raise
            raise UsageError(f"no task `{name}`{near}", fix="puna ls tasks") from None


def _check_options(exams: list[Any], others: list[str], shards: Path | None, output: Path | None, samples: int) -> None:
    """Nothing that was asked for is dropped, and nothing fails after the last answer that could fail before it."""
    from puna.eval.contamination import tokenizer_of_shards
    from puna.files import make_folder

    for option, given in (("--shards", shards), ("--output", output)):
        if given and (others or not exams):
            what = f"for {others[0]}" if others else "without --tasks"
            raise UsageError(f"{option} does nothing {what}", fix="tasks of `puna ls tasks`, in a call of their own")
    once = [exam.name for exam in exams if exam.kind != "code"] + others
    if samples > 1 and once:
        raise UsageError(f"--samples does nothing for {once[0]}", cause="pass@k is of code", fix="--tasks humaneval")
    if output:
        make_folder(output)
    if shards:
        tokenizer_of_shards(shards)


def _procedural(llamas: list[Any], config: Any) -> Iterator[dict[str, Any]]:
    """Rows of the tasks that reasoning-gym makes."""
    from puna.eval.tasks import evaluate_tasks, gain, majority

    for scores in zip(*(evaluate_tasks(llama, config) for llama in llamas), strict=True):
        score, settings = scores[0], config.tasks[scores[0].task]
        low, value, high = score.interval
        row: dict[str, Any] = {"task": score.task, "accuracy": value, "low": low, "high": high, "n": score.n}
        row["majority"] = majority(score.task, config.limit, settings).accuracy
        if len(scores) > 1:
            theirs = dict(zip(("low", "value", "high"), scores[1].interval, strict=True))
            row["against"] = {"model": str(llamas[1].path), "metrics": {"accuracy": theirs}}
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
            row["against"] = {name: scorecard(marks[1])[name] for name in ("model", "metrics")}
            row["gain"] = gain_over(*marks)
        if shards:
            row["contamination"] = contamination(marks[0], shards, llamas[0].tokenizer, ngram)
        if output:
            row["answers"] = str(write_answers(output, marks[0]))
        yield row


def _print(row: dict[str, Any]) -> None:
    """A row for people: metrics under each other, the rest behind one another."""
    rest = {k: v for k, v in row.items() if k not in ("metrics", "contamination", "gain", "against")}
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items()))
    for name, found in row.get("metrics", {}).items():
        print(f"  {name:18} {_interval(found)}  {found['definition']}")
    if "gain" in row:
        metric, other = row["gain"].get("metric", "accuracy"), row["against"]
        print(f"  {'the other model':18} {_interval(other['metrics'][metric])}  {metric} of {other['model']}")
        print(f"  {'gain':18} {_interval(row['gain'])}  {metric}, over the other model, paired")
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
    return {
        "text": str(path),
        "model": str(llama.path),
        "bits_per_byte": bits,
        "perplexity": perplexity,
        "tokens": tokens,
    }
