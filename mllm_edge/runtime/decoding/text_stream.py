"""From token bytes to text that may be shown: whole characters only, and nothing that may be part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mllm_edge.errors import BadInput

MOST_STOP = 10_000  # bytes of all stop strings together; each token is searched for them
_PUNCTUATION = (b".", b",", b";", b":", b"!", b"?", b")")


class TextStream:
    """Collects the bytes of an answer.

    Args:
        stop: strings that end the answer and are not part of it.
        strip: drop white space before the first word.
        late: a stop string that opens the answer is a part of it.

    Attributes:
        text: what has been released so far.
        size: bytes of the answer that are certain, leading white space included and stop string excluded.
        stopped: whether a stop string was found.

    Raises:
        BadInput: the stop strings are too long.
    """

    def __init__(self, stop: Sequence[str], strip: bool, late: bool = False):
        self._stop = [text.encode() for text in stop if text]
        if sum(map(len, self._stop)) > MOST_STOP:
            raise BadInput(f"the stop strings are over {MOST_STOP} bytes long together; give shorter ones")
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = b""
        self._strip, self._late = strip, late
        self._joint: int | None = None  # where in what is held a control token stood
        self.text = ""
        self.size = 0
        self.stopped = False

    def feed(self, data: bytes, joined: bool = False) -> str:
        """Add a token's bytes; returns the text that they release, perhaps nothing.

        After a control token (`joined`) the tokenizer begins a new word with a space of its own; that space is removed
        when punctuation follows.
        """
        if joined:
            self._joint = len(self._held)
        self._held += data
        if self._joint is not None:
            at, after = self._joint, self._held[self._joint : self._joint + 2]
            if len(after) < 2:
                return ""
            if after[:1] == b" " and after[1:] in _PUNCTUATION:
                self._held = self._held[:at] + self._held[at + 1 :]
                self.size += 1
            self._joint = None
        found = self._found()
        if found:
            self.stopped = True
            return self._release(min(found), final=True)
        return self._release(len(self._held) - self._doubtful())

    def finish(self) -> str:
        """The answer is over: release what was held back. A character cut in the middle becomes U+FFFD."""
        if self.stopped:
            return ""
        found = self._found()  # what a control token held back
        self.stopped = bool(found)
        return self._release(min(found, default=len(self._held)), final=True)

    def _found(self) -> list[int]:
        """Where in what is held the stop strings stand."""
        first = int(self._late and self.size == 0)
        return [at for stop in self._stop if (at := self._held.find(stop, first)) >= 0]

    def _doubtful(self) -> int:
        """Length of the longest end of what is held that could begin a stop string."""
        return max((self._begun(stop) for stop in self._stop), default=0)

    def _begun(self, stop: bytes) -> int:
        """Length of the longest end of what is held that begins this stop string."""
        at = self._held.find(stop[:1], max(0, len(self._held) - len(stop) + 1))
        while at >= 0 and not stop.startswith(self._held[at:]):
            at = self._held.find(stop[:1], at + 1)
        return len(self._held) - at if at >= 0 else 0

    def _release(self, count: int, final: bool = False) -> str:
        data, self._held = self._held[:count], self._held[count:]
        self.size += count
        text = self._decoder.decode(data, final)
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        self.text += text
        return text
