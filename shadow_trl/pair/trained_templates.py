"""The chat templates that TUNED was trained with, beside INSTRUCT's: do they differ, and which does the result have?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, both_sides, list_names
from .templates import read_templates, template_files
from .vocabularies import Vocabulary

_OPTION = "chat_template='trained' (in a training config: graft_chat_template)"
_WAY_OUT = "--chat-template trained (in a training config: graft_chat_template: trained) ships that template."
_SHOWN = 60
"""Characters of a template in a message."""


@dataclass(frozen=True)
class TemplateChoice:
    """Whose chat templates a result has.

    Args:
        whose: `instruct` or `trained`, where TUNED was trained with others than INSTRUCT's; None where it was not, or
            where that is not known.
        source: role and folder of the side whose templates the result has in the place of INSTRUCT's; None for none.
        warnings: what the user should know.
    """

    whose: str | None = None
    source: tuple[str, Path] | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, list[Path]]:
        """The files with the templates of the result, by the role of their side; {} where these are INSTRUCT's."""
        return {self.source[0]: template_files(self.source[1])} if self.source else {}

    @property
    def templates(self) -> dict[str, str]:
        """The templates by name; {} where they are INSTRUCT's."""
        return read_templates(self.source[1]) if self.source else {}


def choose_template(trained: Mapping[str, Vocabulary], instruct: Path, wanted: str) -> TemplateChoice:
    """Compare the chat templates that TUNED was trained with to INSTRUCT's, and choose those of the result.

    Args:
        trained: role -> tokenizer of what was trained, `start` being an earlier stage. One without a template says
            nothing: what it was trained with is not known.
        instruct: INSTRUCT's folder.
        wanted: `instruct` or `trained`, the option `chat_template`.

    Raises:
        ConfigError: `trained` is wanted, and there is no template, or several.
    """
    known = {role: read_templates(side.folder) for role, side in trained.items()}
    final = {role: found for role, found in known.items() if found and role != "start"}
    theirs = read_templates(instruct)
    other = any(template_rows(found, theirs) for found in final.values())
    source, shipped = None, theirs
    if wanted == "trained":
        role = _only(final, trained)
        if other:
            source, shipped = (role, trained[role].folder), final[role]
    warnings = [
        f"the chat template of {trained[role].label} is not the one that the result has.\n{list_names(rows)}\nIf it "
        f"was trained on conversations, it knows them in that form.{'' if source else f' {_WAY_OUT}'}"
        for role, found in known.items()
        if (rows := template_rows(found, shipped, ("tuned", "result")))
    ]
    return TemplateChoice(wanted if other else None, source, warnings)


def template_rows(
    ours: Mapping[str, str], theirs: Mapping[str, str], roles: tuple[str, str] = ("tuned", "instruct")
) -> list[str]:
    """Return a row for each of the templates `ours`, by name, that is another in `theirs`, with where it is.

    Two are the same where Jinja reads the same text: the kind of line ends, and one line end at the end, do not count.
    """
    rows = []
    for name in ours:
        if name not in theirs:
            rows.append(both_sides(f"template {name!r}", repr(ours[name][:_SHOWN]), "no such template", roles))
            continue
        one, two = (_as_jinja_reads(side[name]) for side in (ours, theirs))
        if one != two:
            apart = (number for number, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
            place = next(apart, min(len(one), len(two)))
            one, two = (repr(text[place : place + _SHOWN]) for text in (one, two))
            rows.append(both_sides(f"template {name!r}, from character {place}", one, two, roles))
    return rows


def _as_jinja_reads(text: str) -> str:
    return re.sub(r"\r\n?", "\n", text).removesuffix("\n")


def _only(final: Mapping[str, Mapping[str, str]], trained: Mapping[str, Vocabulary]) -> str:
    """Return the role of the side that has the templates of all."""
    if not final:
        names = ", ".join(side.label for role, side in trained.items() if role != "start")
        raise ConfigError(
            f"{_OPTION}: {names} has no chat template, so what it was trained with is not known. Leave the option out "
            "for INSTRUCT's, or save the template as chat_template.jinja in that folder."
        )
    first, *others = final
    apart = [
        role for role in others if template_rows(final[first], final[role]) or len(final[first]) < len(final[role])
    ]
    if apart:
        raise ConfigError(
            f"{_OPTION}: {len(apart) + 1} of the tuned models were trained with different templates.\n"
            f"{list_names(trained[role].label for role in (first, *apart))}\nLeave the option out for INSTRUCT's."
        )
    return first
