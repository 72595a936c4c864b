"""Meta's checkpoints against a Llama written as Meta writes it: pairs as complex numbers, cut into shards."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.checkpoint.meta.model import open_meta
from puna.checkpoint.meta.params import ffn_width, read_params
from puna.checkpoint.meta.write import write_meta
from puna.checkpoint.stored import Stored, Weight
from puna.errors import CheckpointError, UsageError
from puna.model.config import ModelConfig, RopeScaling
from puna.model.init import build_model, materialize
from puna.model.presets import PRESETS
from puna.ops.rope import scale_frequencies
from puna.tokenizer.tokenizer import Tokenizer

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 8, "ffn_dim": 64, "vocab_size": 600,
    "max_seq_len": 2048, "rope_theta": 1e4, "rope_scaling": None, "norm_eps": 1e-6, "tie_embeddings": False,
}  # fmt: skip
LLAMA3 = {**TINY, "n_kv_heads": 2, "rope_theta": 5e5, "norm_eps": 1e-5, "max_seq_len": 8192}
LLAMA31 = {**LLAMA3, "max_seq_len": 131072, "rope_scaling": RopeScaling(factor=8)}
GENERATIONS = {
    "1": ModelConfig(**TINY),
    "2": ModelConfig(**{**TINY, "norm_eps": 1e-5, "max_seq_len": 4096}),
    "3": ModelConfig(**LLAMA3),
    "3.1": ModelConfig(**LLAMA31),
    "3.2": ModelConfig(**{**LLAMA31, "rope_scaling": RopeScaling(factor=32), "tie_embeddings": True}),
}
ROWS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def random_state(config: ModelConfig) -> dict[str, Tensor]:
    """Weights by Meta's names, fp64; the head of a tied model is there too, as Llama 3.2 has it."""
    draw = torch.Generator().manual_seed(0)
    heads, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, ffn = config.dim, config.ffn_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (config.vocab_size, dim), "norm.weight": (dim,)}
    shapes["output.weight"] = (config.vocab_size, dim)
    for i in range(config.n_layers):
        inner = {"wq": (heads, dim), "wk": (keys, dim), "wv": (keys, dim), "wo": (dim, heads)}
        shapes |= {f"layers.{i}.attention.{n}.weight": shape for n, shape in inner.items()}
        inner = {"w1": (ffn, dim), "w2": (dim, ffn), "w3": (ffn, dim)}
        shapes |= {f"layers.{i}.feed_forward.{n}.weight": shape for n, shape in inner.items()}
        shapes |= {f"layers.{i}.{n}.weight": (dim,) for n in ("attention_norm", "ffn_norm")}
    state = {n: torch.randn(s, generator=draw, dtype=torch.float64) * 0.2 for n, s in shapes.items()}
    if config.tie_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"].clone()
    return state


