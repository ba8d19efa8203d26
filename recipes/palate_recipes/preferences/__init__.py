"""Preference data: containers to raw rows, formats to `Row`s, and what is checked on the way. Knows no model and no store.

file ──containers──▶ raw rows ──formats──▶ Row ──lint──▶ findings
                                            └─▶ write, split, the trainer
"""
