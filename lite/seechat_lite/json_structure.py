"""Looks at JSON cheaply before it is parsed, so that no parser builds what nobody can use.

A megabyte of `[1,1,1,…]` or `{"":{"":…` takes many times as much memory once it is parsed; a long
text of the same size does not. So the strings, brackets and commas are counted first, in the bytes
as they came. Counting builds nothing. Numbers need no bound here: the parsers have one.
"""

import re

# Requests of whole conversations with tools take a few thousand.
MAX_PARTS = 100_000  # strings, brackets and commas
MAX_DEPTH = 64

# Up to the end of the next string, bracket or comma. Possessive, so that no input makes
# it try anything twice. It is matched where the last match ended, never searched for.
_PART = re.compile(
    rb"""[^"\[\]{},]*+ (?: " [^"\\]*+ (?: \\. [^"\\]*+ )*+ " | [\[\]{},] )""",
    re.DOTALL | re.VERBOSE,
).match


def too_complex(data: bytes | bytearray | memoryview) -> str | None:
    """Why this JSON should not be parsed; None if it may be, valid or not.

    data: the JSON in UTF-8.
    """
    depth = parts = end = 0
    while part := _PART(data, end):
        end = part.end()
        parts += 1
        if parts > MAX_PARTS:
            return f"more than {MAX_PARTS} values; expected fewer and longer ones"
        match data[end - 1]:
            case 0x5B | 0x7B:  # [ {
                depth += 1
                if depth > MAX_DEPTH:
                    return f"nested more than {MAX_DEPTH} levels deep; expected fewer"
            case 0x5D | 0x7D:  # ] }
                depth -= 1
    return None
