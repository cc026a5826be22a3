"""Mutation operators. Each one takes a node of the syntax tree and yields mistakes that an author might make there."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*",
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
_TRANSPARENT = {"detach", "clone", "contiguous", "float", "double", "to", "abs", "sqrt", "clamp", "round", "square"}
"""Methods whose calls a mutant may leave out: `x.detach()` becomes `x`."""
_TRANSPOSES = {"T", "mT", "H", "mH"}
_PAIRS = (
    ("sum", "mean"), ("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("minimum", "maximum"), ("floor", "ceil"),
    ("zeros", "ones"), ("zeros_like", "ones_like"), ("new_zeros", "new_ones"), ("rand", "randn"), ("any", "all"),
    ("add_", "sub_"), ("mul_", "div_"), ("addcmul_", "addcdiv_"), ("sqrt", "square"), ("qr", "svd"),
)  # fmt: skip
_TWINS = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])} | {
    "float32": "bfloat16", "float64": "float32", "bfloat16": "float16", "float16": "bfloat16",
    "uint8": "int16", "int8": "int16", "int32": "int64", "int64": "int32",
}  # fmt: skip
"""Name of an attribute -> the name that a mutant writes instead, e.g. `sum` -> `mean`."""


@dataclass(frozen=True)
class SourceChange:
    """One possible change of the source code: `text` replaces the text of one node of the syntax tree."""

    kind: str
    """Kind of mistake, e.g. `arithmetic`."""
    node: ast.AST
    """The node whose source text is replaced. The node knows its line and column."""
    text: str


def changes(node: ast.AST) -> Iterator[SourceChange]:
    """Yield every change of this node. Changes of its child nodes are not included."""
    operator = _OPERATORS.get(type(node))
    if operator is not None:
        yield from operator(node)


def _arithmetic(node: ast.BinOp) -> Iterator[SourceChange]:
    left, right = _operand(node.left), _operand(node.right)
    if isinstance(node.op, ast.MatMult):
        yield SourceChange("swapped arguments", node, f"({right} @ {left})")
        return
    if type(node.op) in _ARITHMETIC:
        yield SourceChange("arithmetic", node, f"({left} {_ARITHMETIC[type(node.op)]} {right})")
    if isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow):
        yield SourceChange("omitted term", node, left)
    if isinstance(node.op, ast.Add | ast.Mult):
        yield SourceChange("omitted term", node, right)


def _comparison(node: ast.Compare) -> Iterator[SourceChange]:
    if len(node.ops) == 1:
        left, right = _operand(node.left), _operand(node.comparators[0])
        yield SourceChange("comparison", node, f"({left} {_COMPARISONS[type(node.ops[0])]} {right})")


def _logic(node: ast.BoolOp) -> Iterator[SourceChange]:
    other = " or " if isinstance(node.op, ast.And) else " and "
    yield SourceChange("branch", node, f"({other.join(map(_operand, node.values))})")
    for left_out in range(len(node.values)):
        kept = [_operand(value) for index, value in enumerate(node.values) if index != left_out]
        joined = (" and " if isinstance(node.op, ast.And) else " or ").join(kept)
        yield SourceChange("branch", node, joined if len(kept) == 1 else f"({joined})")


def _sign(node: ast.UnaryOp) -> Iterator[SourceChange]:
    if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield SourceChange("arithmetic", node, _operand(node.operand))
    elif isinstance(node.op, ast.Not):
        yield SourceChange("branch", node, _operand(node.operand))


def _constant(node: ast.Constant) -> Iterator[SourceChange]:
    value = node.value
    if isinstance(value, bool):
        yield SourceChange("constant", node, str(not value))
    elif isinstance(value, int):
        yield SourceChange("constant", node, str(value + 1))
        if value > 0:
            yield SourceChange("constant", node, str(value - 1))
    elif isinstance(value, float):
        yield SourceChange("constant", node, str(2 * value if value else 1.0))


def _branch(node: ast.If) -> Iterator[SourceChange]:
    if not ends_in_error(node.body):
        yield SourceChange("branch", node.test, "True")
        yield SourceChange("branch", node.test, "False")


def _choice(node: ast.IfExp) -> Iterator[SourceChange]:
    yield SourceChange("branch", node, _operand(node.body))
    yield SourceChange("branch", node, _operand(node.orelse))


def _call(node: ast.Call) -> Iterator[SourceChange]:
    function = node.func
    if isinstance(function, ast.Attribute) and function.attr in _TRANSPARENT and not _is_module(function.value):
        yield SourceChange("omitted call", node, _operand(function.value))
    if len(node.args) >= 2 and not any(isinstance(one, ast.Starred) for one in node.args):
        for first in range(len(node.args) - 1):
            order = [*node.args]
            order[first : first + 2] = order[first + 1], order[first]
            written = [*map(ast.unparse, order), *(_keyword(one) for one in node.keywords)]
            yield SourceChange("swapped arguments", node, f"{ast.unparse(function)}({', '.join(written)})")


def _attribute(node: ast.Attribute) -> Iterator[SourceChange]:
    if node.attr in _TRANSPOSES:
        yield SourceChange("axis", node, _operand(node.value))
    elif node.attr in _TWINS:
        kind = "dtype" if _is_module(node.value) and "int" in node.attr + _TWINS[node.attr] else "function"
        kind = "dtype" if "float" in node.attr else kind
        yield SourceChange(kind, node, f"{_operand(node.value)}.{_TWINS[node.attr]}")


def _slice(node: ast.Slice) -> Iterator[SourceChange]:
    lower, upper = (ast.unparse(one) if one else "" for one in (node.lower, node.upper))
    if node.step is None:
        if node.upper and not isinstance(node.upper, ast.Constant):
            yield SourceChange("off by one", node, f"{lower}:{_operand(node.upper)} - 1")
        if node.lower and not isinstance(node.lower, ast.Constant):
            yield SourceChange("off by one", node, f"{_operand(node.lower)} + 1:{upper}")


def _statement(node: ast.Expr) -> Iterator[SourceChange]:
    if isinstance(node.value, ast.Call):
        yield SourceChange("omitted statement", node, "pass")


def _augmented(node: ast.AugAssign) -> Iterator[SourceChange]:
    yield SourceChange("omitted statement", node, "pass")
    if type(node.op) in _ARITHMETIC:
        target, value = ast.unparse(node.target), ast.unparse(node.value)
        yield SourceChange("arithmetic", node, f"{target} {_ARITHMETIC[type(node.op)]}= {value}")


def _assignment(node: ast.Assign) -> Iterator[SourceChange]:
    if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
        yield SourceChange("omitted statement", node, "pass")


def _loop(node: ast.For) -> Iterator[SourceChange]:
    over = node.iter
    if isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and over.func.id == "range":
        last = 0 if len(over.args) == 1 else 1
        yield SourceChange("off by one", over.args[last], f"{_operand(over.args[last])} - 1")


def _return(node: ast.Return) -> Iterator[SourceChange]:
    if node.value is not None and isinstance(node.value, ast.BinOp | ast.Name | ast.Call | ast.Attribute):
        yield SourceChange("detached", node.value, f"{_operand(node.value)}.detach()")


_OPERATORS: dict[type[ast.AST], Callable[..., Iterator[SourceChange]]] = {
    ast.BinOp: _arithmetic, ast.Compare: _comparison, ast.BoolOp: _logic, ast.UnaryOp: _sign, ast.Constant: _constant,
    ast.If: _branch, ast.IfExp: _choice, ast.Call: _call, ast.Attribute: _attribute, ast.Slice: _slice,
    ast.Expr: _statement, ast.AugAssign: _augmented, ast.Assign: _assignment, ast.For: _loop, ast.Return: _return,
}  # fmt: skip


def ends_in_error(body: list[ast.stmt]) -> bool:
    """Return whether the body of a branch ends by raising an error."""
    return isinstance(body[-1], ast.Raise)


def _is_module(node: ast.expr) -> bool:
    """Return whether the expression is the name of a module, such as `torch` in `torch.sqrt`."""
    return ast.unparse(node) in ("torch", "math", "nn", "nn.functional", "torch.linalg", "F")


def _keyword(node: ast.keyword) -> str:
    return f"{node.arg}={ast.unparse(node.value)}" if node.arg else f"**{ast.unparse(node.value)}"


def _operand(node: ast.expr) -> str:
    text = ast.unparse(node)
    simple = isinstance(node, ast.Name | ast.Constant | ast.Attribute | ast.Call | ast.Subscript)
    return text if simple else f"({text})"
