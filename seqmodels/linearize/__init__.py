"""Turns softmax transformers, of any architecture, into linear-time models.

    layer_trees.py   parameters as a list of layers, however a model stacks them
    batches.py       any architecture's model on a batch
    students.py      which layers become which mixer, and a new mixer's first parameters
    inherit.py       a teacher's parameters in a student by rule, such as "all but attention"
    lora.py          low-rank adapters as a transform of parameters
    partition.py     which parameters are trained, by patterns
    transfer.py      teacher and student layer by layer in one pass
    objectives.py    the losses: transfer, cross-entropy, KL, denoisers', the choice of layers
    ensembles.py     the loss of a student that is added to an ensemble

`python -m experiments.linearize` runs the stages of a config with these.
"""
