"""Detokenizes a stream: token ids in, text out as soon as it is certain."""

from typing import Protocol


class Detokenizer(Protocol):
    """The part of a tokenizer that a TextStream needs."""

    leading_spaces_dropped: int  # how many spaces the start of a decoded text swallows

    def surface(self, token_id: int) -> str | int | bytes | None:
        """One token: its characters (U+2581 for a space), the value of a byte, bytes, or None.

        token_id: the token.
        """
        ...

    def opening(self, surface: str) -> str | None:
        """The text of the first piece of an answer, if it is not its surface less spaces.

        surface: the piece's.
        """
        ...

    def restore(self, text: str) -> str:
        """Replace the tokenizer's own names of white space in decoded text.

        text: the decoded text.
        """
        ...

    def unfinished(self, text: str) -> int:
        """Index from which `text` may be the beginning of such a name, else its length.

        text: the decoded text so far.
        """
        ...


class AsWritten:
    """A Detokenizer's half for tokenizers that have no names of their own for white space."""

    def restore(self, text: str) -> str:
        """The text itself.

        text: the decoded text.
        """
        return text

    def unfinished(self, text: str) -> int:
        """The text's length: all of it is certain.

        text: the decoded text so far.
        """
        return len(text)


class TextStream:
    """Turns token ids into text, as soon as the text is certain.

    Held back are incomplete UTF-8 characters, the beginning of a possible newline, tab or blank
    marker, and the beginning of a possible `stop` marker. All pieces joined equal
    `tokenizer.decode(all ids)`, cut at the first stop marker. A token costs the same however long
    the text is. Ids beyond the tokenizer's vocabulary have no text and add none.

    tokenizer: decodes.
    stop: markers that end the text.
    stopped: whether a stop marker was met; nothing more will come.
    """

    def __init__(self, tokenizer: Detokenizer, *, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._bytes = b""  # an incomplete character
        # whether each byte that is in no character becomes a U+FFFD, or those that belong together
        self._bytewise = True
        self._leading = tokenizer.leading_spaces_dropped  # how many more spaces the start swallows
        self._raw = ""  # text that may be the start of a whitespace marker
        self._held = ""  # text that may be the start of a stop marker
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that has become certain, possibly "".

        token_id: the token.
        """
        surface = self._tokenizer.surface(token_id)
        if surface is None or self.stopped:
            return ""
        if not isinstance(surface, str):
            self._bytewise = isinstance(surface, int)  # as sentencepiece, not as tokenizers
            self._bytes += surface if isinstance(surface, bytes) else bytes((surface,))
            return self._release(self._characters(final=False))
        text = self._characters(final=True)
        if text:
            self._leading = 0
        first = self._leading == self._tokenizer.leading_spaces_dropped
        if first and (opening := self._tokenizer.opening(surface)) is not None:
            self._leading = 0
            return self._release(text + opening)
        while surface.startswith("\u2581") and self._leading:
            surface = surface[1:]
            self._leading -= 1
        if surface:
            self._leading = 0
        return self._release(text + surface.replace("\u2581", " "))

    def finish(self) -> str:
        """The end of the text: everything still held back, unless a stop marker was met."""
        if self.stopped:
            return ""
        return self._release(self._characters(final=True), final=True)

    def _characters(self, *, final: bool) -> str:
        """Take the complete characters out of the pending bytes.

        Bytes that belong to no character become U+FFFD.
        """
        data, text = self._bytes, ""
        while data:
            n = _utf8_length(data[0])
            try:
                text += data[:n].decode()
            except UnicodeDecodeError as e:
                # "unexpected end": the beginning is valid, and more bytes may complete it
                if not final and e.reason == "unexpected end of data":
                    break
                text, n = text + "\ufffd", 1 if self._bytewise else e.end - e.start
            data = data[n:]
        self._bytes = data
        if text:
            self._leading = 0
        return text

    def _release(self, text: str, *, final: bool = False) -> str:
        raw = self._raw + text
        cut = len(raw) if final else self._tokenizer.unfinished(raw)
        self._raw = raw[cut:]
        text = self._held + self._tokenizer.restore(raw[:cut])
        end = min((i for s in self._stop if (i := text.find(s)) >= 0), default=-1)
        hold = len(text) if final else self._partial_stop(text)
        if 0 <= end < hold:  # no marker that begins earlier can still be completed
            self.stopped, self._held = True, ""
            return text[:end]
        self._held = text[hold:]
        return text[:hold]

    def _partial_stop(self, text: str) -> int:
        """Index from which `text` may be the beginning of a stop marker, else its length."""
        longest = max(map(len, self._stop), default=1) - 1
        for i in range(max(0, len(text) - longest), len(text)):
            if any(len(s) > len(text) - i and s.startswith(text[i:]) for s in self._stop):
                return i
        return len(text)


def _utf8_length(lead: int) -> int:
    return 1 if lead < 0xC2 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
