"""The scores of a run on its validation set: taken by the training itself, or by a follower beside it."""
