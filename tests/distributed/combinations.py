"""All combinations of some choices as the parameters of a test, of which a part runs in CI: one in which any two values
of different choices meet."""

import itertools
import random

import pytest


def combinations(**choices):
    """A decorator: `@combinations(ranks=[1, 2], strategy=["ring", "all_gather"])`. What is not needed for pairs to meet
    is a long test, which `make test-distributed` runs."""
    quick = pairwise(list(choices.values()))
    params = [
        pytest.param(*values, marks=() if values in quick else pytest.mark.long)
        for values in itertools.product(*choices.values())
    ]
    return pytest.mark.parametrize(list(choices), params)


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
