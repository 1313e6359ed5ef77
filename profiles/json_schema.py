"""The published JSON Schema of profiles, `cca-profile-1.json` beside this file; `cca-profile schema` prints it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .schema import SCHEMA, Profile

PUBLISHED = Path(__file__).with_name("cca-profile-1.json")


def json_schema() -> str:
    """The schema as text. It says what every block may hold; that the blocks agree is checked when a file is read."""
    content = _without_titles(Profile.model_json_schema(by_alias=True))
    named = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA, **content}
    return json.dumps(named, indent=1) + "\n"


def _without_titles(block: Any) -> Any:
    """`block` without the titles that only repeat a field's name."""
    if isinstance(block, list):
        return [_without_titles(item) for item in block]
    if not isinstance(block, dict):
        return block
    return {key: _without_titles(item) for key, item in block.items() if key != "title" or isinstance(item, dict)}
