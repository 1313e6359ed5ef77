"""How a profile's text is laid out: YAML whose parts are JSON, which is read fifty times as fast as YAML.

A line that begins with a name and a colon begins a part, or with nothing after the colon a list; one that begins with a
dash begins an item of the list. Every part and item is JSON, broken after commas alone, into lines of which all but the
first are indented. Such a text means the same in YAML; any other text is left to the reader of YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 110
"""Characters of a line up to which a part is not broken into lines of its own."""

_PART = re.compile(r"\n(?! )")
_WORDS = {True: "true", False: "false"}


def laid_out(content: Mapping[str, Any]) -> str:
    """The text of `content`; a block in a list gets a line for each field, and so does a long part."""
    return "".join(f"{name}:{_part(value)}\n" for name, value in content.items())


def _part(value: Any) -> str:
    if isinstance(value, list | tuple) and value and all(isinstance(item, dict) for item in value):
        return "".join("\n- " + _block(item) for item in value)
    return " " + (_block(value) if isinstance(value, dict) and len(_json(value)) > WIDTH else _json(value))


def _block(value: Mapping[str, Any]) -> str:
    return "{" + ",\n  ".join(f"{_json(name)}: {_json(item)}" for name, item in value.items()) + "}"


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if text.isprintable() else json.dumps(value)  # what no reader takes is at least not another text


def read_laid_out(text: str, most: int) -> dict[str, Any] | None:
    """The content of a text that is laid out so, with all numbers and truths as text; None for any other text.

    Args:
        most: values, keys counted too, that it may have.
    """
    if sum(map(text.count, ",:[{\n")) > most or not _is_like_yaml(text):
        return None
    content: dict[str, Any] = {}
    items: list[Any] | None = None
    try:
        for part in _PART.split(text.removesuffix("\n")):
            if part.startswith("- ") and items is not None:
                items.append(_value(part[2:]))
                continue
            name, colon, rest = part.partition(":")
            if not (colon and name.isidentifier()) or name in content or rest[:1] not in ("", " "):
                return None
            items = None if rest else []
            content[name] = _value(rest) if rest else items
    except (ValueError, RecursionError):
        return None
    return content if [] not in content.values() else None


def _is_like_yaml(text: str) -> bool:
    """Whether what JSON makes of its parts is what YAML makes of them: counted, since it is asked of every file."""
    count = text.count
    return (
        "\\" not in text  # YAML has other escapes
        and text.replace("\n", "").isprintable()
        and count("\n ") == count(",\n ")  # it takes a break in fewer places
        and count("true") + count("false") == count('": true') + count('": false')  # `_mapping` sees no lists
    )


def _value(text: str) -> Any:
    return _DECODER.decode(text)


def _mapping(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    block = dict(pairs)
    if len(block) < len(pairs):
        raise ValueError("a key is given twice")
    if True in block.values() or False in block.values():  # there are no numbers yet that would equal them
        return {name: _WORDS[value] if isinstance(value, bool) else value for name, value in pairs}
    return block


_DECODER = json.JSONDecoder(object_pairs_hook=_mapping, parse_int=str, parse_float=str, parse_constant=str)
