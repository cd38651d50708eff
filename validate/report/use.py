"""Figures about using the files: size, speed and a simple task compared with the original, and texts that loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from validate.report import facts, numbers
from validate.report.facts import Report, find
from validate.report.tables import Cell, Row, Table

__all__ = ["generation_table", "last_words_table", "original_texts", "sentences", "trained_sentence", "use_table"]

_WAYS = {"greedy": "the most probable token each time", "sampled": "drawn at temperature 1"}
_SPEED_UNKNOWN = "the original was not run in this runtime"


def trained_sentence(report: Report) -> str:
    """The share of parameters that recovery trained; empty if it is not known."""
    share = find(report, "against_original", "trained_share")
    if share is None:
        return ""
    n_trained = report["against_original"]["trained_parameters"]
    if not n_trained:
        return "No parameter was trained."
    return f"Recovery trained {_small_percent(share)} of the parameters ({numbers.count(n_trained)})."


def use_table(report: Report) -> Table:
    """Each file's size, decode speed and last words found, relative to the original's."""
    rows = []
    for name, file in (find(report, "against_original", "files") or {}).items():
        row = facts.validation_row(report, name)
        speed = file["decode_speed_ratio"]
        cells = (
            Cell(numbers.percent(file["size_ratio"])),
            Cell("not known" if speed is None else f"{speed:.2f}x", note=_SPEED_UNKNOWN if speed is None else ""),
            Cell(
                numbers.percent(file["last_words_kept"]),
                note=numbers.interval(find(row, "cloze", "kept_interval"), numbers.percent),
            ),
        )
        rows.append(Row(f"{facts.artifact_name(name)} beside the original", cells, name))
    return Table(("", "Size", "Decode speed", "Last words kept"), tuple(rows))


def last_words_table(report: Report) -> Table:
    """Cloze accuracy of every model: over all words, then by domain."""
    measured = [row for row in report.get("validation") or [] if row.get("cloze")]
    domains = dict.fromkeys(domain for row in measured for domain in row["cloze"]["domains"])
    rows = []
    for row in measured:
        figures = [row["cloze"], *(row["cloze"]["domains"].get(domain) or {} for domain in domains)]
        cells = tuple(
            Cell(
                numbers.percent(part.get("accuracy")),
                note=numbers.interval(part.get("accuracy_interval"), numbers.percent),
            )
            for part in figures
        )
        rows.append(Row(facts.row_name(row), cells, row["artifact"], note=f"{row['cloze']['words']:,} words"))
    return Table(("Model", "All", *domains), tuple(rows))


def generation_table(report: Report) -> Table:
    """Loops, ends of text and repetition in the texts that each model wrote."""
    rows = []
    for row in report.get("validation") or []:
        if not (generation := row.get("generation")):
            continue
        for way, what in _WAYS.items():
            figures = generation[way]
            cells = (
                _rate(figures, "loop_rate"),
                _rate(figures, "end_of_text_rate"),
                Cell(numbers.fixed(figures["longest_repeat_mean"], 1)),
                Cell(numbers.count(figures["longest_repeat_max"])),
            )
            note = f"{generation['prompts']} texts of {generation['new_tokens']} tokens, {what}"
            rows.append(Row(f"{facts.row_name(row)}, {way}", cells, row["artifact"], note=note))
    headings = ("Model", "Loops", "End of text", "Longest repeat, mean", "Longest of all")
    return Table(headings, tuple(rows))


def original_texts(report: Report) -> str:
    """Says how often the original was read for its texts; empty if the report does not know."""
    effort = report.get("original_texts")
    if not effort:
        return ""
    said = f"The original was read {numbers.count(effort['passes'])} times for its texts"
    if effort["drafted"]:
        drafts = f"{facts.artifact_name(effort['drafted_by'])} drafted {numbers.count(effort['drafted'])} tokens"
        said += f": {drafts}, of which {numbers.percent(effort['acceptance_rate'])} were the original's"
    ended = effort["drafting_ended"]
    return f"{said}." if ended is None else f"{said}. Drafting ended early: {ended}."


def sentences(report: Report) -> list[str]:
    """The same figures as sentences for the model card."""
    trained = trained_sentence(report)
    return [*([trained] if trained else []), *(_of_file(report, row) for row in facts.shipped_rows(report))]


def _of_file(report: Report, row: Mapping[str, Any]) -> str:
    name = facts.row_name(row)
    if row.get("error"):
        return f"{name}: did not run."
    parts = []
    file = find(report, "against_original", "files", row["artifact"]) or {}
    if file:
        parts.append(f"{numbers.percent(file['size_ratio'])} of the original's size")
        speed = file["decode_speed_ratio"]
        of_speed = f"{speed:.2f} times the original's decode speed" if speed is not None else ""
        parts.append(of_speed or f"decode speed beside the original not known, because {_SPEED_UNKNOWN}")
    if cloze := row.get("cloze"):
        parts.append(
            f"finds {numbers.percent(cloze['accuracy'])} of {cloze['words']:,} last words of sentences and lines, "
            f"the original {numbers.percent(cloze['teacher_accuracy'])}"
        )
    if generation := row.get("generation"):
        loops = (f"{numbers.percent(generation[way]['loop_rate'])} {way}" for way in _WAYS)
        parts.append(f"texts that loop: {', '.join(loops)}{_of_original(report)}")
    return f"{name}: {'; '.join(parts) or 'not measured'}."


def _of_original(report: Report) -> str:
    generation = facts.validation_row(report, "teacher").get("generation")
    if not generation:
        return ""
    return f" (the original {', '.join(numbers.percent(generation[way]['loop_rate']) for way in _WAYS)})"


def _rate(figures: Mapping[str, Any], name: str) -> Cell:
    return Cell(numbers.percent(figures[name]), note=numbers.interval(figures[f"{name}_interval"], numbers.percent))


def _small_percent(share: float) -> str:
    """Formats a small share, such as that of routers: ``0.016 %`` where two decimals would say little."""
    return numbers.percent(share) if share >= 0.001 else f"{100 * share:.2g} %"
