"""How the scores of the judges that preflab ships were made: three readable functions of a text.

    real words   the share of the words that are English ones: wordfreq's Zipf frequency is at least 2.5, that is, the
                 word makes up at least 10^2.5 of 10^9 words of running text. A response that is cut off within a
                 word, or stammers, loses here. A text without words has the share 0.
    readability  Flesch's reading ease, 206.835 - 1.015 words / sentences - 84.6 syllables / words: short words, short
                 sentences. Syllables are pyphen's places to hyphenate plus one, and a sentence has more than two words
                 (if none has, the text is one), as in textstat 0.7.3 (which imports a module that setuptools no longer
                 has); unlike there averages are not rounded, a hyphen separates words and a number is
                 none.
    length       the number of characters, longer is better: the bias to long answers that people and models show as
                 judges. In characters and not in words, since answers of at most five tokens mostly tie in words.

The fourth judge, the sentiment, is the gold reward of the world itself (VADER).

    python -m preflab.envs.judge_scores --out judges.npz     score the texts of the shipped world again
    python -m preflab.envs.judge_scores --check              and compare with the shipped scores

wordfreq and pyphen are imported inside the functions; nothing that reads the shipped scores needs them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np

from .. import __version__
from .comparisons import replace_file
from .judges import DIGITS, FORMAT, SCORED, load_scores
from .kernels import Array
from .language_world import load_language_world

REAL = 2.5  # the Zipf frequency from which on a word is a real one
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
Judge = Callable[[str], float]


def words(text: str) -> list[str]:
    """The words in lower case; an apostrophe within a word belongs to it, a hyphen does not."""
    return [word.replace("’", "'") for word in WORD.findall(text.lower())]


def real_words() -> Judge:
    """The share of the words whose Zipf frequency is at least `REAL`."""
    _needs("wordfreq")
    from wordfreq import zipf_frequency

    frequency = cache(lambda word: zipf_frequency(word, "en"))

    def share(text: str) -> float:
        found = words(text)
        return sum(frequency(word) >= REAL for word in found) / len(found) if found else 0.0

    return share


def readability() -> Judge:
    """Flesch's reading ease; 0 for a text without words."""
    _needs("pyphen")
    from pyphen import Pyphen

    dictionary = Pyphen(lang="en_US")
    syllables = cache(lambda word: len(dictionary.positions(word)) + 1)

    def ease(text: str) -> float:
        found = words(text)
        if not found:
            return 0.0
        sentences = max(1, sum(len(words(part)) > 2 for part in re.split("[.!?]+", text)))
        return 206.835 - 1.015 * len(found) / sentences - 84.6 * sum(map(syllables, found)) / len(found)

    return ease


def length() -> Judge:
    """The number of characters."""
    return lambda text: float(len(text))


JUDGES: dict[str, Callable[[], Judge]] = {
    "real words": real_words,
    "readability": readability,
    "length": length,
}


def score(texts: Sequence[str]) -> dict[str, Array]:
    """The scores of the texts by each judge of `JUDGES`, (n,), rounded to `DIGITS`, so that equal ones are ties."""
    return {
        name: np.round([judge(text) for text in texts], DIGITS)
        for name, make in JUDGES.items()
        for judge in [make()]
    }


def save(path: Path, texts: Sequence[str]) -> None:
    """Score the texts and write the file that `judges.load_scores` reads; it appears whole, by rename."""
    found = score(texts)
    assert tuple(found) == SCORED
    meta = {
        "judges": {
            "real words": f"share of words with a Zipf frequency of at least {REAL}",
            "readability": "Flesch reading ease, syllables by pyphen's en_US dictionary",
            "length": "number of characters",
        },
        "texts_sha256": fingerprint(texts),
        "digits": DIGITS,
        "versions": {"preflab": __version__}
        | {p: importlib.metadata.version(p) for p in ("wordfreq", "pyphen")},
        "date": datetime.now(UTC).date().isoformat(),
    }
    text = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    table = np.column_stack([found[name] for name in SCORED])
    replace_file(
        path, lambda file: np.savez_compressed(file, format=np.array(FORMAT), meta=text, scores=table)
    )


def fingerprint(texts: Sequence[str]) -> str:
    """SHA-256 of the texts, joined by zeros."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed: pip install {package}")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 = written, or equal to the shipped scores; 1 = different from them."""
    parser = argparse.ArgumentParser(
        prog="python -m preflab.envs.judge_scores",
        description="Score the texts of the shipped language-model world again, with wordfreq and pyphen.",
    )
    parser.add_argument("--out", type=Path, help="write the scores to this file (.npz)")
    parser.add_argument("--check", action="store_true", help="compare them with the shipped ones")
    options = parser.parse_args(arguments)
    if not (options.out or options.check):
        parser.error("nothing to do: give --out FILE or --check")
    world = load_language_world()
    texts = world.text(world.trajectories(np.arange(world.n_leaves)))
    if options.out:
        save(options.out, texts)
        print(f"wrote {options.out} ({options.out.stat().st_size / 1024:.0f} KiB)")
    if not options.check:
        return 0
    found, shipped = score(texts), load_scores()
    different = {name: int((found[name] != shipped[name]).sum()) for name in found}
    print("; ".join(f"{name}: {k} of {len(texts)} texts differ" for name, k in different.items()))
    return int(any(different.values()))


if __name__ == "__main__":
    sys.exit(main())
