"""Charges put into a chat template: before everything in it that repeats, compares or builds."""

from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

LOOKED, CHARGED = "a look", "a charge"  # no names that stand after a `|`


class Charging(NodeTransformer):
    """Rewrites a parsed template with filters that charge for walking through a value and for running a body."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        tested = _count(node.test) if node.test else 1
        self.generic_visit(node)
        node.iter = _filtered(node.iter, LOOKED, nodes.Const(tested))
        return self._charge_body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        return self._charge_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        return self._charge_body(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        self.generic_visit(node)
        return self._charge_body(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes), "join")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, LOOKED)
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, LOOKED)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, LOOKED)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, LOOKED)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx == "store" else _filtered(node, LOOKED)

    def _charge_body(self, node: Any) -> nodes.Node:
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(sum(map(_count, node.body)) + 1), CHARGED)))
        return node


def _filtered(node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _count(node: nodes.Node) -> int:
    return 1 + sum(1 for _ in node.find_all(nodes.Node))
