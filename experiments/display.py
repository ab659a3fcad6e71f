"""What a user sees while a run goes on: bars in a terminal, one plain line an evaluation elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from experiments.results import split_without_alpha
from fedwsa.config import Config

Event = dict[str, Any]


class Display:
    """Progress of a run; use as a context manager.

    In a terminal a bar for each strategy of the federation that is on, and one for all rounds of the run with the time
    left, by the mean time of the rounds so far but for the first, in which much is done for the first time.
    """

    def __init__(self, config: Config, console: Console) -> None:
        self.rounds = config.rounds
        self.console = console
        self.several = len(config.federations()) > 1
        self.prefix = ""
        self.start = self.end = time.monotonic()
        self.computed = 0  # rounds, by this process
        self.completed = dict.fromkeys(config.strategies, 0)  # rounds of this federation, by whom ever
        self.left = len(config.federations()) * len(config.strategies) * config.rounds
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[accuracy]:>6}"),
            _Remaining(self),
            console=console,
            refresh_per_second=4,
            transient=True,  # the table at the end has it all
            disable=not console.is_interactive,
        )
        self.tasks = {name: self.progress.add_task(name, total=config.rounds, accuracy="") for name in self.completed}
        self.all = self.progress.add_task("all rounds", total=self.left, accuracy="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def begin(self, config: Config, made_by: Mapping[str, Any]) -> None:
        """Events from now on are of this federation, whose partition says `made_by` of itself."""
        split = split_without_alpha(config.to_run_config(), made_by) or f"α = {config.alpha[0]:g}"
        self.prefix = f"{split}, seed {config.seed[0]}: " if self.several else ""
        for name, task in self.tasks.items():
            self.completed[name] = 0
            self.progress.reset(task, description=f"{self.prefix}{name}", accuracy="")

    def finished(self, strategy: str) -> None:
        """A strategy has its final model, maybe since an earlier start of this run."""
        self._complete(strategy, self.rounds)

    def event(self, strategy: str, event: Event) -> None:
        """Called for every line of a strategy's metrics.jsonl as it is written."""
        if event["phase"] == "train":
            self._complete(strategy, event["round"])
            self._time_round()
        for failure in event.get("failures", ()):
            self._print(f"{self.prefix}{strategy} round {event['round']}: left out {failure}", style="yellow")
        if event["phase"] == "evaluate-server":
            accuracy = f"{event['metrics']['accuracy']:.1%}"
            self.progress.update(self.tasks[strategy], accuracy=accuracy)
            if not self.console.is_interactive:
                counted = f"{event['round']}/{self.rounds}"
                self._print(f"{self.prefix}{strategy} round {counted} accuracy {accuracy} ETA {self.remaining()}")

    def remaining(self) -> str:
        """Time that the run will still take; "–" in its first two rounds."""
        if self.computed < 2:
            return "–"
        seconds = max(0, round(self.end - time.monotonic()))
        if seconds < 60:
            return f"{seconds} s"
        minutes = seconds // 60
        return f"{minutes}:{seconds % 60:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"

    def _complete(self, strategy: str, server_round: int) -> None:
        new = server_round - self.completed[strategy]
        self.completed[strategy] = server_round
        self.left -= new
        self.progress.update(self.tasks[strategy], completed=server_round)
        self.progress.update(self.all, advance=new)

    def _time_round(self) -> None:
        now = time.monotonic()
        self.computed += 1
        if self.computed == 1:
            self.start = now
        else:
            self.end = now + (now - self.start) / (self.computed - 1) * self.left

    def _print(self, line: str, style: str | None = None) -> None:
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


class _Remaining(ProgressColumn):
    """The time left, beside the bar of all rounds."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self.display = display

    def render(self, task: Task) -> Text:
        return Text(f"ETA {self.display.remaining()}" if task.id == self.display.all else "")
