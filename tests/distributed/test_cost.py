import pytest

from sslkern.distributed.cost import DEVICES, SHARE, Problem, by_triangle, choose, cost

GPU = DEVICES["cuda"]


@pytest.mark.parametrize("ranks", [*range(1, 17), 64, 4096])
def test_counts_are_those_of_the_formulas(ranks):
    n, D, b, a, others = 96, 128, 2, 4, ranks - 1
    k, s, d = n * (D * b + 8), n * a, n * D * a
    clip, itself = (Problem(n, D, ranks, itself, b) for itself in (False, True))
    forward, backward, memory = cost("ring", clip, GPU)
    assert forward.moved == others * (k + s) and forward.flop == ranks * 2 * n * n * D
    assert backward.moved == others * (k + 2 * s + d) and backward.flop == 3 * forward.flop
    assert memory == 2 * k + 6 * d + ranks * s
    forward, backward, memory = cost("all_gather", clip, GPU)
    assert forward.moved == others * (k + s) and backward.moved == others * (2 * s + d)
    assert memory == 2 * d + ranks * (k + 2 * d)
    forward, backward, memory = cost("ring", itself, GPU, False)
    assert forward.moved == ranks // 2 * (k + s) and backward.moved == others * (k + 2 * s)
    assert forward.flop == (2 * (ranks // 2) + 1) * n * n * D and backward.flop == 4 * ranks * n * n * D
    assert memory == 3 * k + 2 * d + ranks * s


def test_the_ring_hides_what_it_sends_behind_what_it_computes():
    """And then it is as quick as its products."""
    problem = Problem(8192, 512, 64, False)
    ring, gather = cost("ring", problem, GPU), cost("all_gather", problem, GPU)
    for phase, other in zip(ring[:2], gather[:2], strict=True):
        computing = phase.flop / GPU.flops + problem.size * GPU.launch
        assert phase.exposed < 0.02 * phase.seconds and phase.seconds == pytest.approx(computing, rel=0.02)
        assert other.exposed > 0.2 * other.seconds and other.flop == phase.flop
    slow = GPU._replace(bandwidth=GPU.bandwidth / 100)
    exposed = cost("ring", problem, slow).forward.exposed
    assert exposed > 0.9 * cost("ring", problem, slow).forward.moved / slow.bandwidth


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_a_triangle_backward_is_fewer_flop_and_no_fewer_bytes(ranks):
    n, D = 96, 136
    for b in (2, 4):
        problem = Problem(n, D, ranks, True, b)
        k, s, d = n * (D * b + 8), n * 4, n * D * 4
        (_, owners, less), (_, once, memory) = (cost("ring", problem, GPU, triangular) for triangular in (False, True))
        assert once.moved == ranks // 2 * (k + 2 * s + d) and memory == less + 3 * d
        assert once.flop == 3 * (2 * (ranks // 2) + 1) * n * n * D
        assert once.flop < owners.flop or ranks == 2  # of which one has the whole block of both
        few = problem._replace(features=128)  # for each gradient of a block its scores are computed
        assert cost("ring", few, GPU, True).backward.flop >= cost("ring", few, GPU, False).backward.flop


def test_the_backward_is_a_triangle_where_that_is_quicker_and_fits():
    large = Problem(8192, 512, 64, True)
    assert by_triangle(large, GPU) and cost("ring", large, GPU) == cost("ring", large, GPU, True)
    assert not by_triangle(large._replace(rows=2048), GPU)  # whose gradients take longer to send than their products
    assert not by_triangle(large._replace(rows=65536, features=128), GPU)  # which are no fewer products
    assert not by_triangle(large, GPU._replace(memory=1e8))
    assert by_triangle(Problem(1024, 128, 3, True, 4), DEVICES["cpu"])
    assert not any(by_triangle(Problem(rows, 128, 2, True, 4), DEVICES["cpu"]) for rows in (0, 64, 1024, 65536))


def test_auto_takes_the_quicker_one_and_none_that_does_not_fit():
    assert choose(Problem(64, 128, 8, True), GPU) == "all_gather"  # of which launching 8 blocks is more
    assert choose(Problem(8192, 512, 64, False), GPU) == "ring"
    large = Problem(1024, 512, 4096, False)
    gather, ring = (cost(strategy, large, GPU) for strategy in ("all_gather", "ring"))
    assert gather.seconds < ring.seconds and gather.memory > SHARE * GPU.memory > ring.memory
    assert choose(large, GPU) == "ring"
    assert choose(large, GPU._replace(memory=10 * GPU.memory)) == "all_gather"
    assert choose(Problem(64, 128, 1, True), GPU) == "all_gather"
