"""Errors a user can act on: what happened, where, the likely cause, what to type next."""


class PunaError(Exception):
    """Base of every expected failure. The command line prints it without a traceback and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, what: str, *, where: object = "", cause: str = "", fix: str = ""):
        super().__init__(what)
        self.what, self.where, self.cause, self.fix = what, str(where), cause, fix

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.cause:
            lines.append(f"  likely cause: {self.cause}")
        if self.fix:
            lines.append(f"  try: {self.fix}")
        return "\n".join(lines)


class UsageError(PunaError):
    """The command line or a config asks for something that cannot be."""

    exit_code = 2


class DataError(PunaError):
    """Input text, a dataset, a tokenizer or a shard cannot be used."""

    exit_code = 3


class CheckpointError(PunaError):
    """A model directory or a checkpoint is missing, damaged or does not fit."""

    exit_code = 4


class NumericError(PunaError):
    """Training was stopped because its numbers went wrong."""

    exit_code = 5


class ResourceError(PunaError):
    """Disk or memory ran out, or another process holds what this one needs."""

    exit_code = 6


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. By name, since torch may not be loaded; its CPU allocator raises a plain RuntimeError."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


class Interrupted(PunaError):
    """A signal asked the run to stop; what was done is saved. Exit code 128 + signal number."""

    def __init__(self, what: str, signal_number: int, *, fix: str = ""):
        super().__init__(what, fix=fix)
        self.exit_code = 128 + signal_number
