"""Chat templates: Jinja that makes one text of messages, in a sandbox, with what Hugging Face's transformers offers.

Which part of the text is an answer is said by the template itself, between `{% generation %}` and
`{% endgeneration %}`. Where it does not, an answer is what an assistant's message adds to the text of those before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.chat_messages import ANSWERER, Conversation, Message

# First and last + 1 of the characters of an answer.
Span = tuple[int, int]
MARK = re.compile(r"{%-?\s*generation\s*-?%}")
# For bytes: what stands for nothing else is learnt, the end of an answer as well.
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>\n{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class ChatTemplateError(ValueError):
    """A template is none, or refuses a conversation. The message says why, in words."""


class AnswerMarks(jinja2.ext.Extension):
    """The tag `generation`, which notes where in the text an answer is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        """Return the node that calls `_mark` with what is between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        answer = caller()
        # While a text is written, its pieces so far are here.
        pieces, spans = self.environment.pieces, self.environment.spans  # type: ignore[attr-defined]
        start = sum(map(len, pieces))
        spans.append((start, start + len(answer)))
        return answer


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with what it may ask for.

    Attributes:
        text: the Jinja.
        special_tokens: `bos_token`, `eos_token` and the like, by name.
        date: what it writes for today; None: it may not ask.
    """

    text: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    date: date | None = None

    @property
    def marks_answers(self) -> bool:
        """Return whether the template says which part of its text is an answer."""
        return MARK.search(self.text) is not None

    @cached_property
    def _compiled(self) -> tuple[Any, jinja2.Template]:
        environment: Any = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[AnswerMarks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _dump_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": self._format_date}
        try:
            return environment, environment.from_string(self.text)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"is no Jinja: {_first_line(error)}") from None

    def check(self) -> None:
        """Raise ChatTemplateError where the template is no Jinja."""
        assert self._compiled

    def render(self, messages: Sequence[Message], tools: Any, *, prompts: bool = False) -> tuple[str, list[Span]]:
        """Return the text of messages, and where in it answers are marked.

        With `prompts` the text ends where an answer would begin. Raises ChatTemplateError where the template refuses
        the messages.
        """
        environment, template = self._compiled
        environment.pieces, environment.spans = [], []
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompts}
        try:
            for piece in template.generate(**given, **self.special_tokens):
                environment.pieces.append(piece)
        except ChatTemplateError:
            raise
        # A template is somebody's code: it may do anything that an expression can do wrong.
        except Exception as error:
            raise ChatTemplateError(f"refuses it: {_first_line(error)}") from None
        return "".join(environment.pieces), environment.spans

    def _format_date(self, form: str) -> str:
        if self.date is None:
            raise ChatTemplateError("writes the date of today, and tomorrow it would be other data; say data.date=DATE")
        return self.date.strftime(form)


def write_conversation(template: ChatTemplate, conversation: Conversation) -> tuple[str, list[Span]]:
    """Return the text of a conversation, and the spans of the answers in it that are learnt.

    Raises ChatTemplateError where the template refuses it, or where nobody can tell what is an answer.
    """
    messages, tools = conversation.messages, conversation.tools
    text, spans = template.render(messages, tools)
    answers = [number for number, message in enumerate(messages) if message["role"] == ANSWERER]
    learnt = answers if conversation.num_learnt is None else answers[-conversation.num_learnt :]
    if not template.marks_answers:
        spans = [_find_answer(template, conversation, number, text) for number in learnt]
    elif len(learnt) < len(answers):
        # One answer may have several marked parts, or none: then only the last can be told from the others.
        if len(learnt) > 1 and len(spans) != len(answers):
            raise ChatTemplateError("marks other parts than one for each answer, so nobody can tell which are learnt")
        spans = spans[-len(learnt) :]
    if not any(stop > start for start, stop in spans):
        raise ChatTemplateError("writes no answer of it")
    return text, spans


def _find_answer(template: ChatTemplate, conversation: Conversation, number: int, text: str) -> Span:
    """Return what the message of this number, an answer, adds to the text of those before it."""
    messages, tools = conversation.messages, conversation.tools
    before, _ = template.render(messages[:number], tools, prompts=True)
    through = text if number == len(messages) - 1 else template.render(messages[: number + 1], tools)[0]
    # Some templates write older answers otherwise, without what was thought, or have no place to prompt for one.
    if not (through.startswith(before) and text.startswith(through)):
        raise ChatTemplateError(
            f"writes message {number + 1} otherwise when others follow, so nobody can tell what is an answer; mark it "
            "in a template of yours with {% generation %} (data.template=FILE), or say data.answers=last"
        )
    return len(before), len(through)


def _dump_json(value: Any, **options: Any) -> str:
    # Jinja's own filter writes `<` and `'` as HTML has them.
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
