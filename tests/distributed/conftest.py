import pytest

from .combinations import parametrize
from .pool import Pool


def pytest_generate_tests(metafunc):
    parametrize(metafunc)


@pytest.fixture(scope="session")
def pool():
    """Eight processes. Tests of one folder run in one process of pytest as long as another has something else to do
    (worksteal gives each a stretch of the tests, these first), so that there is about one pool at a time."""
    pool = Pool()
    yield pool
    pool.close()
