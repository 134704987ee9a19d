"""What a spec may ask of a target, as data: what the target cannot do is refused before anything is traced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Abilities:
    """What a target can do beyond running fp32 programs of fixed shapes, which every target does."""

    # Products with int8 weights: computed in int8 with inputs quantized as they come, or in floating point; None: not.
    int8_products: Literal["int8", "float"] | None = None
    int8_rows: bool = False  # rows of int8 tables are looked up

    def __str__(self) -> str:
        products = {None: "no int8 products", "int8": "int8 products", "float": "int8 weights, products in float"}
        return f"{products[self.int8_products]}, {'' if self.int8_rows else 'no '}int8 rows"
