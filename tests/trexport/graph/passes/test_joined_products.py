"""Products of one input as one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tests.trexport.graph.passes.small import Rewritten, attributes, rewrite
from trexport.graph.passes import joined_products as module
from trexport.graph.passes.joined_products import LEAST, MOST, joined_products

PLAIN, TURNED, GEMM = "MatMul", "MatMul of a transpose", "Gemm"
KINDS = [PLAIN, TURNED, GEMM]
WEIGHT = {PLAIN: (6, 8), TURNED: (8, 6), GEMM: (8, 6)}
MADE = {
    PLAIN: {"Concat": 1, "MatMul": 1, "Split": 1},
    TURNED: {"Concat": 1, "Transpose": 1, "MatMul": 1, "Split": 1},
    GEMM: {"Concat": 2, "Gemm": 1, "Split": 1},
}


def product(kind: str, i: int, x: str = "x") -> str:
    """The i-th product `p`, by the weight `w`."""
    if kind == GEMM:
        return f"p{i} = Gemm<transB = 1>({x}, w{i}, b{i})"
    if kind == TURNED:
        return f"t{i} = Transpose<perm = [1,0]>(w{i}) p{i} = MatMul({x}, t{i})"
    return f"p{i} = MatMul({x}, w{i})"


def used(products: list[str], x: str = "float[3,6] x", y: str = "3,8", more: str = "", kind: str = "float") -> str:
    """A graph in which each product `p` has a reader of its own, what it computes an output `y`."""
    outputs = ", ".join(f"{kind}[{y}] y{i}" for i in range(len(products)))
    readers = " ".join(f"y{i} = Relu(p{i})" for i in range(len(products)))
    return f"({x}{more}) => ({outputs}) {{ {' '.join(products)} {readers} }}"


def weights(shapes: list[tuple[int, int]], biases: tuple[int, ...] | None = None) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"w{i}": shape for i, shape in enumerate(shapes)}
    return found if biases is None else found | {f"b{i}": biases for i in range(len(shapes))}


def joined(kind: str, count: int = LEAST, x: str = "3,6", y: str = "3,8", *, half: bool = False) -> Rewritten:
    dtype = "float16" if half else "float"
    text = used([product(kind, i) for i in range(count)], f"{dtype}[{x}] x", y, kind=dtype)
    return rewrite(text, joined_products, weights([WEIGHT[kind]] * count, (8,) if kind == GEMM else None), half=half)


def operators(found: Rewritten) -> dict[str, int]:
    """But for the products' readers."""
    return {name: count for name, count in Counter(found.ops()).items() if name != "Relu"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [LEAST, LEAST + 3])
def test_products_of_one_input(kind: str, count: int) -> None:
    found = joined(kind, count)
    assert (found.sites, operators(found)) == (count - 1, MADE[kind])
    assert len(found.node("Split").output) == count
    found.assert_same(kernels=True)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_are_not_worth_it(kind: str) -> None:
    joined(kind, LEAST - 1).assert_untouched()


@pytest.mark.parametrize("kind", [PLAIN, TURNED])
@pytest.mark.parametrize(
    ("x", "y"), [("6", "8"), ("N,6", "N,8"), ("2,5,6", "2,5,8"), ("N,L,6", "N,L,8"), ("2,1,5,6", "2,1,5,8")]
)
def test_inputs_of_any_rank_and_free_axes(kind: str, x: str, y: str) -> None:
    found = joined(kind, x=x, y=y)
    assert (found.sites, operators(found)) == (LEAST - 1, MADE[kind])
    found.assert_same()


def test_a_free_number_of_rows() -> None:
    found = joined(GEMM, x="N,6", y="N,8")
    assert (found.sites, operators(found)) == (LEAST - 1, MADE[GEMM])
    found.assert_same()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str) -> None:
    found = joined(kind, half=True)
    assert (found.sites, operators(found)) == (LEAST - 1, MADE[kind])
    found.assert_same(1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_fed(kind: str) -> None:
    given = weights([WEIGHT[kind]] * LEAST, (8,) if kind == GEMM else None)
    more = "".join(f", float[{','.join(map(str, shape))}] {name}" for name, shape in given.items())
    found = rewrite(used([product(kind, i) for i in range(LEAST)], more=more), joined_products, given)
    assert (found.sites, operators(found)) == (LEAST - 1, MADE[kind])
    found.assert_same()
    found.assert_same(fed=given)


def fed_weights(shapes: dict[str, tuple[int, ...]], count: int = LEAST) -> Rewritten:
    """Of products of which the weights of some can be fed."""
    more = "".join(f", float[{','.join(map(str, shape))}] {name}" for name, shape in shapes.items())
    return rewrite(
        used([product(PLAIN, i) for i in range(count)], more=more), joined_products, weights([(6, 8)] * count)
    )


@pytest.mark.parametrize(("number", "sites"), [(1, LEAST - 1), (LEAST - 1, LEAST - 1), (LEAST, 2 * LEAST - 2)])
def test_weights_that_are_fed_and_others_do_not_mix(number: int, sites: int) -> None:
    """With `LEAST` others of constant weights."""
    fed = {f"w{i}": (6, 8) for i in range(number)}
    found = fed_weights(fed, number + LEAST)
    assert found.sites == sites
    found.assert_same()
    found.assert_same(fed=fed)


@pytest.mark.parametrize(("most", "sites"), [(LEAST * 6 * 8 * 4, LEAST - 1), (LEAST * 6 * 8 * 4 - 1, 0)])
def test_so_many_bytes_of_weights_that_are_fed(most: int, sites: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_FED", most)
    assert fed_weights({f"w{i}": (6, 8) for i in range(LEAST)}).sites == sites
    assert joined(PLAIN).sites == LEAST - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "more"), [(LEAST - 1, 0), (LEAST, LEAST - 1)])
