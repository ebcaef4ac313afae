"""What the build says at its end: a table of times, and each failure with its place."""

from __future__ import annotations

from pathlib import Path

from handbook_src.publish.chapters import Chapter, Skip
from handbook_src.publish.execute import Outcome

TRACE_LINES = 12


def times(outcomes: list[Outcome], chapters: dict[str, Chapter]) -> str:
    """Chapter, seconds, budget, state; one line a chapter."""
    width = max([len(c.name) for c in chapters.values()] + [7])
    lines = [f"{'chapter':{width}}  seconds  budget  state"]
    for outcome in outcomes:
        chapter = chapters[outcome.page]
        over = outcome.state in ("executed", "cached") and outcome.seconds > chapter.budget * outcome.slowness
        state = outcome.state + (", over its budget" if over else "")
        spent = f"{outcome.seconds:7.1f}" if outcome.state != "skipped" else f"{'-':>7}"
        lines.append(f"{chapter.name:{width}}  {spent}  {chapter.budget:6g}  {state}")
    return "\n".join(lines)


def stretched(slowness: float) -> str:
    return f"This machine is {slowness:.2f} times as slow as the one of the budgets, which are stretched by that."


def failures(outcomes: list[Outcome], chapters: dict[str, Chapter], root: Path) -> str:
    """Each failed chapter: cell, line of the text, and the last lines of the traceback."""
    blocks = []
    for outcome in outcomes:
        failure = outcome.failure
        if failure is None:
            continue
        source = chapters[outcome.page].source.relative_to(root)
        where = f"{source}:{failure.line}" if failure.line else str(source)
        cell = f", cell {failure.cell}" if failure.cell else ""
        lines = [f"FAILED  {where}{cell}", f"  {failure.why}"]
        lines += [f"  | {line}" for line in failure.trace[-TRACE_LINES:]]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def skipped(found: dict[str, Skip]) -> str:
    return "\n".join(f"skipped {s.page} until {s.until}: {s.reason}" for s in found.values())
