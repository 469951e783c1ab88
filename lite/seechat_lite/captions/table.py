"""Reads pictures from Parquet files: a column of bytes, or of what `datasets` writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from seechat_lite.captions.run import Item, failed
from seechat_lite.images import MAX_BYTES, too_many_bytes
from seechat_weights.errors import EngineError, ImageError
from seechat_weights.files.untrusted import open_file
from seechat_weights.libraries import import_error

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".parquet", ".pq")
NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "content")
# rows read at once: one value may be a whole page, however small that is while it is compressed;
# the file decides how much more is decompressed with them
BATCH = 1
MAX_GROWTH = 200  # times; empty pages in BMP's form stay below
_SHOWN = 8  # columns that a message names


def is_one(path: str) -> bool:
    """Whether a file is named like a Parquet file.

    path: the file.
    """
    return path.lower().endswith(SUFFIXES)


def rows(path: str, *, column: str | None = None) -> Iterator[Item]:
    """Yield the pictures in a Parquet file; they are named FILE/ROW.

    A file that cannot be read yields an item that says so.

    path: the file.
    column: the column that holds pictures; None to find it.

    Raises EngineError if pyarrow is not installed.
    """
    parquet = _parquet()
    try:
        with _opened(parquet, path) as file:
            chosen = _column(path, file.schema_arrow, column)
            _check_sizes(path, file.metadata, chosen)
            row = 0
            for batch in file.iter_batches(BATCH, columns=[chosen], use_threads=False):
                values = batch.column(0)
                for at in range(len(values)):
                    name = f"{path}/{row}"
                    yield Item(name, partial(_taken, name, values, at))
                    row += 1
    except ImageError as e:
        yield failed(path, e)
    except Exception as e:  # Arrow raises many kinds
        yield failed(path, _unreadable(path, e))


def count(path: str) -> int | None:
    """How many rows a Parquet file has; None if that cannot be said.

    path: the file.
    """
    try:
        with _opened(_parquet(), path) as file:
            return file.metadata.num_rows
    except Exception:  # rows() will say what is wrong
        return None


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except (ImportError, OSError) as e:
        needed, install = "expected it for Parquet files", '"seechat-lite[data]"'
        raise import_error(EngineError, e, needed=needed, install=install) from None
    return parquet


@contextmanager
def _opened(parquet: Any, path: str) -> Iterator[Any]:
    # pages are decompressed as they are needed, not whole groups of rows ahead
    with (
        open_file(path) as raw,
        parquet.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20) as f,
    ):
        yield f


def _column(path: str, schema: "pyarrow.Schema", wanted: str | None) -> str:
    """The column that holds pictures. Raises ImageError."""
    fits = [field.name for field in schema if _holds_bytes(field.type)]
    if wanted is not None:
        found = [name for name in fits if name == wanted]
    else:
        found = [name for name in NAMES if fits.count(name) == 1][:1] or fits
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{field.name} ({field.type})"[:80] for field in list(schema)[:_SHOWN])
    more = ", …" if len(schema) > _SHOWN else ""
    raise ImageError(
        f"{path}: its columns are {names or 'none'}{more}; expected one of bytes"
        f"{f', named {wanted!r}' if wanted is not None else ''}: name the column that holds "
        "pictures",
        options={"column": None},
    )


def _check_sizes(path: str, metadata: Any, column: str) -> None:
    """Refuse a column that grows without measure when it is decompressed. Raises ImageError.

    Arrow decompresses whole pages, and their sizes are in no list.
    """
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        some = [c for c in chunks if f"{c.path_in_schema}.".startswith(f"{column}.")]
        stored = sum(chunk.total_compressed_size for chunk in some)
        size = sum(chunk.total_uncompressed_size for chunk in some)
        if size > MAX_BYTES and size > MAX_GROWTH * stored:
            raise ImageError(
                f"{path}: {size // 1_000_000} MB of pictures in {stored / 1e6:.1f} MB; expected "
                f"pictures, which grow by less than {MAX_GROWTH} times: check the file"
            )


def _holds_bytes(kind: Any) -> bool:
    """Whether a column's type is bytes, or the struct in which `datasets` keeps a picture."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        at = kind.get_field_index("bytes")
        inner = kind.field(at).type if at >= 0 else None
        return inner is not None and (types.is_null(inner) or _holds_bytes(inner))
    known = types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view
    return any(fits(kind) for fits in known)


def _taken(name: str, values: Any, at: int) -> bytes:
    """The bytes of a row's picture. Raises ImageError."""
    value = values[at]
    while value.is_valid:
        if hasattr(value.type, "get_field_index"):  # a struct
            value = value["bytes"]
        elif hasattr(value, "dictionary"):
            value = value.value
        else:
            break
    if not value.is_valid:
        raise ImageError(
            f"{name}: no bytes in this row; expected a picture's: write the table with the "
            "pictures themselves"
        )
    size = value.as_buffer().size
    if size > MAX_BYTES:
        raise too_many_bytes(name, size)
    return value.as_py()


def _unreadable(path: str, error: Exception) -> ImageError:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ImageError(
        f"{path}: cannot be read as Parquet ({why:.200}); expected a whole Parquet file: get it "
        "again, or write it again"
    )
