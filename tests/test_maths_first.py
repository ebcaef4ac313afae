"""The maths comes first: how much of the public functions' bodies is something else."""

from __future__ import annotations

import ast
from pathlib import Path

from handbook_src.publish.fingerprint import public_face

FUNCTIONAL = Path(__file__).parents[1] / "handbook_src" / "functional"
#: Share of guard and dispatch lines in the bodies. It only goes down: 0.15 is the goal.
AT_MOST = 0.43


def guards(body: list[ast.stmt]) -> int:
    """Lines of a body that check, refuse, or choose who computes."""
    return sum(s.end_lineno - s.lineno + 1 if is_guard(s) else inner(s) for s in body)


def inner(statement: ast.stmt) -> int:
    return sum(guards(getattr(statement, part, [])) for part in ("body", "orelse", "finalbody"))


def is_guard(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise | ast.Assert | ast.Try):
        return True
    if isinstance(statement, ast.If):
        return any(isinstance(s, ast.Raise) for s in statement.body) or chooses(statement.test)
    return isinstance(statement, ast.Expr | ast.Assign | ast.AnnAssign) and (checks(statement) or chooses(statement))


def checks(statement: ast.stmt) -> bool:
    called = [n.func for n in ast.walk(statement) if isinstance(n, ast.Call)]
    names = [f.id if isinstance(f, ast.Name) else f.attr for f in called if isinstance(f, ast.Name | ast.Attribute)]
    return any(name.startswith(("check_", "_check", "refuse")) for name in names)


def chooses(node: ast.AST) -> bool:
    """It reads ``backend``, what came of it, or torch's switches of autocast and compilation."""
    words = {"backend", "resolve", "runs", "able", "torchs", "autocasts", "autocasting", "is_compiling"}
    names = (getattr(n, "id", None) or getattr(n, "attr", None) for n in ast.walk(node))
    return any(name in words for name in names)


def bodies() -> dict[str, tuple[int, int]]:
    """Of each public function: its lines without the docstring, and how many of them are guards."""
    found = {}
    for name, file in public_face(FUNCTIONAL).items():
        for node in ast.parse(file.read_text("utf8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                body = node.body[1:] if ast.get_docstring(node) else node.body
                found[name] = (node.end_lineno - body[0].lineno + 1, guards(body)) if body else (0, 0)
    return found


def test_guards_and_dispatch_are_a_small_part_of_the_public_functions():
    found = bodies()
    share = sum(g for _, g in found.values()) / sum(lines for lines, _ in found.values())
    worst = sorted(found, key=lambda name: -found[name][1])[:12]
    told = "\n".join(f"{name}: {found[name][1]} of {found[name][0]} lines" for name in worst)
    assert share <= AT_MOST, f"{share:.1%} of the lines are guards or dispatch, at most {AT_MOST:.1%}\n{told}"


def test_an_operation_has_none():
    found = bodies()
    for name in ("rms_norm", "layer_norm", "batch_norm", "gelu", "sigmoid", "linear"):
        assert found[name][1] == 0, name
