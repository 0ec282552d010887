"""A list of work with a progress bar, which Ctrl-C ends early without losing what is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from bench import text

if TYPE_CHECKING:
    from rich.console import RenderableType

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    items: Sequence[Item],
    title: Callable[[Item], str],
    work: Callable[[Item], Iterable[Result]],
    table: Callable[[Sequence[Result]], text.Table] | None = None,
) -> tuple[list[Result], bool]:
    """Do a piece of work for each item; the bar is on the standard error.

    Parameters
    ----------
    items : sequence
    title : callable
        What the bar says of an item.
    work : callable
        Yields results.
    table : callable, optional
        Makes a table of the last results, which a terminal shows above the bar as they come.

    Returns
    -------
    results : list
        Of all pieces; of the one that Ctrl-C ended, what it had yielded.
    interrupted : bool
        Whether Ctrl-C ended it.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    results: list[Result] = []
    console = Console(stderr=True)
    columns = TextColumn("{task.description:40}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    progress = Progress(*columns, console=console, auto_refresh=False)
    task = progress.add_task("", total=len(items))

    def shown() -> RenderableType:
        if table is None or not results or not console.is_terminal:
            return progress
        return Group(text.drawn(table(results[-max(3, console.height - 8) :]), console.width)[0], progress)

    interrupted = False
    # Without auto_refresh, whose thread would run during the measurements.
    with Live(shown(), console=console, auto_refresh=False) as live:
        try:
            for item in items:
                progress.update(task, description=title(item)[:40])
                live.update(shown(), refresh=True)
                for result in work(item):
                    results.append(result)
                    live.update(shown(), refresh=True)
                progress.update(task, advance=1)
                live.update(shown(), refresh=True)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            live.update(progress, refresh=True)
    if not console.is_terminal:  # where rich leaves the last line open
        console.line()
    return results, interrupted
