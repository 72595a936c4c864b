"""LoRA by request: each text as if its adapter were alone on the model, whoever shares the step or the prompt."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapters import KINDS
from test_engine import CONFIG, alone, answers, prompts
from test_model import build
from test_speculate import eager

from puna.checkpoint.adapter import load_adapter, save_adapter
from puna.errors import CheckpointError, UsageError
from puna.infer.engine import Engine
from puna.infer.native import use_native
from puna.infer.request import Request, Sampling
from puna.infer.speculation.speculate import Lookup
from puna.lora import LoraConfig, add_lora, lora_parameters, merge_lora
from puna.model.transformer import Transformer
from puna.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, Path]:
    """Adapters of several kinds, none of which does nothing."""
    made: dict[str, Path] = {}
    for seed, (kind, values) in enumerate(KINDS.items(), 1):
        model = build(CONFIG, torch.float64)
        config = LoraConfig(rank=3 + seed, alpha=10.0, **values)
        add_lora(model, config, seed=seed, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        for parameter in lora_parameters(model).values():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        made[kind] = tmp_path_factory.mktemp(kind)
        save_adapter(made[kind], model, config, Tokenizer(tokenizer_folder), "base", {})
    return made


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(CONFIG, torch.float64).eval()


def merged(folder: Path | None) -> Transformer:
    model = build(CONFIG, torch.float64)
    if folder is not None:
        load_adapter(model, folder, dtype=torch.float64)
        merge_lora(model)
    return model.eval()


def mixed(names: list[str | None], count: int) -> list[Request]:
    """The same prompts for all of them: only the adapter tells their texts apart."""
    texts = prompts(-(-count // len(names)), seed=4)
    return [
        Request(texts[i // len(names)], Sampling(max_tokens=9, seed=i), names[i % len(names)]) for i in range(count)
    ]


@pytest.mark.parametrize("more", [{}, {"chunk": 24, "tokens": 200}, {"speculate": eager(Lookup((2, 1)), 4)}])
def test_each_text_is_that_of_its_adapter_alone(
    more: dict[str, Any], model: Transformer, folders: dict[str, Path]
) -> None:
    """Rows with their neighbour's adapter, keys of one adapter that serve another, a scale or rank mixed up."""
    engine = Engine(model, adapters=folders, **more)
    requests = mixed([None, *folders], 42)
    for _ in range(2):  # the second time from what is cached
        found = answers(engine, requests)
    for name in [None, *folders]:
        one = merged(folders[name] if name else None)
        mine = [i for i, request in enumerate(requests) if request.adapter == name]
        assert [found[i] for i in mine] == [alone(one, requests[i]) for i in mine]
    assert engine.cache.blocks.used == 0


def test_scores_equal_the_merged_models(model: Transformer, folders: dict[str, Path]) -> None:
    """The same to 1e-10, where equal texts could be chance."""
    rows = [(p, [1, 2, 3]) for p in prompts(6)]
    engine = Engine(model, adapters=folders)
    for name, folder in folders.items():
        with torch.inference_mode():
            for (context, continuation), found in zip(rows, engine.score(rows, adapter=name), strict=True):
                logp = merged(folder)(torch.tensor([context + continuation]))[0].log_softmax(-1)
                want = [logp[len(context) - 1 + i, token].item() for i, token in enumerate(continuation)]
                assert found.tokens == pytest.approx(want, abs=1e-10)
    assert engine.score(rows) == Engine(model).score(rows)


def test_native_kernels_see_adapters(folders: dict[str, Path]) -> None:
    """A block that computes its layers in one call passes by what is added to them."""
    model = build(CONFIG).eval()
    if not use_native(model):
        pytest.skip("no native kernels: nothing passes by the hooks")
    rows = [(prompts(1)[0][:5], [1, 2])]
    for name in (None, "rslora", "dora", None):
        [plain] = Engine(build(CONFIG).eval(), adapters=folders).score(rows, adapter=name)
        [found] = Engine(model, adapters=folders).score(rows, adapter=name)
        assert found.tokens == pytest.approx(plain.tokens, abs=1e-4)


def test_a_name_that_gets_another_adapter_forgets_the_old_ones_keys(
    model: Transformer, folders: dict[str, Path]
) -> None:
    """Keys and values cached under a name would serve whatever bears it next."""
    engine, request = Engine(model, adapters={"it": folders["all"]}), Request(prompts(1)[0] * 3, Sampling(8), "it")
    assert answers(engine, [request, request])[1] == alone(merged(folders["all"]), request)
    engine.add_adapter("it", folders["dora"])
    assert answers(engine, [request]) == [alone(merged(folders["dora"]), request)]


def test_adapters_leave_no_trace(folders: dict[str, Path]) -> None:
    """A hook that stays makes every later use of the model slower; one that acts makes it wrong."""
    model, tokens = build(CONFIG, torch.float64).eval(), torch.tensor([prompts(1)[0]])
    before, names = model(tokens), list(model.state_dict())
    engine, dropped = Engine(model, adapters=folders), Engine(model, adapters=folders)
    answers(engine, mixed(["dora", "all"], 4))
    assert torch.equal(model(tokens), before)
    assert list(model.state_dict()) == names
    held = weakref.ref(engine.adapters._layers["all"]["layers.0.self_attn.q_proj"].a)
    for name in folders:
        engine.remove_adapter(name)
    del dropped
    gc.collect()
    assert held() is None
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UsageError, match="no adapter `all`"):
        engine.add(mixed(["all"], 1)[0])


def test_what_cannot_be_is_refused(model: Transformer, folders: dict[str, Path]) -> None:
    """A wrong name, an adapter taken away under a text, one of another shape, one on top of another."""
    engine = Engine(model, adapters={"dora": folders["dora"]})
    with pytest.raises(UsageError, match="did you mean `dora`"):
        engine.run([Request([1], Sampling(1), "dara")])
    number = engine.add(Request([1], Sampling(4), "dora"))
    for change in (lambda: engine.remove_adapter("dora"), lambda: engine.add_adapter("dora", folders["all"])):
        with pytest.raises(UsageError, match="being written"):
            change()
    engine.cancel(number)
    engine.step()
    engine.remove_adapter("dora")
    with pytest.raises(CheckpointError, match="does not fit its base"):
        Engine(build(CONFIG.model_copy(update={"dim": 16})), adapters=folders)
    tuned = build(CONFIG, torch.float64)
    load_adapter(tuned, folders["all"])
    with pytest.raises(UsageError, match="of its own"):
        Engine(tuned, adapters=folders)