def test_no_more_than_so_many_in_one(kind: str, left: int, more: int) -> None:
    found = joined(kind, MOST + left)
    assert found.sites == MOST - 1 + more
    splits = [node for node in found.after.graph.node if node.op_type == "Split"]
    assert [len(node.output) for node in splits] == [MOST, *([left] if more else [])]
    found.assert_same(1e-4)


def test_attributes_that_are_written_out() -> None:
    texts = [product(GEMM, 0).replace("<", "<alpha = 1.0, beta = 1.0, transA = 0, ")]
    texts += [product(GEMM, i) for i in range(1, LEAST)]
    found = rewrite(used(texts), joined_products, weights([(8, 6)] * LEAST, (8,)))
    assert (found.sites, attributes(found.node("Gemm"))["transB"]) == (LEAST - 1, 1)
    found.assert_same()


def test_one_weight_of_all() -> None:
    text = used([f"p{i} = MatMul(x, w0)" for i in range(LEAST)])
    found = rewrite(text, joined_products, {"w0": (6, 8)})
    assert found.sites == LEAST - 1
    found.assert_same()


def test_results_of_several_readers() -> None:
    products = [product(PLAIN, i) for i in range(LEAST)]
    text = used(products).replace("}", "z = Mul(p1, p2) } ").replace(") {", ", float[3,8] z) {")
    found = rewrite(text, joined_products, weights([(6, 8)] * LEAST))
    assert found.sites == LEAST - 1
    found.assert_same()


@pytest.mark.parametrize("shapes", [[(6, 8), (6, 5)], [(6, 8), (4, 8)]], ids=["other width", "other input"])
def test_groups_of_their_own(shapes: list[tuple[int, int]]) -> None:
    """In turns, so that order is no help; two of one number and width share what says so."""
    inputs = [f"x{rows}" for rows, _ in shapes]
    texts = [f"p{i} = MatMul({inputs[i % 2]}, w{i})" for i in range(2 * LEAST)]
    outputs = ", ".join(f"float[3,{shapes[i % 2][1]}] y{i}" for i in range(2 * LEAST))
    readers = " ".join(f"y{i} = Relu(p{i})" for i in range(2 * LEAST))
    given = ", ".join(f"float[3,{name[1:]}] {name}" for name in dict.fromkeys(inputs))
    text = f"({given}) => ({outputs}) {{ {' '.join(texts)} {readers} }}"
    found = rewrite(text, joined_products, weights(shapes * LEAST))
    assert (found.sites, operators(found)) == (2 * LEAST - 2, {"Concat": 2, "MatMul": 2, "Split": 2})
    found.assert_same()


def test_inputs_on_different_depths() -> None:
    """The second group's input is computed from the first one's results, the first group's last product comes at the end."""
    first, second = [product(PLAIN, i) for i in range(LEAST)], [product(PLAIN, i, "h") for i in range(LEAST, 2 * LEAST)]
    texts = [*first[:-1], "h = Slice(p0, zero, six, one)", *second, first[-1]]
    outputs = ", ".join(f"float[3,8] y{i}" for i in range(2 * LEAST))
    readers = " ".join(f"y{i} = Relu(p{i})" for i in range(2 * LEAST))
    text = f"(float[3,6] x) => ({outputs}) {{ {' '.join(texts)} {readers} }}"
    cut = {"zero": np.array([0]), "six": np.array([6]), "one": np.array([1])}
    found = rewrite(text, joined_products, weights([(6, 8)] * 2 * LEAST) | cut)
    assert found.sites == 2 * LEAST - 2
    found.assert_same()


