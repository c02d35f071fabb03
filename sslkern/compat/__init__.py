"""Stand-ins for the losses of other packages: a file for each, of the name under which the package is imported.

    from sslkern.compat.lightly import NTXentLoss   # was: from lightly.loss import NTXentLoss

Constructor, call, attributes, buffers and errors are the package's, and so are the numbers, quirks included; a
correction is an option of its own, off by default. What the fused loss cannot do is computed as the package does it,
with all similarities in memory, and the first time a warning names it and what to change.
"""
