import math

import pytest
import torch

from fastcl import metrics
from fastcl.metrics import AccuracyMatrix

nan = math.nan
# Worked by hand: task 0 falls 0.9 -> 0.8 -> 0.6, task 1 rises 0.7 -> 0.75.
R = [[0.9, nan, nan], [0.8, 0.7, nan], [0.6, 0.75, 0.5]]


def test_values_worked_by_hand():
    assert metrics.acc(R) == pytest.approx((0.6 + 0.75 + 0.5) / 3)
    assert metrics.acc(R, after=1) == pytest.approx(0.75)
    assert metrics.bwt(R) == pytest.approx((-0.3 + 0.05) / 2)
    assert metrics.bwt(R, after=1) == pytest.approx(-0.1)
    assert metrics.forgetting(R) == pytest.approx((0.3 - 0.05) / 2)
    assert metrics.forgetting(R, after=1) == pytest.approx(0.1)
    assert metrics.bwt(R, after=0) == metrics.forgetting(R, after=0) == 0


def test_forgetting_takes_the_best_and_bwt_the_diagonal():
    rising = [[0.5, nan, nan], [0.9, 0.7, nan], [0.6, 0.7, 0.5]]
    assert metrics.forgetting(rising) == pytest.approx((0.3 + 0.0) / 2)
    assert metrics.bwt(rising) == pytest.approx((0.1 + 0.0) / 2)
    above = [[0.9, 0.95, nan], [0.8, 0.7, nan], [0.6, 0.75, 0.5]]
    assert metrics.forgetting(above) == pytest.approx((0.3 + 0.2) / 2)


def test_the_matrix_object_agrees_and_copies():
    matrix = AccuracyMatrix(3)
    for i in range(3):
        for j in range(i + 1):
            matrix[i, j] = R[i][j]
    assert matrix.tasks == 3
    assert matrix[2, 1] == 0.75
    assert math.isnan(matrix[0, 1])
    assert matrix.acc() == metrics.acc(R)
    assert matrix.bwt(1) == metrics.bwt(R, 1)
    assert matrix.forgetting() == metrics.forgetting(R)
    values = matrix.values
    values.zero_()
    assert matrix[0, 0] == 0.9
    again = AccuracyMatrix.of(R)
    assert torch.equal(again.values.nan_to_num(-1), matrix.values.nan_to_num(-1))
    again[0, 0] = 0.1
    assert R[0][0] == 0.9
    source = matrix.values
    AccuracyMatrix.of(source)[0, 0] = 0.2
    assert source[0, 0] == 0.9


def test_mean_and_std():
    runs = [AccuracyMatrix.of([[v]]) for v in (0.2, 0.4, 0.9)]
    mean, std = metrics.mean_and_std(runs, AccuracyMatrix.acc)
    assert mean == pytest.approx(0.5)
    assert std == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2))
    assert math.isnan(metrics.mean_and_std(runs[:1], AccuracyMatrix.acc)[1])
    with pytest.raises(ValueError, match="matrices is empty"):
        metrics.mean_and_std([], AccuracyMatrix.acc)


def test_csv(tmp_path):
    AccuracyMatrix.of(R).to_csv(tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text().split() == ["after", "task,0,1,2", "0,0.9,,", "1,0.8,0.7,", "2,0.6,0.75,0.5"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0.1, 0.2]], "square"),
        ([], "square"),
        ([0.1], "square"),
        ([[1.5]], "fractions"),
        ([[0.5, nan], [nan, 0.5]], r"R\[1, 0\] was not measured"),
    ],
)
@pytest.mark.parametrize("measure", [metrics.acc, metrics.bwt, metrics.forgetting])
def test_bad_matrices(measure, values, message):
    with pytest.raises(ValueError, match=message):
        measure(values)


def test_bad_indices_and_values():
    with pytest.raises(ValueError, match="after is 3"):
        metrics.acc(R, after=3)
    with pytest.raises(ValueError, match="at least 1"):
        AccuracyMatrix(0)
    with pytest.raises(TypeError, match="whole number"):
        AccuracyMatrix(2.5)
    matrix = AccuracyMatrix(2)
    for value in (-0.1, 1.1, nan, 97):
        with pytest.raises(ValueError, match="fraction"):
            matrix[0, 0] = value
    with pytest.raises(IndexError, match="j is 2"):
        matrix[0, 2] = 0.5
    with pytest.raises(IndexError, match="i is -1"):
        matrix[-1, 0]
    with pytest.raises(TypeError, match="two indices"):
        matrix[0]
    assert bool(matrix.values.isnan().all())


class TestForwardTransfer:
    FULL = ((0.9, 0.3, 0.1), (0.8, 0.7, 0.4), (0.6, 0.75, 0.5))
    BASELINE = (nan, 0.1, 0.15)

    def test_values_worked_by_hand(self):
        assert metrics.fwt(self.FULL, self.BASELINE) == pytest.approx((0.2 + 0.25) / 2)
        assert metrics.fwt(self.FULL, self.BASELINE, after=1) == pytest.approx(0.2)
        assert metrics.fwt(self.FULL, self.BASELINE, after=0) == 0
        assert metrics.fwt(self.FULL, [0.9, 0.4, 0.6]) == pytest.approx((-0.1 - 0.2) / 2)

    def test_the_matrix_object_agrees_and_tensors_do(self):
        matrix, baseline = AccuracyMatrix.of(self.FULL), torch.tensor(self.BASELINE)
        assert matrix.fwt(self.BASELINE) == metrics.fwt(matrix.values, self.BASELINE)
        assert matrix.fwt(baseline, 1) == pytest.approx(0.2)

    @pytest.mark.parametrize(
        ("baseline", "message"),
        [
            ([0.1, 0.1], "one accuracy per task"),
            ([[0.1, 0.1, 0.1]], "one accuracy per task"),
            (0.1, "one accuracy per task"),
            ([0.1, 10, 0.1], "fractions"),
            ([0.1, -0.1, 0.1], "fractions"),
            ([0.1, 0.1, nan], r"baseline\[2\] is NaN"),
        ],
    )
    def test_bad_baselines(self, baseline, message):
        with pytest.raises(ValueError, match=message):
            metrics.fwt(self.FULL, baseline)

    def test_what_was_not_measured(self):
        with pytest.raises(ValueError, match=r"R\[0, 1\] was not measured"):
            metrics.fwt(R, self.BASELINE)
        with pytest.raises(ValueError, match="square"):
            metrics.fwt([[0.1, 0.2]], [0.1])


def test_numbers_that_are_none():
    matrix = AccuracyMatrix.of(R)
    for index, name in (((0.5, 0), "i"), ((0, "1"), "j")):
        with pytest.raises(TypeError, match=f"{name} must be a whole number"):
            matrix[index]
        with pytest.raises(TypeError, match=f"{name} must be a whole number"):
            matrix[index] = 0.5
    for measure in (metrics.acc, metrics.bwt, metrics.forgetting):
        with pytest.raises(TypeError, match="after must be a whole number, got float"):
            measure(R, after=0.5)
    with pytest.raises(ValueError, match="tasks must be at most 10000, got 1000000000000"):
        AccuracyMatrix(10**12)
