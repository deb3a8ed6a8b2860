"""Progress of long work on standard error: a bar on a terminal where rich is installed, else a line at times."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_S = 5.0  # seconds between plain lines


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Yields ``advance(what)``, to be called before each of ``total`` steps with what it is."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        except ImportError:
            pass
        else:
            columns = (
                TextColumn(title),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                task, begun = bar.add_task("", total=total), [0]

                def advance(what: str) -> None:
                    bar.update(task, completed=begun[0], description=what)
                    begun[0] += 1

                yield advance
            return
    yield _plain(title, total)


def _plain(title: str, total: int) -> Callable[[str], None]:
    begun, printed = 0, time.monotonic()

    def advance(what: str) -> None:
        nonlocal begun, printed
        begun += 1
        if time.monotonic() - printed >= EVERY_S:
            printed = time.monotonic()
            print(f"{title}: {begun} of {total}, {what}", file=sys.stderr, flush=True)

    return advance
