"""The Python API over guessing and adapters: names become proposers, and nothing else about a text changes."""

import re
from pathlib import Path
from typing import Any

import pytest
from command_line import puna_forked
from test_model import BASE, build

from puna.errors import CheckpointError, PunaError, UsageError
from puna.infer.llama import Llama
from puna.infer.speculation.draft import Draft
from puna.model.config import ModelConfig
from puna.quant.quantize import quantize_model
from puna.recipes import run
from puna.tokenizer.tokenizer import Tokenizer

SHAPE = {**BASE, "ffn_dim": 64, "vocab_size": 600}


def test_every_way_of_guessing_writes_the_same(tokenizer_folder: Path, texts: Path, tmp_path: Path) -> None:
    """A draft of another tokenizer; a packed copy that changes or freezes the weights it was made from."""
    tokenizer = Tokenizer(tokenizer_folder)
    llama = Llama(build(ModelConfig(**SHAPE)).eval(), tokenizer, tmp_path, [])
    Llama(build(ModelConfig(**{**SHAPE, "n_layers": 1})), tokenizer, tmp_path, []).save(tmp_path / "small", "fp32")
    plain = llama.generate("In the puna", 40, temperature=0.9, seed=3)
    for by in ("lookup", "self", str(tmp_path / "small")):
        assert llama.generate("In the puna", 40, temperature=0.9, seed=3, speculate=by) == plain
        assert llama.speculation(by) is llama.speculation(by)
    assert all(p.requires_grad for p in llama.model.parameters())
    other = Tokenizer(run("tokenizer", **{"output": tmp_path / "other", "vocab_size": 540, "sources.path": texts}))
    Llama(build(ModelConfig(**SHAPE)), other, tmp_path, []).save(tmp_path / "foreign", "fp32")
    with pytest.raises(UsageError, match="another tokenizer"):
        llama.generate("In the puna", speculate=str(tmp_path / "foreign"))


def test_guessing_is_the_call_s_and_its_memory_is_given_back(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A guesser left on the engine others use; the cache of a draft of two calls ago that stays for good."""
    tokenizer = Tokenizer(tokenizer_folder)
    llama = Llama(build(ModelConfig(**SHAPE)).eval(), tokenizer, tmp_path, [])
    Llama(build(ModelConfig(**{**SHAPE, "n_layers": 1})), tokenizer, tmp_path, []).save(tmp_path / "small", "fp32")
    draft = str(tmp_path / "small")
    llama.generate("In the puna", 20, speculate=draft)
    assert llama.engine.speculation is None
    proposer = llama.speculation(draft).proposer
    assert isinstance(proposer, Draft)
    assert proposer._cache is not None
    llama.generate(["In the puna", "In"], 4)
    assert proposer._cache is None


def test_a_quantized_model_guesses_for_itself_on_the_command_line(tokenizer_folder: Path, tmp_path: Path) -> None:
    """The command line loads packed weights, of which `self` can make no copy: what the help offers was refused."""
    tokenizer = Tokenizer(tokenizer_folder)
    llama = Llama(build(ModelConfig(**{**SHAPE, "dim": 64})).eval(), tokenizer, tmp_path, [])
    quantize_model(llama.model, "int8")
    llama.save(tmp_path / "q", "fp32")
    words = ["generate", tmp_path / "q", "-p", "In the puna", "--max-tokens", 8, "--dtype", "fp32", "--temperature", 0]
    plain, guessed = puna_forked([words, [*words, "--speculate", "self"]], tmp_path)
    assert guessed.returncode == 0, guessed.stderr
    assert guessed.stdout == plain.stdout
    assert "dequantized" in guessed.stderr


def test_slips_are_answered(tokenizer_folder: Path, tmp_path: Path) -> None:
    """`Sampling.__init__() got an unexpected keyword argument`, or a list of where models lie for `lokup`."""
    llama = Llama(build(ModelConfig(**SHAPE)).eval(), Tokenizer(tokenizer_folder), tmp_path, [])
    llama.save(model := tmp_path / "model", "fp32")
    slips: list[tuple[dict[str, Any], type[PunaError], str]] = [
        ({"temprature": 1.0}, UsageError, "no sampling option `temprature`; did you mean `temperature`?"),
        ({"speculate": "lokup"}, CheckpointError, "speculate=lokup: no such model; did you mean `lookup`?"),
        ({"adapter": tmp_path / "nowhere"}, CheckpointError, "nowhere: no such model"),
        ({"adapter": model}, UsageError, "a model, not an adapter"),
    ]
    for given, kind, says in slips:
        with pytest.raises(kind, match=re.escape(says)) as told:
            llama.generate("a", **given)
        assert told.value.fix
