"""Mistakes in arguments and options, in the words of mistakes in a recipe."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from typer import BadParameter

from blockft.errors import did_you_mean
from blockft.validation import describe_value


def describe_usage_error(error: Any) -> str:
    """Return what is wrong: what was given, what is allowed, a suggestion, and the command for help.

    error: typer's `UsageError` about the arguments of a command. Typer does not export its classes.
    """
    command = error.ctx.command_path if error.ctx else "blockft"
    return f"{_describe(error)} (see {command} --help)"


def _describe(error: Any) -> str:
    if hasattr(error, "possibilities"):  # NoSuchOption
        suggestion = did_you_mean(error.option_name, error.possibilities or ())
        return "; ".join(filter(None, [f"there is no option {error.option_name}", suggestion]))
    if not isinstance(error, BadParameter) or error.param is None:
        return str(error.format_message())
    name = _name(error)
    if isinstance(error.__cause__, ValidationError):
        fault = error.__cause__.errors(include_url=False)[0]
        return describe_value(name, _with_choices(fault, error.param))
    return f"{name} {error.message or 'is missing'}"


def _name(error: Any) -> str:
    """Return the name of an argument or an option, or of the variable that gives its value."""
    parameter = error.param
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    source = error.ctx and error.ctx.get_parameter_source(parameter.name)
    return str(parameter.envvar if source is not None and source.name == "ENVIRONMENT" else parameter.opts[0])


def _with_choices(fault: Mapping[str, Any], parameter: Any) -> Mapping[str, Any]:
    """Return a fault of an option whose value is none of its choices as that of a setting."""
    members = getattr(parameter.type_descriptor.annotation, "__members__", None)
    if members is None:
        return fault
    return {**fault, "type": "enum", "ctx": {"expected": ", ".join(m.value for m in members.values())}}
