"""Configs: every mistake is told with its place and the nearest valid key; words over file over default."""

from pathlib import Path
from typing import Any

import pytest

from puna.config import Config, RecipeConfig, differences, load_config, parse_words, read_yaml, to_yaml
from puna.errors import UsageError
from puna.recipes import load
from puna.recipes.data import Config as DataConfig
from puna.recipes.pretrain import Config as PretrainConfig

STRINGS = [
    "no", "null", "~", "", " ", "1e3", "0x10", "007", "12", "2024-01-01", ".inf", "true", "a: b # c", "- a",
    "{a", "[a", "'", '"', "!x", "&a", "*a", "%", "@", "`", "=", "<<", "\n", "a\n", "\ta", "a ", "a\r\nb", "é",
    "\u2028", "👍", "\x00", "word " * 60,
]  # fmt: skip


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def refusal(kind: type[Config], file: Path | None = None, *words: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(kind, file, parse_words(words))
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("recipe: pretrain\nstep: 5\n", 2, ["unknown key `step`; did you mean `steps`?", "valid here: recipe"]),
        ("seed: 1\nlr: 3\n", 2, ["unknown key `lr`", "did you mean `train.optimizer.lr`?"]),
        ("train:\n  lr: 3\n", 2, ["unknown key `train.lr`", "did you mean `train.optimizer.lr`?"]),
        ("train:\n  optimizer:\n    lrr: 3\n", 3, ["`train.optimizer.lrr`", "did you mean `train.optimizer.lr`?"]),
        ("\n\noptimizer: {lr: 1}\n", 3, ["unknown key `optimizer`", "did you mean `train.optimizer`?"]),
        ("model: {n_layer: 3}\n", 1, ["`model.n_layer`", "did you mean `model.n_layers`?"]),
        ("steps: 1\n\nsteps: 2\n", 3, ["duplicate key", "steps"]),
        ("train:\n  keep: 1\n  keep: 1\n", 3, ["duplicate key", "keep"]),
        ("seed: 0\nsteps: many\n", 2, ["`steps`", "integer", "'many'"]),
        ("steps: 1.5\n", 1, ["`steps`", "integer", "1.5"]),
        ("samples:\n  prompts:\n    - a\n    - 3\n", 4, ["`samples.prompts.1`", "3"]),
        ("samples: {prompts: a}\n", 1, ["`samples.prompts`", "list"]),
        ("train:\n  optimizer: {lr: .inf}\n", 2, ["`train.optimizer.lr`", "finite"]),
        ("seed: 0\ndtype: bf61\n", 2, ["`dtype`", "'bf61'", "auto, fp32, bf16, fp64", "did you mean `bf16`?"]),
        ("model:\n  rope_scaling: {low_freq_factor: 1}\n", 2, ["`model.rope_scaling.factor` is missing"]),
        ("- a\n- b\n", 1, ["mapping"]),
        ("hello\n", 1, ["mapping"]),
        ("seed: 0\nsteps: [1\n", 3, ["expected ',' or ']'"]),
        ("seed: 0\nsteps: a: b\n", 2, ["mapping values are not allowed"]),
        ("seed: 0\n\tsteps: 1\n", 2, []),
        ("steps: 3\n---\nsteps: 4\n", 2, ["document"]),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, line: int, parts: list[str]) -> None:
    """A mistake without its place, or with a hint that leads elsewhere, costs the user the afternoon."""
    file = write(tmp_path, text)
    message = refusal(PretrainConfig, file)
    assert message.startswith(f"{file}:{line}: ")
    assert [part for part in parts if part not in message] == []
    assert "Traceback" not in message


