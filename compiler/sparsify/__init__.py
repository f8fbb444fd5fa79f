"""`gammac sparsify`: a whole model trained into 2:4 masks by what passes/masks offers.

model.py       a transformers model as something to train
run.py         from a model's name to a checkpoint folder that `gammac compile` takes
"""
