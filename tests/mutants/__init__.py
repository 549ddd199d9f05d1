"""Backends that are wrong on purpose, one fault each, many of them faults that real implementations
had.

`table.py` names the case that must reject each. To see one fail by hand:

    PYTHONPATH=tests moge-hal conformance --backend mutants.routing:GlobalTopK --filter 'route/*'
"""
