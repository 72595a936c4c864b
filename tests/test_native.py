"""The native kernels against their oracles: every path this CPU has, shapes that fill no tile, builds that fail."""

import copy
import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_engine import alone, answers, mixed
from test_speculate import eager

from puna.checkpoint.adapter import save_adapter
from puna.errors import UsageError
from puna.infer import native as on_models
from puna.infer.cache.paged_cache import PagedCache
from puna.infer.engine import Engine
from puna.infer.forward import Row, forward
from puna.infer.generate import generate
from puna.infer.native import FEW_TOKENS, use_native
from puna.infer.request import Request
from puna.infer.sampling import Sampling
from puna.infer.speculation.speculate import Lookup
from puna.log import log
from puna.lora import LoraConfig, add_lora, lora_parameters, merge_lora
from puna.model.config import ModelConfig
from puna.model.transformer import Transformer
from puna.ops import linear as linear_file
from puna.ops import packed as packed_file
from puna.ops import paged_attention as paged_file
from puna.ops.linear import linear
from puna.ops.native import library
from puna.ops.native import linear as by_native
from puna.ops.native.library import LEVELS, Native, load
from puna.ops.packed import Packed, dequantize, expanded, packed_linear, packed_linear_eager, quantize_rows
from puna.ops.packed_layers import PackedLinear
from puna.ops.paged_attention import BLOCK, Piece, Pieces, paged_attention, paged_attention_eager
from puna.packages import cache as packages
from puna.quant.nf4 import with_nested_scales
from puna.tokenizer.tokenizer import Tokenizer

LOADED = load("auto")
pytestmark = pytest.mark.skipif(isinstance(LOADED, str), reason=f"no native kernels: {LOADED}")
ROWS = (1, 2, 3, 4, 7, 16, 17)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Native:
    """The library on each of its paths; a CPU without one skips it."""
    loaded = load(request.param)
    if isinstance(loaded, str):
        pytest.skip(loaded)
    for module in (linear_file, packed_file, paged_file, on_models):
        monkeypatch.setattr(module, "native", lambda: loaded)
    return loaded


