import itertools

from .combinations import combinations, pairwise

CHOICES = dict(ranks=[1, 2, 3, 5, 8], rows=["even", "uneven", "empty"], loss=list("abcdefg"), learns=[True, False])


def test_any_two_values_meet_in_few_combinations():
    found = pairwise(list(CHOICES.values()))
    for i, j in itertools.combinations(range(len(CHOICES)), 2):
        of = list(CHOICES.values())
        assert {(x[i], x[j]) for x in found} == set(itertools.product(of[i], of[j]))
    assert 35 <= len(found) <= 38 and found == pairwise(list(CHOICES.values()))
    assert pairwise([[1, 2]]) == {(1,), (2,)}


def test_the_others_are_long():
    mark = combinations(**CHOICES).mark
    names, params = mark.args
    assert names == list(CHOICES) and len(params) == 5 * 3 * 7 * 2
    quick = {param.values for param in params if not param.marks}
    assert quick == pairwise(list(CHOICES.values()))
    assert {mark.name for param in params for mark in param.marks} == {"long"}
