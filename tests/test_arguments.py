"""Each argument of all that is exported, in turn None or of a wrong type: refused in a sentence that names it."""

import re

import pytest
import torch

from .fuzz import NAMES, valid_call

WRONG = {"None": None, "object": object(), "list": [None], "4-d": torch.zeros(2, 3, 4, 5)}
ALLOWED = {  # of any shape, or None is a way to leave it out
    ("clamp_logit_scale_", "log_scale", "4-d"),
    ("clamp_logit_scale_", "max", "None"),
    ("clip", "logit_scale", "None"),
    ("logsumexp", "x", "4-d"),
    ("similarity_softplus", "bias", "None"),
}
CALLED = {"use_backend name": "backend", "MatryoshkaLoss loss": "loss_fn"}  # what a message calls an argument


@pytest.mark.parametrize("name", [name for name in NAMES if ":" not in name])
def test_what_is_wrong_is_named(name):
    call = valid_call(name, 4, 4, torch.float32, 0)
    for where, argument in call.slots():
        if argument == call.positional():  # features, whose names are those of the loss
            continue
        for kind, value in WRONG.items():
            if value is call.default((where, argument)) or (name, argument, kind) in ALLOWED:
                continue
            changed = valid_call(name, 4, 4, torch.float32, 0)
            getattr(changed, where)[argument] = value
            with pytest.raises((ValueError, TypeError, NotImplementedError)) as error:
                thing = changed.build(torch.float32, False)
                assert where == "args", f"{argument} {kind} is refused at the call only"
                changed.run(thing)
            said = str(error.value)
            called = CALLED.get(f"{name} {argument}", argument)
            assert re.search(rf"\b{called}\b", said) and "\n" not in said, f"{argument} {kind}: {said!r}"
