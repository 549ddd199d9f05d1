"""From a wrong model to the operation that is wrong in it.

bisect.py       the search, from a backend to what is said of it
playlist.py     what is played
locating.py     from a scene that fails to the call that makes it so
recording.py    the calls of a backend in its real run
replaying.py    the same for a graph, call by call
evidence.py     the judgement of a call
finding.py      what was found, and how to replay it
"""
