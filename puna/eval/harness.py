"""lm-eval's view of a model of ours: its thousands of tasks, computed by our engine.

    import lm_eval, puna
    from puna.eval.harness import as_lm
    lm_eval.simple_evaluate(model=as_lm(puna.load("my-model")), tasks=["arc_easy"], num_fewshot=5)

Scores equal those of `--model hf` on the exported directory: the same split of context and continuation, BOS where the
tokenizer's config asks for it, contexts cut at the left. A directory of tasks: `lm_eval.tasks.TaskManager`.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from puna.errors import DataError, UsageError
from puna.eval.reader import Reader
from puna.infer.llama import Llama
from puna.infer.sampling import Sampling

_KNOWN = {"until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p"}


def as_lm(llama: Llama, *, batch: int = 32, max_gen_toks: int = 256) -> Any:
    """A `lm_eval.api.model.LM` of a loaded model.

    Args:
        batch: most answers written at a time.
        max_gen_toks: ids of an answer where the task does not say.

    Raises:
        DataError: lm-eval is not installed.
    """
    try:
        base: Any = import_module("lm_eval.api.model").LM  # an extra, and seconds to import
    except ImportError:
        raise DataError("lm-eval is not installed", fix="pip install lm-eval") from None

    class PunaLM(base):
        """Answers lm-eval's three questions."""

        def __init__(self) -> None:
            super().__init__()
            self.reader = Reader(llama, special=True, batch=batch)

        @property
        def tokenizer_name(self) -> str:
            return str(llama.path)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            found = self.reader.likelihoods([request.args for request in requests])
            return [(each.total, each.greedy) for each in found]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            return self.reader.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            answers: dict[int, str] = {}
            for asked, places in _alike([request.args[1] for request in requests]):
                settings = sampling_of(asked, max_gen_toks)
                written = self.reader.write([requests[place].args[0] for place in places], settings)
                answers |= {place: texts[0] for place, texts in zip(places, written, strict=True)}
            return [answers[place] for place in range(len(requests))]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if not add_generation_prompt:
                raise UsageError("an answer that the task begins", cause="the model's template closes every turn",
                                 fix="a task without gen_prefix, or without --apply_chat_template")  # fmt: skip
            ids = llama.template.prompt(chat_history)
            return llama.tokenizer.decode(ids, special=True)

        def chat_template(self, chat_template: bool | str = False) -> str:
            """What lm-eval notes of the template: the text that one exchange becomes."""
            if chat_template is False:
                return ""
            return self.apply_chat_template([{"role": "user", "content": "{content}"}])

    return PunaLM()


def _alike(asked: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], list[int]]]:
    """The settings that requests have, each with the places of those that have them."""
    groups: dict[str, list[int]] = {}
    for place, settings in enumerate(asked):
        groups.setdefault(repr(sorted(settings.items())), []).append(place)
    return [(asked[places[0]], places) for places in groups.values()]


def sampling_of(settings: Mapping[str, Any], max_gen_toks: int = 256) -> Sampling:
    """lm-eval's generation settings as ours.

    Raises:
        UsageError: one that would change the answer and is not known here.
    """
    if unknown := [name for name in settings if name not in _KNOWN]:
        raise UsageError(f"the task asks for `{unknown[0]}`", cause="a setting of another library's sampler")
    until = settings.get("until") or ()
    greedy = not settings.get("do_sample", float(settings.get("temperature") or 0) > 0)
    return Sampling(
        max_tokens=int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or max_gen_toks),
        stop=(until,) if isinstance(until, str) else tuple(each for each in until if each),
        temperature=0.0 if greedy else float(settings.get("temperature") or 1.0),
        top_p=float(settings.get("top_p") or 1.0),
        top_k=int(settings.get("top_k") or 0),
        min_p=float(settings.get("min_p") or 0.0),
    )
