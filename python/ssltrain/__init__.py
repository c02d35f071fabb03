"""Reference trainers on top of `sslkern`: self-supervised methods that really learn, on images that fit in memory.

Read `loop.py` for how a run goes and `methods/simclr.py` for a method; the command line is `ssltrain simclr --help`.
"""


class UsageError(ValueError):
    """A mistake that the caller can mend, told in one sentence; the command line prints it without a traceback."""
