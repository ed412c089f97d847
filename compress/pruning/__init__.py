"""Taking pieces out of a model: which ones, what the rest must become, and what the config then says.

choose.py    which pieces of a linear's input can go
refit.py     what the weights of the others become
surgery.py   slicing the tensors of a block
counts.py    how many pieces a target leaves, and the config of the result
"""
