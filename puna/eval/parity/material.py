"""What two models are asked when nothing else is given: short, and of every kind that conversions get wrong."""

from typing import Any

PROMPTS = (
    "What is the capital of Peru?",
    "Count from one to ten.",
    "Write a Python function that reverses a list.",
    "Translate into French: the sky is blue.",
    "Why do llamas live so high in the mountains?",
    "2, 4, 8, 16,",
    "Once upon a time there was",
    "Name three colours.",
)

STRINGS = (
    "Hello, world!", " leading and trailing ", "two  spaces   three", "\n\n\tdef f(x):\n        return x\n",
    "12345678 and 3.14159", "It's I'll DON'T they'RE", "naïve café, Größe", "привет мир", "日本語のテスト",
    "مرحبا بالعالم", "🦙🚀 👩\u200d👩\u200d👧", "a\u0301 e\u0301", "aaaaaaaaaaaaaaaaaaaaaaaa",
    "</s><s> <|eot_id|> [INST]", "▁ \u2581x", "\u0000\u0007", "\r\n\r\n", "https://example.org/a?b=c#d",
    "x = {'k': [1, 2]}; y != z", "\ufeffBOM", "ﷺ ½ ①",
)  # fmt: skip
"""Texts whose ids differ once a vocabulary, a normalizer or a split rule does."""

CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " How are you?\n"}],
    [
        {"role": "user", "content": "Say <|eot_id|> and [/INST]."},
        {"role": "assistant", "content": "Said.\n\nAnd more?"},
        {"role": "user", "content": "No, ¡gracias! 🦙"},
    ],
)

TEXT = """The puna begins where the last trees end. At four thousand metres the nights are cold all year, the days are \
short of air and full of light, and the grass grows in hard tufts that few animals can live on. Llamas can. Their \
blood carries more oxygen than that of a horse, their soft feet spare the thin soil, and they drink little. People \
have kept them here for some six thousand years, first for their meat and wool and then to carry loads: a grown \
animal bears about thirty kilograms, and a caravan of fifty walked twenty kilometres a day between the salt flats and \
the valleys where maize was grown.

A herder knows each animal by its colour and by the way it walks. When one is overloaded it lies down and does not \
get up again until part of the load has been taken off. It is not stubborn, the herders say; it only counts better \
than the people who packed it. In the evening the animals are driven into a round yard with walls of stone, and the \
children count them once more: eleven, twelve, thirteen. If one is missing, somebody goes back with a lamp.
"""
