"""Files that appear under their names complete, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a name beside ``file`` to write to; a block that ends well puts it in its place.

    An error, or Ctrl-C, removes what was written and leaves ``file`` as it was.
    """
    partial = file.with_name(f"{file.name}.partial")
    try:
        yield partial
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_file(file: Path, data: str | bytes) -> None:
    """Write ``data``, text in UTF-8, to ``file`` in one step."""
    with replacing(file) as partial:
        partial.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