@pytest.mark.parametrize("name", ["missing.yaml", ".", "c.yaml/below.yaml"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    """A wrong path is the user's error, never a crash."""
    write(tmp_path, "seed: 1\n")
    assert str(tmp_path / name) in refusal(PretrainConfig, tmp_path / name)


def test_not_text(tmp_path: Path) -> None:
    """A model file given for a config."""
    assert refusal(PretrainConfig, write(tmp_path, b"\x80\x02\xff")).startswith(str(tmp_path))


@pytest.mark.parametrize("text", ["output: 2024\n", "output: 2024-01-01\n", "device: 0x10\n"])
def test_text_that_yaml_takes_for_something_else(tmp_path: Path, text: str) -> None:
    """`output: 2024` is a number to YAML: say that quotes are missing, in words, not in Python's types."""
    message = refusal(PretrainConfig, write(tmp_path, text))
    assert "quotes" in message
    assert "pathlib" not in message


@pytest.mark.parametrize("text", ["train:\n", "train: 3\n"])
def test_section_without_keys(tmp_path: Path, text: str) -> None:
    """All keys of a section commented out: the message names the section and its keys, not a Python class."""
    message = refusal(PretrainConfig, write(tmp_path, text))
    assert "`train`" in message
    assert "accumulate" in message
    assert "TrainConfig" not in message


def test_missing_required() -> None:
    """A required value that nobody gave is named with the word to type."""
    assert "`output` is missing" in refusal(RecipeConfig, None, "recipe=x")
    assert "output=..." in refusal(RecipeConfig, None, "recipe=x")


def test_short_list_is_told_by_its_own_name() -> None:
    """`betas.1=...` is no word one can type, so the message must not propose it."""
    message = refusal(PretrainConfig, None, "train.optimizer.betas=[0.9]")
    assert "betas" in message
    assert "betas.1=" not in message


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    """One mistake a run is a walk in the dark."""
    file = write(tmp_path, "steps: a\nseed: b\nfoo: 1\ntrain:\n  keep: z\n")
    message = refusal(PretrainConfig, file, "dtype=zz", "batch_sise=2")
    for place in (f"{file}:1: `steps`", f"{file}:2: `seed`", f"{file}:3: unknown key `foo`", f"{file}:5: `train.keep`"):
        assert place in message
    assert "dtype=zz: `dtype`" in message
    assert "batch_sise=2: unknown key `batch_sise`; did you mean `batch_size`?" in message


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("step=5", "did you mean `steps`?"),
        ("lr=5", "did you mean `train.optimizer.lr`?"),
        ("optimizer.lr=5", "did you mean `train.optimizer"),
        ("train.optimiser.lr=1", "did you mean `train.optimizer`?"),
        ("train.optimizer.lrr=1", "did you mean `train.optimizer.lr`?"),
        ("steps.foo=1", "`steps`"),
        ("steps=abc", "integer"),
        ("dtype=bf61", "did you mean `bf16`?"),
        ("train.optimizer.lr=nan", "finite"),
        ("samples.prompts=a", "samples.prompts=[a]"),
        ("output=", "`output`"),
        ("steps", "key=value"),
        ("=5", "key=value"),
        ("samples.prompts=[a", "not valid YAML"),
    ],
)
def test_mistakes_in_words(tmp_path: Path, word: str, part: str) -> None:
    """A wrong word is named itself; blaming a line of the file would be a lie."""
    file = write(tmp_path, "seed: 1\ntrain: {keep: 1}\n")
    message = refusal(PretrainConfig, file, word)
    assert part in message
    assert word in message
    assert str(file) not in message


def test_precedence(tmp_path: Path) -> None:
    """Command line over file over default; a later word over an earlier one; neighbours stay."""
    file = write(tmp_path, "steps: 7\nbatch_size: 3\ntrain:\n  keep: 5\n  optimizer: {lr: 1.0e-2, clip: 2.0}\n")
    config = load_config(PretrainConfig, file, parse_words(["steps=8", "steps=9", "train.optimizer.lr=1e-4"]))
    assert (config.steps, config.batch_size, config.seq_len) == (9, 3, PretrainConfig().seq_len)
    assert (config.train.keep, config.train.optimizer.lr, config.train.optimizer.clip) == (5, 1e-4, 2.0)
    assert config.train.optimizer.weight_decay == PretrainConfig().train.optimizer.weight_decay


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("output=2024", Path("2024")),
        ("output=runs/a=b", Path("runs/a=b")),
        ("output=no", Path("no")),
        ("device=12", "12"),
        ("device='null'", "null"),
        ('device="a b"', "a b"),
        ("seconds=null", None),
        ("seconds=1e-4", 1e-4),
        ("seconds=60", 60.0),
        ("steps=0010", 10),
        ("compile=true", True),
        ("samples.prompts=[]", []),
        ('samples.prompts=[a, "b, c", "[d]"]', ["a", "b, c", "[d]"]),
        ("train.optimizer.betas=[0.8, 9e-1]", (0.8, 0.9)),
        ("train.evaluate_every=~", None),
    ],
)
def test_words(word: str, value: Any) -> None:
    """Words have the types of their fields: a folder called 2024 is no number, 1e-4 is no text."""
    found: Any = load_config(PretrainConfig, None, parse_words([word]))
    for key in word.partition("=")[0].split("."):
        found = getattr(found, key)
    assert found == value
    assert type(found) is type(value)


