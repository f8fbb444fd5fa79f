"""Learning 2:4 masks: SparseForge and what it is measured against share one trainer.

methods.py     who decides which weights stay, and when
gates.py       SparseForge's soft masks: scores, hardening, quenching
curvature.py   diagonals of the Hessian
trainer.py     steps, checkpoints, curves; knows nothing of models

`gammac sparsify` trains whole models with them, the pass `sparsify` one block after the other.
"""
