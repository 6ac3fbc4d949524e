"""The page of all settings, from the settings classes of the services and what is said behind each of their fields."""

import ast
import inspect
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from pydantic_core import PydanticUndefined

from services.modelserver.settings import ModelServerSettings
from services.registry.settings import RegistrySettings
from services.runtime.settings import PREFIX, ServiceSettings
from services.selector.settings import SelectorSettings
from services.trainer.settings import TrainerSettings
from services.validator.settings import ValidatorSettings

SERVICES = (RegistrySettings, SelectorSettings, TrainerSettings, ValidatorSettings, ModelServerSettings)


def page() -> str:
    """The text of settings.md."""
    lines = [
        "# Settings",
        "",
        "Made from the settings classes of `services/` by `make docs`. A service takes these variables from its",
        "environment; one that it does not know, or whose value is wrong, stops its start with the variable's name.",
        "",
        "## Every service",
        "",
        *_table(ServiceSettings, {"listen"}),
    ]
    for settings in SERVICES:
        lines += ["", f"## {settings.service}", "", *_table(settings, set(ServiceSettings.model_fields) - {"listen"})]
    return "\n".join(lines) + "\n"


def _table(settings: type[ServiceSettings], left_out: set[str]) -> Iterator[str]:
    said = dict(_said(ServiceSettings)) | dict(_said(settings))
    yield "| variable | default | |"
    yield "|---|---|---|"
    for name, field in settings.model_fields.items():
        if name not in left_out:
            default = "required" if field.is_required() else _shown(field.default)
            yield f"| `{PREFIX}{name.upper()}` | {default} | {said[name]} |"


def _shown(default: object) -> str:
    """A default as it would be written into the environment; nothing where what is said behind the field has it."""
    if default in (None, "", Path(), frozenset(), PydanticUndefined):
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, float):
        return f"`{default:g}`"
    if isinstance(default, frozenset):
        return f"`{','.join(sorted(str(each.value if isinstance(each, Enum) else each) for each in default))}`"
    return f"`{default}`"


def _said(settings: type[ServiceSettings]) -> Iterator[tuple[str, str]]:
    """Each field of a class with the string that stands behind it."""
    (tree,) = ast.parse(inspect.getsource(settings)).body
    assert isinstance(tree, ast.ClassDef)
    for statement, behind in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_text = isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant)
            if is_text and isinstance(behind.value.value, str):
                yield statement.target.id, " ".join(behind.value.value.split()).replace("|", "\\|")
