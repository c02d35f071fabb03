"""All combinations of some choices as the parameters of a test, of which a part runs in CI: one in which any two values
of different choices meet.

    @combinations(ranks=[1, 2], strategy=["ring", "all_gather"])
    def test_a_loss(pool, ranks, strategy): ...

The others are made where long tests run (`make test-distributed`), and only there: to collect them takes time, too.
"""

import itertools
import random

import pytest

combinations = pytest.mark.combinations


def parametrize(metafunc) -> None:
    """What pytest_generate_tests does for a test with that mark."""
    for mark in metafunc.definition.iter_markers("combinations"):
        choices = list(mark.kwargs.values())
        chosen = pairwise(choices) if "not long" in metafunc.config.option.markexpr else set()
        metafunc.parametrize(list(mark.kwargs), [x for x in itertools.product(*choices) if not chosen or x in chosen])


def pairwise(choices: list[list], tries: int = 30) -> set[tuple]:
    """Few combinations, in which any two values of different choices meet: each is made around a pair that has not met
    yet, and is the one of some drawn at random in which most new pairs do. The same in every run."""
    draw = random.Random(0)
    places = list(itertools.combinations(range(len(choices)), 2))
    apart = {(i, j, a, b): None for i, j in places for a in choices[i] for b in choices[j]}  # in order, unlike a set
    found = set()
    while apart:
        i, j, a, b = next(iter(apart))
        candidates = []
        for _ in range(tries):
            values = [draw.choice(of) for of in choices]
            values[i], values[j] = a, b
            candidates.append(tuple(values))
        best = max(candidates, key=lambda values: sum((i, j, values[i], values[j]) in apart for i, j in places))
        found.add(best)
        for i, j in places:
            apart.pop((i, j, best[i], best[j]), None)
    return found or set(itertools.product(*choices))
