"""Prediction sets of programs: a predicted program with holes, which stands for all ways to fill them. On the host.

A model predicts a program and gives each node v of its syntax tree a cost, minus the log of its probability. Of the
nodes some are kept; the maximal subtrees that are not are holes. For a level tau

    minimise    the number of nodes removed
    subject to  sum of the costs of kept nodes <= tau,   at most m holes,   the parent of a kept node is kept,
                what was kept at a smaller level is kept

The last makes the sets shrink as tau grows, so that "the truth fits the partial program" is decided by one number, the
largest such tau, and `pac_threshold` of minus this number finds a level with an error of at most eps, with confidence
1 - delta. Khakhar et al. solve an integer program. On a tree dynamic programming solves it: with D_v[h, r] the least
cost kept below and at v with h holes and r nodes removed,

    D_v[1, size_v] = 0    (v removed)       D_v = cost_v + min-plus convolution of D_c over children c    (v kept)

level by level, in O(m^2 n^2) for n nodes. It is exact at each level, given what the smaller ones kept.

References:
    Khakhar, Mell and Bastani (2023), https://arxiv.org/abs/2302.08703.
"""

import ast
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from bayesinf import errors

__all__ = ["Program", "keep_nodes", "nested_keeps", "parse_program", "program_score", "show_program"]

HOLE = "__"


@dataclass(frozen=True)
class Program:
    """A program as a tree, parents before children. Its nodes are statements, expressions, and the module.

    Attributes:
        source: as it was written.
        labels: of each node, all of it that is not a statement or expression below it.
        parents: of each node; -1 of the module, the first.
    """

    source: str
    labels: tuple[str, ...]
    parents: Int[np.ndarray, " n"]


def parse_program(source: str) -> Program:
    """The tree of a Python program.

    Args:
        source: what `ast.parse` takes.

    Returns:
        The program.

    Raises:
        SyntaxError: it is no program.

    Example:
        >>> from bayesinf.models.conformal import parse_program
        >>> parse_program("x = y + 1").parents.tolist()                   # module, assignment, x, y + 1, y, 1
        [-1, 0, 1, 1, 3, 3]
    """
    labels: list[str] = []
    parents: list[int] = []

    def add(node: ast.AST, parent: int) -> None:
        label, children = _describe(node)
        index = len(labels)
        labels.append(label)
        parents.append(parent)
        for child in children:
            add(child, index)

    add(ast.parse(source), -1)
    return Program(source, tuple(labels), np.array(parents))


def keep_nodes(
    parents: Int[np.ndarray, " n"],
    costs: Float[np.ndarray, " n"],
    tau: float,
    max_holes: int,
    kept: Bool[np.ndarray, " n"] | None = None,
) -> Bool[np.ndarray, " n"]:
    """Which nodes to keep: the most that cost at most tau, with at most `max_holes` holes; of equals the cheapest.

    Args:
        parents: of each node, before it; -1 of the first, the root.
        costs: of each node, >= 0.
        tau: the level.
        max_holes: m >= 1.
        kept: what must be kept, an earlier answer to a smaller level.

    Returns:
        Whether each node is kept. Nothing is, one hole, where tau < 0.

    Raises:
        ValueError: parents do not come before children, or a cost is negative.

    Example:
        >>> import numpy as np
        >>> from bayesinf.models.conformal import keep_nodes
        >>> parents, costs = np.array([-1, 0, 1, 1, 0]), np.array([0.1, 0.1, 3.0, 0.2, 0.3])
        >>> keep_nodes(parents, costs, tau=1.0, max_holes=1).tolist()                        # all but the dear one
        [True, True, False, True, True]

    References:
        Khakhar, Mell and Bastani (2023), https://arxiv.org/abs/2302.08703.
    """
    errors.check_count("max_holes", max_holes)
    n = len(parents)
    if n == 0 or parents[0] != -1 or np.any(parents[1:] < 0) or np.any(parents >= np.arange(n)):
        raise ValueError(f"parents must be -1 for the first node and earlier nodes for the others, got {parents}")
    if np.shape(costs) != (n,) or not np.all(np.asarray(costs) >= 0):
        raise ValueError(f"costs must be {n} numbers, none negative, got {costs}")
    forced = np.zeros(n, bool) if kept is None else np.asarray(kept, bool)
    sizes = np.ones(n, int)
    children: list[list[int]] = [[] for _ in range(n)]
    for v in range(n - 1, 0, -1):
        sizes[parents[v]] += sizes[v]
        children[parents[v]].insert(0, v)

    # D_v, and for kept nodes the tables after each child, through which the choices are read back
    tables: list[np.ndarray] = [np.empty(0)] * n
    partial_sums: list[list[np.ndarray]] = [[] for _ in range(n)]
    for v in range(n - 1, -1, -1):
        sums = [np.full((max_holes + 1, 1), np.inf)]
        sums[0][0, 0] = costs[v]
        for child in children[v]:
            sums.append(_convolve(sums[-1], tables[child]))
        partial_sums[v] = sums
        tables[v] = np.concatenate([sums[-1], np.full((max_holes + 1, 1), np.inf)], axis=1)  # r = 0, ..., size
        if not forced[v]:
            tables[v][1, sizes[v]] = 0.0

    least = tables[0].min(axis=0)
    affordable = np.flatnonzero(least <= tau)
    is_kept = np.zeros(n, bool)
    if len(affordable) == 0:  # tau < 0, or below what is forced: nothing more than that
        return forced
    num_removed = int(affordable[0])
    pending = [(0, int(np.argmin(tables[0][:, num_removed])), num_removed)]
    while pending:
        v, h, r = pending.pop()
        if r == sizes[v]:
            continue
        is_kept[v] = True
        for child, before in zip(reversed(children[v]), reversed(partial_sums[v][:-1]), strict=True):
            h_child, r_child = _split(before, tables[child], h, r)
            pending.append((child, h_child, r_child))
            h, r = h - h_child, r - r_child
    return is_kept


