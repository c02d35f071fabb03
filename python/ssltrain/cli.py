"""The console script `ssltrain`: see that the extra is installed, run the commands, tell a mistake in one sentence."""

from __future__ import annotations

import importlib.util
import sys

from ssltrain import UsageError, files

REQUIRED = (
    "typer",
    "rich",
    "kornia",
    "sklearn",
    "matplotlib",
    "PIL",
    "mlxtend",
    "safetensors",
    "tensorboard",
    "yaml",
)  # the extra `train`


def main(arguments: list[str] | None = None) -> None:
    """Run `ssltrain` on `arguments`, by default the command line, and exit: 0, 2 for a mistake, 130 if stopped."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        _fail(f"{', '.join(missing)} not found; install what the trainers need with: pip install 'sslkern[train]'")
    from ssltrain.commands import app

    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show is shown as escapes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        sys.exit(app(args=arguments or ["--help"], prog_name="ssltrain", standalone_mode=False))
    except UsageError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a name that is too long, a disk that is full
        if error.filename is None or error.strerror is None:
            raise
        _fail(f"{files.shown(str(error.filename))}: {error.strerror}.")
    except Exception as error:
        # The parser's own exceptions; click or a copy of it inside typer, by version, so known by what they can do.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message() or "see ssltrain --help")


def _fail(sentence: str) -> None:
    print(f"ssltrain: {sentence}", file=sys.stderr)
    sys.exit(2)
