"""Conversations as people write them in JSON: messages with a role each, or a prompt and its completion.

In the form of ShareGPT they are `conversations`, of messages with `from` and `value`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.json_lines import name_json_type
from data.option_fields import explain_missing_name

ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWERER = "assistant"
# What those who speak are called in the form of ShareGPT.
SHARED_ROLES = {
    **{"human": "user", "user": "user", "gpt": ANSWERER, "chatgpt": ANSWERER, "assistant": ANSWERER},
    **{"system": "system", "tool": "tool"},
}
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the last is an answer.

    Attributes:
        messages: each with its `role` and mostly a `content`; other keys are the template's business.
        num_learnt: how many answers are learnt, counted from the last one; None: all.
        tools: descriptions of functions that may be called, for the template.
        source: the line it comes from, written in one way: the same line is always on the same side of a split.
    """

    messages: tuple[Message, ...]
    num_learnt: int | None
    tools: Any
    source: bytes


def read_conversation(row: object, *, only_last: bool) -> Conversation:
    """Return the conversation in an object of JSON. Raises ValueError, in words, where it is none."""
    if not isinstance(row, dict):
        raise ValueError(f"is {name_json_type(row)}; expected an object with messages, or with prompt and completion")
    if "messages" in row:
        messages = read_messages(row["messages"], "messages")
    elif "conversations" in row:
        messages = read_messages(_rename_shared(row), "conversations")
    elif "prompt" in row and "completion" in row:
        prompt = read_messages(row["prompt"], "prompt", "user")
        completion = read_messages(row["completion"], "completion", ANSWERER)
        return make_conversation([*prompt, *completion], row, num_learnt=1)
    else:
        raise ValueError(f"has no messages{explain_missing_name('messages', row)}, and no prompt with its completion")
    return make_conversation(messages, row, num_learnt=1 if only_last else None)


def make_conversation(messages: list[Message], row: Mapping[str, Any], *, num_learnt: int | None) -> Conversation:
    """Return checked messages as a conversation. Raises ValueError where it does not end with an answer."""
    if not messages:
        raise ValueError("has no message")
    if messages[-1]["role"] != ANSWERER:
        raise ValueError(
            f"ends with a message of {messages[-1]['role']}; expected one of {ANSWERER}, for answers are what is learnt"
        )
    source = json.dumps(row, sort_keys=True).encode()
    return Conversation(tuple(messages), num_learnt, row.get("tools"), source)


def read_messages(value: Any, key: str, role: str | None = None) -> list[Message]:
    """Return the messages in a value; a text is one of `role`. Raises ValueError where there is anything else."""
    if role is not None and isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise ValueError(f"{key} is {name_json_type(value)}; expected a list of messages{' or a text' if role else ''}")
    places = [f"message {number} of {key}" if len(value) > 1 else key for number in range(1, len(value) + 1)]
    return [_read_message(message, where) for message, where in zip(value, places, strict=True)]


def _rename_shared(row: Mapping[str, Any]) -> Any:
    """Return the messages of `conversations`, `from` as role and `value` as content; others as they are.

    A text that is the line's `system` comes first. Raises ValueError where nobody knows who speaks.
    """
    value, system = row["conversations"], row.get("system")
    if not isinstance(value, list):
        return value
    renamed: list[Any] = [{"role": "system", "content": system}] if system else []
    if renamed and value and isinstance(value[0], dict) and value[0].get("from") == "system":
        raise ValueError("has a system, and a first message from system; leave one of them out")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or "from" not in message:
            renamed.append(message)
            continue
        speaker = message["from"]
        if not isinstance(speaker, str) or speaker not in SHARED_ROLES:
            known = explain_missing_name(str(speaker), SHARED_ROLES)
            raise ValueError(f"message {number} of conversations is from {speaker!r}{known}")
        rest = {key: each for key, each in message.items() if key not in ("from", "value")}
        renamed.append({"role": SHARED_ROLES[speaker], "content": message.get("value"), **rest})
    return renamed


def _read_message(message: Any, where: str) -> Message:
    """Return a message, the parts of its content joined. Raises ValueError as `_check_message` does."""
    if isinstance(message, dict) and isinstance(message.get("content"), list):
        message = {**message, "content": _join_parts(message["content"], where)}
    _check_message(message, where)
    read: Message = message
    return read


def _join_parts(parts: list[Any], where: str) -> str:
    """Return the text of `[{"type": "text", "text": …}]`. Raises ValueError where a part is anything but text."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            said = f"of type {kind!r}" if isinstance(kind, str) else name_json_type(part)
            raise ValueError(
                f'{where}: a part of its content is {said}; only {{"type": "text", "text": …}} can be learnt'
            )
    return "".join(part["text"] for part in parts)


def _check_message(message: Any, where: str) -> None:
    """Raise ValueError where a value is no message, or an answer without a word."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f'{where} is no message; expected {{"role": …, "content": …}}')
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where} has the role {role!r}{explain_missing_name(role, ROLES)}")
    calls = role == ANSWERER and bool(message.get("tool_calls"))
    if content is None and calls:
        return
    if not isinstance(content, str):
        raise ValueError(f"{where}: its content is {name_json_type(content)}; expected text")
    if role == ANSWERER and not content.strip() and not calls:
        raise ValueError(f"{where} is an empty answer; drop that line, or write the answer")
