"""From token ids, as they come, to text: whole characters, and none after a stop string.

Enters: a request's new token ids, more of them each time. Leaves: its text so far, what of
it may be shown already, and whether a stop string has ended it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from neo_jax.tokenizer import Tokenizer

_BROKEN = "\ufffd"  # what decoding shows for bytes that are no whole character yet


@dataclasses.dataclass
class Draft:
    """One text while it is written.

    `text` and `token_ids` hold what there is of it; `stopped` tells that a stop string ended
    it. The token that completes the string is kept, the string and what follows it is not.
    """

    words: Tokenizer
    stop_strings: Sequence[str]
    min_tokens: int  # a stop string within so many first tokens does not count
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    stopped: bool = False
    _shown: int = 0
    _searched: int = 0  # tokens in which there is no stop string

    def extend(self, token_ids: Sequence[int], *, done: bool) -> str:
        """Takes all tokens so far, and returns the text that can be shown since the last call.

        Args:
          token_ids: all new tokens of the text, from the first.
          done: whether there will be no more.
        """
        if self.stopped:
            return ""
        self.token_ids = list(token_ids)
        self.text = self._decode(len(self.token_ids))
        self._cut()
        safe = len(self.text) if done or self.stopped else self._safe_length()
        piece = self.text[self._shown : safe]
        self._shown = max(self._shown, safe)
        return piece

    def _decode(self, count: int) -> str:
        return self.words.decode(self.token_ids[:count], skip_special_tokens=True)

    def _cut(self) -> None:
        first = len(self._decode(self.min_tokens)) if self.min_tokens else 0
        if not any(self.text.find(stop, first) >= 0 for stop in self.stop_strings):
            self._searched = len(self.token_ids)
            return
        for count in range(self._searched + 1, len(self.token_ids) + 1):
            text = self._decode(count)
            found = [at for s in self.stop_strings if (at := text.find(s, first)) >= 0]
            if found:
                self.text, self.stopped = text[: min(found)], True
                self.token_ids = self.token_ids[:count]
                return

    def _safe_length(self) -> int:
        """Characters that no later token can change or cut off."""
        end = len(self.text.rstrip(_BROKEN))
        for stop in self.stop_strings:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if self.text[:end].endswith(stop[:size]):
                    end -= size
                    break
        return end
