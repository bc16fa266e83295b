from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.cluster import KMeans

from eckart.linalg import LinalgError
from eckart.linalg.kmeans import kmeans_in_groups


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(points: list[torch.Tensor], count: int, seed: int = 0, **options: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return kmeans_in_groups([y @ y.mT for y in points], count, generator, **options)


def objective(points: list[torch.Tensor], labels: list[torch.Tensor]) -> float:
    """By the points themselves, which the function never sees."""
    total = 0.0
    for y, label in zip(points, labels, strict=True):
        for one in label.unique():
            members = y[label == one]
            total += float((members - members.mean(0)).square().sum())
    return total


def best_of_all(points: list[torch.Tensor], count: int) -> float:
    """The smallest objective over every partition with that many clusters in all, none across groups."""
    per_group = []
    for y in points:
        lowest = {}
        for labels in itertools.product(range(len(y)), repeat=len(y)):
            used = len(set(labels))
            lowest[used] = min(lowest.get(used, float("inf")), objective([y], [torch.tensor(labels)]))
        per_group.append(lowest)
    pairs = itertools.product(*(lowest.items() for lowest in per_group))
    return min(sum(cost for _, cost in pair) for pair in pairs if sum(used for used, _ in pair) == count)


@pytest.mark.parametrize("count", [2, 3, 4, 6, 8])
def test_small_problems_are_solved_as_by_trying_everything(count):
    points = [normal(5, 3, seed=1), 0.3 * normal(4, 3, seed=2)]
    labels = run(points, count)
    assert sum(len(label.unique()) for label in labels) == count
    assert objective(points, labels) == pytest.approx(best_of_all(points, count), abs=1e-12)


def test_one_group_is_the_k_means_of_scikit_learn():
    y = normal(60, 2, seed=3) + 4 * normal(5, 2, seed=4).repeat(12, 1)
    theirs = KMeans(5, n_init=20, random_state=0).fit(y.numpy())
    (labels,) = run([y], 5)
    assert objective([y], [labels]) == pytest.approx(theirs.inertia_, rel=1e-9)


def test_the_group_of_near_copies_ends_with_fewer_clusters():
    near, far = normal(1, 6).repeat(4, 1) + 1e-3 * normal(4, 6, seed=5), normal(4, 6, seed=6)
    assert [len(label.unique()) for label in run([near, far], 5)] == [1, 4]


@pytest.mark.parametrize("count", [2, 5, 8])
def test_exact_copies_and_zeros_still_give_the_wanted_number(count):
    points = [torch.zeros(4, 3).double(), normal(1, 3).repeat(4, 1)]
    labels = run(points, count)
    assert sum(len(label.unique()) for label in labels) == count
    assert all(label.min() == 0 and label.max() == len(label.unique()) - 1 for label in labels)


def test_labels_are_numbered_by_their_first_point_and_the_seed_decides():
    points = [normal(9, 4, seed=7)]
    (labels,) = run(points, 4)
    first = [labels.tolist().index(one) for one in range(4)]
    assert first == sorted(first)
    assert torch.equal(run(points, 4)[0], labels)
    # Single starts end in different local minima; many of them in the best.
    single = [objective(points, run(points, 4, seed, restarts=1)) for seed in range(12)]
    assert max(single) > min(single) + 1e-6
    assert objective(points, [labels]) <= min(single) + 1e-12


def test_what_cannot_be_is_refused():
    gram = torch.eye(3)
    for count in (1, 7):
        with pytest.raises(ValueError, match=rf"{count} clusters do not fit: there must be 2 .* to 6"):
            kmeans_in_groups([gram, gram], count, torch.Generator())
    with pytest.raises(LinalgError, match=r"square matrices of finite inner products, got \(2, 3\)"):
        kmeans_in_groups([torch.zeros(2, 3)], 1, torch.Generator())
    with pytest.raises(LinalgError, match="finite"):
        kmeans_in_groups([torch.full((2, 2), torch.nan)], 1, torch.Generator())
