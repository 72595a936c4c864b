"""Every command of the README: run here on tiny stand-ins, or named with the place that runs it."""

import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import commands, environment, puna_forked

from puna.checkpoint.registry import REGISTERED

ROOT = Path(__file__).parent.parent
TINY = [
    "model.dim=16", "model.n_heads=2", "model.n_kv_heads=1", "model.head_dim=8", "model.n_layers=1", "model.ffn_dim=16",
    "model.max_seq_len=1024", "batch_size=2", "samples.prompts=[]", "steps=2",
]  # fmt: skip
ROWS = '{"prompt": "How many stars?", "completion": "345"}\n' * 8
QUESTIONS = '{"goal": "To count stars,", "sol1": "look up.", "sol2": "look down.", "label": 0}\n' * 4
TUNE = ["model=runs/pretrain", "data.path=rows.jsonl", "template=llama3.1"]
SHORT = ["steps=1", "seq_len=256"]

# in the README's order; the words behind a command make it small, later words win
RUN: dict[str, list[str]] = {
    "puna run tokenizer sources.path=my_texts": ["vocab_size=530"],
    "puna run data sources.path=my_texts": ["sources.valid_fraction=0.2"],
    "puna run pretrain steps=500": TINY,
    'puna generate runs/pretrain -p "It was a dark and"': ["--max-tokens", "2"],
    "puna ls": [],
    "puna cat pretrain": [],
    "puna cp pretrain mine.yaml": [],
    "puna validate mine.yaml steps=600": [],
    "puna run pretrain --config mine.yaml data=runs/data output=runs/mine model=cria-15m": TINY,
    "puna runs show runs/mine": [],
    "puna run sft model=smollm2-135m data.path=rows.jsonl steps=100": [*TUNE, *SHORT],
    "puna chat runs/sft": ["--max-tokens", "2"],
    "puna merge runs/sft my-model": [],
    "puna run sft --config qlora model=my-model data.path=rows.jsonl output=runs/qlora": [
        *TUNE,
        *SHORT,
        "quantize=int8",  # NF4 has blocks of 64
    ],
    "puna run sft model=my-model data.path=rows.jsonl output=runs/dora lora.dora=true train.optimizer.kind=adamw8bit": [
        *TUNE,
        *SHORT,
    ],
    "puna run sft model=my-model data.path=rows.jsonl output=runs/full lora=null train.checkpoint_activations=full": [
        *TUNE,
        *SHORT,
    ],
    "puna plan sft model=my-model data.path=rows.jsonl": TUNE,
    "puna data select rows.jsonl data.select.near_duplicates=0.8": [],
    "puna runs ls": [],
    "puna eval my-model --text held_out.txt": [],
    "puna eval my-model --tasks chain_sum": ["--limit", "2", "--max-tokens", "1"],
    'puna eval my-model --tasks "{chain_sum: {max_terms: 2}}" --shots 4': ["--limit", "2", "--max-tokens", "1"],
    "puna cp sft tune.yaml": [],
    "puna data show tune.yaml": TUNE,
    "puna data pack tune.yaml": TUNE,
    "puna data show runs/data": [],
    "puna data stats runs/data": [],
    'puna tokenizer encode runs/tokenizer "text"': [],
    "puna inspect runs/pretrain": [],
    'puna generate my-model -p "Dear" -n 3 --top-k 40 --stop "." --json --logprobs 5': ["--max-tokens", "2"],
    'puna generate my-model -p "Dear" --speculate lookup': ["--max-tokens", "4"],
    "puna ls tasks": [],
    "puna eval my-model --tasks piqa --data questions --limit 200": [],
    "puna quantize my-model small --scheme int4": ["--text", "held_out.txt", "--scheme", "int8"],  # as its rows are 16
    "puna inspect my-model": [],
    "puna convert my-model my-model.gguf --kind Q8_0": ["--kind", "F16"],  # rows of 16 have no blocks of 32
    "puna convert my-model.gguf back": [],
    "puna run sft model=my-model data.path=rows.jsonl output=runs/kd distill.teacher=back": [*TUNE, *SHORT],
    "puna eval my-model --tasks piqa --data questions --against back --output answers": [],
    "puna convert back for-meta --to meta --shards 3": ["--shards", "1"],
    "puna verify my-model --against my-model.gguf": ["--max-tokens", "2"],
    'puna tokenizer encode for-meta/tokenizer.model "Hello world"': [],
    "puna chat my-model --tools tools.json": ["--max-tokens", "2"],
    "puna verify runs/pretrain": [],
    "puna doctor": [],
    "puna run pretrain --nproc 2": [*TINY, "output=runs/two"],
}
# (file, the line in it that runs the command)
ELSEWHERE = {
    "make quickstart": ("Makefile", "$(BIN)/puna quickstart"),
    "make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu": ("Makefile", "$(INDEX) '$(TORCH)'"),
    "make test": ("Makefile", "$(MAKE) --no-print-directory test"),
    "puna download HuggingFaceTB/SmolLM2-135M": ("tests/test_hub.py", '"puna", "download", "org/tiny@v1"'),
    "puna quickstart --acts 1": (".ci/wheel", "puna quickstart --acts 1"),
    "puna migrate theirs.yaml -o ours.yaml": ("tests/test_migrate.py", '["migrate", "theirs.yaml", "-o", "ours.yaml"'),
    "puna run sft model=my-model data.path=rows.jsonl output=runs/qat lora=null qat.group=32": (
        "tests/test_qat.py",
        'tuned(method, models, tmp_path, **{"qat.group": 32',
    ),
    "puna doctor smollm2-135m --data rows.jsonl": ("tests/test_doctor.py", '["doctor", str(m), "--data", str(rows)'),
}
# run here, each by itself; measuring takes minutes and a machine of its own, so benchmarks only start
ALONE = {
    "puna chat smollm2-135m": ["--max-tokens", "2"],
    "python bench/lora.py": ["--help"],
    "python bench/pretrain.py": ["--help"],
    "python bench/generate.py": ["--help"],
    "python bench/serve.py": ["--help"],
    "python bench/speculate.py": ["--help"],
    "python bench/load.py": ["--help"],
    "python bench/convert.py": ["--help"],
}


