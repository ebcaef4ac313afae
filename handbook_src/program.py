"""The program of an experiment, cut from its chapter: the statements that its result hangs on.

A chapter is a list of cells. What an experiment computes depends on its own function, on
the helpers of the chapter that it calls, and on the values these read. That program is cut
out without running anything: by name, with Python's own symbol tables. Recording executes
it, and its hash says whether a record still belongs to the code.
"""

from __future__ import annotations

import ast
import hashlib
import symtable
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from handbook_src.errors import ConfigError

#: Papermill's parameters: the same experiment, whatever they are.
PARAMETERS = {"quick", "seed", "device"}
DECORATOR = "experiment"


@dataclass(frozen=True)
class Statement:
    """One top-level statement of a chapter."""

    node: ast.stmt

    @cached_property
    def text(self) -> str:
        return ast.unparse(self.node)

    @cached_property
    def binds(self) -> set[str]:
        """Names that it gives a value, those of ``x[i] = ...`` and ``x.y = ...`` included."""
        top = symtable.symtable(self.text, "cell", "exec")
        targets = [t for n in ast.walk(self.node) if isinstance(n, ast.Assign) for t in n.targets]
        roots = {root_of(t) for t in targets if isinstance(t, ast.Subscript | ast.Attribute)}
        return {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()} | roots

    @cached_property
    def uses(self) -> set[str]:
        """Names of the chapter that it reads, inside functions too; their own locals are not meant."""
        top = symtable.symtable(self.text, "cell", "exec")
        here = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
        return here.union(*(globals_of(inner) for inner in top.get_children()))

    @property
    def sets_parameters(self) -> bool:
        return bool(self.binds) and self.binds <= PARAMETERS

    @property
    def imports(self) -> bool:
        return isinstance(self.node, ast.Import | ast.ImportFrom)

    @property
    def defines(self) -> str | None:
        """The function or class that it defines."""
        return self.node.name if isinstance(self.node, ast.FunctionDef | ast.ClassDef) else None


def root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def globals_of(scope: symtable.SymbolTable) -> set[str]:
    found = {s.get_name() for s in scope.get_symbols() if s.is_global() and s.is_referenced()}
    return found.union(*(globals_of(inner) for inner in scope.get_children()))


@dataclass(frozen=True)
class Program:
    """Statements in their order; executed in a fresh namespace they define the experiment."""

    statements: tuple[Statement, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(s.text for s in self.statements)

    @property
    def hash(self) -> str:
        """Of what can change the result: neither imports nor words nor the quick setting."""
        counted = [s for s in self.statements if not s.imports and not s.sets_parameters]
        parts = (ast.unparse(Bare().visit(ast.parse(s.text))) for s in counted)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


class Bare(ast.NodeTransformer):
    """Drops docstrings, and the quick setting of an experiment's decorator."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        for call in filter(is_experiment, node.decorator_list):
            call.keywords = [k for k in call.keywords if k.arg != "quick"]  # type: ignore[attr-defined]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node


def is_experiment(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and root_of(decorator.func) == DECORATOR


def statements(cells: Iterable[str]) -> Iterator[Statement]:
    """Top-level statements of all cells; IPython's own lines are left out, and cells that don't parse."""
    for cell in cells:
        plain = "\n".join("" if x.lstrip().startswith(("%", "!")) else x for x in cell.splitlines())
        try:
            yield from map(Statement, ast.parse(plain).body)
        except SyntaxError:
            continue


def experiments(cells: Iterable[str]) -> list[str]:
    """Names of the experiments that a chapter defines, in its order."""
    nodes = [s.node for s in statements(cells)]
    return [n.name for n in nodes if isinstance(n, ast.FunctionDef) and any(map(is_experiment, n.decorator_list))]


def cut(cells: Iterable[str], name: str) -> Program:
    """The program that defines ``name``: whatever it reads, as far as its own definition.

    Raises:
        ConfigError: nothing in the cells defines it.
    """
    every = list(statements(cells))
    last = max((i for i, s in enumerate(every) if s.defines == name), default=None)
    if last is None:
        raise ConfigError(
            f"experiment {name}",
            got="no definition in the cells",
            want=f"a function {name} under @{DECORATOR}(...)",
            remedy="Define it in a cell of the chapter, at the top level.",
        )
    return Program(tuple(needed(every[: last + 1], {name})))


def needed(every: list[Statement], names: set[str]) -> list[Statement]:
    """Every statement that binds one of the names, or a name that such a statement reads."""
    newest = {s.defines: i for i, s in enumerate(every) if s.defines}  # a cell that was run again
    live = [s for i, s in enumerate(every) if not s.defines or newest[s.defines] == i]
    chosen: dict[str, Statement] = {}
    wanted = set(names)
    while fresh := [s for s in live if s.text not in chosen and s.binds & wanted]:
        for s in fresh:
            chosen[s.text] = s
            wanted |= s.uses
    return [s for i, s in enumerate(live) if chosen.get(s.text) is s]


def traced(cells: list[str]) -> list[set[str]]:
    """For each cell the experiments whose data it reads, through whatever values of earlier cells."""
    flat = [(i, s) for i, cell in enumerate(cells) for top in statements([cell]) for s in steps(top.node)]
    names = set(experiments(cells))
    reached: list[set[str]] = []
    newest: dict[str, int] = {}
    for k, (_, s) in enumerate(flat):
        found = names & {s.defines or ""}
        if not found:
            found = set().union(*(reached[newest[n]] for n in s.uses if n in newest))
        reached.append(found)
        newest.update(dict.fromkeys(s.binds, k))
    return [set().union(*(reached[k] for k, (j, _) in enumerate(flat) if j == i)) for i in range(len(cells))]


def steps(node: ast.stmt) -> Iterator[Statement]:
    """A statement in the order in which it runs: a loop gives its variable a value before its body reads it."""
    if isinstance(node, ast.For):
        first: ast.stmt = ast.Assign([node.target], node.iter)
        inner = [*node.body, *node.orelse]
    elif isinstance(node, ast.If):
        first, inner = ast.Expr(node.test), [*node.body, *node.orelse]
    else:
        yield Statement(node)
        return
    yield Statement(ast.fix_missing_locations(ast.copy_location(first, node)))
    for statement in inner:
        yield from steps(statement)
