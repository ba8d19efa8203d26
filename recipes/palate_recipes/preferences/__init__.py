"""Preference data: reads files to raw rows, formats to `Row`s, and checks them. Knows no model and no store.

file ───files───▶ raw rows ──formats──▶ Row ──check──▶ findings
                                            └─▶ write, split, the trainer
"""
