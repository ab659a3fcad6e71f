"""What a user sees while a run goes on: bars in a terminal, one plain line an evaluation elsewhere."""

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fedwsa.config import Config

Event = dict[str, Any]


class Display:
    """Progress of all federations of a run; use as a context manager."""

    def __init__(self, config: Config, console: Console) -> None:
        self.config = config
        self.console = console
        self.federation = ""
        self.several = len(config.federations()) > 1
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[accuracy]:>7}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[tuple[str, str], TaskID] = {}
        self.total = self.progress.add_task(
            "all rounds",
            total=len(config.federations()) * len(config.strategies) * config.rounds,
            accuracy="",
            visible=len(config.federations()) * len(config.strategies) > 1,
        )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def begin(self, config: Config) -> None:
        """Events from now on are of this federation."""
        self.federation = f"α = {config.alpha[0]:g}, seed {config.seed[0]}: " if self.several else ""
        for (federation, _), task in self.tasks.items():  # those of the federations before make room
            self.progress.update(task, visible=federation == self.federation)

    def finished(self, strategy: str) -> None:
        """A strategy that an earlier start of this run has completed."""
        self._advance(strategy, self.config.rounds, None)

    def event(self, strategy: str, event: Event) -> None:
        """Called for every line of metrics.jsonl as it is written."""
        if event["phase"] == "evaluate-server":
            self._advance(strategy, event["round"], event["metrics"]["accuracy"])
        for failure in event.get("failures", ()):
            self.console.print(
                f"{self.federation}{strategy}, round {event['round']}: left out {failure}", style="yellow", markup=False
            )

    def _advance(self, strategy: str, server_round: int, accuracy: float | None) -> None:
        key = (self.federation, strategy)
        if key not in self.tasks:
            self.tasks[key] = self.progress.add_task(
                f"{self.federation}{strategy}", total=self.config.rounds, accuracy=""
            )
        task = self.tasks[key]
        before = int(self.progress.tasks[self.progress.task_ids.index(task)].completed)
        shown = "" if accuracy is None else f"{accuracy:.1%}"
        self.progress.update(task, completed=server_round, accuracy=shown)
        self.progress.update(self.total, advance=server_round - before)
        if not self.console.is_terminal and accuracy is not None:
            self.console.print(
                f"{self.federation}{strategy} round {server_round}/{self.config.rounds} accuracy {shown} "
                f"ETA {self._remaining()}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _remaining(self) -> str:
        left = self.progress.tasks[self.progress.task_ids.index(self.total)].time_remaining
        return "–" if left is None else f"{left:.0f} s"
