"""Formats conversations as text by a model's Jinja template, as `apply_chat_template` of
transformers does."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

try:
    import jinja2
    from jinja2 import ext, nodes, sandbox
except ImportError as error:
    raise ValueError("chat templates need jinja2: pip install 'linear-seqmodels[gguf]'") from error


class _Generation(ext.Extension):
    """Jinja extension for {% generation %} ... {% endgeneration %} in chat templates.

    Templates mark the assistant's text by this tag for training; here its content is rendered
    unchanged.
    """

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call, so that what is set in the block ends with it, as in transformers.
        return nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(line)

    def _shown(self, caller) -> str:
        return caller()


def _refuse(message):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Returns a value as JSON text; templates' filter `tojson`, without Jinja's HTML escapes."""
    options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message without its fields that are None, as chat templates expect it.

    The model's reasoning, if any, is put under both names in use, "thinking" and
    "reasoning_content".
    """
    said = {k: v for k, v in message.items() if v is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    thought = next((said[name] for name in names if name in said), None)
    return said if thought is None else {"thinking": thought, **said, "reasoning_content": thought}


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Returns a conversation as text, up to where the model's answer begins.

    Args:
      template: a Jinja chat template. It runs in a sandbox, as it comes from a downloaded file.
      messages: the conversation, such as [{"role": "user", "content": "..."}].
      special: the texts of special tokens by name, such as {"bos_token": "<s>"}.
      tools: JSON schemas of functions that the model may call.
      documents: texts for the model to read, each with "title" and "text".

    Raises:
      ValueError: no messages, or any error while the template is rendered.
    """
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    if not messages:
        raise ValueError("a conversation has one message at least")
    said = list(map(_message, messages))
    try:
        return environment.from_string(template).render(
            **special, messages=said, tools=tools, documents=documents, add_generation_prompt=True
        )
    except Exception as error:  # whatever the template makes happen
        raise ValueError(f"the model's chat template cannot be rendered: {error}") from error
