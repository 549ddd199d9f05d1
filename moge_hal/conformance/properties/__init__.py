"""What a backend must keep. A property takes a `Subject` and a `Case`, gives a `Verdict` or raises
`Failure`, and says which real failures it guards against.

operations.py            every operation: values, routes, rows, NaN, repetition, expert parallelism
caching.py               attention over a cache
gradients.py, training.py    gradients of an operation; a training step of a whole model
whole_model.py, scenes.py    whole models, through their steps alone; what is played
bitwise.py               the profile bitwise: a row's bits do not depend on the rows beside it
capture.py, faking.py    the profile capture: a step could be recorded
"""
