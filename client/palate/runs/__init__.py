"""Runs in a store: records, leases, lists, cleanup. Knows stores, no program and no ML."""