def nested_keeps(
    parents: Int[np.ndarray, " n"], costs: Float[np.ndarray, " n"], taus: Float[np.ndarray, " t"], max_holes: int
) -> Bool[np.ndarray, "t n"]:
    """The nodes kept at each of several levels, more and more of them.

    Args:
        parents: of each node, before it; -1 of the first, the root.
        costs: of each node, >= 0.
        taus: levels, ascending; the same for all programs of a calibration, and not chosen by looking at its truths.
        max_holes: m >= 1.

    Returns:
        Whether each node is kept, a row for each level.

    Raises:
        ValueError: the levels do not ascend.

    Example:
        >>> import numpy as np
        >>> from bayesinf.models.conformal import nested_keeps
        >>> parents, costs, taus = np.array([-1, 0, 0]), np.array([0.1, 1.0, 2.0]), np.array([0.0, 1.5, 9.0])
        >>> nested_keeps(parents, costs, taus, max_holes=1).astype(int).tolist()
        [[0, 0, 0], [1, 1, 0], [1, 1, 1]]

    References:
        Khakhar, Mell and Bastani (2023), https://arxiv.org/abs/2302.08703.
    """
    if np.any(np.diff(taus) < 0):
        raise ValueError(f"taus must ascend, got {taus}")
    kept = np.zeros(len(parents), bool)
    rows = []
    for tau in taus:
        kept = keep_nodes(parents, costs, float(tau), max_holes, kept)
        rows.append(kept)
    return np.array(rows).reshape(len(taus), len(parents))


def program_score(
    predicted: Program, truth: Program, costs: Float[np.ndarray, " n"], taus: Float[np.ndarray, " t"], max_holes: int
) -> float:
    """Minus the largest level at which the truth fits the partial program; +inf where it fits at none.

    A partial program fits a program that has its kept nodes, with the same label, in the same places; a hole is filled
    by exactly one statement or expression. Where nothing is kept every program fits.

    Args:
        predicted: the model's program.
        truth: the right one.
        costs: of the predicted nodes, >= 0.
        taus: levels, ascending.
        max_holes: m >= 1.

    Returns:
        The score, for `pac_threshold`: with its threshold t, the level is -t, and for t = inf nothing is kept.

    Raises:
        ValueError: as of `nested_keeps`.

    Example:
        >>> import numpy as np
        >>> from bayesinf.models.conformal import parse_program, program_score
        >>> predicted, truth = parse_program("x = f(y, 1)"), parse_program("x = f(y, 2)")
        >>> costs = np.array([0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 2.0])                   # 1 is doubtful
        >>> program_score(predicted, truth, costs, np.array([0.0, 1.0, 2.0, 3.0]), max_holes=1)
        -2.0

    References:
        Khakhar, Mell and Bastani (2023), https://arxiv.org/abs/2302.08703.
    """
    score = np.inf
    for tau, kept in zip(taus, nested_keeps(predicted.parents, costs, taus, max_holes), strict=True):
        if not _fits(predicted, kept, truth):
            break
        score = -float(tau)
    return score


