"""What is measured of one conversation: its words, and how much they repeat themselves."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from puna.data.quality.config import SelectConfig

# A word; of scripts that put no spaces between words, a character.
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_PIECE = re.compile(f"{_WORD.pattern}|[-+*/=<>%^]")
_FEWEST = 50  # words: in less than that every sequence is a large share
_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_LINES = 0.20


def words(text: str) -> list[str]:
    """The words in lower case, without what stands between them."""
    return _WORD.findall(text.lower())


def pieces(text: str) -> list[str]:
    """The words, and the signs that make 2 + 3 another question than 2 - 3."""
    return _PIECE.findall(text.lower())


def wrong_length(prompt: str, answer: str, config: SelectConfig) -> Iterator[tuple[str, str]]:
    """(rule, why) for each limit on words that is broken."""
    sides = (("prompt", prompt, config.min_prompt_words, config.max_prompt_words),
             ("answer", answer, config.min_answer_words, config.max_answer_words))  # fmt: skip
    for side, text, least, most in sides:
        if least or most:
            count = len(words(text))
            if count < least:
                yield f"min_{side}_words", f"{count} words"
            elif most and count > most:
                yield f"max_{side}_words", f"{count:,} words"


def repetition(text: str, factor: float) -> str:
    """What exceeds `factor` times Gopher's limits (Rae et al. 2021, table A1); "" if nothing does.

    Shares are of the words' characters: of the most frequent 2-, 3- and 4-gram, of 5- to 10-grams said again; and of
    the lines' characters that stand in a line said before. Its limits on counts of lines and on paragraphs are left
    out: closing braces and lists of one word a line would break them.
    """
    found = words(text)
    if len(found) < _FEWEST:
        return ""
    total = sum(map(len, found))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if (share := repeated_lines(lines)) > factor * _LINES:
        return f"{share:.0%} of it in repeated lines"
    for n, limit in _TOP.items():
        gram, times = Counter(zip(*(found[i:] for i in range(n)), strict=False)).most_common(1)[0]
        if times > 1 and (share := times * sum(map(len, gram)) / total) > factor * limit:
            return f"{share:.0%} of it is `{' '.join(gram)}`"
    for n, limit in _REPEATED.items():
        if (share := repeated_share(found, n)) > factor * limit:
            return f"{share:.0%} of it in repeated sequences of {n} words"
    return ""


def repeated_lines(lines: Sequence[str]) -> float:
    """The share of characters in lines that were said before."""
    again = sum(len(line) * (times - 1) for line, times in Counter(lines).items())
    return again / max(1, sum(map(len, lines)))


def repeated_share(found: Sequence[str], n: int) -> float:
    """The share of characters in word n-grams that were said before, none counted twice."""
    seen = set[tuple[str, ...]]()
    again = place = 0
    while place + n <= len(found):
        gram = tuple(found[place : place + n])
        if gram in seen:
            again += sum(map(len, gram))
            place += n
        else:
            seen.add(gram)
            place += 1
    return again / max(1, sum(map(len, found)))