def test_model_by_name(tmp_path: Path) -> None:
    """`model: name` in the file and `model.n_layers=4` as a word are one choice."""
    file = write(tmp_path, "model: llama3.2-1b\n")
    assert load_config(PretrainConfig, file).model.preset == "llama3.2-1b"
    model = load_config(PretrainConfig, file, parse_words(["model.n_layers=4"])).model
    assert (model.preset, model.n_layers, model.dim) == ("llama3.2-1b", 4, None)
    assert load_config(PretrainConfig, file, parse_words(["model=cria-2m"])).model.preset == "cria-2m"


def test_unknown_model() -> None:
    """A preset that is not there passes `puna validate` and fails after the run folder was made."""
    assert "did you mean `llama3.2-1b`?" in refusal(PretrainConfig, None, "model=lama3.2-1b")


def test_yaml_is_1_2(tmp_path: Path) -> None:
    """In YAML 1.1 Norway is false, `on` is true and 1e-3 is text."""
    text = 'device: no\nseconds: 1e-3\nsamples: {prompts: [yes, on, off, n, 12:30:45, "1"]}\n'
    config = load_config(PretrainConfig, write(tmp_path, text))
    assert (config.device, config.seconds) == ("no", 1e-3)
    assert config.samples.prompts == ["yes", "on", "off", "n", "12:30:45", "1"]


@pytest.mark.parametrize("text", [b"", b"# only a comment\n", b"\xef\xbb\xbfsteps: 1000\r\nseed: 0\r\n"])
def test_empty_and_windows_files(tmp_path: Path, text: bytes) -> None:
    """An empty file is all defaults; a BOM and CRLF are no keys."""
    assert load_config(PretrainConfig, write(tmp_path, text)) == PretrainConfig()


@pytest.mark.parametrize("string", STRINGS)
def test_round_trip_of_text(tmp_path: Path, string: str) -> None:
    """A resolved config that reads back as another one refuses to resume its own run."""
    config = load(
        "pretrain", None, {"seconds": 1e-5, "train.optimizer.betas": [0.1, 1e-16], "model.rope_scaling": {"factor": 32}}
    )
    config = config.model_copy(update={"samples": config.samples.model_copy(update={"prompts": [string, string]})})
    file = write(tmp_path, to_yaml(config))
    assert load_config(PretrainConfig, file) == config
    assert list(differences(read_yaml(file), config.model_dump(mode="json"))) == []


def test_round_trip_of_what_was_given() -> None:
    """config.yaml holds what the user gave and nothing else."""
    config = load_config(DataConfig, None, parse_words(["sources.path=2024", "sources.hold_out=['*a*']"]))
    given = to_yaml(config, given_only=True)
    assert given.split() == ["sources:", "path:", "'2024'", "hold_out:", "-", "'*a*'"]


def test_config_is_frozen() -> None:
    """A value changed halfway makes the stored config a lie."""
    with pytest.raises(ValueError, match="frozen"):
        PretrainConfig().steps = 3


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (PretrainConfig, "steps=-1"),
        (PretrainConfig, "seconds=-1"),
        (PretrainConfig, "seq_len=0"),
        (PretrainConfig, "batch_size=0"),
        (PretrainConfig, "model.n_layers=0"),
        (PretrainConfig, "train.accumulate=0"),
        (PretrainConfig, "train.optimizer.lr=-1"),
        (DataConfig, "sources.valid_fraction=1.5"),
        (DataConfig, "sources.valid_fraction=-0.1"),
    ],
)
def test_impossible_numbers(kind: type[Config], word: str) -> None:
    """A negative number of steps or a share above one is refused at once, not a crash later."""
    assert word in refusal(kind, None, word)


def test_differences() -> None:
    """What a refused resume prints: every changed leaf, nothing else, in a fixed order."""
    old = {"b": {"c": 2, "d": [1], "e": {"f": 1}}, "a": 1, "same": [1, {"x": 2}]}
    new = {"b": {"c": 3, "d": [1, 2], "e": {"f": 1}}, "same": [1, {"x": 2}], "z": "new"}
    expected = ["a: 1 -> None", "b.c: 2 -> 3", "b.d: [1] -> [1, 2]", "z: None -> new"]
    assert list(differences(old, new)) == expected
    assert list(differences(old, old)) == []