def test_every_command_of_the_readme_is_run_somewhere() -> None:
    """The first thing a stranger types fails: a command that was renamed everywhere but there."""
    found = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(found) == sorted([*RUN, *ELSEWHERE, *ALONE])
    for command, (file, line) in ELSEWHERE.items():
        assert (ROOT / file) != Path(__file__), "a line of the table itself runs nothing"
        assert line in (ROOT / file).read_text(encoding="utf-8"), command


@pytest.mark.parametrize("command", ALONE)
def test_what_runs_alone(command: str) -> None:
    """A script that was moved; a chat with the real model that stumbles over what tiny models do not have."""
    program, *words = shlex.split(command)
    for word in REGISTERED.keys() & set(words):
        if REGISTERED[word][0].find() is None:
            pytest.skip(f"`{command}` is not run: {REGISTERED[word][0].requirement} is not installed")
    started = [sys.executable, *(["-m", "puna"] if program == "puna" else []), *words, *ALONE[command]]
    done = subprocess.run(
        started, cwd=ROOT, env=environment(), input="Who are you?\n/quit\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert ("usage: " if program == "python" else "\n") in done.stdout


def test_a_new_command_is_seen() -> None:
    """The search itself must find commands in blocks, behind a prompt, and in prose over two lines."""
    text = "A `puna\nfly` and `x=1`.\n\n```\n$ puna walk a  # to b\nputs b\nmake haste\n```\n`puna/cli/`\n"
    assert commands(text) == ["puna walk a", "make haste", "puna fly"]


@pytest.mark.skipif(not find_spec("reasoning_gym"), reason="reasoning-gym is not installed: the README is not run")
def test_the_readme_runs(tmp_path: Path, texts: Path) -> None:
    """Commands that each work alone and not one after the other, as they stand in the README."""
    (tmp_path / "my_texts").symlink_to(texts)
    (tmp_path / "rows.jsonl").write_text(ROWS)
    (tmp_path / "tools.json").write_text('[{"name": "count", "description": "Counts.", "parameters": {}}]')
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions/piqa_validation.jsonl").write_text(QUESTIONS)
    (tmp_path / "held_out.txt").write_text("The stars count the llamas.\n")
    calls = [[*shlex.split(command)[1:], *more] for command, more in RUN.items()]
    answers = puna_forked(calls, tmp_path, stdin="Who are you?\n/quit\n")
    assert "\n".join(f"{done.args}: {done.stderr}" for done in answers if done.returncode) == ""
    printed = {command: done.stdout for command, done in zip(RUN, answers, strict=True)}
    silent = {command for command, text in printed.items() if not text}
    assert silent == {command for command in RUN if command.startswith("puna run ")}
    assert "steps: 600" in printed["puna validate mine.yaml steps=600"]
    assert "[[345<|eot_id|>]]" in printed["puna data show tune.yaml"]
    assert "bits_per_byte" in printed["puna eval my-model --text held_out.txt"]
