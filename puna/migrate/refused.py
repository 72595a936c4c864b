"""Which torchtune configs are not for puna's `sft`, and what to type instead."""

from typing import Any, NoReturn

from puna.errors import UsageError
from puna.migrate.asked import Asked

FAMILIES = ("llama2", "code_llama2", "llama3", "llama3_1", "llama3_2", "llama3_3")
_PREFERENCES = ("stack_exchange_paired_dataset", "hh_rlhf_helpful_dataset", "preference_dataset")
_MODELS = ("model", "policy_model")


def check(asked: Asked) -> None:
    """Raise UsageError for a config that does something else than tuning a Llama on text."""
    if "recipe" in asked.values:
        _no(asked, "this is a puna config already", "", "puna validate FILE")
    if not any(isinstance(value, dict) and "_component_" in value for value in asked.values.values()):
        _no(asked, "not a torchtune config", "nothing in it names a `_component_`", "a file that `tune cp` wrote")
    section = next((key for key in _MODELS if key in asked.values), "")
    builder = asked.component(section) if section else ""
    _family(asked, builder)
    _preferences(asked)
    _other_verbs(asked)
    if not builder:
        _no(asked, "no model in this config", "`model._component_` is missing", "add the model's builder")


def _family(asked: Asked, builder: str) -> None:
    """Vision and other architectures."""
    parts = builder.split(".")
    if "vision" in builder or "multimodal" in str(asked.values.get("dataset")):
        _no(asked, f"`{builder}` reads images", "puna's Llamas read text alone", "the text Llama of that size")
    if any("reward" in part or "classifier" in part for part in parts):
        _no(asked, f"`{builder}` is a reward model", "puna has no recipe for these yet", "puna ls recipes")
    if parts[:2] == ["torchtune", "models"] and parts[2] not in FAMILIES:
        _no(asked, f"`{builder}` is of the family {parts[2]}", "puna is for Llamas", f"one of {', '.join(FAMILIES)}")
    if builder and parts[:2] != ["torchtune", "models"]:
        cause = "puna never imports what a config names"
        _no(asked, f"`{builder}` is a builder of your own", cause, "torchtune.models.llama3_1.llama3_1_8b, say")


def _preferences(asked: Asked) -> None:
    """What learns from preferences or rewards."""
    fix = "puna ls recipes; sft on the chosen answers comes first in any case"
    loss, dataset = asked.name("loss"), asked.values.get("dataset")
    listed: list[Any] = dataset if isinstance(dataset, list) else [dataset]
    names = [str(part.get("_component_")).rpartition(".")[2] for part in listed if isinstance(part, dict)]
    if asked.values.keys() & {"policy_model", "reward_and_value_model", "ppo_epochs"}:
        _no(asked, "a PPO or GRPO config", "puna has no recipe for reinforcement learning yet", fix)
    if asked.values.keys() & {"grpo_samples", "ref_checkpointer"} and not loss.startswith("DPO"):
        _no(asked, "a GRPO config", "puna has no recipe for reinforcement learning yet", fix)
    if loss.startswith(("DPO", "RSO", "SimPO")) or any(name in _PREFERENCES for name in names):
        _no(asked, f"a DPO config ({loss or names[0]})", "puna has no recipe for pairs of answers yet", fix)
    if asked.values.keys() & {"early_exit_loss", "layer_dropout"}:
        _no(
            asked, "early exit and layer dropout", "puna's Llamas always run every layer", "the same without these keys"
        )


def _other_verbs(asked: Asked) -> None:
    """What torchtune has recipes for and puna verbs."""
    model = asked.take("checkpointer.checkpoint_dir") or "MODEL"
    if "tasks" in asked.values:
        listed = asked.values["tasks"]
        names = ", ".join(map(str, listed if isinstance(listed, list) else [listed]))
        own = f"puna eval {model} --tasks NAME (puna ls tasks); {names} are lm-eval's: docs/from-torchtune.md"
        _no(asked, "an evaluation, which is a verb of puna's", "", own)
    if "prompt" in asked.values or "max_new_tokens" in asked.values:
        words = {"--max-tokens": "max_new_tokens", "--temperature": "temperature", "--top-k": "top_k"}
        options = " ".join(f"{o} {asked.values[key]}" for o, key in words.items() if asked.values.get(key) is not None)
        _no(asked, "a generation, which is a verb of puna's", "", f"puna generate {model} -p TEXT {options}".strip())
    if "dataset" not in asked.values and "quantizer" in asked.values:
        scheme = "int8-int4" if "Int8DynActInt4" in asked.name("quantizer") else "int4"
        group = asked.take("quantizer.groupsize")
        sized = f" --group {group}" if group else ""
        output = asked.values.get("output_dir", "DST")
        fix = f"puna quantize {model} {output} --scheme {scheme}{sized}"
        _no(asked, "a quantization, which is a verb of puna's", "", fix)


def _no(asked: Asked, what: str, cause: str, fix: str) -> NoReturn:
    raise UsageError(what, where=asked.where, cause=cause, fix=fix)
