"""Text that others wrote, shown to people: nothing in it commands a terminal or forges a line.

Control characters (C0, DEL, C1) move the cursor, set titles, answer for the keyboard; separators
begin a line that looks like ours; bidirectional overrides show a name backwards. Each is shown as
its escape instead (\\x1b). All other characters, of any script, stay.
"""

# C0, DEL and C1; Arabic letter mark, marks, embeddings, overrides and isolates; line separators
_COMMANDS = (
    *(*range(0x20), *range(0x7F, 0xA0)),
    *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),
    *(0x2028, 0x2029),
)
_ESCAPED = {c: ascii(chr(c))[1:-1] for c in _COMMANDS}
_KEPT_IN_LINES = {c: e for c, e in _ESCAPED.items() if chr(c) not in "\n\t"}
_DROPPED = dict.fromkeys(_KEPT_IN_LINES)
_JSON = {c: f"\\u{c:04x}" for c in _COMMANDS if c >= 0x7F}


def one_line(text: object) -> str:
    """A text as one line."""
    return str(text).translate(_ESCAPED)


def many_lines(text: str) -> str:
    """A text whose line breaks and tabs are its own."""
    return text.translate(_KEPT_IN_LINES)


def spoken(text: str) -> str:
    """What a model said, without what is no text in it."""
    return text.translate(_DROPPED)


def safe_json(json: str) -> str:
    """A JSON text that says the same; JSON itself escapes only part of it."""
    return json.translate(_JSON)
