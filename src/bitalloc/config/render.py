"""config/config.yaml and config/schema.json, from the classes."""

from __future__ import annotations

import json
import textwrap

import yaml

from bitalloc.config.gates import Check
from bitalloc.config.section import Section
from bitalloc.config.whole import Config


def default_yaml() -> str:
    """Every default with its description: the text of config/config.yaml."""
    lines = ["# Every setting with its default. Written by `python -m bitalloc.config`; a test keeps it in step.", ""]
    for name, field in Config.model_fields.items():
        if name == "models":
            continue
        default = getattr(Config(), name)
        if isinstance(default, Section):
            lines += [f"{name}:", *_section_lines(default, 2), ""]
        else:
            value = {k: v.model_dump() for k, v in default.items()} if isinstance(default, dict) else default
            lines += [f"# {field.description}", yaml.safe_dump({name: value}, sort_keys=False, width=110).rstrip(), ""]
    return "\n".join(lines)


def _section_lines(section: Section, indent: int) -> list[str]:
    pad, lines = " " * indent, []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        lines += [f"{pad}# {line}" for line in textwrap.wrap(field.description or "", 100)]
        if isinstance(value, Check):
            shown = yaml.safe_dump(value.model_dump(exclude_defaults=True), default_flow_style=True, width=110).strip()
            lines.append(f"{pad}{name}: {shown}")
        elif isinstance(value, Section):
            lines += [f"{pad}{name}:", *_section_lines(value, indent + 2)]
        else:
            dumped = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            lines.append(f"{pad}{name}: {dumped}")
    return lines


def schema_json() -> str:
    return json.dumps(Config.model_json_schema(), indent=1, sort_keys=True) + "\n"