def metas_logits(state: Mapping[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """A forward as Meta's model.py computes it: pairs of neighbours are complex numbers."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.norm_eps) * state[f"{name}.weight"]

    def rotated(x: Tensor) -> Tensor:  # (B, T, H, D)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[None, :, None]).flatten(3)

    size = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, size, 2).float() / size)
    if config.rope_scaling is not None:
        frequencies = scale_frequencies(frequencies, **config.rope_scaling.model_dump())
    angles = torch.outer(torch.arange(tokens.shape[1]).float(), frequencies)
    turns = torch.complex(angles.cos(), angles.sin()).to(torch.complex128)
    h = state["tok_embeddings.weight"][tokens]
    future = torch.full((tokens.shape[1],) * 2, float("-inf"), dtype=torch.float64).triu(1)
    for i in range(config.n_layers):
        w = {n.split(".")[3]: t for n, t in state.items() if n.startswith(f"layers.{i}.") and n.count(".") == 4}
        x = norm(h, f"layers.{i}.attention_norm")
        q, k, v = ((x @ w[n].T).unflatten(-1, (-1, size)) for n in ("wq", "wk", "wv"))
        q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(config.n_heads // config.n_kv_heads, 2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5 + future
        h = h + torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2) @ w["wo"].T
        x = norm(h, f"layers.{i}.ffn_norm")
        h = h + (torch.nn.functional.silu(x @ w["w1"].T) * (x @ w["w3"].T)) @ w["w2"].T
    return norm(h, "norm") @ state["output.weight"].T


def cut(name: str, tensor: Tensor, shards: int, config: ModelConfig, by_rows: bool) -> list[Tensor]:
    """A tensor as the shards hold it, by the published rules."""
    kind = name.split(".")[-2]
    if kind == "tok_embeddings":
        return list(tensor.chunk(shards, 0 if by_rows else 1))
    if kind not in ROWS:
        return [tensor] * shards
    if kind in ("wk", "wv") and shards > config.n_kv_heads:
        times = shards // config.n_kv_heads
        return [part for part in tensor.chunk(config.n_kv_heads, 0) for _ in range(times)]
    return list(tensor.chunk(shards, ROWS[kind]))


def joined(parts: list[Tensor], name: str, config: ModelConfig, by_rows: bool) -> Tensor:
    """The inverse of `cut`."""
    kind = name.split(".")[-2]
    if kind in ("wk", "wv"):
        parts = parts[:: max(1, len(parts) // config.n_kv_heads)]
    axis = (0 if by_rows else 1) if kind == "tok_embeddings" else ROWS.get(kind)
    return parts[0] if axis is None else torch.cat(parts, axis)


def publish(
    folder: Path, state: Mapping[str, Tensor], config: ModelConfig, shards: int, by_rows: bool, **more: Any
) -> Path:
    """A folder as Meta would publish it, by torch.save."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        mine = {n: cut(n, t, shards, config, by_rows)[shard].clone() for n, t in state.items()}
        torch.save({**mine, "rope.freqs": torch.ones(4)}, folder / f"consolidated.{shard:02}.pth")
    params: dict[str, Any] = {n: getattr(config, n) for n in ("dim", "n_layers", "n_heads", "norm_eps")}
    params |= {"multiple_of": 64, "vocab_size": -1, "ffn_dim_multiplier": 0.7, "rope_theta": config.rope_theta}
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if config.rope_scaling is not None:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": config.rope_scaling.factor}
    (folder / "params.json").write_text(json.dumps(params | more))
    return folder


def tokens() -> Tensor:
    return torch.randint(0, 600, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_meta_publishes_computes_the_same(generation: str, shards: int, tmp_path: Path) -> None:
    """Rows of q and k in Meta's order, k permuted with too many heads, an axis mixed up: fluent nonsense."""
    config = GENERATIONS[generation]
    state = random_state(config)
    stored = open_meta(publish(tmp_path / "m", state, config, shards, by_rows=generation >= "3"))
    wanted = (
        config if config.rope_theta == 1e4 else config.model_copy(update={"max_seq_len": stored.config.max_seq_len})
    )
    assert stored.config == wanted
    logits = stored.load(torch.float64, CPU)(tokens())
    assert (logits - metas_logits(state, config, tokens())).abs().max() < 1e-9


def random_model(config: ModelConfig, tokenizer: Path, dtype: torch.dtype = torch.float64) -> Stored:
    """A model in memory that can be written."""
    model = build_model(config, dtype)
    materialize(model, CPU, dtype)
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=draw)
    tied = config.tie_embeddings
    named = {n: p.data for n, p in model.named_parameters() if not (tied and n.startswith("lm_head."))}
    weights = {n: Weight(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in named.items()}
    return Stored(tokenizer, "hf", config, weights, "F64", [], lambda: Tokenizer(tokenizer))


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_is_written_computes_the_same_in_metas_code(
    generation: str, shards: int, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """An export that only its own reader understands."""
    config = GENERATIONS[generation]
    stored, names = random_model(config, tokenizer_folder), list[str]()
    write_meta(stored, tmp_path, shards, None, {"recipe": "test"}, names.append)
    parts = [torch.load(f, weights_only=True) for f in sorted(tmp_path.glob("*.pth"))]
    assert len(parts) == shards
    assert set(stored.weights) <= set(names)
    state = {n: joined([part[n] for part in parts], n, config, by_rows=True) for n in parts[0]}
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in random_state(config).items()}
    logits = stored.load(torch.float64, CPU)(tokens())
    assert (logits - metas_logits(state, config, tokens())).abs().max() < 1e-9
    again = open_meta(tmp_path)
    assert again.config == config
    assert again.lineage["recipe"] == "test"
    assert all(torch.equal(again.weights[n].read(), w.read()) for n, w in stored.weights.items())
    for line in (tmp_path / "checklist.chk").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.md5((tmp_path / name).read_bytes()).hexdigest() == digest


def test_embeddings_cut_by_columns_are_joined_when_they_are_tied(tmp_path: Path) -> None:
    """The head is cut by rows and the embedding by columns: equal matrices in unequal parts."""
    config = ModelConfig(**{**TINY, "tie_embeddings": True})
    stored = open_meta(publish(tmp_path / "m", random_state(config), config, 2, by_rows=False))
    assert stored.config.tie_embeddings
    assert "lm_head.weight" not in stored.weights


@pytest.mark.parametrize("said", [2, 4])
def test_repeated_key_heads_are_kept_once(said: int, tmp_path: Path) -> None:
    """405B in 16 shards stores its 8 key heads twice, and its params.json counts 16."""
    config = GENERATIONS["3"]
    state = random_state(config)
    stored = open_meta(publish(tmp_path / "m", state, config, 4, by_rows=True, n_kv_heads=said))
    assert stored.config.n_kv_heads == 2
    logits = stored.load(torch.float64, CPU)(tokens())
    assert (logits - metas_logits(state, config, tokens())).abs().max() < 1e-9


PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
    "llama-65b": {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
    "llama2-13b": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05, "vocab_size": -1},
    "llama2-70b": {
        "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
        "norm_eps": 1e-05, "vocab_size": -1,
    },
    "llama3-8b": {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
    },
    "llama3.1-405b": {"model": {
        "dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 4096,
        "ffn_dim_multiplier": 1.2, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
    }},
    "llama3.2-1b": {
        "dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
        "ffn_dim_multiplier": 1.5, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
    },
    "llama3.2-3b": {
        "dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
        "ffn_dim_multiplier": 1.0, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params_mean_the_preset(name: str) -> None:
    """A factor of 8 for Llama 3.2, a context of another generation, a width rounded another way."""
    preset = PRESETS[name]
    config = read_params(PUBLISHED[name], preset.vocab_size, Path("params.json"))
    assert config.model_copy(update={"tie_embeddings": preset.tie_embeddings}) == preset


def test_widths_of_the_fact_sheet() -> None:
    """Truncations of the rule matter."""
    assert [ffn_width(4096, 1.0, 256), ffn_width(4096, 1.3, 1024), ffn_width(8192, 1.3, 4096)] == [11008, 14336, 28672]
    assert [ffn_width(16384, 1.2, 4096), ffn_width(2048, 1.5, 256), ffn_width(3072, 1.0, 256)] == [53248, 8192, 8192]


WRONG_PARAMS: dict[str, tuple[dict[str, Any], str]] = {
    "quantized": ({"quantization_args": {"scheme": "int8_weight_int8_dynamic_activation"}}, "quantization_args"),
    "adapted": ({"lora_args": {"rank": 8, "scale": 2.0}}, "lora_args"),
    "a billion layers": ({"n_layers": 10**9}, "n_layers is 1000000000"),
    "a layer too many": ({"n_layers": 3}, "3 layers, the files hold 2"),
    "heads of 100 million": ({"head_dim": 10**8}, "head_dim is 100000000"),
    "a theta of zero": ({"rope_theta": 0}, "rope_theta is 0"),
    "a negative theta": ({"rope_theta": -1}, "rope_theta is -1"),
    "a theta in quotes": ({"rope_theta": "500000"}, "rope_theta is '500000'"),
    "an eps of one": ({"norm_eps": 1}, "norm_eps is 1"),
    "an odd head": ({"head_dim": 7}, "head_dim 7 is odd"),
    "a theta that is no number": ({"rope_theta": float("nan")}, "rope_theta is nan"),
    "a large eps": ({"norm_eps": 2}, "norm_eps is 2"),
    "a negative context": ({"max_seq_len": -7}, "max_seq_len is -7"),
    "no number": ({"dim": "many"}, "not numbers"),
    "no heads": ({"n_heads": 0}, "not numbers"),
    "negative": ({"n_kv_heads": -2}, "n_kv_heads is -2"),
    "too wide": ({"multiple_of": 4096}, "does not fit its config"),
}


@pytest.mark.parametrize("case", WRONG_PARAMS)
def test_params_that_cannot_be_are_refused(case: str, tmp_path: Path) -> None:
    """A quantized checkpoint read as if it were plain, or sizes that take the machine down."""
    more, told = WRONG_PARAMS[case]
    config = GENERATIONS["3"]
    folder = publish(tmp_path / "m", random_state(config), config, 1, by_rows=True, **more)
    with pytest.raises(CheckpointError, match=told):
        open_meta(folder).check()


@pytest.mark.parametrize(
    "said",
    [*({"max_seq_len": n} for n in (-7, 0, 2**31, True, "8192")), *({"stop_ids": i} for i in (7, ["7"], [600], [-1]))],
)
def test_a_puna_json_that_cannot_be_is_refused(said: dict[str, Any], tmp_path: Path) -> None:
    """It says what params.json has no place for; a context of -7 was believed."""
    config = GENERATIONS["3"]
    folder = publish(tmp_path / "m", random_state(config), config, 1, by_rows=True)
    (folder / "puna.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=f"{next(iter(said))} (is|are)"):
        open_meta(folder)


@pytest.mark.parametrize("name", ["attention.wk", "attention.wv", "tok_embeddings", "output"])
def test_a_scalar_for_a_matrix_is_told(name: str, tmp_path: Path) -> None:
    """Heads counted by the rows of a number: an IndexError."""
    config, state = GENERATIONS["3"], random_state(GENERATIONS["3"])
    full = name if "." not in name else f"layers.0.{name}"
    folder = publish(tmp_path / "m", state, config, 1, by_rows=True)
    torch.save({**state, f"{full}.weight": torch.tensor(1.0)}, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=rf"no {full}\.weight that is a matrix"):
        open_meta(folder)


@pytest.mark.parametrize(("case", "rows"), [("tied", 0), ("copied", 600), ("untied", 64), ("heads", 64 + 3)])
def test_what_is_compared_when_a_folder_is_opened(
    case: str, rows: int, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`puna inspect` of Llama 3.2 1B read a gigabyte to learn that a matrix equals itself."""
    compared, equal = [], torch.equal
    config = GENERATIONS["3.2" if case in ("tied", "copied") else "3" if case == "untied" else "2"]
    if case == "tied":
        write_meta(random_model(config, tokenizer_folder), folder := tmp_path, 1, None, {}, print)
    else:
        folder = publish(tmp_path / "m", random_state(config), config, 4 if case == "heads" else 1, by_rows=True)

    def counted(a: Tensor, b: Tensor) -> bool:
        compared.append(len(a))
        return equal(a, b)

    monkeypatch.setattr(torch, "equal", counted)
    assert open_meta(folder).config.tie_embeddings == config.tie_embeddings
    assert sum(compared) <= rows


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    """A download that lost a file, or two models in one folder."""
    config = GENERATIONS["3"]
    folder = publish(tmp_path / "m", random_state(config), config, 2, by_rows=True)
    whole = (folder / "consolidated.01.pth").read_bytes()
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"no consolidated\.01\.pth here"):
        open_meta(folder)
    (folder / "consolidated.02.pth").unlink()
    (folder / "consolidated.01.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a torch file"):
        open_meta(folder)
    torch.save({"norm.weight": torch.ones(32)}, folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth differ from"):
        open_meta(folder)


@pytest.mark.parametrize("by_rows", [True, False])
def test_a_last_shard_that_is_missing_is_told(by_rows: bool, tmp_path: Path) -> None:
    """No gap in the numbers: a line of 1,300 characters about shapes, and a wrong parameter count from inspect."""
    config = GENERATIONS["3"]
    folder = publish(tmp_path / "m", random_state(config), config, 4, by_rows=by_rows)
    (folder / "consolidated.03.pth").unlink()
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(CheckpointError, match=r"shard 2 of 4 is missing: no consolidated\.02\.pth here"):
        open_meta(folder)


def test_a_tokenizer_model_that_is_copied_is_not_said_to_be_missing(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`no tokenizer.model` stood there beside a tokenizer.model."""
    tree = Tokenizer(tokenizer_folder).parsed
    tree["model"]["ignore_merges"] = False  # as transformers writes what it read from a GGUF
    files = {"tokenizer.json": json.dumps(tree).encode(), "tokenizer.model": b"of another family"}
    caplog.set_level("WARNING", "puna")
    stored = random_model(GENERATIONS["3"], tokenizer_folder)
    write_meta(replace(stored, read_tokenizer=lambda: Tokenizer(files)), tmp_path, 1, None, {}, lambda name: None)
    assert (tmp_path / "tokenizer.model").read_bytes() == b"of another family"
    assert "tokenizer.model is a copy of the source's" in caplog.text


def test_shards_that_cannot_be_cut_are_told_before_writing(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Half a conversion that ends in a shape error."""
    stored = random_model(GENERATIONS["3"], tokenizer_folder)
    with pytest.raises(UsageError, match=r"cut into 3 shards: n_heads = 4, ffn_dim = 64") as told:
        write_meta(stored, tmp_path, 3, None, {}, print)
    assert told.value.fix == "--shards 1 or 2 or 4"  # "another number that divides them" leaves the sum to the reader
    odd = GENERATIONS["3"].model_copy(update={"rope_scaling": RopeScaling(factor=8, original_max_seq_len=32)})
    with pytest.raises(UsageError, match="no place for this RoPE scaling"):
        write_meta(random_model(odd, tokenizer_folder), tmp_path, 1, None, {}, print)
    assert list(tmp_path.iterdir()) == []
