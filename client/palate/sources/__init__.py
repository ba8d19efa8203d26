"""Finds preference data and fetches it to this machine. Knows locations; the formats are in `palate_recipes.preferences`."""