def show_program(program: Program, kept: Bool[np.ndarray, " n"]) -> str:
    """The partial program as source, holes as `__`.

    Args:
        program: the program.
        kept: whether each node is.

    Returns:
        Source.

    Example:
        >>> import numpy as np
        >>> from bayesinf.models.conformal import parse_program, show_program
        >>> program = parse_program("x = f(y, 1 + z)")
        >>> show_program(program, np.array([True, True, True, True, True, True, False, False, False]))
        'x = f(y, __)'
    """
    count = -1

    def visit(node: ast.AST) -> ast.AST:
        nonlocal count
        count += 1
        if not kept[count]:
            count += len(_below(program.parents, count)) - 1
            return ast.Expr(ast.Name(HOLE)) if isinstance(node, ast.stmt) else ast.Name(HOLE)
        return fill(node)

    def fill(node: ast.AST) -> ast.AST:
        def new(value: Any) -> Any:
            if isinstance(value, ast.stmt | ast.expr):
                return visit(value)
            return fill(value) if isinstance(value, ast.AST) else value

        for name, value in ast.iter_fields(node):
            setattr(node, name, [new(item) for item in value] if isinstance(value, list) else new(value))
        return node

    if not kept[0]:
        return HOLE
    return ast.unparse(visit(ast.parse(program.source)))


def _describe(node: ast.AST) -> tuple[str, list[ast.AST]]:
    """What a node says without the statements and expressions below it, and these, in order."""
    parts: list[str] = []
    children: list[ast.AST] = []
    for name, value in ast.iter_fields(node):
        items = []
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.stmt | ast.expr):
                items.append(HOLE)
                children.append(item)
            elif isinstance(item, ast.AST):
                label, below = _describe(item)
                items.append(label)
                children += below
            else:
                items.append(repr(item))
        parts.append(f"{name}=[{', '.join(items)}]")
    return f"{type(node).__name__}({', '.join(parts)})", children


def _fits(predicted: Program, kept: Bool[np.ndarray, " n"], truth: Program) -> bool:
    pending = [(0, 0)]
    while pending:
        v, w = pending.pop()
        if not kept[v]:
            continue
        if predicted.labels[v] != truth.labels[w]:  # the label also says how many children there are
            return False
        children = (np.flatnonzero(program.parents == u).tolist() for program, u in ((predicted, v), (truth, w)))
        pending += list(zip(*children, strict=True))
    return True


def _below(parents: Int[np.ndarray, " n"], v: int) -> list[int]:
    """V and all below it, which follow it."""
    found = [v]
    for w in range(v + 1, len(parents)):
        if parents[w] in found:
            found.append(w)
    return found


def _convolve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Min over h + h' = H and r + r' = R of a[h, r] + b[h', r']."""
    total = np.full((a.shape[0], a.shape[1] + b.shape[1] - 1), np.inf)
    for h in range(a.shape[0]):
        for h_child in range(a.shape[0] - h):
            for r_child in np.flatnonzero(np.isfinite(b[h_child])):
                window = total[h + h_child, r_child : r_child + a.shape[1]]
                np.minimum(window, a[h] + b[h_child, r_child], out=window)
    return total


def _split(before: np.ndarray, child: np.ndarray, h: int, r: int) -> tuple[int, int]:
    """The child's share (h', r') of the least sum with h holes and r removed."""
    best, share = np.inf, (0, 0)
    for h_child in range(h + 1):
        for r_child in range(max(0, r - before.shape[1] + 1), min(r, child.shape[1] - 1) + 1):
            total = before[h - h_child, r - r_child] + child[h_child, r_child]
            if total < best:
                best, share = total, (h_child, r_child)
    return share
