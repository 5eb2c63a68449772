"""Layouts in the words of other systems: one engine over a table for each, `SYSTEM.toml` beside this file.

A table relates a system's flags (or keys of its configuration file) to *facts*, the named values of `facts.py`. It is read
in both directions: facts are written as flags by `emit`, and flags are read back into facts by `read`. What a table says:

- `absent`: the value of a fact that the system takes where its flag is left out; such a flag is not written.
- `flag`: a key, and either the `fact` it carries or a fixed `value` (none for a bare flag) that stands `when` facts have
  the given values. `words` are a fact's values as the system names them; `also` further names that are read.
- `among`: the values of a layout's key that the system has; `refuse`: combinations that it has not. Both say why.
- `comment`: what a person should know beside it.

The engine knows no system; `checked` in each table says what its keys were checked against.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple, cast

import msgspec

from fiveply.spec.errors import InputError
from fiveply.spec.layout import Layout

Facts = Mapping[str, Any]
When = dict[str, Any]
"""A fact's name to the value it must have, a list of such values, or `{above = n}`."""


class Flag(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One flag, environment variable (`env`) or key of a configuration file (dots go down into it)."""

    key: str
    fact: str = ""
    value: Any = True
    when: When = {}
    words: dict[str, Any] = {}
    also: dict[str, Any] = {}
    notes: dict[str, str] = {}
    """What to say of a word that is read as something simpler."""
    reads: dict[str, Any] = {}
    """Facts that reading a fixed flag sets; by default those of `when` that have one value."""
    read_only: bool = False
    free: bool = False
    """Changes neither layout nor model: written, and set no fact when read."""
    env: bool = False


class Among(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    values: tuple[Any, ...]
    why: str


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    when: When
    why: str
    fix: str


class Comment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    when: When = {}


class Dialect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One system. `command` stands before its flags, with facts in braces; a configuration file has none."""

    title: str
    checked: str
    software: str
    form: Literal["flags", "json"] = "flags"
    command: str = ""
    among: dict[str, Among] = {}
    absent: dict[str, Any] = {}
    flag: tuple[Flag, ...] = ()
    refuse: tuple[Refusal, ...] = ()
    comment: tuple[Comment, ...] = ()


def names() -> list[str]:
    """Systems that layouts are written for."""
    return sorted(f.name.removesuffix(".toml") for f in resources.files(__name__).iterdir() if f.name.endswith(".toml"))


@cache
def load(system: str) -> Dialect:
    """Raises InputError for a system without a table."""
    if system not in names():
        raise InputError(f"no dialect of '{system}'", where="--emit", fix=f"choose one of {', '.join(names())}")
    return msgspec.toml.decode(resources.files(__name__).joinpath(f"{system}.toml").read_bytes(), type=Dialect)


def choices(system: str) -> dict[str, tuple[Any, ...]]:
    """The values of a layout's keys that the system has, of those keys where it has not all (of `sp`, where tp is above 1)."""
    dialect = load(system)
    whole = any(refusal.when == {"sp": True} for refusal in dialect.refuse)
    return {key: among.values for key, among in dialect.among.items()} | ({"sp": (0,)} if whole else {})


def emit(system: str, facts: Facts) -> tuple[str, list[str]]:
    """A layout in `system`'s words, by its facts (`facts.facts_of`): a command, or the contents of a configuration file; and
    comments, what a person should know beside it. Raises InputError, with the reason, for what the system has not."""
    dialect = load(system)
    check(dialect, facts)
    comments = [one.text.format_map(facts) for one in dialect.comment if holds(one.when, facts)]
    if dialect.form == "json":
        text = msgspec.json.format(msgspec.json.encode(_nested(dialect, facts)), indent=2).decode()
    else:
        text = " \\\n  ".join(_command(dialect, facts))
    return f"{text}\n", comments


def check(dialect: Dialect, facts: Facts) -> None:
    """Raise InputError with the reason for a layout that the system does not have."""
    for key, among in dialect.among.items():
        if facts[key] not in among.values:
            raise InputError(f"{dialect.title} does not have {key}={facts[key]}: {among.why}", where="--emit", key=key,
                             fix=f"plan with --fix {key}={among.values[0]}")  # fmt: skip
    for refusal in dialect.refuse:
        if holds(refusal.when, facts):
            keys = [key for key in refusal.when if key in Layout.__struct_fields__]
            said = " with ".join(f"{key}={_plain(facts[key])}" for key in keys)
            has_not = f" does not have {said}" if said else ""
            raise InputError(f"{dialect.title}{has_not}: {refusal.why}", where="--emit", fix=refusal.fix)


def holds(when: When, facts: Facts) -> bool:
    return all(_matches(facts[key], wanted) for key, wanted in when.items())


def _matches(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return value > cast(dict[str, Any], wanted)["above"]
    return value in wanted if isinstance(wanted, list) else value == wanted


def _plain(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


# Writing


def written(dialect: Dialect, facts: Facts) -> Iterator[tuple[Flag, Any]]:
    """Every flag that must stand, and its value."""
    for flag in dialect.flag:
        if flag.read_only or not holds(flag.when, facts):
            continue
        value = facts[flag.fact] if flag.fact else flag.value
        if flag.fact and value == dialect.absent.get(flag.fact):
            continue
        yield flag, flag.words.get(str(value), value)


def _command(dialect: Dialect, facts: Facts) -> list[str]:
    flags: list[str] = []
    variables: list[str] = []
    for flag, value in written(dialect, facts):
        text = shlex.quote(str(value))
        if flag.env:
            variables.append(f"{flag.key}={text}")
        else:
            flags.append(flag.key if value is True else f"{flag.key} {text}")
    return [" ".join([*variables, dialect.command.format_map(facts)]), *flags]


def _nested(dialect: Dialect, facts: Facts) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for flag, value in written(dialect, facts):
        *path, last = flag.key.split(".")
        place = tree
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return tree


def changes(dialect: Dialect, before: Facts, after: Facts) -> list[str]:
    """What to change on a command line that says `before` so that it says `after`."""
    old, new = ({flag.key: value for flag, value in written(dialect, facts)} for facts in (before, after))
    found = [f"add {_said(key, value)}" for key, value in new.items() if key not in old]
    found += [f"drop {_said(key, value)}" for key, value in old.items() if key not in new]
    return [*(f"{_said(key, old[key])} -> {new[key]}" for key in old if key in new and old[key] != new[key]), *found]


def _said(key: str, value: Any) -> str:
    return key if value is True else f"{key} {value}"


# Reading


class Reading(NamedTuple):
    """Facts that a command line gives, over those that its system takes for what is left out; every flag on it, and those
    that no row reads; notes on words that are read as something simpler."""

    facts: dict[str, Any]
    given: tuple[str, ...]
    unread: tuple[str, ...]
    notes: tuple[str, ...]


def read(dialect: Dialect, text: str, where: str) -> Reading:
    """Raises InputError for what is no command line, and for a value that is none."""
    given = _arguments(text, where)
    facts, notes = dict(dialect.absent), list[str]()
    for flag in dialect.flag:  # in the table's order, so that later rows refine earlier ones
        if flag.key not in given or flag.free:
            continue
        words = given[flag.key]
        if flag.fact:
            facts[flag.fact] = _value(flag, dialect.absent[flag.fact], words, where)
        elif flag.value is True or words == [str(flag.value)]:
            facts |= flag.reads or {k: v for k, v in flag.when.items() if not isinstance(v, (list, dict))}
        notes += [flag.notes[word] for word in words if word in flag.notes]
    known = {flag.key for flag in dialect.flag}
    return Reading(facts, tuple(given), tuple(key for key in given if key not in known), tuple(notes))


def _arguments(text: str, where: str) -> dict[str, list[str]]:
    """Each flag with the words that follow it; of a flag given twice the last counts."""
    try:
        tokens = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise InputError(f"not a command line ({error})", where=where, fix="quote it as a shell would") from None
    given: dict[str, list[str]] = {}
    words: list[str] = []  # before the first flag: the launcher's and the script's names
    for token in tokens:
        if "$" in token:
            raise InputError(
                f"'{token}' is a variable of the shell", where=where, fix="give the values that it stands for"
            )
        if token.startswith("--"):
            key, equals, value = token.partition("=")
            words = given[key] = [value] if equals else []
        else:
            words.append(token)
    return given


def _value(flag: Flag, absent: Any, words: list[str], where: str) -> Any:
    if isinstance(absent, bool):
        return True
    if not words:
        raise InputError("has no value", where=where, key=flag.key, fix="give one, or leave the flag out")
    word = words[0]
    meanings = {str(said): value for value, said in flag.words.items()} | flag.also
    try:
        return type(absent)(meanings.get(word, word))
    except ValueError:
        kind = "a whole number" if isinstance(absent, int) else "a number"
        raise InputError(f"'{word}' is not {kind}", where=where, key=flag.key, fix=f"give {kind}") from None
