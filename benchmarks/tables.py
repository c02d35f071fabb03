"""How the pages of results show tables and numbers."""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |" for cells in lines) + "\n"


def number(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def of_unit(figures: dict, key: str, unit: float) -> str:
    """A figure that may be missing."""
    return number(figures[key] / unit) if key in figures else ""
