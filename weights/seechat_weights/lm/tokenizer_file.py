"""Reads ChatGLM-6B's tokenizer file, ice_text.model, in its present and in its first form.

Until 6 April 2023 the file held only the 130000 pieces of ordinary text, and the published code
added the special ones when it ran. Since then the file holds them behind the others. This module
adds them to the first form and so makes the later file, byte for byte. All other code sees one
form.
"""

import hashlib

MAX_BYTES = 64 << 20  # of a tokenizer file; the published one has 2.7 MB

# the first file, the bytes of its pieces, and the complete file
_FIRST = "99871e0c85db81ad7af1028854fd091cd5778c8414ae9d94bbbc10d02c831c21"
_FIRST_BYTES, _PIECES_END = 2_699_926, 2_462_302
# settings behind the pieces: field 2, its length, and byte_fallback at its end
_SETTINGS = (
    b"\x0a\x16/root/train_cn_en.json\x12\x0fnew_ice_unigram"
    b" \xd0\xf7\x07Ur\xf9\x7f?\xc8\x01\x01\xfa\x01\x03<n>"
)
_FIRST_SETTINGS = b"\x12\x41" + _SETTINGS
_LATER_SETTINGS = b"\x12\x44" + _SETTINGS + b"\x98\x02\x01"
_CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
_USER_DEFINED = ("<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81)))
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def is_first_form(model: bytes) -> bool:
    """Whether these are the bytes of ice_text.model as published before 6 April 2023.

    model: the file's bytes.
    """
    return len(model) == _FIRST_BYTES and hashlib.sha256(model).hexdigest() == _FIRST


def completed(model: bytes) -> bytes:
    """The bytes of a tokenizer; the first published form becomes the later one.

    model: the file's bytes.
    """
    if not is_first_form(model):
        return model
    # the types of sentencepiece_model.proto: CONTROL, USER_DEFINED, BYTE
    kinds = ((_CONTROL, 3), (_USER_DEFINED, 4), (_BYTES, 6))
    pieces = b"".join(_piece(text, kind) for texts, kind in kinds for text in texts)
    rest = model[_PIECES_END:].replace(_FIRST_SETTINGS, _LATER_SETTINGS, 1)
    return model[:_PIECES_END] + pieces + rest


def _piece(text: str, kind: int) -> bytes:
    """One of a model's `pieces`: field 1 is a message of a piece, a score of 0.0 and a type."""
    name = text.encode()
    message = b"\x0a" + bytes((len(name),)) + name + b"\x15\0\0\0\0\x18" + bytes((kind,))
    return b"\x0a" + bytes((len(message),)) + message
