"""Guessing ahead against not guessing, SmolLM2-135M at batch 1: the same ids, and how much sooner.

python bench/speculate.py [--tokens 128] [--rounds 5] [--dtype bf16]
A copy task (a passage, to be repeated) and ordinary text; by look-up in the text, and by the model's own 4-bit copy.
Turns alternate, times are medians. The draft's copy is made before the clock starts.
"""

import argparse
import statistics
import time

COPY = "Repeat the passage word by word.\n\nPassage: {0}\n\nPassage: {0}\n\nPassage:"
PASSAGE = (
    "The llamas of the high puna graze between 3,800 and 4,600 metres. Each of the 412 animals that were counted in "
    "1987 carried a red or a blue thread in its ear, and the herders, who came from eleven villages, wrote down every "
    "birth, every death and every sale in a book with a green cover that is kept in the church of San Antonio."
)
ORDINARY = [
    "My grandmother kept bees, and every summer she",
    "The most surprising thing about the deep sea is",
    "He closed the door behind him and listened. In the hall",
    "To understand why prices rise, it helps to",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--temperature", type=float, default=0.0)
    given = parser.parse_args()
    import puna
    from puna.infer.native import use_native

    llama = puna.load("smollm2-135m", dtype=given.dtype)
    print(f"native kernels: {use_native(llama.model)}")
    tasks = {"copy": [COPY.format(PASSAGE)], "ordinary text": ORDINARY}
    print(
        f"{'task':16} {'guesses by':12} {'plain tok/s':>12} {'guessing':>9} {'ratio':>7} {'right':>7} {'same ids':>9}"
    )
    for task, prompts in tasks.items():
        for by in ("lookup", "self"):
            measure(llama, task, [llama.encode(p) for p in prompts], by, given)


def measure(llama, task: str, prompts: list[list[int]], by: str, given: argparse.Namespace) -> None:
    """One row: every prompt alone, the reading of it not in the time."""
    guessing, times = llama.speculation(by), {None: [], by: []}
    ids: dict = {}
    for turn in range(given.rounds + 1):
        for how in times:
            spent, ids[how] = 0.0, []
            for prompt in prompts:
                marks: list[float] = []
                options = {"temperature": given.temperature, "speculate": how}
                ids[how] += llama.continue_ids(
                    [prompt], given.tokens, on_token=lambda _, m=marks: m.append(time.perf_counter()), **options
                )
                spent += marks[-1] - marks[0]
            if turn:  # the first one warms up
                times[how].append(spent)
    count = sum(len(row) - 1 for row in ids[None])
    same = sum(a == b for row, other in zip(ids[None], ids[by], strict=True) for a, b in zip(row, other, strict=False))
    plain, sooner = (count / statistics.median(times[how]) for how in times)
    ratio = statistics.median(a / b for a, b in zip(times[None], times[by], strict=True))
    right = f"{guessing.right}/{guessing.guessed}"
    total = sum(map(len, ids[None]))
    print(f"{task:16} {by:12} {plain:12.1f} {sooner:9.1f} {ratio:7.2f} {right:>9} {same:>6}/{total}")


if __name__ == "__main__":
    main()
