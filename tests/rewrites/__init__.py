"""Backends that are right in another way. No limit may reject one of them, whatever the seed.

`table.py` says which cases show how each of them differs.
"""
