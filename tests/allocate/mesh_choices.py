"""Not a test: allocates many score matrices over meshes and compares with one process; test_mesh.py runs it.

Prints, for every mesh and case, on how many processes the winners, their order and their gradients were the same.
"""

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from apportion.allocate import FeatureChoice, MutualChoice, NofM, Rule, Threshold, TokenChoice, Zipf
from apportion.allocate.mesh import Block, Mesh, allocate_over_mesh, encode_over_mesh
from forked_ranks import on_mesh

MESHES = ((1, 2), (2, 1), (2, 2), (4, 1))


KINDS = ("plain", "many ties", "all equal", "zeros of both signs", "negative", "double", "bfloat16", "huge and tiny")


def scores_of(kind: str, rows: int, columns: int) -> Tensor:
    draw = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    if kind == "many ties":
        return draw.round()
    if kind == "all equal":
        return torch.zeros_like(draw)
    if kind == "zeros of both signs":
        return torch.where(draw > 0, 0.0, -0.0).where(draw.abs() < 1, draw)
    if kind == "negative":
        return -draw.abs() - 1
    if kind == "double":
        # Differences that single precision cannot see.
        return 1 + draw.double() * 1e-12
    if kind == "bfloat16":
        return draw.bfloat16()
    if kind == "huge and tiny":
        return draw * 10.0 ** torch.arange(-38, 38, 76 / columns)[:columns]
    return draw


def cases() -> Iterator[tuple[str, Rule, Tensor]]:
    kinds = (
        "plain",
        "many ties",
        "all equal",
        "zeros of both signs",
        "negative",
        "double",
        "bfloat16",
        "huge and tiny",
    )
    for kind in kinds:
        # 5 rows over 4 processes leave one of them none, 13 columns leave shards of different widths.
        shapes = ((5, 13), (33, 70), (3, 2)) if kind == "many ties" else ((5, 13),)
        for rows, columns in shapes:
            scores = scores_of(kind, rows, columns)
            every: list[Rule] = [
                TokenChoice(2),
                TokenChoice(columns),
                MutualChoice(1.4),
                MutualChoice(0.3),
                FeatureChoice(1.5, profile=Zipf()),
                FeatureChoice(2.0),
                Threshold(torch.linspace(-1, 1, columns)),
            ]
            for rule in every:
                name = type(rule).__name__
                yield f"{kind} {rows}x{columns} {name}({rule.mean_budget(columns)})", rule, scores


def check(mesh: Mesh) -> dict[str, bool]:
    outcome = {}
    for name, rule, scores in cases():
        whole = scores.clone().requires_grad_()
        dense = rule(whole).to_dense()
        dense.sum().backward()
        place = (mesh.shard(scores.shape[0], "data"), mesh.shard(scores.shape[1], "feature"))
        part = scores[place].clone().requires_grad_()
        found = allocate_over_mesh(rule, part, mesh)
        found.to_dense().sum().backward()
        won = torch.zeros(whole.shape, dtype=torch.bool)
        alone = rule(scores)
        won[alone.row_indices(), alone.col_indices] = True
        here = torch.zeros(part.shape, dtype=torch.bool)
        here[found.row_indices(), found.col_indices] = True
        outcome[name] = (
            torch.equal(here, won[place])
            and torch.equal(found.to_dense().detach(), dense.detach()[place])
            and torch.equal(part.grad, whole.grad[place])
            and all(bool((part.diff() > 0).all()) for part in found.col_indices.split(found.winners_per_row().tolist()))
        )
    outcome["blocks of any size"] = uneven(mesh)
    outcome["encoding"] = encoding(mesh)
    try:
        allocate_over_mesh(NofM(2, 4), torch.zeros(4, 4), mesh)
    except TypeError:
        outcome["NofM is refused"] = True
    return outcome


def uneven(mesh: Mesh) -> bool:
    """Blocks need not be those of ``Mesh.shard``: the first has one row and column, the last the rest, others none."""
    scores = scores_of("many ties", 9, 11)

    def bounds(total: int, dimension: str) -> slice:
        place, size = mesh.place(dimension), mesh.size(dimension)
        return slice(0 if place == 0 else 1, total if place == size - 1 else 1)

    place = (bounds(9, "data"), bounds(11, "feature"))
    # A list: every process must come to every collective call, also after it has found a difference.
    same = [
        torch.equal(allocate_over_mesh(rule, scores[place], mesh).to_dense(), rule(scores).to_dense()[place])
        for rule in (TokenChoice(3), MutualChoice(2.5), FeatureChoice(2.5))
    ]
    return all(same)


def encoding(mesh: Mesh) -> bool:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (10, 21))
    bias = torch.randn(21, generator=generator, dtype=torch.float64)
    rows, columns = mesh.shard(10, "data"), mesh.shard(21, "feature")
    block = Block.find(mesh, rows.stop - rows.start, columns.stop - columns.start)
    same = []
    for rule in (TokenChoice(3), MutualChoice(2.5), FeatureChoice(2.5), Threshold(0.2)):
        selection = rule.selection(10, 21)
        whole = selection.encode(x, weight, bias).to_dense()
        part = encode_over_mesh(selection, x[rows], weight[columns], bias[columns], block, mesh).to_dense()
        same.append(torch.allclose(part, whole[rows, columns], rtol=1e-12, atol=0))
    return all(same)


report: dict[str, bool] = {}
for data, feature in MESHES:
    ranks = on_mesh(data, feature, check)
    for case in ranks[0]:
        report[f"{data}x{feature} {case}"] = sum(rank[case] for rank in ranks) == data * feature
print(json.dumps(report))
