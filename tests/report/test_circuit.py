"""The picture of a circuit: whole, honest about what is not explained, and safe whatever tokens say."""

import re
from xml.etree import ElementTree

import pytest

from apportion.features.transcoder_circuits import Circuit, Figures, Node
from apportion.report.circuit import Drawing, FeatureNote, unexplained, visible, write_circuit

ROOT = Node("logit", 2, None, 7)
FEATURE, HEAD = Node("feature", 2, 1, 30), Node("head", 2, 1, 3, 1)
EMBEDDING, ERROR, MLP, BIAS = Node("embedding", 1), Node("error", 2), Node("mlp", 2), Node("bias", 2)
TOKENS = ["The", " </script><b>", "\n"]


@pytest.fixture
def circuit() -> Circuit:
    nodes = {
        ROOT: Figures(value=4.0, pruned=-0.5, expanded=True),
        FEATURE: Figures(value=3.0, activation=6.0),
        HEAD: Figures(value=-1.0, pruned=0.2, expanded=True),
        EMBEDDING: Figures(value=-1.2),
        ERROR: Figures(value=1.0),
        MLP: Figures(value=2.0),
        BIAS: Figures(value=-0.5),
    }
    edges = {
        (FEATURE, ROOT): 3.0,
        (HEAD, ROOT): -1.0,
        (ERROR, ROOT): 1.0,
        (MLP, ROOT): 2.0,
        (BIAS, ROOT): -0.5,
        (EMBEDDING, HEAD): -1.2,
    }
    return Circuit(ROOT, nodes, edges, [5, 6, 7], {"name": "greedy"})


def test_every_node_and_edge_is_drawn(circuit: Circuit) -> None:
    tree = ElementTree.fromstring(Drawing(circuit, [visible(each) for each in TOKENS], {7: " yes"}).svg())
    drawn = [each for each in tree.iter() if each.get("data-node")]
    assert len(drawn) == len(circuit.nodes)
    edges = [each for each in tree.iter() if each.get("data-child")]
    assert len(edges) == len(circuit.edges)
    widths = {each.get("data-child"): float(each.get("stroke-width")) for each in edges}
    assert max(widths.values()) == pytest.approx(7.5)
    assert {each.get("class").split()[1] for each in edges} == {"plus", "minus"}


def test_layers_go_up_and_tokens_to_the_right(circuit: Circuit) -> None:
    drawing = Drawing(circuit, TOKENS, {})
    height = {node: drawing.place[node][1] for node in circuit.nodes}
    assert height[ROOT] < height[FEATURE] < height[HEAD] < height[ERROR] < height[EMBEDDING]
    assert drawing.place[EMBEDDING][0] < drawing.place[HEAD][0]
    places = list(drawing.place.values())
    assert len(set(places)) == len(places)


def test_area_is_by_value(circuit: Circuit) -> None:
    tree = ElementTree.fromstring(Drawing(circuit, ["a", "b", "c"], {}).svg())
    sizes = {each.get("class").split()[1]: each for each in tree.iter() if each.get("data-node")}
    feature, head = float(sizes["feature"].get("r")), float(sizes["head"].get("width"))
    assert 3.1416 * feature**2 / head**2 == pytest.approx(3.0, rel=0.05)


def test_what_is_not_explained_is_said(circuit: Circuit) -> None:
    assert dict(unexplained(circuit)) == {
        "kept parts": "+2",
        "transcoder error": "+1",
        "MLPs without a transcoder": "+2",
        "biases": "-0.5",
        "pruned": "-0.5",
    }


def test_text_cannot_become_markup(circuit: Circuit, tmp_path) -> None:
    note = FeatureNote(["</script><i>"], ["\ud800 lone"])
    path = write_circuit(
        tmp_path / "circuit.html",
        circuit,
        TOKENS,
        title="<u>",
        summary={"<s>": "<q>"},
        notes={(1, 30): note},
        vocabulary={7: "<em>"},
    )
    page = path.read_text(encoding="utf-8")
    for tag in ("<b>", "<i>", "<u>", "<s>", "<q>", "<em>"):
        assert tag not in page
    assert page.count("</script>") == 2
    assert not re.search(r"(src|href)\s*=\s*.http", page)


def test_another_number_of_tokens_is_refused(circuit: Circuit, tmp_path) -> None:
    with pytest.raises(ValueError, match="2 tokens for a circuit of 3"):
        write_circuit(tmp_path / "circuit.html", circuit, TOKENS[:2], title="t")


@pytest.mark.parametrize(
    ("text", "shown"), [(" the", "␣the"), ("a b", "a b"), ("\n", "↵"), ("  ", "␣␣"), ("", "␣"), ("x ", "x␣")]
)
def test_spaces_can_be_seen(text: str, shown: str) -> None:
    assert visible(text) == shown