def test_a_result_that_is_given_out_stays() -> None:
    texts = [product(PLAIN, i) for i in range(LEAST + 1)]
    text = used(texts).replace(") {", ", float[3,8] p2) {")
    found = rewrite(text, joined_products, weights([(6, 8)] * (LEAST + 1)))
    assert (found.sites, operators(found)) == (LEAST - 1, {"Concat": 1, "MatMul": 2, "Split": 1})
    found.assert_same()


@pytest.mark.parametrize(
    ("kinds", "shapes"),
    [
        ([PLAIN, TURNED], [(6, 6)]),
        ([TURNED, GEMM], [(6, 6)]),
        ([PLAIN], [(6, 8), (6, 7)]),
        ([TURNED], [(8, 6), (7, 6)]),
    ],
    ids=["turned and not", "with and without a bias", "two widths", "two widths, turned"],
)
def test_others_among_them_do_not_count(kinds: list[str], shapes: list[tuple[int, int]]) -> None:
    """One less than are joined of each."""
    texts, outputs, given = [], [], {}
    for i in range(2 * LEAST - 2):
        kind, shape = kinds[i % len(kinds)], shapes[i % len(shapes)]
        texts.append(f"{product(kind, i)} y{i} = Relu(p{i})")
        width = shape[1] if kind == PLAIN else shape[0]
        outputs.append(f"float[3,{width}] y{i}")
        given |= {f"w{i}": shape} | ({f"b{i}": (width,)} if kind == GEMM else {})
    text = f"(float[3,6] x) => ({', '.join(outputs)}) {{ {' '.join(texts)} }}"
    rewrite(text, joined_products, given).assert_untouched()


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("p{i} = MatMul(x, v{i})", {}),
        ("t{i} = Transpose<perm = [1,0]>(v{i}) p{i} = MatMul(x, t{i})", {}),
        ("t{i} = Relu(w{i}) p{i} = MatMul(x, t{i})", {"w": (6, 6)}),
        ("t{i} = Transpose<perm = [0,1]>(w{i}) p{i} = MatMul(x, t{i})", {"w": (6, 6)}),
        ("t{i} = Transpose(w{i}) p{i} = MatMul(x, t{i})", {"w": (6, 6)}),
        ("p{i} = MatMul(w{i}, x)", {"w": (6, 6)}),
        ("p{i} = Gemm<transB = 1>(x, v{i}, b{i})", {"b": (6,)}),
        ("p{i} = Gemm<transB = 1>(x, w{i}, r{i})", {"w": (6, 6)}),
        ("p{i} = Gemm<transB = 1>(x, w{i})", {"w": (6, 6)}),
        ('p{i} = Gemm<transB = 1>(x, w{i}, "")', {"w": (6, 6)}),
        ("p{i} = Gemm<transB = 1>(x, w{i}, b{i})", {"w": (6, 6), "b": (1,)}),
        ("p{i} = Gemm<transB = 1>(x, w{i}, b{i})", {"w": (6, 6), "b": (6, 6)}),
        ("p{i} = Gemm(x, w{i}, b{i})", {"w": (6, 6), "b": (6,)}),
        ("p{i} = Gemm<transA = 1, transB = 1>(x, w{i}, b{i})", {"w": (6, 6), "b": (6,)}),
        ("p{i} = Gemm<alpha = 2.0, transB = 1>(x, w{i}, b{i})", {"w": (6, 6), "b": (6,)}),
        ("p{i} = Gemm<beta = 0.5, transB = 1>(x, w{i}, b{i})", {"w": (6, 6), "b": (6,)}),
        ("p{i} = Mul(x, w{i})", {"w": (6, 6)}),
    ],
)
def test_others_are_left_alone(text: str, shapes: dict[str, tuple[int, ...]]) -> None:
    given = {f"{name}{i}": shape for name, shape in shapes.items() for i in range(LEAST)}
    more = "".join(f", float[6,6] v{i}, float[6] r{i}" for i in range(LEAST))
    graph = used([text.format(i=i) for i in range(LEAST)], "float[6,6] x", "6,6", more)
    rewrite(graph, joined_products, given).assert_untouched()


def test_weights_of_every_sample_are_left_alone() -> None:
    texts = [product(PLAIN, i) for i in range(LEAST)]
    given = {f"w{i}": (2, 6, 8) for i in range(LEAST)}
    rewrite(used(texts, "float[2,3,6] x", "2,3,8"), joined_products, given).assert_untouched()


def test_results_of_unknown_rank_are_left_alone() -> None:
    texts = ["h = Reshape(x, s)", *(product(PLAIN, i, "h") for i in range(LEAST))]
    outputs = ", ".join(f"float[A,B,8] y{i}" for i in range(LEAST))
    readers = " ".join(f"y{i} = Relu(p{i})" for i in range(LEAST))
    text = f"(float[3,6] x, int64[K] s) => ({outputs}) {{ {' '.join(texts)} {readers} }}"
    rewrite(text, joined_products, weights([(6, 8)] * LEAST)).assert_untouched()
