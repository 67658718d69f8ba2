"""What replay buffers refuse, and that nothing has changed then."""

import pytest
import torch

from fastcl.data import ClassBalancedBuffer, ReservoirBuffer, TaskBalancedBuffer

ALL = [ReservoirBuffer, ClassBalancedBuffer, TaskBalancedBuffer]


def filled(kind):
    buffer = kind(6, generator=torch.Generator().manual_seed(0))
    buffer.add(torch.arange(8.0).reshape(8, 1), torch.tensor([0, 1] * 4), 0)
    buffer.add(torch.arange(8.0, 12).reshape(4, 1), torch.tensor([0, 1] * 2), 1)
    return buffer


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.zeros(1), 0), TypeError, "x must be a tensor, got list"),
        ((torch.zeros(1, 1), [0], 0), TypeError, "y must be a tensor, got list"),
        ((torch.zeros(()), torch.zeros(1).long(), 0), ValueError, "x must be a batch"),
        ((torch.zeros(2, 1), torch.zeros(1).long(), 0), ValueError, "x has 2 samples and y has 1"),
        (
            (torch.zeros(1, 2), torch.zeros(1).long(), 0),
            ValueError,
            r"x must have samples of shape \(1,\) as the samples before, got \(2,\)",
        ),
        ((torch.zeros(1, 1).double(), torch.zeros(1).long(), 0), ValueError, "x must have dtype torch.float32 .* got torch.float64"),
        ((torch.zeros(1, 1, device="meta"), torch.zeros(1).long(), 0), ValueError, "x must have device cpu"),
        ((torch.zeros(1, 1), torch.zeros(1, 1).long(), 0), ValueError, "y must have samples of shape"),
        ((torch.zeros(1, 1), torch.zeros(1), 0), ValueError, "y must have dtype"),
        ((torch.zeros(1, 1), torch.zeros(1).long(), -1), ValueError, "task must be at least 0, got -1"),
        ((torch.zeros(1, 1), torch.zeros(1).long(), 2**63), ValueError, "task must be at most 9223372036854775807"),
        ((torch.ones(1, 1).to_sparse(), torch.zeros(1).long(), 2), ValueError, "x must be a dense tensor .* got layout torch.sparse_coo"),
        ((torch.zeros(1, 1), torch.ones(1).long().to_sparse(), 2), ValueError, "y must be a dense tensor"),
        ((torch.zeros(1, 1), torch.zeros(1).long(), 1.0), TypeError, "task must be a whole number, got float"),
        ((torch.zeros(1, 1), torch.zeros(1).long(), True), TypeError, "task must be a whole number, got bool"),
    ],
)
def test_add(kind, arguments, error, message):
    buffer = filled(kind)
    before = buffer.state_dict()
    with pytest.raises(error, match=message):
        buffer.add(*arguments)
    assert same(before, buffer.state_dict())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 1, device="meta"), "x must hold values, got a tensor of"),
        (torch.ones(1, 1).to_sparse(), "x must be a dense"),
    ],
)
def test_the_first_batch(kind, x, message):
    buffer = kind(6)
    with pytest.raises(ValueError, match=message):
        buffer.add(x, torch.zeros(1).long(), 0)
    buffer.add(torch.zeros(1, 1), torch.zeros(1).long(), 0)
    assert len(buffer) == buffer.seen == 1


@pytest.mark.parametrize("kind", ALL)
def test_other_arguments(kind):
    for capacity, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="capacity must be"):
            kind(capacity)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got int"):
        kind(5, generator=0)
    with pytest.raises(ValueError, match="the buffer is empty"):
        kind(5).sample(1)
    buffer = filled(kind)
    for n, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="n must be"):
            buffer.sample(n)
    with pytest.raises(ValueError, match=r"k is 2, and no sample of that task is stored; stored are tasks \[0, 1\]"):
        buffer.of_task(2)
    for loader, got in (([torch.zeros(2)], "Tensor"), ([(torch.zeros(2),)], "1 parts")):
        with pytest.raises(TypeError, match=rf"loader must yield pairs \(x, y\), got {got}"):
            buffer.add_task(loader, 0)


