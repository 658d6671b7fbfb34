"""From a question to what the policy reads: plain text or chat messages, with worked examples before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mcts.tasks.base import TaskSettingError
from mcts.tasks.rows import fill, places
from mcts.tasks.settings import TextSettings
from mcts.types import Message

SEPARATOR = "\n\n"
"""What stands between two worked examples of a plain prompt."""


@dataclass(frozen=True, slots=True)
class Shot:
    """A worked example as the prompt shows it."""

    asked: str
    """The template, filled."""
    solved: str
    """Its solution, final answer included."""


class Prompts:
    """Renders the prompts of one task."""

    def __init__(self, task: str, settings: TextSettings) -> None:
        self.chat, self.system, self.template = settings.chat, settings.system, settings.template
        if "question" not in (names := places(self.template)) and not names:
            raise TaskSettingError(f"{task}: the template must hold {{question}}, or a column such as {{text}}")

    def asked(self, look_up: Callable[[str], str]) -> str:
        return fill(self.template, look_up)

    def render(self, asked: str, shots: Sequence[Shot]) -> str | tuple[Message, ...]:
        """Chat: system, then user and assistant per example, then user. Plain: the same as one text."""
        if not self.chat:
            start = "" if self.system is None else self.system + SEPARATOR
            return start + "".join(shot.asked + shot.solved + SEPARATOR for shot in shots) + asked
        messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for shot in shots:
            messages.append({"role": "user", "content": shot.asked})
            messages.append({"role": "assistant", "content": shot.solved})
        return (*messages, {"role": "user", "content": asked})
