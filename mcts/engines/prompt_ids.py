"""A prompt as token ids: what stands in front of the first step, wherever it is sent, learned from or measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mcts.engines.model import NO_TEMPLATE, ModelError
from mcts.types import Message


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Message]) -> list[int]:
    """Token ids of a prompt: a text as the tokenizer encodes it (with its BOS token, where it has one), messages
    through the chat template. Raises ModelError where that cannot be done."""
    if not isinstance(prompt, str):
        return chat_ids(tokenizer, prompt)
    ids: list[int] = tokenizer(prompt)["input_ids"]
    return ids


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of chat messages, up to where the assistant's turn begins. Raises ModelError where there is no chat
    template, or where it refuses these roles or is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError("the tokenizer has no chat template: set chat: false in the task, or give the prompt as text")
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except NO_TEMPLATE as error:
        raise ModelError(f"the model's chat template refuses these messages ({error}): change their roles") from error
    return ids
