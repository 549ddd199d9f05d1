"""Backends that are wrong on purpose, one fault each, most of them faults that real implementations
had.

`test_mutants.py` names the property that must reject each. To see one fail by hand:

    PYTHONPATH=tests moge-hal conformance --backend mutants.routing:GlobalTopK --filter 'route/*'
"""
