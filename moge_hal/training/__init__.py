"""Pre-training, from a text to a folder that every backend runs: `moge_hal.training.train.train`.

data.py    corpora, the held-out part, batches      bpe.py     a tokenizer from text
init.py    the first weights                        ngram.py   a baseline to be better than
train.py   the loop                                 state.py   what a resume goes on from
log.py     what a run leaves for people to read
"""