def packed(out: int, columns: int, kind: str, group: int = 32, half: bool = True) -> Packed:
    """A weight of random codes: `int8` or `int4`, `int4-min`, `nf4`, and `-dynamic` behind any but nf4."""
    random = torch.Generator().manual_seed(out * columns)
    bits = 8 if kind.startswith("int8") else 4
    low, high, width, dtype = (-128, 128, columns, torch.int8) if bits == 8 else (0, 256, columns // 2, torch.uint8)
    codes = torch.randint(low, high, (out, width), generator=random, dtype=dtype)
    scales, mins = (torch.rand(out, columns // group, generator=random) * size for size in (0.02, -0.1))
    dtype = torch.float16 if half else torch.float32
    table = torch.randn(16, generator=random).sort().values if "nf4" in kind else None
    given = mins.to(dtype) if "min" in kind else None
    if kind == "nf4-double":
        return with_nested_scales(Packed(codes, scales, None, bits, group, table))
    return Packed(codes, scales.to(dtype), given, bits, group, table, "int8" if "dynamic" in kind else "float")


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("columns", [32, 96, 576])
@pytest.mark.parametrize(
    "kind", ["int8", "int4", "int4-min", "nf4", "nf4-double", "int8-dynamic", "int4-dynamic", "int4-min-dynamic"]
)
def test_packed_linear_is_the_oracle_s(kernels: Native, kind: str, columns: int) -> None:
    """A tail behind the last whole tile or vector was left out, or read as weights."""
    for group in (32, columns):
        for dtype in (torch.float32, torch.bfloat16):
            weight = packed(37, columns, kind, group, half=group == 32)
            for rows in ROWS:
                x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
                wanted = packed_linear_eager(x if weight.activations == "int8" else x.double(), weight)
                assert distance(packed_linear(x, weight), wanted) < TOLERANCE[dtype], (group, dtype, rows)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
def test_an_expanded_weight_is_the_oracle_s_to_the_last_bit(kernels: Native, kind: str) -> None:
    """A product and a sum fused into one rounding: a base that was trained on was not quite the one that is merged."""
    for columns in (96, 576):
        weight = packed(37, columns, kind, 32, half=False)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(expanded(weight, dtype), dequantize(weight).to(dtype))


@pytest.mark.parametrize("kind", ["int8-dynamic", "int4-dynamic"])
def test_integer_sums_are_exact(kernels: Native, kind: str) -> None:
    """A sum in 16 bits saturates, one in floats rounds: with scales of 1 the result is a whole number, and this one."""
    weight = packed(9, 4096, kind, 4096 if "8" in kind else 32)
    weight = Packed(weight.codes, torch.ones_like(weight.scales), None, weight.bits, weight.group, None, "int8")
    x = torch.randint(-127, 128, (3, 4096), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127  # so that the scale of a row is 1
    wanted = x.long() @ dequantize(weight).long().T
    assert torch.equal(packed_linear(x, weight).long(), wanted)


def test_rows_are_rounded_as_torch_rounds_them(kernels: Native) -> None:
    """Multiplying by an inverse instead of dividing moves a value across a tie: one code of 40 rows was another."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    weight = Packed(torch.eye(96, dtype=torch.int8), torch.ones(96, 1), bits=8, group=96, activations="int8")
    whole, scale = quantize_rows(x)
    assert torch.equal(packed_linear(x, weight), whole * scale)


@pytest.mark.parametrize("kind", ["int8-dynamic", "int4-dynamic", "int4-min-dynamic"])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_what_is_not_finite_stays_so(kernels: Native, kind: str, bad: str) -> None:
    """A NaN was rounded away: a model that had gone wrong went on with numbers."""
    for group in (32, 96):
        for dtype in (torch.float32, torch.bfloat16):
            weight = packed(37, 96, kind, group)
            x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
            x[1, 40] = float(bad)
            found, wanted = packed_linear(x, weight), packed_linear_eager(x, weight)
            assert wanted[1].isnan().all()
            assert found[1].isnan().all()
            assert distance(found[::2], wanted[::2]) < TOLERANCE[dtype]


def test_threads_and_memory_that_are_not_there(kernels: Native) -> None:
    """A helper thread that could not start ended the process; so did memory that ran out amid a kernel."""
    code = f"""
import resource, torch
from puna.errors import ResourceError
from puna.ops import packed
from puna.ops.native.library import load
packed.native = lambda library=load({LEVELS[kernels.level]!r}): library
torch.set_num_threads(1)
weight = packed.Packed(torch.ones(512, 4096, dtype=torch.int8), torch.ones(512, 1), None, 8, 4096, None, "int8")
x, many, room = torch.ones(2, 4096), torch.ones(8192, 4096), torch.ones(20 << 20, dtype=torch.uint8)
packed.packed_linear(x, weight)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (6 << 20), -1))
torch.set_num_threads(3)
assert bool((packed.packed_linear(x, weight) == 4096).all())
try:
    del room  # as much as the output takes
    packed.packed_linear(many, weight)
except ResourceError as error:
    print(error.what)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert bool((packed.packed_linear(x, weight) == 4096).all())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "memory ran out in a native kernel\n"


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_linear_is_torch_s(kernels: Native, dtypes: tuple[str, str]) -> None:
    """Rows, outputs and inputs that fill no tile, and none at all."""
    kind, stored = (getattr(torch, name) for name in dtypes)
    for out, columns in ((100, 64), (37, 576), (5, 77), (1, 1)):
        weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(out)).to(stored)
        for rows in (0, *ROWS):
            x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(kind)
            with torch.no_grad():
                found = linear(x, weight)
            wanted = F.linear(x.double(), weight.double())
            assert found.shape == wanted.shape
            assert found.dtype == kind
            assert rows == 0 or distance(found, wanted) < TOLERANCE[kind], (out, columns, rows)


@pytest.mark.parametrize(("out", "columns"), [(100, 64), (37, 576), (64, 66), (5, 77)])
def test_many_rows_are_torch_s(kernels: Native, out: int, columns: int) -> None:
    """Panels of 32 outputs and tiles of 12 rows, none of them full; an odd row has half a pair."""
    r = torch.Generator().manual_seed(out)
    weight = torch.randn(out, columns, generator=r).bfloat16()
    for rows in (39, 40, 53, 130):
        x = torch.randn(rows, columns, generator=r).bfloat16()
        known = by_native.plain_weight(weight)
        assert known is not None
        found, wanted = by_native.linear(kernels, x, known), F.linear(x.double(), weight.double())
        assert distance(found, wanted) < TOLERANCE[torch.bfloat16], rows


def test_threads_do_not_change_bits(kernels: Native) -> None:
    """A sum that is cut by threads depends on how many there are: a resumed run would write other text."""
    weight, x = packed(1000, 576, "int4-min"), torch.randn(3, 576, generator=torch.Generator().manual_seed(0))
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(packed_linear(x.bfloat16(), weight))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_gradient_flows_through_packed_weights(kernels: Native) -> None:
    """Kernels know no autograd: training adapters over packed weights must not lose the gradient."""
    weight, x = packed(8, 64, "nf4"), torch.randn(3, 64, requires_grad=True)
    packed_linear(x, weight).sum().backward()
    assert x.grad is not None
    assert distance(x.grad, dequantize(weight).sum(0).expand(3, -1)) < 1e-6


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 32), (6, 2, 96), (8, 1, 64)])
def test_what_another_text_left_in_a_block_is_not_seen(kernels: Native, heads: int, kv_heads: int, dim: int) -> None:
    """A text that had gone wrong made NaNs of every later one that was given one of its blocks."""
    r = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(5, kv_heads, BLOCK, dim, generator=r) for _ in range(2))
    for block, used in ((0, 27), (1, 13), (4, 9)):
        keys[block, :, used:] = values[block, :, used:] = float("nan")
    few, many = ([Piece(45 - n, n, [3, 1]), Piece(40, 1, [2, 4]), Piece(16, 11, [0])] for n in (13, 45))
    cases = [(few, torch.float32), (few, torch.bfloat16), *([(many, torch.bfloat16)] if kernels.wide else [])]
    for pieces, dtype in cases:
        step = Pieces(pieces, torch.device("cpu"))
        q, k, v = (torch.randn(1, n, step.tokens, dim, generator=r).to(dtype) for n in (heads, kv_heads, kv_heads))
        given = [q, k, v, keys.to(dtype), values.to(dtype)]
        wanted = paged_attention_eager(*(x.double() for x in given), step)
        assert distance(paged_attention(*(x.clone() for x in given), step), wanted) < TOLERANCE[dtype]


