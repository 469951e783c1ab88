"""Makes text that others wrote safe to show: it cannot command a terminal or forge a line.

Control characters (C0, DEL, C1) move the cursor, set titles and answer for the keyboard. Separators
begin a line that looks like ours. Bidirectional overrides show a name backwards. Each of these is
shown as its escape instead (\\x1b). All other characters, of any script, stay.
"""

import json
from typing import Any

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
    """The text as one line; line breaks and tabs become escapes too.

    text: anything; str() is taken of it.
    """
    return str(text).translate(_ESCAPED)


def many_lines(text: str) -> str:
    """The text with its own line breaks and tabs.

    text: the text.
    """
    return text.translate(_KEPT_IN_LINES)


def spoken(text: str) -> str:
    """What a model said, without control characters.

    text: the text.
    """
    return text.translate(_DROPPED)


def json_line(value: Any, *, ascii: bool = False) -> str:
    """A value as one line of JSON that is safe to show and can be written as UTF-8.

    value: what json.dumps takes.
    ascii: write every other character as its escape.
    """
    line = json.dumps(value, ensure_ascii=ascii)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: a byte of a name that is no text
        line = json.dumps(value)
    return safe_json(line)


def safe_json(json: str) -> str:
    """The same JSON with all such characters escaped; JSON itself escapes only some of them.

    json: a JSON text.
    """
    return json.translate(_JSON)
