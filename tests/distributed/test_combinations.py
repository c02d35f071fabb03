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


@combinations(**CHOICES)
def test_they_are_the_parameters_of_a_test(ranks, rows, loss, learns, request):
    values = ranks, rows, loss, learns
    quick = values in pairwise(list(CHOICES.values()))
    assert quick or "not long" not in request.config.option.markexpr
