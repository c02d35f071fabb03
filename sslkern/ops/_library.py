import torch

library = torch.library.Library("sslkern", "DEF")


def define(schema: str, kernel, fake) -> None:
    """Registers an op that runs `kernel` on every device and whose output shapes `fake` computes."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sslkern::{name}", fake, lib=library)
