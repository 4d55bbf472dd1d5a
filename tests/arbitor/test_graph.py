"""MoEGraph: edges against a plain count, decay, the total order, messages."""

from collections import Counter

import pytest
import torch

from arbitor.graph import EDGES_PER_CODE, MAX_SCORE, SCORE_SHIFT, MoEGraph

V = 11


def make_graph(num_codes=V):
    graph = MoEGraph(num_codes, code_width=16)
    graph.node_features.initialize(seed=0, name="node_features")
    return graph


def codes_of(step, slots=3):
    random = torch.Generator().manual_seed(step)
    skewed = torch.rand(slots, 2, 40, generator=random).square() * V
    return skewed.long()


def apply(graph, codes_SBT):
    keys = torch.stack([graph._edge_keys(codes_BT) for codes_BT in codes_SBT])
    return graph.apply_counts(keys, key=0)


def plain_edges(steps):
    """The K best successors of each code after these steps, with Python's integers."""
    scores = {}
    for codes_SBT in steps:
        scores = {e: s - (s + 63) // 64 for e, s in scores.items()}
        seen = Counter(
            (int(a), int(b))
            for row in codes_SBT.flatten(0, 1)
            for a, b in zip(row[:-1], row[1:], strict=True)
        )
        for edge, times in seen.items():
            scores[edge] = scores.get(edge, 0) + (times << SCORE_SHIFT)
        kept = {}
        for code in range(V):
            ranked = sorted((-s, b) for (a, b), s in scores.items() if a == code and s > 0)
            kept |= {(code, b): -s for s, b in ranked[:EDGES_PER_CODE]}
        scores = kept
    return scores


def edges(graph):
    return {
        (code, int(graph.successor[code, k])): int(graph.score[code, k])
        for code in range(V)
        for k in range(EDGES_PER_CODE)
        if graph.score[code, k]
    }


def test_edges_are_the_best_of_a_plain_count():
    graph, steps = make_graph(), [codes_of(step) for step in range(6)]
    for codes_SBT in steps:
        figures = apply(graph, codes_SBT)
    expected = plain_edges(steps)
    assert len(expected) > 3 * EDGES_PER_CODE and edges(graph) == expected
    assert figures["graph/edges_per_code"] == pytest.approx(len(expected) / V)
    assert 0.5 < figures["graph/pairs_known"] <= 1
    ranked = graph.score.sort(dim=1, descending=True, stable=True).values
    assert torch.equal(ranked, graph.score)


def test_equal_scores_keep_the_lower_codes():
    graph = make_graph()
    rows = [[0, last] for last in (10, 9, 8, 7, 6, 5, 4, 3, 2)]
    apply(graph, torch.tensor([rows]))
    assert graph.successor[0].tolist() == [2, 3, 4, 5, 6, 7, 8, 9]


def test_the_order_of_the_slots_does_not_matter():
    one, other, codes_SBT = make_graph(), make_graph(), codes_of(0)
    apply(one, codes_SBT)
    apply(other, codes_SBT[[2, 0, 1]])
    assert torch.equal(one.successor, other.successor) and torch.equal(one.score, other.score)


def test_an_edge_that_is_not_seen_again_fades_and_a_score_stays_in_int32():
    graph = make_graph()
    apply(graph, torch.tensor([[[1, 2]]]))
    for _ in range(64):
        apply(graph, torch.tensor([[[3, 4]]]))
    assert (1, 2) not in edges(graph) and (3, 4) in edges(graph)
    graph.score[3, 0] = MAX_SCORE
    apply(graph, torch.full((1, 1 << 10, 1 << 9), 3))
    assert edges(graph)[3, 3] > 1 << 24 and graph.score.min() >= 0


def test_rows_do_not_join_at_their_ends():
    graph = make_graph()
    apply(graph, torch.tensor([[[1, 2], [3, 4]]]))
    assert set(edges(graph)) == {(1, 2), (3, 4)}


def test_a_message_is_the_codes_own_features_and_the_weighted_ones_of_its_successors():
    graph = make_graph()
    apply(graph, torch.tensor([[[1, 2], [1, 2], [1, 2], [1, 5]]]))
    features = graph.node_features(torch.arange(V)).float()
    message = graph(torch.tensor([[1, 7]])).float()
    expected = features[1] + 0.75 * features[2] + 0.25 * features[5]
    # Two float32 additions, then bfloat16: half a unit in the last of 8 bits.
    assert (message[0, 0] - expected).abs().max() <= 2.0**-8 * expected.abs().max()
    assert torch.equal(message[0, 1], features[7])


def test_node_features_of_codes_and_successors_get_gradients():
    graph = make_graph()
    apply(graph, torch.tensor([[[1, 2], [1, 5]]]))
    graph(torch.tensor([[1]])).sum().backward()
    rows = graph.node_features.slot_gradient.abs().sum(dim=1).nonzero().flatten().tolist()
    assert rows == [1, 2, 5]
    assert graph.node_features.slot_gradient[2].unique().tolist() == [0.5]
