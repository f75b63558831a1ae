"""Products of activations with stored weights: the slow truth, and the fast paths held equal to it."""
