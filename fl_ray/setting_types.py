"""Settings of the right types, by the annotations of what takes them (jsonargparse), and errors in our words."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from fl_ray.errors import SettingError
from fl_ray.registry import nearest

__all__ = ["typed_arguments", "typed_section"]


def typed_section(key: str, kind: type, values: dict[str, Any]) -> Any:
    """An instance of the dataclass ``kind``, whose settings stand under ``key`` in messages.

    Raises:
        SettingError: a value is of another type.
    """
    parser = _section_parser(key, kind)
    return parser.instantiate(_parse(parser, {key: values}))[key]


def typed_arguments(
    label: str, target: Callable[..., Any], skip: frozenset[str], values: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of ``target``, but for ``skip``, with defaults filled in.

    Args:
        label: in front of the settings' names in messages.

    Raises:
        SettingError: a value is of another type.
    """
    return _parse(_component_parser(target, skip), {"settings": values}, label)["settings"].as_dict()


@functools.cache  # reading signatures takes longer than all the rest, and a comparison checks dozens of recipes
def _section_parser(key: str, kind: type) -> Any:
    """A parser of one argument, ``key``, of type ``kind``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{key}", type=kind)
    return parser


@functools.cache
def _component_parser(target: Callable[..., Any], skip: frozenset[str]) -> Any:
    """A parser of ``settings``: what a call of ``target`` takes, but for ``skip``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if inspect.isclass(target) else parser.add_function_arguments
    add(target, "settings", skip=set(skip), fail_untyped=False)
    return parser


def _parse(parser: Any, values: dict[str, Any], label: str | None = None) -> Any:
    from argparse import ArgumentError

    try:
        return parser.parse_object(copy.deepcopy(values))  # jsonargparse writes into what it is given
    except (ArgumentError, TypeError) as error:
        raise SettingError(_in_our_words(" ".join(str(error).split()), label)) from error


def _in_our_words(message: str, label: str | None) -> str:
    """jsonargparse's message on a value of the wrong type, as ours are: setting, value, way out."""
    message = re.sub(r'^Parser key "([^"]*)":', lambda match: match[1] + ":", message).removeprefix("recipe.")
    if label is not None:
        message = re.sub(r"^settings", label, message).replace("settings.", f"{label}.")
    unknown = re.search(r"does not accept option '([^']*)'", message)
    if unknown:
        return f"{label or 'recipe'}: unknown setting {unknown[1]!r}; --print_config shows those known"
    found = re.search(r"^([\w.]+): Expected an? (.*?)\. Got value: (.*)$", message)
    if found is None:
        found = re.search(
            r"^([\w.]+): Does not validate against any of the Union subtypes Subtypes: (.*?) Errors:", message
        )
        value = re.search(r"Given value type: .*? Given value: (.*)$", message)
        if found is None:
            return message
        return f"{found[1]} is {value[1] if value else 'of the wrong type'}, but it must be one of {_types(found[2])}"
    setting, wanted, value = found.groups()
    if wanted.startswith("typing.Literal"):
        choices = re.findall(r"'([^']*)'", wanted)
        return f"{setting} is {value}.{nearest(value, choices)}"
    return f"{setting} is {value}, but it must be of type {_types(wanted)}"


def _types(text: str) -> str:
    """Python's names of types without their wrapping, and the words of a choice alone."""
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", r"\1", text)
    return re.sub(r"<class '([^']*)'>", r"\1", text).replace("NoneType", "null")
