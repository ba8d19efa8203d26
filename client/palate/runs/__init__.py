"""Runs of a store: their records, who runs them, what is left of them. Knows stores, no program and no ML."""
