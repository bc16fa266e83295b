"""Evolutionary search: one candidate for every layer, the best total score, the costs within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from ..models.progress import track

__all__ = ["Choice", "Found", "Search", "evolve", "random_choice", "repaired"]

#: The number of the chosen candidate of every layer.
Choice = tuple[int, ...]


@dataclass(frozen=True)
class Search:
    """How long to search.

    Attributes:
        population: children of a generation, half of them mutants and half crossovers.
        parents: how many survive.
        generations: how often.
        mutation: probability that a mutant draws a layer's candidate again.
        seed: of the random numbers.
    """

    population: int = 100
    parents: int = 25
    generations: int = 20
    mutation: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """The best choice, its score, and how many different choices were scored for it."""

    choice: Choice
    score: float
    scored: int


def repaired(choice: Choice, costs: Sequence[Sequence[int]], budget: float, random: Random) -> Choice:
    """The choice with random layers made cheaper until it fits; the cheapest candidates together must fit.

    Example:
        >>> repaired((1, 1), [[1, 5], [2, 7]], 3, Random(0))
        (0, 0)
    """
    genes = list(choice)
    while sum(layer[gene] for layer, gene in zip(costs, genes, strict=True)) > budget:
        cheaper = {
            place: [other for other, cost in enumerate(layer) if cost < layer[genes[place]]]
            for place, layer in enumerate(costs)
        }
        place = random.choice([place for place, others in cheaper.items() if others])
        genes[place] = random.choice(cheaper[place])
    return tuple(genes)


def random_choice(costs: Sequence[Sequence[int]], budget: float, random: Random) -> Choice:
    """A random choice within the budget."""
    return repaired(tuple(random.randrange(len(layer)) for layer in costs), costs, budget, random)


def evolve(
    costs: Sequence[Sequence[int]],
    budget: float,
    score: Callable[[Choice], float],
    search: Search,
    starts: Iterable[Choice] = (),
    *,
    progress: bool = False,
) -> Found:
    """The best choice that is found within the budget. The best never dies, so more generations are never worse.

    Args:
        costs: of every candidate of every layer.
        budget: of all layers together; at least the sum of the smallest costs.
        score: larger is better; asked once for every choice.
        search: how long.
        starts: choices to begin with, besides random ones; those over the budget are made cheaper.
        progress: show a bar.

    Example:
        >>> found = evolve([[1, 2, 3]] * 3, 6, lambda c: 10 * c[0] + c[1] - c[2], Search(20, 5, 10))
        >>> found.choice
        (2, 1, 0)
    """
    random = Random(search.seed)
    scores: dict[Choice, float] = {}

    def best(choices: Iterable[Choice]) -> list[Choice]:
        for choice in choices:
            if choice not in scores:
                scores[choice] = score(choice)
        # The choice itself decides between equal scores, so that the order of a set does not.
        return sorted(set(choices), key=lambda choice: (-scores[choice], choice))[: search.parents]

    population = [repaired(start, costs, budget, random) for start in starts]
    population += [random_choice(costs, budget, random) for _ in range(search.population - len(population))]
    parents = best(population)
    for _ in track(range(search.generations), "search", enabled=progress):
        children = []
        for index in range(search.population):
            genes = list(random.choice(parents))
            other = random.choice(parents)
            for place, layer in enumerate(costs):
                if index % 2 == 0 and random.random() < search.mutation:
                    genes[place] = random.randrange(len(layer))
                elif index % 2 == 1 and random.random() < 0.5:
                    genes[place] = other[place]
            children.append(repaired(tuple(genes), costs, budget, random))
        parents = best([*parents, *children])
    return Found(parents[0], scores[parents[0]], len(scores))
