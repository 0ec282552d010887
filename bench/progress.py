"""A list of work with a progress bar, which Ctrl-C ends early without losing what is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(items: Sequence[Item], title: Callable[[Item], str], work: Callable[[Item], Iterable[Result]]) -> tuple[list[Result], bool]:
    """Do a piece of work for each item; the bar is on the standard error.

    Returns
    -------
    results : list
        Of all pieces; of the one that Ctrl-C ended, what it had yielded.
    interrupted : bool
        Whether Ctrl-C ended it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    results: list[Result] = []
    columns = TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Without auto_refresh, whose thread would run during the measurements.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("", total=len(items))
        try:
            for item in items:
                progress.update(task, description=title(item), refresh=True)
                results += work(item)
                progress.update(task, advance=1, refresh=True)
        except KeyboardInterrupt:
            return results, True
    return results, False
