"""The fused encode finds the reference's winners without their matrix; without a GPU, under Triton's interpreter."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton (`pip install 'apportion[gpu]'`) to run the CUDA kernels")

from apportion.ops import encode_select
from apportion.ops.encode import composed, cuda, reference
from apportion.ops.encode.reference import Codes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOWS = ["rows", "total", "columns", "above"]
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles, samples and parts so small that small inputs have several, and the fused way always seems to pay."""
    monkeypatch.setattr(cuda, "_tile", lambda dtype: cuda._Tile(16, 16, 16, warps=4, stages=2))
    monkeypatch.setattr(cuda, "_GROUP", 2)
    monkeypatch.setattr(cuda, "_SMALLEST_SAMPLE", 8)
    monkeypatch.setattr(cuda, "_WORTH", 1)
    monkeypatch.setattr(cuda, "_HOPELESS", 1)
    monkeypatch.setattr(cuda, "_SCORED_TOGETHER", 200)


@pytest.fixture
def gave_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the score matrices written during the test."""
    written: list[tuple[int, int]] = []
    matrix = composed.DenseScores.matrix.func

    def watched(scores: composed.DenseScores) -> Tensor:
        written.append((scores.x.shape[0], scores.weight.shape[0]))
        return matrix(scores)

    monkeypatch.setattr(composed.DenseScores, "matrix", property(watched))
    return written


def gaussian(rows: int, columns: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, width), (columns, width), (columns,)
    x, weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x.to(dtype).to(DEVICE), weight.to(dtype).to(DEVICE), bias.to(dtype).to(DEVICE)


def whole_numbers(rows: int, columns: int, width: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Small enough that every product is exact, in bfloat16 too, and so few that most scores tie."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, width), (columns, width), (columns,)
    x, weight, bias = (torch.randint(-2, 3, shape, generator=generator) for shape in shapes)
    return x.to(dtype).to(DEVICE), weight.to(dtype).to(DEVICE), bias.to(dtype).to(DEVICE)


def choice(how: str, x: Tensor, weight: Tensor) -> tuple[int, Tensor | None]:
    """(count, limits)"""
    rows, columns = x.shape[0], weight.shape[0]
    if how == "rows":
        return min(2, columns), None
    if how == "total":
        return rows * 2, None
    if how == "columns":
        return 0, torch.arange(columns, device=DEVICE) % min(3, rows + 1)
    limits = torch.linspace(-2, 6, columns, dtype=x.dtype, device=DEVICE)
    limits[0], limits[-1] = torch.inf, -torch.inf
    return 0, limits


def same_bits(ours: Codes, theirs: Codes) -> bool:
    return all(one.dtype == two.dtype and one.equal(two) for one, two in zip(ours, theirs, strict=True))


SHAPES = [(1, 17, 1), (18, 33, 5), (17, 16, 20), (0, 6, 4)]
MODES = [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)]
TYPES_AND_MODES = [*((torch.float32, *mode) for mode in MODES[1:]), (torch.float64, *MODES[0])]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("rows", "columns", "width"), SHAPES)
def test_ties_and_winners_are_the_references_on_every_shape(rows: int, columns: int, width: int, how: str) -> None:
    inputs = whole_numbers(rows, columns, width)
    chosen = choice(how, *inputs[:2])
    wanted = reference.encode_select(*inputs, how, *chosen)
    assert same_bits(cuda.encode_select(*inputs, how, *chosen, "float32", False), wanted)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("dtype", "precision", "exact"), TYPES_AND_MODES)
def test_ties_and_winners_are_the_references_in_every_mode(
    how: str, dtype: torch.dtype, precision: str, exact: bool
) -> None:
    inputs = whole_numbers(10, 20, 6, dtype)
    chosen = choice(how, *inputs[:2])
    wanted = reference.encode_select(*inputs, how, *chosen)
    assert same_bits(cuda.encode_select(*inputs, how, *chosen, precision, exact), wanted)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_winners_and_values_are_those_of_a_float64_product(how: str, seed: int) -> None:
    inputs = gaussian(9, 17, 19, seed)
    count, limits = choice(how, *inputs[:2])
    crow, col, values = cuda.encode_select(*inputs, how, count, limits, "float32", False)
    x, weight, bias = (each.double() for each in inputs)
    wide_limits = limits.double() if how == "above" and limits is not None else limits
    wanted = reference.encode_select(x, weight, bias, how, count, wide_limits)
    assert crow.equal(wanted[0])
    assert col.equal(wanted[1])
    torch.testing.assert_close(values.double(), wanted[2], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("how", ["rows", "above"])
def test_the_second_look_decides_by_the_full_precision_score(how: str) -> None:
    # In bfloat16 both columns score the same, so that only the second look can tell who is first.
    x = torch.ones(8, 1, device=DEVICE)
    weight = torch.zeros(30, 1, device=DEVICE)
    weight[3], weight[9] = 1.0, 1.0001
    limits = torch.full((30,), 1.00005, device=DEVICE) if how == "above" else None
    _, col, values = cuda.encode_select(x, weight, torch.zeros(30, device=DEVICE), how, 1, limits, "bfloat16", True)
    assert col.tolist() == [9] * 8
    assert values.equal(weight[9].expand(8))


@pytest.mark.parametrize("how", HOWS)
def test_strided_inputs_give_the_same(how: str) -> None:
    x, weight, bias = whole_numbers(6, 20, 6)
    chosen = choice(how, x, weight)
    strided = x.T.contiguous().T, weight.repeat(1, 2)[:, :6], bias.repeat_interleave(2)[::2]
    assert not any(each.is_contiguous() for each in strided)
    wanted = cuda.encode_select(x, weight, bias, how, *chosen, "float32", False)
    assert same_bits(cuda.encode_select(*strided, how, *chosen, "float32", False), wanted)


@pytest.mark.parametrize("how", HOWS)
def test_the_matrix_is_never_written(how: str, gave_up: list[tuple[int, int]]) -> None:
    inputs = gaussian(20, 21, 8)
    cuda.encode_select(*inputs, how, *choice(how, *inputs[:2]), "float32", False)
    assert all(rows <= 8 for rows, _ in gave_up)


@pytest.mark.parametrize("how", ["rows", "columns"])
def test_a_row_or_column_that_the_sample_misjudged_is_scored_in_full(
    how: str, gave_up: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_SMALLEST_SAMPLE", 16)
    monkeypatch.setattr(cuda, "_SCORED_TOGETHER", 2**25)
    few, many, width = 9, 80, 4
    a, b, _ = whole_numbers(few, many, width)
    # Before number 7 the sampled (every fifth) score high and nobody else, so that fewer than 20 reach its cut.
    a[:, 3], b[:, 3] = 0, 0
    a[7, 3], b[::5, 3] = 1, 50
    if how == "rows":
        inputs, count, limits = (a, b, torch.zeros(many, device=DEVICE)), 20, None
    else:
        inputs, count, limits = (b, a, torch.zeros(few, device=DEVICE)), 0, torch.full((few,), 20, device=DEVICE)
    wanted = reference.encode_select(*inputs, how, count, limits)
    assert same_bits(cuda.encode_select(*inputs, how, count, limits, "float32", False), wanted)
    assert gave_up[0] == ((1, many) if how == "rows" else (many, 1))


def test_a_floor_that_too_few_reach_is_lowered() -> None:
    x, weight, bias = whole_numbers(40, 40, 3)
    # All sampled rows score far more than the others, so the first floor is out of reach for anything else.
    x[::5] *= 100
    wanted = reference.encode_select(x, weight, bias, "total", 500, None)
    assert same_bits(cuda.encode_select(x, weight, bias, "total", 500, None, "float32", False), wanted)


@pytest.mark.parametrize("how", HOWS)
def test_where_everything_ties_the_first_win(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_HOPELESS", 8)
    inputs = torch.zeros(9, 4, device=DEVICE), torch.zeros(11, 4, device=DEVICE), torch.ones(11, device=DEVICE)
    chosen = choice(how, *inputs[:2])
    wanted = reference.encode_select(*inputs, how, *chosen)
    assert same_bits(cuda.encode_select(*inputs, how, *chosen, "float32", False), wanted)


def test_exactly_zero_scores_are_not_lost_to_the_second_look() -> None:
    # All norms are zero, so that a score cannot have been rounded and the floor is the winner's score itself.
    inputs = torch.ones(9, 4, device=DEVICE), torch.zeros(33, 4, device=DEVICE), torch.zeros(33, device=DEVICE)
    wanted = reference.encode_select(*inputs, "rows", 2, None)
    assert same_bits(cuda.encode_select(*inputs, "rows", 2, None, "float32", True), wanted)


def test_a_list_that_proves_too_short_is_made_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_SLACK", 0)
    x, weight, bias = whole_numbers(40, 40, 3)
    # The sampled rows (every eighth) win nothing.
    x[::8] = 0
    limits = torch.full((40,), 2.0, device=DEVICE)
    lengths = []
    collect = cuda._run_collect

    def watched(operands: list[Tensor], capacity: int) -> tuple[Tensor, Tensor, int]:
        lengths.append(capacity)
        return collect(operands, capacity)

    monkeypatch.setattr(cuda, "_run_collect", watched)
    wanted = reference.encode_select(x, weight, bias, "above", 0, limits)
    assert same_bits(cuda.encode_select(x, weight, bias, "above", 0, limits, "float32", False), wanted)
    assert lengths[0] < lengths[1] == wanted[1].numel()


@pytest.mark.parametrize("how", HOWS)
def test_too_many_winners_for_a_list_are_found_in_the_matrix(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_HOPELESS", 8)
    inputs = whole_numbers(20, 33, 6)
    count = {"rows": 33, "total": 660}.get(how, 0)
    limits = {"columns": torch.full((33,), 20), "above": torch.full((33,), -torch.inf)}.get(how)
    limits = limits if limits is None else limits.to(DEVICE)
    wanted = reference.encode_select(*inputs, how, count, limits)
    assert same_bits(cuda.encode_select(*inputs, how, count, limits, "float32", False), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_tiles_of_real_use_give_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "_WORTH", 1)
    monkeypatch.setattr(cuda, "_SMALLEST_SAMPLE", 8)
    precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
    inputs = whole_numbers(130, 140, 70, torch.float64 if dtype == torch.float64 else torch.float32)
    limits = torch.full((140,), 30.0, dtype=inputs[0].dtype, device=DEVICE)
    wanted = reference.encode_select(*inputs, "above", 0, limits)
    assert wanted[1].numel() > 100
    assert same_bits(cuda.encode_select(*inputs, "above", 0, limits, precision, False), wanted)


def test_a_way_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="how='best'"):
        cuda.encode_select(*gaussian(3, 4, 2), "best", 1, None, "float32", False)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("precision", "exact"), MODES)
def test_the_op_uses_the_kernel_on_cuda_tensors(
    how: str, precision: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    inputs = whole_numbers(3000, 5000, 96)
    x, weight, _ = inputs
    limits = {"columns": torch.full((5000,), 9), "above": torch.full((5000,), 60.0)}.get(how)
    limits = limits if limits is None else limits.to(DEVICE)
    count = {"rows": 16, "total": 3000 * 16}.get(how, 0)
    wanted = reference.encode_select(*inputs, how, count, limits)
    leaves = [each.clone().requires_grad_() for each in inputs]
    codes = encode_select(*leaves, how, count, limits, precision, exact)
    assert same_bits((codes[0], codes[1], codes[2].detach()), wanted)
    to_x, to_weight, to_bias = torch.autograd.grad(codes[2].sum(), leaves)
    matrix = torch.sparse_csr_tensor(codes[0], codes[1], torch.ones_like(wanted[2]), (3000, 5000)).to_dense()
    torch.testing.assert_close(to_x, matrix @ weight, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(to_weight, matrix.T @ x, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(to_bias, matrix.sum(dim=0))
