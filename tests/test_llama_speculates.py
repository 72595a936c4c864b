"""The Python API over guessing and adapters: names become proposers, and nothing else about a text changes."""

from pathlib import Path

import pytest
from test_model import BASE, build

from puna.errors import UsageError
from puna.infer.llama import Llama
from puna.model.config import ModelConfig
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
