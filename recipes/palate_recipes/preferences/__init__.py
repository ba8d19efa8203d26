"""Preference data: files to raw rows, formats to `Row`s, and what is checked on the way. Knows no model and no store.

file ───files───▶ raw rows ──formats──▶ Row ──check──▶ findings
                                            └─▶ write, split, the trainer
"""
