"""Training 2:4 masks: SparseForge and what it is measured against share one trainer.

methods.py     who decides which weights stay, and when
gates.py       SparseForge's soft masks: scores, hardening, quenching
curvature.py   diagonals of the Hessian
trainer.py     steps, checkpoints, curves; knows nothing of models
model.py       a transformers model as something to train
run.py         from a model's name to a checkpoint folder that `gammac compile` takes
"""
