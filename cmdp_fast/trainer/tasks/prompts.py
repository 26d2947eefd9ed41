"""How a prompt is made of a row: the template over its columns, the chat around it, and the arguments of the chat
template. A row is somebody else's: all of it is looked at before a model is loaded."""

from __future__ import annotations

import inspect
import json
import math
import re
from string import Formatter
from typing import Any

from cmdp_fast.errors import InputError, first_line

from ..settings.config import TrainConfig

EXPECTED = "expected a text or a list of chat messages"

_FIELD = re.compile(r"([^.\[\]]+)((?:\[[^\[\]]+\])*)")  # a column, and keys or positions in what it holds
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")  # as a table without lists holds them
_KEY = re.compile(r"\[([^\[\]]+)\]")


def with_prompt(row: dict[str, Any], config: TrainConfig, where: str) -> dict[str, Any]:
    """The row with its prompt as the configuration wants it: a text, or a list of chat messages; with the latter also
    `tools`, a list, and `chat_template_kwargs`, a dict, where the row or the configuration has any.

    ``where`` names the row in errors. Raises InputError for a row that no prompt can be made of.
    """
    if config.prompt_template:
        row = {**row, "prompt": filled(config.prompt_template, row, where)}
    prompt = row["prompt"]
    if isinstance(prompt, str):
        _check_text(prompt, where)
        if not config.chat:
            if config.chat_template_kwargs:
                raise InputError(f"--chat-template-kwargs is part of a chat, {where} has a text: add --chat")
            return row
        prompt = [{"role": "user", "content": prompt}]
    else:
        _check_messages(prompt, where)
        # Templates ask whether a message has `tool_calls`; of its content they ask whether it is None.
        prompt = [{**_without_none(message), "content": _without_none(message["content"])} for message in prompt]
    if config.system_prompt:
        if any(message["role"] in ("system", "developer") for message in prompt):
            raise InputError(f"--system-prompt: {where} has a system message of its own; there can be one")
        prompt = [{"role": "system", "content": config.system_prompt}, *prompt]
    return {**row, "prompt": prompt} | _template_arguments(row, config, where)


def filled(template: str, row: dict[str, Any], where: str) -> str:
    """The template with the row's values for ``{column}``, ``{column[key]}`` and ``{column[0]}``; braces are doubled.

    Neither attributes nor formats: a template may be another's, as the row is. Raises InputError for what is not there
    or is no text or number.
    """
    option = f"--prompt-template {template!r}"
    parts = []
    try:
        fields = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{option}: {first_line(error)}") from error
    for literal, field, form, conversion in fields:
        parts.append(literal)
        if field is None:
            continue
        if form or conversion:
            raise InputError(f"{option}: {{{field}}} takes neither a format nor a conversion")
        value = _value(field, row, option)
        if value is None or isinstance(value, (list, dict)) or (isinstance(value, float) and math.isnan(value)):
            what = "a list of messages" if field == "prompt" and isinstance(value, list) else _kind(value)
            raise InputError(f"{option}: {{{field}}} of {where} is {what}, expected a text or a number")
        parts.append(str(value))
    return "".join(parts)


def _value(field: str, row: dict[str, Any], option: str) -> Any:
    if field in row:
        return row[field]
    match = _FIELD.fullmatch(field)
    if match is None or match[1] not in row:
        raise InputError(f"{option} does not fit the columns {', '.join(row)}: there is no {{{field}}}")
    value = row[match[1]]
    for key in _KEY.findall(match[2]):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise InputError(f"{option}: there is no [{key}] in {{{field}}}, which is {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "None" if value is None else "NaN" if value != value else f"of type {type(value).__name__}"


def _check_text(text: str, where: str) -> None:
    if _MESSAGES.match(text):
        raise InputError(
            f"the prompt of {where} is a text that begins as a list of chat messages does: expected the list itself, "
            "which JSON and Parquet files can hold"
        )
    _check_unicode(text, where)


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt of {where} is not valid Unicode: {first_line(error)}") from error


def _check_messages(prompt: Any, where: str) -> None:
    if not isinstance(prompt, list):
        number = isinstance(prompt, (int, float)) and prompt == prompt
        hint = "; --prompt-template '{prompt}' makes a text of a number" if number else ""
        raise InputError(f"the prompt of {where} is {_kind(prompt)}, {EXPECTED}{hint}")
    if not prompt:
        raise InputError(f"the prompt of {where} is an empty list, {EXPECTED}")
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InputError(
                f"the prompt of {where} has a message that is {_kind(message)}, expected a dict with role and content"
            )
        _check_content(message, where)
    _check_unicode(json.dumps(prompt, ensure_ascii=False, default=str), where)


def _check_content(message: dict[str, Any], where: str) -> None:
    """Raises InputError for a content that is neither a text nor texts in parts, thoughts among them; a call of a tool
    may have none."""
    content = message["content"]
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    what = f"the prompt of {where} has a message of {message['role']} whose content"
    if not isinstance(content, list):
        raise InputError(f"{what} is {_kind(content)}, expected a text")
    for part in content:
        kind = part.get("type") or "text" if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "thinking") or not isinstance(part.get(kind), str):
            raise InputError(f"{what} has a part that is no text ({kind}): the models are given texts alone")


def _template_arguments(row: dict[str, Any], config: TrainConfig, where: str) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs` where there are any. JSON, TRL's way, is taken as it is; columns of a table
    have None for what a row leaves out, and that is left out again."""
    tools = _read_json("tools", row, list, where)
    if not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"the column tools of {where} must hold JSON schemas, a dict for each tool")
    own = _read_json("chat_template_kwargs", row, dict, where)
    check_template_kwargs(own, f"the column chat_template_kwargs of {where}")
    arguments = {"tools": tools, "chat_template_kwargs": {**config.chat_template_kwargs, **own}}
    return {name: value for name, value in arguments.items() if value or name in row}


def check_template_kwargs(kwargs: dict[str, Any], what: str) -> None:
    """Raises InputError for a name that means something to `apply_chat_template` itself, such as another template."""
    from transformers import PreTrainedTokenizerBase

    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name in kwargs:
        if name in own:
            raise InputError(f"{what}: {name} is no variable of a template, but an argument of apply_chat_template")


def _read_json(column: str, row: dict[str, Any], kind: type, where: str) -> Any:
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the column {column} of {where} is not JSON: {first_line(error)}") from error
    elif isinstance(value, (list, dict)):
        value = _without_none(value)
    if not value:  # None, an empty text, list or dict
        return kind()
    if not isinstance(value, kind):
        raise InputError(f"the column {column} of {where} is {_kind(value)}, expected a {kind.__name__} or its JSON")
    return value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
