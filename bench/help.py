"""How long the command line takes before it answers, in milliseconds: `python bench/help.py`."""

import statistics
import subprocess
import sys
import time

COMMANDS = (["--help"], ["run", "--help"], ["ls"], ["completion", "bash", "--", "puna run sft lora."])
RUNS = 10


def milliseconds(words: list[str]) -> float:
    """Of one process, from its start to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "puna", *words], capture_output=True, check=True)
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    for command in COMMANDS:
        milliseconds(command)  # files are in the system's cache from here on
        median = statistics.median(milliseconds(command) for _ in range(RUNS))
        print(f"{median:4.0f} ms  puna {' '.join(command)}")