@pytest.fixture
def model() -> Transformer:
    return wide_heads()


def wide_heads() -> Transformer:
    """A tiny Llama whose heads are as wide as the kernels want them."""
    config = ModelConfig(
        dim=96, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=32, ffn_dim=160, vocab_size=300, max_seq_len=160,
        rope_theta=10000.0, rope_scaling=None, norm_eps=1e-5, tie_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        made = Transformer(config)
    made.to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    for parameter in made.parameters():  # not `init_weights`: its blocks add nothing yet
        parameter.data.normal_(0.0 if parameter.ndim > 1 else 1.0, 0.1, generator=random)
    return made.eval()


def texts(model: Transformer, count: int = 5) -> tuple[list[list[int]], list[list[int]]]:
    """What the plain loop and the engine write after prompts that end in all places of a block."""
    prompts = [list(range(1 + i, 8 + 9 * i)) for i in range(count)]
    wanted = [generate(model, [prompt], max_tokens=40)[0] for prompt in prompts]
    results = Engine(model).run([Request(prompt, Sampling(max_tokens=40)) for prompt in prompts])
    return wanted, [list(result.completions[0].token_ids) for result in results]


def test_the_engine_writes_what_generate_writes(kernels: Native, model: Transformer) -> None:
    """Norms, RoPE, attention over blocks and the MLP are all written a second time in the kernels."""
    assert use_native(model)
    wanted, found = texts(model)
    assert found == wanted
    assert on_models._weights(model) is not None


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every step that the kernels made."""
    made: list[int] = []

    def forward(*given: Any) -> None:
        made.append(len(given[2]))
        return by_blocks(*given)

    by_blocks = on_models.forward
    monkeypatch.setattr(on_models, "forward", forward)
    return made


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """What `generate` says to each of the 64 requests alone."""
    return [alone(wide_heads(), request) for request in mixed(64)]


@pytest.mark.parametrize(
    ("size", "guesses"),
    [
        ({"chunk": 7}, False),  # prompts, too, are read by the kernels
        ({"tokens": 160, "batch": 8}, False),  # texts are preempted
        ({"tokens": 200, "chunk": 16, "batch": 8}, True),
    ],
)
def test_64_requests_equal_generate(
    kernels: Native, expected: list[list[int]], steps: list[int], size: dict[str, int], guesses: bool
) -> None:
    """The engine's own proof is of fp64 and narrow heads, which never enter the kernels that users run: shared blocks,
    preempted texts and rejected guesses are theirs to store and read as well."""
    model = wide_heads()
    use_native(model)
    engine = Engine(model, speculate=eager(Lookup()) if guesses else None, **size)
    for _ in range(2):  # the second time much of it is in the cache
        assert answers(engine, mixed(64)) == expected
        assert engine.cache.blocks.used == 0
    assert len(steps) > 50
    assert max(steps) >= min(size.get("chunk", 8), 8) - 1


def test_native_steps_go_on_beside_adapters(
    kernels: Native, model: Transformer, steps: list[int], tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Hooks of one step's adapters that are passed by, or that keep later steps from the kernels."""
    twin = copy.deepcopy(model)
    add_lora(twin, config := LoraConfig(rank=4, alpha=8.0), seed=1, dtype=torch.float32)
    for parameter in lora_parameters(twin).values():
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    save_adapter(tmp_path, twin, config, Tokenizer(tokenizer_folder), "base", {})
    requests = mixed(24)
    merge_lora(twin)
    base, adapted = ([alone(each, request) for request in requests] for each in (model, twin))
    assert base != adapted
    use_native(model)
    engine = Engine(model, adapters={"a": tmp_path}, batch=8)
    asked = [replace(request, adapter="a" if i % 2 else None) for i, request in enumerate(requests)]
    assert answers(engine, asked) == [(adapted if i % 2 else base)[i] for i in range(24)]
    steps.clear()
    assert answers(engine, requests) == base
    assert len(steps) > 20


@pytest.mark.parametrize("chunk", [9, 45, 90])
def test_a_bf16_step_is_as_near_as_torch_s(kernels: Native, model: Transformer, steps: list[int], chunk: int) -> None:
    """bf16 is what users run, and its rounding between two products is written a second time: of few rows and many."""
    if chunk > FEW_TOKENS and not kernels.wide:
        pytest.skip("long prompts are torch's below AVX-512")
    ids = torch.randint(300, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.compute_dtype = torch.bfloat16
    with torch.no_grad():
        wanted = model(torch.tensor([ids]))[0]
        plain = distance(half(torch.tensor([ids]))[0], wanted)
        use_native(half)
        cache = PagedCache(half.config, 96, torch.bfloat16, torch.device("cpu"))
        table = [cache.take() for _ in range(96 // BLOCK)]
        hidden = [forward(half, cache, [Row(ids[i : i + chunk], i, table)]) for i in range(0, 90, chunk)]
        found = half.lm_head(torch.cat(hidden))
    assert steps == [chunk] * (90 // chunk)
    assert distance(found, wanted) < 1.2 * plain


def test_prompts_and_tokens_of_many_texts_in_one_step(kernels: Native, model: Transformer, steps: list[int]) -> None:
    """Stretches of a text are looked at together: one must not run into its neighbour's, or past its own end."""
    if not kernels.wide:
        pytest.skip("long prompts are torch's below AVX-512")
    half = copy.deepcopy(model).to(torch.bfloat16)
    half.compute_dtype = torch.bfloat16
    r = torch.Generator().manual_seed(1)
    texts = [torch.randint(300, (length,), generator=r).tolist() for length in (70, 1, 33, 64, 17, 65, 2, 40)]
    with torch.no_grad():
        wanted = [model(torch.tensor([ids]))[0, -1] for ids in texts]
        plain = max(distance(half(torch.tensor([i]))[0, -1], w) for i, w in zip(texts, wanted, strict=True))
        use_native(half)
        cache = PagedCache(half.config, 1024, torch.bfloat16, torch.device("cpu"))
        tables = [[cache.take() for _ in range(-(-len(ids) // BLOCK))] for ids in texts]
        named = list(zip(texts, tables, strict=True))
        forward(half, cache, [Row(ids[:40], 0, table) for ids, table in named if len(ids) > 1])
        forward(half, cache, [Row(ids[40:-1], 40, table) for ids, table in named if len(ids) > 41])
        last = forward(half, cache, [Row(ids[-1:], len(ids) - 1, table) for ids, table in named])
        whole = PagedCache(half.config, 1024, torch.bfloat16, torch.device("cpu"))
        tables = [[whole.take() for _ in range(-(-len(ids) // BLOCK))] for ids in texts]
        hidden = forward(half, whole, [Row(ids, 0, t) for ids, t in zip(texts, tables, strict=True)])
        ends = torch.tensor([len(ids) for ids in texts]).cumsum(0) - 1
        found = [half.lm_head(last), half.lm_head(hidden[ends])]
    assert steps[-1] == sum(map(len, texts))
    for logits in found:
        assert max(distance(f, w) for f, w in zip(logits, wanted, strict=True)) < 1.5 * plain


def test_packed_blocks_write_what_their_dequantized_weights_write(kernels: Native, model: Transformer) -> None:
    """Layers of unequal kinds are told apart one by one: a GGUF file mixes them."""
    for i, layer in enumerate(model.layers):
        for parent, name in ((layer.self_attn, "v_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "up_proj")):
            out, columns = getattr(parent, name).weight.shape
            setattr(parent, name, PackedLinear(packed(out, columns, ("int8", "int4-min")[i])))
    use_native(model)
    wanted, found = texts(model)
    assert found == wanted
    assert on_models._weights(model) is not None


def test_weights_that_moved_are_read_where_they_are(kernels: Native, model: Transformer) -> None:
    """An address kept over an optimizer's or a loader's new tensor would read freed memory."""
    use_native(model)
    texts(model, 1)
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    wanted, found = texts(model)
    assert found == wanted
    assert use_native(copy.deepcopy(model))  # addresses are not copied with a model


@pytest.mark.parametrize("place", ["1", "1.mlp", "1.mlp.up_proj", "0.self_attn.q_proj", "0.input_layernorm"])
def test_what_is_hooked_or_replaced_is_called(kernels: Native, model: Transformer, place: str) -> None:
    """A module that is something else now (an adapter, a probe) was passed by, and other text written."""
    use_native(model)
    before, _ = texts(model, 2)
    module = model.layers.get_submodule(place)
    handle = module.register_forward_hook(lambda module, given, out: out * 0)
    wanted, found = texts(model, 2)
    assert found == wanted != before
    handle.remove()
    wanted, found = texts(model, 2)
    assert found == wanted == before
    assert on_models._weights(model) is not None
    parent, _, name = place.rpartition(".")
    setattr(model.layers.get_submodule(parent), name, torch.nn.Sequential(module) if parent else Twice(module))
    assert on_models._weights(model) is None
    wanted, found = texts(model, 2)
    assert found == wanted


class Twice(torch.nn.Module):
    """A block that adds what it adds twice."""

    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return 2 * self.block(x, *rest) - x


def test_modules_that_hold_no_tensor_are_watched(kernels: Native, model: Transformer) -> None:
    """Hooks on the attention (which nobody calls) and on all modules of a process are hooks, too."""
    use_native(model)
    texts(model, 1)
    for register in (
        model.layers[0].self_attn.register_forward_pre_hook,
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(lambda *given: None)
        assert on_models._weights(model) is None
        handle.remove()
        assert on_models._weights(model) is not None


def test_packed_tensors_that_are_replaced_are_read(kernels: Native, model: Transformer) -> None:
    """`load_state_dict(assign=True)` with other scales changed the buffer and not the output."""
    layer = model.layers[0].mlp.up_proj = PackedLinear(packed(160, 96, "int4-min"))
    use_native(model)
    texts(model, 1)
    for name, factor in (("scales", 2), ("mins", -3)):
        changed = layer.state_dict()
        changed[name] = changed[name] * factor
        layer.load_state_dict(changed, assign=True)
        x = torch.randn(1, 96, generator=torch.Generator().manual_seed(0))
        assert distance(layer(x), F.linear(x, layer.weight)) < 1e-6
        wanted, found = texts(model, 2)
        assert found == wanted


def test_a_table_meets_rounded_activations_in_torch(kernels: Native) -> None:
    """The kernels add whole codes up for int8 activations: a table was taken for none."""
    weight, x = replace(packed(37, 96, "nf4"), activations="int8"), torch.randn(2, 96)
    assert torch.equal(packed_linear(x, weight), packed_linear_eager(x, weight))


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without g++ has to work, by torch's kernels."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no C++ compiler" in str(load("auto"))
    assert load("0") == "PUNA_NATIVE=0"
    monkeypatch.setattr(packed_file, "native", lambda: None)
    weight, x = packed(8, 64, "int4"), torch.randn(2, 64)
    assert torch.equal(packed_linear(x, weight), packed_linear_eager(x, weight))


def test_a_level_that_is_not_to_be_had_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`PUNA_NATIVE=AVX2` was heard as 0, in a line that -q hides."""
    native = library.native.__wrapped__
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setenv("PUNA_NATIVE", "AVX2")
    with pytest.raises(UsageError, match="AVX2 is no level") as told:
        native()
    assert "avx2" in told.value.fix
    monkeypatch.setenv("PUNA_NATIVE", "avx512")
    monkeypatch.setattr(library, "_open", lambda compiler: SimpleNamespace(puna_level=lambda: 1))
    with caplog.at_level("WARNING", log.name):
        assert native() is None
    assert "this CPU has no avx512" in caplog.text


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A broken toolchain must not end a run, and its own first error helps."""
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'native.cpp:1: error: it is broken' >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "it is broken" in str(load("auto"))


def test_builds_at_once_and_a_damaged_library(tmp_path: Path) -> None:
    """Ranks start together; and a file cut short by a full disk kills whoever loads it, for ever."""
    built = max((packages().with_name("native")).glob("*.so"), key=lambda path: path.stat().st_mtime)
    compiler = tmp_path / "g++"
    skip = 'while [ "$1" != -o ]; do shift; done'
    compiler.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit\n{skip}\nsleep 0.3\ncp {built} $2\n")
    compiler.chmod(0o700)
    code = "from puna.ops.native.library import load; assert not isinstance(load('auto'), str), load('auto')"
    environment = {
        "XDG_CACHE_HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path),
    }  # fmt: skip
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    (made,) = tmp_path.glob("puna/native/*")
    assert made.stat().st_mode & 0o077 == 0
    made.write_bytes(made.read_bytes()[:1000])
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
    assert made.stat().st_size > 10000


def test_the_library_s_structs_are_those_of_the_sources(tmp_path: Path) -> None:
    """ctypes mirrors types.h by hand: a field added on one side moves all others."""
    names = ("Weight", "Call", "Block", "Pool")
    sizes = ", ".join(f"sizeof({name})" for name in names)
    program = f'#include "types.h"\n#include <cstdio>\nint main() {{ printf("%zu %zu %zu %zu", {sizes}); }}'
    command = ["g++", "-std=c++20", "-Wno-psabi", "-I", str(Path(library.__file__).parent), "-x", "c++", "-"]
    subprocess.run([*command, "-o", str(tmp_path / "sizes")], input=program.encode(), check=True)
    told = subprocess.run([str(tmp_path / "sizes")], capture_output=True, text=True).stdout
    assert told.split() == [str(ctypes.sizeof(getattr(library, name))) for name in names]
