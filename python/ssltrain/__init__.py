"""Reference trainers on top of `sslkern`: self-supervised methods that really learn, on data that fits in memory.

Read `runs.py` and `loop.py` for how a run goes, `methods/simclr.py` for a method, `config.py` for the options; the
command line is `ssltrain --help`.
"""


class UsageError(ValueError):
    """A mistake that the caller can mend, told in one sentence; the command line prints it without a traceback."""
