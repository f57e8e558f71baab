"""Error laws: their forms, how they are fitted, how good they are, and what they say of options not swept."""
