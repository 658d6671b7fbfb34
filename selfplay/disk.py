"""What a power cut must not take."""

from __future__ import annotations

import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """Have a file's content, or the names in a folder, reach the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
