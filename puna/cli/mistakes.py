"""Whatever goes wrong on the command line, told in one voice: what, where, the likely cause, what to type."""

from typing import Any

import typer
from typer.core import TyperGroup

from puna.errors import PunaError, ResourceError, UsageError, out_of_memory
from puna.files import DISK_FULL


class Verbs(TyperGroup):
    """A group of verbs that knows the nearest one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0].startswith("-") or args[0] in self.commands:
            return super().resolve_command(ctx, args)
        from puna.config import nearest

        group = ctx.command_path
        raise UsageError(f"no verb `{group} {args[0]}`" + nearest(args[0], list(self.commands)), fix=f"{group} -h")


def told(error: Exception) -> PunaError | None:
    """`error` as one with a cause, a remedy and an exit code; None for a verb alone, whose help is the message."""
    if isinstance(error, PunaError):
        return error
    if isinstance(error, typer.TyperException):
        return None if error.message.startswith("Usage:") else _refused(error)
    if isinstance(error, OSError):
        fix = "free some space and run it again" if error.errno in DISK_FULL else ""
        return ResourceError(error.strerror or str(error), where=error.filename or "", fix=fix)
    if out_of_memory(error):
        return ResourceError("out of memory", cause=_asked(error), fix="a smaller batch_size, seq_len or model")
    what = f"unexpected {type(error).__name__}: {error}"
    return PunaError(what, cause="a bug in puna", fix="the same command with -v, and report it")


def _asked(error: Exception) -> str:
    """`you tried to allocate N bytes`, where the allocator says so."""
    _, said, size = str(error).partition("ried to allocate ")
    return f"it tried to allocate {size.splitlines()[0].split('. ')[0]}" if said else "model, batch or rows too large"


def _refused(error: Any) -> UsageError:
    """What the parser of the command line refused."""
    from puna.config import nearest

    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    verb = context.command_path if context else "puna"
    if hasattr(error, "possibilities"):
        options = context.command.params if context else []
        near = nearest(error.option_name, [name for option in options for name in option.opts])
        what = f"no option `{error.option_name}`{near}"
        if not near and any(option.name == "words" for option in options):
            fix = f"{error.option_name.lstrip('-')}=VALUE, without dashes, if it is a key of the config; or {verb} -h"
            return UsageError(what, where=verb, fix=fix)
    elif parameter is not None:
        name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar or parameter.name
        what = f"`{name}`: {_small(error.message)}" if error.message else f"{name} is missing"
    else:
        what = _small(error.format_message())
    return UsageError(what, where=verb if verb != "puna" else "", fix=f"{verb} -h")


def _small(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")
