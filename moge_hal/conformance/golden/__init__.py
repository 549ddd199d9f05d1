"""Inputs and right outputs of operations in files, for whoever has no oracle.

store.py      a file: write and read
check.py      a backend against a file
shipped.py    the files in cases/
README.md     the format, for a runtime without Python
"""
