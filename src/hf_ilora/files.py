"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a killed process may leave behind in a folder.
UNFINISHED_FILES = ".*.unfinished*"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to that takes the name `path` when the block ends without an error.

    Until then, and after an error, an earlier file at `path` stays as it is. The suffix is kept, for writers that
    choose their format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.unfinished{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
