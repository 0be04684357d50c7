"""Image files in a folder or in a zip file, read one at a time; a zip is never unpacked to the disk."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from .checks import DataError
from .folder import Encoded, is_image


class Archive:
    """The image files of `path`, a folder or a zip, by their paths inside it, in order."""

    def __init__(self, path: Path):
        self.path = path
        self._zip = None
        if path.is_dir():
            names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        else:
            try:
                self._zip = zipfile.ZipFile(path)
                names = [name for name in self._zip.namelist() if not name.endswith("/")]
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(
                    f"{path}: cannot be read, damaged or cut short ({error}); expected a zip of images: download it "
                    "again"
                ) from error
        self.files = sorted(filter(is_image, map(PurePosixPath, names)))

    def encoded(self, files: Sequence[PurePosixPath]) -> Encoded:
        """Some of its files, to be decoded."""
        return Encoded([f"{self.path}/{file}" for file in files], lambda i: self._open(files[i]))

    def _open(self, file: PurePosixPath) -> Any:
        from PIL import Image

        return Image.open(self.path / file if self._zip is None else io.BytesIO(self._zip.read(str(file))))


def beside(root: Path, name: str) -> Path | None:
    """The folder `name` in `root`, or else its zip; None without either."""
    return next((path for path in (root / name, root / f"{name}.zip") if path.exists()), None)
