"""Training the classifiers: recipes, the loop and its checkpoints.

Nothing but a `train` request needs this package; it imports torch.
"""
