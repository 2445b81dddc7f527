"""SentencePiece word by word: the same ids, several times as fast.

A BPE model joins neighbours only where the result is one of its pieces. Where no piece has a
certain pair of characters, nothing is ever joined across such a pair, and the text before it and
the text after it can be encoded by themselves. Texts repeat their words; each is encoded once.
"""

from __future__ import annotations

import itertools
import re
import string
from typing import Any

import numpy as np

_SPACE = "▁"
"""SentencePiece's sign for a space, in pieces and in normalised text."""

_CLASSES = (string.ascii_letters, string.punctuation, "\n", string.digits, "\t", "\r")
"""Characters that may be told apart; all but these and the space are one more class."""
_OTHERS = ""

_BPE = 2
_IN_TEXT = (1, 4, 5)
"""Types of pieces that text is made of: normal, user-defined, unused (BPE's steps go over it)."""

_MOST_WORDS = 200_000
"""Words remembered: some 40 MB."""
_LONGEST_WORD = 64
"""Longer ones seldom come again."""
_WINDOW = 1 << 20
"""Characters whose words are listed at once: a document of 100 MB needs no gigabytes."""


class WordTokenizer:
    """Encodes as ``SentencePieceProcessor.encode`` does.

    Args:
        model: Content of the model file.
        dtype: Type of the ids.
    """

    def __init__(self, model: bytes, dtype: type[np.generic]) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        self._dtype = dtype
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model)
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(model)
        pattern = word_pattern(proto)
        self._find_words = re.compile(pattern).findall if pattern else None
        # A word is normalised already, as a part of its text.
        proto.normalizer_spec.Clear()
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        self._of_words = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._known: dict[str, bytes] = {}

    def encode(self, text: str) -> bytes:
        """Return the ids of a text, in the dtype's bytes."""
        if self._find_words is None:
            return np.array(self.model.encode(text), self._dtype).tobytes()
        text = self.model.normalize(text)
        if len(text) <= _WINDOW:
            return self._encode_words(self._find_words(text))
        ids, start, window = [], 0, _WINDOW
        while start < len(text):
            words = self._find_words(text, start, start + window)
            if start + window < len(text):
                if len(words) == 1:
                    window *= 2
                    continue
                words.pop()  # It may go on behind the window.
            ids.append(self._encode_words(words))
            start += sum(map(len, words))
        return b"".join(ids)

    def _encode_words(self, words: list[str]) -> bytes:
        known = self._known
        try:
            return b"".join(map(known.__getitem__, words))
        except KeyError:
            new = set(words).difference(known)
        if len(known) + len(new) > _MOST_WORDS:
            known.clear()
            new = set(words)
        order = list(new)
        encoded = self._of_words.encode(order, num_threads=1)
        known.update(
            (word, np.array(ids, self._dtype).tobytes())
            for word, ids in zip(order, encoded, strict=True)
        )
        joined = b"".join(map(known.__getitem__, words))
        for word in order:
            if len(word) > _LONGEST_WORD:
                del known[word]
        return joined


def word_pattern(proto: Any) -> str:
    """Build the regular expression of words that a model encodes each by itself.

    Args:
        proto: The model, a ``ModelProto``.

    Returns:
        A pattern whose matches, one after the other, are the whole text. Empty where the model is
        no BPE model, or has a piece with a space after another character.
    """
    # Without bytes for unknown characters, neighbouring unknown ones become a single id.
    if proto.trainer_spec.model_type != _BPE or not proto.trainer_spec.byte_fallback:
        return ""
    class_of = {character: each for each in (*_CLASSES, _SPACE) for character in each}
    joined = {
        frozenset((class_of.get(a, _OTHERS), class_of.get(b, _OTHERS)))
        for piece in proto.pieces
        if piece.type in _IN_TEXT
        for a, b in itertools.pairwise(piece.piece)
        if a != _SPACE or b == _SPACE
    }
    if any(_SPACE in pair and len(pair) == 2 for pair in joined):
        return ""
    groups = [{each} for each in _CLASSES]
    for pair in joined:
        if not pair & {_OTHERS, _SPACE}:
            merged = set().union(*(group for group in groups if group & pair))
            groups = [merged] + [group for group in groups if not group & pair]
    words = []
    apart = {_SPACE, *_CLASSES}
    for group in groups:
        word = f"[{_inside(group)}]" + "++" * any(pair <= group for pair in joined)
        if any(_OTHERS in pair and pair & group for pair in joined):
            # Beside a character of the others, the whole run of both is one word.
            word += f"(?![^{_inside({_SPACE, *_CLASSES})}])"
            apart -= group
        words.append(word)
    words.append(f"[^{_inside(apart)}]+")
    return "|".join([f"{_SPACE}*{word}" for word in words] + [f"{_SPACE}+"])


def _inside(classes: set[str]) -> str:
    return re.escape("".join(sorted(classes)))
