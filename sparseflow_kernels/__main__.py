"""The `sparseflow` command, also as `python -m sparseflow_kernels`."""

import sys


def main() -> None:
    """Run the command line, or say in a sentence what it needs and is not installed (status 1)."""
    try:
        from .cli.main import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(
            f"error: the command line needs {error.name}, which is not installed: "
            "pip install 'sparseflow_kernels[cli]' (the library itself does without)"
        )
    app(prog_name="sparseflow")


if __name__ == "__main__":
    main()
