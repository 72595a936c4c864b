"""What is dropped before training. Nothing is, by default."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from puna.config import Config

Share = Annotated[float, Field(gt=0, le=1)]


class SelectConfig(Config):
    """Rules by which conversations are dropped, in this order; of alike ones the first stays."""

    empty_answers: bool = False
    """Drop conversations in which the assistant once says nothing and calls nothing."""
    min_prompt_words: NonNegativeInt = 0
    """Words of all that is not the assistant's. Higher: drops greetings and fragments, and short honest questions."""
    max_prompt_words: PositiveInt | None = None
    """Lower: drops pasted documents, whose answers seq_len might cut off anyway."""
    min_answer_words: NonNegativeInt = 0
    """Words of the assistant's messages. Higher: drops curt answers, and right ones that are short."""
    max_answer_words: PositiveInt | None = None
    """Lower: drops essays; too low teaches brevity where length is needed."""
    repetition: Annotated[float, Field(gt=0, le=10)] | None = None
    """Multiple of Gopher's limits on repeated lines and word sequences, for answers of 50 words and more. Lower: drops
    more, worked solutions, lists and code first. 1, made for web pages, drops 2 % of Alpaca and 15 % of GSM8K; 2 drops
    0.1 % and 1 %: what runs in circles."""
    duplicates: bool = False
    """Drop what is the same as an earlier one but for case and spaces."""
    near_duplicates: Annotated[float, Field(ge=0.3, le=1)] | None = None
    """Drop what shares at least this part of its word triples with an earlier one. Lower: drops more, also other
    questions of one pattern; 0.8 drops rewordings. Costs about 4 KB of memory a conversation that is kept."""
    compare: Literal["prompt", "conversation"] = "prompt"
    """What the two rules above compare. prompt: one answer to each question; conversation: drops less."""
