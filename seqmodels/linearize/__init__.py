"""Pretrained softmax transformers into linear-time models.

    layer_trees.py   parameters as a list of layers, whatever way a model stacks them
    students.py      which layers become which mixer; what a student's mixer takes from the
      teacher's
    lora.py          low-rank adapters as a transform of parameters
    partition.py     which parameters are trained, by pattern
    transfer.py      teacher and student layer by layer in one pass
    objectives.py    the losses: transfer, cross-entropy, KL, the choice of layers

`python -m experiments.linearize` runs the stages of a config with these.
"""
