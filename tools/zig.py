"""Clang of the ziglang package as a C++ compiler for another system or an older C library.

    python tools/zig.py aarch64-linux-musl FOLDER      # prints the compiler's path

Zig has the headers and symbols of every glibc, musl and macOS, and puts the C++ library into what it links.
"""

from __future__ import annotations

import sys
from pathlib import Path


def compiler(target: str, folder: Path, *flags: str) -> Path:
    """A script in `folder` that compiles C++ for a target as zig names them (aarch64-linux-gnu.2.28); it stays, as
    objects depend on its path."""
    script = folder / f"zig-c++-{target}"
    folder.mkdir(parents=True, exist_ok=True)
    words = " ".join(["-target", target, *flags])
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang c++ {words} "$@"\n')
    script.chmod(0o755)
    return script


if __name__ == "__main__":
    print(compiler(sys.argv[1], Path(sys.argv[2]).resolve(), *sys.argv[3:]))