def test_more_groups_than_room():
    by_class = ClassBalancedBuffer(3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="capacity is 3, too small for the 4 classes seen"):
        by_class.add(torch.zeros(4, 2), torch.arange(4), 0)
    assert len(by_class) == by_class.seen == 0
    by_class.add(torch.zeros(3, 1), torch.arange(3), 0)  # the refused batch has left no shape behind
    before = by_class.state_dict()
    with pytest.raises(ValueError, match="4 classes seen"):
        by_class.add(torch.zeros(1, 1), torch.tensor([9]), 1)
    assert same(before, by_class.state_dict())
    by_task = TaskBalancedBuffer(1)
    by_task.add(torch.zeros(1, 1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="capacity is 1, too small for the 2 tasks seen"):
        by_task.add(torch.zeros(1, 1), torch.zeros(1), 1)


@pytest.mark.parametrize("y", [torch.zeros(2), torch.zeros(2, 1).long(), torch.zeros(2, dtype=torch.complex64)])
def test_targets_that_are_no_classes(y):
    with pytest.raises(ValueError, match=r"y must be class labels, integers of shape \[n\]"):
        ClassBalancedBuffer(4).add(torch.zeros(2, 1), y, 0)


CHANGES = [
    (lambda s: s.pop("seen"), ValueError, r"missing \['seen'\], unknown \[\]"),
    (lambda s: s.update(extra=1), ValueError, r"unknown \['extra'\]"),
    (lambda s: s.update(seen=torch.tensor(12)), TypeError, r"state\['seen'\] must be of type int, got Tensor"),
    (lambda s: s.update(seen=True), TypeError, "got bool"),
    (lambda s: s.update(x=[1.0]), TypeError, r"state\['x'\] must be of type Tensor, got list"),
    (lambda s: s.update(capacity=7), ValueError, "buffer of capacity 7; this one has 6"),
    (lambda s: s.update(x=torch.zeros(())), ValueError, r"state\['x'\] must be \[n, \.\.\.\]"),
    (lambda s: s.update(y=s["y"][1:]), ValueError, "state holds 6 x and 5 y of 12 seen"),
    (lambda s: s.update(task=s["task"].float()), ValueError, r"state\['task'\] must be torch.int64 of shape \(6,\), got torch.float32"),
    (lambda s: s.update(task=s["task"] - 5), ValueError, "negative numbers"),
    (lambda s: s.update(x=s["x"].to("meta")), ValueError, r"state\['x'\] must hold values"),
    (lambda s: s.update(x=s["x"].to_sparse()), ValueError, r"state\['x'\] must be a dense tensor"),
    (lambda s: s.update(task=s["task"].to("meta")), ValueError, r"state\['task'\] must hold values"),
    (lambda s: s.update(seen=5), ValueError, "6 y of 5 seen"),
    (lambda s: s.update(seen=-1), ValueError, "of -1 seen"),
    (lambda s: s.update(generator=torch.zeros(3, dtype=torch.uint8)), ValueError, r"state\['generator'\] is no state of a CPU generator"),
    (lambda s: s.update(generator=torch.zeros(3)), ValueError, r"state\['generator'\] is no state"),
]
BALANCED = [
    (lambda s: s.update(counts=s["counts"] + 1), "add up to state"),
    (lambda s: s.update(group=s["group"] + 1), "must be row numbers"),
    (lambda s: s.update(group=s["group"] * 0), "does not hold as many samples of each group"),
    (lambda s: s.update(priority=s["priority"][1:]), r"state\['priority'\] must be torch.int64 of shape \(6,\)"),
    (lambda s: s.update(seen=13), "add up to state"),
]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(("change", "error", "message"), CHANGES)
def test_a_bad_state_changes_nothing(kind, change, error, message):
    buffer, other = filled(kind), filled(kind)
    buffer.sample(3)
    state = other.state_dict()
    change(state)
    check_refused(buffer, state, error, message)


@pytest.mark.parametrize("kind", [ClassBalancedBuffer, TaskBalancedBuffer])
@pytest.mark.parametrize(("change", "message"), BALANCED)
def test_a_bad_state_of_groups_changes_nothing(kind, change, message):
    buffer = filled(kind)
    state = filled(kind).state_dict()
    change(state)
    check_refused(buffer, state, ValueError, message)


@pytest.mark.parametrize("kind", [ClassBalancedBuffer, TaskBalancedBuffer])
def test_keys_of_groups(kind):
    state = filled(kind).state_dict()
    name = kind.GROUPS
    check_refused(filled(kind), state | {name: state[name][:, 0]}, ValueError, rf"state\['{name}'\] must be torch.int64 of shape \(2, 1\)")
    check_refused(filled(kind), state | {name: state[name] * 0}, ValueError, "must differ")


def test_samples_that_contradict_their_groups():
    for kind in (TaskBalancedBuffer, lambda *a, **k: ClassBalancedBuffer(*a, per_task=True, **k)):
        state = filled(kind).state_dict()
        check_refused(filled(kind), state | {"task": 1 - state["task"]}, ValueError, r"state\['task'\] contradicts state\['group'\]")
    state = filled(ClassBalancedBuffer).state_dict()
    check_refused(filled(ClassBalancedBuffer), state | {"y": 1 - state["y"]}, ValueError, r"state\['y'\] contradicts")
    check_refused(filled(ClassBalancedBuffer), state | {"y": state["y"].float()}, ValueError, r"state\['y'\] must be class labels")


def test_states_of_other_buffers_and_a_hole_in_a_reservoir():
    states = [filled(kind).state_dict() for kind in ALL]
    for i, kind in enumerate(ALL):
        for j, state in enumerate(states):
            if i != j:
                check_refused(filled(kind), state, ValueError, f"state is not that of a {kind.__name__}")
    check_refused(ClassBalancedBuffer(6, per_task=True), states[1], ValueError, r"state\['classes'\] must be torch.int64 of shape \(2, 2\)")
    short = {k: v[:5] if k in ("x", "y", "task") else v for k, v in states[0].items()}
    check_refused(filled(ReservoirBuffer), short, ValueError, "a reservoir of 6 that saw 12 is fuller")
    check_refused(filled(ReservoirBuffer), [1], TypeError, "state must be a mapping, got list")


def check_refused(buffer, state, error, message) -> None:
    before = buffer.state_dict()
    with pytest.raises(error, match=message):
        buffer.load_state_dict(state)
    assert same(before, buffer.state_dict())
