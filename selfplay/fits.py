"""Whether the problems that every evaluation asks can be sent to the model at all, told before a run begins."""

from __future__ import annotations

from mcts.engines.model import load_tokenizer
from mcts.engines.prompt_ids import prompt_ids
from mcts.tasks import Task
from selfplay.config import Config
from selfplay.errors import UserError

SPLITS = ("heldout", "dev")


def check_prompts(config: Config, task: Task) -> None:
    """Raise SettingError where the tokenizer of `model.path` cannot write a held-out or dev problem (no chat template,
    or one that refuses its messages), or where one leaves no room in `engine.max_context`. Of training problems one
    that is too long costs that problem alone."""
    assert config.model.path is not None
    tokenizer, room = load_tokenizer(config.model.path), config.engine.max_context
    for split in SPLITS:
        for problem in task.problems(split):
            size = len(prompt_ids(tokenizer, problem.prompt))
            if not size:
                raise UserError(f"the prompt of the {split} problem {problem.id} has no token: correct its template")
            if size >= room:
                raise UserError(
                    f"the prompt of the {split} problem {problem.id} has {size} tokens, which leave no room in a "
                    f"context of {room}: raise engine.max_context, or leave the problem out"
                )
