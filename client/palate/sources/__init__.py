"""Preference data as the client handles it: where it lies, and how it is made. Its formats are in `palate_recipes.preferences`."""
