"""`puna doctor`: the machine; with a model and data, whether every way to compute the same gives the same."""

import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from puna.cli.models import MODEL
from puna.cli.output import Json, print_fields, print_json
from puna.errors import DataError, UsageError

_DTYPES = ("auto", "fp64", "fp32", "bf16")


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL)] = None,
    data: Annotated[Path | None, typer.Option(help="Conversations, text, or a folder of token shards.")] = None,
    template: Annotated[
        str | None, typer.Option(help="llama3, chatml ... or a jinja file; the model's own by default.")
    ] = None,
    rows: Annotated[int, typer.Option(help="The first so many conversations or texts.", min=2)] = 8,
    dtype: Annotated[str, typer.Option(help="auto (fp64 for small models), fp64, fp32 or bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    as_json: bool = Json,
) -> None:
    """The machine; with MODEL and --data, whether training, cache, merge, save and resume keep their promises.

    Exit code 5 if a check fails.
    """
    from puna.config import nearest_path

    if dtype not in _DTYPES:
        raise UsageError(f"`{dtype}` is not a dtype", fix=f"--dtype {', '.join(_DTYPES)}")
    if model is None and data is None:
        _machine(as_json)
        return
    if model is None or data is None:
        raise UsageError("a model and its data belong together", fix="puna doctor MODEL --data FILE")
    data = data.expanduser()  # --data=~/rows.jsonl: no shell reads a `~` behind `=`
    if not data.exists():
        fix = "--data FILE, of conversations or text, or a folder of token shards"
        raise DataError("no such file" + nearest_path(data), where=data, fix=fix)
    findings = _examine(as_json, model, data, template=template, rows=rows, dtype=dtype, device=device)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(5)


def _machine(as_json: bool) -> None:
    from puna.eval.doctor.machine import examine_machine, warnings

    machine = examine_machine()
    found = warnings(machine)
    if as_json:
        print_json({**machine, "warnings": [warned._asdict() for warned in found]})
        return
    print_fields({name: _plain(value) for name, value in machine.items()}, False)
    for warned in found:
        print(f"warning: {warned.what}\n  try: {warned.fix}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        told = ", ".join(f"{k} {v}" for k, v in value.items() if v not in ("", None))
        return told or ("works" if "problem" in value else "nothing set")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _examine(as_json: bool, model: str, data: Path, **options: Any) -> list[Any]:
    import tempfile

    import torch

    from puna.device import calibrate_threads
    from puna.eval.doctor.case import open_case
    from puna.eval.doctor.diagnose import CHECKS, diagnose
    from puna.log import clock, log

    torch.set_num_threads(calibrate_threads())
    findings = []
    with tempfile.TemporaryDirectory(prefix="puna-doctor-") as scratch:
        case = open_case(model, data, Path(scratch), **options)
        if not as_json:
            print(f"{'check':13} {'':40} {'apart':>8} {'allowed':>8}")
        for finding in diagnose(case):
            log.debug("%s took %.1f s", finding.name, finding.seconds)
            findings.append(finding)
            if not as_json:
                print(_line(finding), flush=True)
        left_out = [check.name for check in CHECKS if not check.applies(case)]
    failed = [finding.name for finding in findings if not finding.ok]
    if as_json:
        rows = [finding.as_dict() for finding in findings]
        print_json({"model": model, "dtype": case.dtype, "ok": not failed, "checks": rows, "not applicable": left_out})
    if left_out:
        log.info("not for this model and data: %s", ", ".join(left_out))
    took = clock(sum(finding.seconds for finding in findings))
    log.info("%d checks in %s, %s", len(findings), took, f"failed: {', '.join(failed)}" if failed else "all passed")
    return findings


def _line(finding: Any) -> str:
    verdict = "ok" if finding.ok else "FAIL"
    line = f"{finding.name:13} {finding.compares:40} {finding.difference:8.2g} {finding.tolerance:8.2g} {verdict}"
    if finding.ok:
        return line
    parts = {name: value for name, value in finding.parts.items() if not value <= finding.tolerance}
    why = [finding.error] if finding.error else [f"{name}: {value:.3g}" for name, value in parts.items()]
    told = [*why, f"likely cause: {finding.cause}"]
    return "\n".join([line, *(textwrap.fill(t, 79, initial_indent="  ", subsequent_indent="    ") for t in told)])
