"""What the command lines share: arguments that are checked before anything is measured, and files that nothing overwrites."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number from `least` on, to `most` where there is a limit."""
    wanted = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return parse


def threads(text: str) -> int:
    """The type of an argument that is a number of threads."""
    from fastbn.environment import MOST_THREADS  # not before a build is chosen (build.py)

    return whole(1, MOST_THREADS)(text)


def above_zero(what: str) -> Callable[[str], float]:
    """Return the type of an argument that is a number above 0; what it is a number of is said where it is none."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a {what} above 0, got {text!r}")
        return value

    return parse


seconds = above_zero("number of seconds")


def input_file(text: str) -> Path:
    """Parse the path of a file that will be read."""
    path = Path(text)
    try:
        path.open("rb").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error.strerror}") from None
    return path


def output_file(text: str) -> Path:
    """Parse the path of a file that will be written; find out whether it can be, and leave no trace."""
    path = Path(text)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists():
            path.open("ab").close()
        else:
            _try(path.parent)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {path}: {error.strerror}") from None
    return path


def output_folder(text: str) -> Path:
    """Parse the path of a folder that files will be written to; find out whether they can be, and leave no trace."""
    path = Path(text)
    try:
        _try(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {path}: {error.strerror}") from None
    return path


def _try(folder: Path) -> None:
    """Make a file without a name in a folder, or in the nearest one above that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    tempfile.TemporaryFile(dir=folder).close()


PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}  # of modules that have another name


def need(parser: argparse.ArgumentParser, option: str, *modules: str) -> None:
    """End with one line where an option needs modules that are not installed; names them all."""
    missing = [PACKAGES.get(module, module) for module in modules if find_spec(module) is None]
    if missing:
        parser.error(f"{option} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def need_different(parser: argparse.ArgumentParser, arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """End with one line where two of these options name one file."""
    files = [path.resolve() for path in (getattr(arguments, name) for name in names) if path is not None]
    if len(set(files)) < len(files):
        parser.error(f"{', '.join(f'--{name}' for name in names)} must name different files")


def require(program: str, *modules: str) -> None:
    """As `need`, for a program that imports these modules before it reads its options."""
    need(argparse.ArgumentParser(f"python -m {program}", usage=argparse.SUPPRESS), "it", *modules)


def keep(path: Path) -> None:
    """Rename what an earlier run has written to a file; its time becomes part of its name."""
    if path.is_file() and path.stat().st_size:
        name = f"{path.stem}-{datetime.fromtimestamp(path.stat().st_mtime):%Y%m%d-%H%M%S}"
        older, n = path.with_name(name + path.suffix), 1
        while older.exists():
            older, n = path.with_name(f"{name}-{n}{path.suffix}"), n + 1
        path.rename(older)
        print(f"kept the earlier {path} as {older.name}", file=sys.stderr)


def write(texts: Mapping[Path, str]) -> bool:
    """Write files and say so; where one cannot be written, say why and write the others.

    Returns
    -------
    bool
        Whether all were written.
    """
    return all([_write(path, text) for path, text in texts.items()])  # noqa: C419  each is written


def _write(path: Path, text: str) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep(path)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"could not write {path}: {error.strerror}", file=sys.stderr)
        return False
    print(f"wrote {path}", file=sys.stderr)
    return True


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Save a figure as PNG and SVG in a folder, which is made if it is not there; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        keep(path)
        figure.savefig(path, dpi=150)
    return paths


def run(main: Callable[[], int]) -> int:
    """Run a command; Ctrl-C, a reader that has gone and an output that takes no more end it without a traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started it, as by `>&-`
            setattr(sys, name, io.StringIO())
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # it may lack the Greek letter of microseconds
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        with suppress(io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would flush once more
        if not isinstance(error, BrokenPipeError):
            print(error, file=sys.stderr)
        return 1
    return status
